"""Every error that specrag raises on purpose, so that a caller can catch them by kind."""


class SpecRAGError(Exception):
    """Base of all errors raised by specrag."""


class InvalidInputError(SpecRAGError, ValueError):
    """An argument or an input cannot be used; the message says what was given and what to do."""


class ModelNotFoundError(SpecRAGError, FileNotFoundError):
    """A model path, a bundled model or an index is not where it was looked for."""


class ModelError(SpecRAGError, RuntimeError):
    """A model or its server failed while generating or scoring."""


class ServerError(ModelError):
    """An OpenAI-compatible server could not be reached or refused a request."""


class LogProbsUnavailableError(ModelError):
    """The backend cannot return the log-probabilities that were asked for."""


class DraftingError(ModelError):
    """No draft could be made: every drafter call failed."""
