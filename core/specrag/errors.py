"""Every error that specrag raises on purpose. A caller can catch them all, or one kind."""


class SpecRAGError(Exception):
    """Base of all errors that specrag raises."""


class InvalidInputError(SpecRAGError, ValueError):
    """An argument or an input cannot be used; the message says what was given and what to do."""


class NotFoundError(SpecRAGError, FileNotFoundError):
    """Something that was named, a document, an index or a saved session, is not where it was looked for."""


class ModelNotFoundError(NotFoundError):
    """A model, a tokenizer or an adapter is not where it was looked for, or cannot be loaded from there."""


class MissingExtraError(SpecRAGError, ImportError):
    """A package that an extra of specrag installs is needed here; the message holds the command that installs it."""


class ModelError(SpecRAGError, RuntimeError):
    """A model or its server failed while it generated, scored or embedded, or needs more memory than is free."""


class ServerError(ModelError):
    """An OpenAI-compatible server could not be reached, refused a request, or gave a reply that cannot be used."""


class ServerBusyError(ServerError):
    """Too many requests wait for the servers: requests come faster than the servers answer."""


class LogProbsUnavailableError(ModelError):
    """The backend cannot return the log-probabilities that were asked for."""


class DraftingError(ModelError):
    """No draft could be made: every call of the drafter failed."""


def kind_of(value: object) -> str:
    """The type of ``value`` for a message: its first class without an underscore, which a reader can look up.

    ``None`` is called so.
    """
    return (
        "None"
        if value is None
        else next(kind.__name__ for kind in type(value).__mro__ if not kind.__name__.startswith("_"))
    )


def a(value: object) -> str:
    """The type of ``value`` with its article, where it has one: "an int", "an LLM", "a UUID", "bytes", "None"."""
    noun = kind_of(value)
    if value is None or isinstance(value, bytes):
        return noun
    if noun[:2].isupper():  # the letters are read one by one
        return f"an {noun}" if noun[0] in "AEFHILMNORSX" else f"a {noun}"
    vowel = noun[0].lower() in "aeiou" and noun[:3].lower() not in ("uni", "use", "uti")
    return f"an {noun}" if vowel else f"a {noun}"


def described(error: BaseException) -> str:
    """``error`` for a message: its type, and what it says where it says anything."""
    return f"{kind_of(error)}: {error}" if str(error) else kind_of(error)


def said(error: BaseException) -> str:
    """What ``error`` says; its type where it says nothing."""
    return str(error) or kind_of(error)
