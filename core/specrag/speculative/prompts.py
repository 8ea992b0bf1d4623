"""Every prompt of Speculative RAG, as data.

A user replaces prompts with a ``Prompts`` value. Passages are shown in numbered blocks. When a passage contains
something that looks like a delimiter, all delimiters get a mark that no passage contains, so no passage can end its
block.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from specrag.errors import InvalidInputError
from specrag.models.base import LanguageModel
from specrag.schema import Draft, Passage
from specrag.text import passage_text

#: The statements R of the paper's Table 7. Each is answered with "Yes" when the draft is to be trusted.
SELF_REFLECTION_STATEMENTS: tuple[str, ...] = (
    "Do you think the explanation supports the answers? (Yes or No)",
    "Does the rationale support the answer? (Yes or No)",
    "What do you think about the rationale? A good one? (Yes or No)",
    "Is the rationale good enough to support the answer? (Yes or No)",
)

#: The fields of ``Prompts`` that a drafter is trained with. With other values it drafts badly.
DRAFTING_FIELDS = ("draft", "examples", "rationale_header", "answer_header", "abstention")
#: The fields that a pointwise verifier sees.
VERIFYING_FIELDS = ("verify", "verify_with_passages", "statement", "affirmation")
#: What comes before a drafter's verdict when it is trained to give one. It is short: a drafter reads it token by token.
VERDICT_HEADER = "Right:"
#: What a drafter that was trained to judge its drafts says behind a right one, and behind a wrong one.
RIGHT, WRONG = "Yes", "No"
_DRAFTING_FILE = "prompts.json"


@dataclass(frozen=True)
class Prompts:
    """The texts that the models see. Placeholders are in braces; the list below names those of each field.

    Attributes:
        draft: The drafter's turn ({passages}, {question}, and {abstention} where the drafter is told the marker).
        examples: Earlier turns that the drafter sees, each a pair: what it is asked, and what it replies.
        free_format: Added to the drafter's turn where a server cannot begin the reply with the header.
        rationale_header, answer_header: What comes before β and α, in drafts and in verification.
        abstention: The marker: what a drafter writes as its answer when the passages do not answer.
        verdict_header: Comes after the answer where the drafter was trained to say "Yes" or "No" there: whether the
            answer is right (``specrag train --verdict``). ``None``: it is not asked. In a pipeline, a drafter with a
            file of prompts beside its weights keeps its own; this one is for drafters on servers.
        verify: Q as the verifier sees it ({question}).
        verify_with_passages: Q with passages beside or in place of the rationale ({passages}, {question}).
        statement: R, the self-reflection statement.
        affirmation: The answer to R that is scored.
        listwise: Asks which of several candidate answers is right ({question}, {candidates}).
        candidate: One candidate ({label}, {answer}); its evidence follows in ``candidate_evidence`` ({evidence}), where
            it has any.
        none_of_these: The last candidate.
        standard: Standard RAG, answer only ({passages}, {question}).
        synthesis: Asks a strong LM for the rationale of a known answer ({passages}, {question}, {answer}).
        questions: Asks a strong LM for questions that a passage answers, with their answers ({passages}).

    Raises:
        InvalidInputError: A text is empty, or a placeholder is missing or unknown.
    """

    draft: str = (
        "Read the passages and answer the question. First give the rationale: one sentence with the evidence "
        "from the passages. Then give the answer in a few words. If the passages do not answer the question, "
        "the answer is: {abstention}.\n\nQuestion: {question}\n\n{passages}\n\nQuestion: {question}"
    )
    examples: tuple[tuple[str, str], ...] = ()
    free_format: str = "Reply in two lines, the first beginning with 'Rationale:', the second with 'Answer:'."
    rationale_header: str = "Rationale:"
    answer_header: str = "Answer:"
    abstention: str = "not in the passages"
    verdict_header: str | None = None
    verify: str = "Question: {question}"
    verify_with_passages: str = "{passages}\n\nQuestion: {question}"
    statement: str = SELF_REFLECTION_STATEMENTS[0]
    affirmation: str = "Yes"
    listwise: str = (
        "Question: {question}\n\nCandidate answers, each with its evidence:\n{candidates}\n\n"
        "Which candidate answers the question? Reply with its letter only."
    )
    candidate: str = "{label}. {answer}"
    candidate_evidence: str = " ({evidence})"
    none_of_these: str = "None of these"
    standard: str = "Read the passages and answer the question in a few words.\n\n{passages}\n\nQuestion: {question}"
    synthesis: str = (
        "{passages}\n\nQuestion: {question}\nAnswer: {answer}\n\n"
        "Write one sentence that states the evidence in the passages for this answer."
    )
    questions: str = (
        "Write questions that the passage answers, as somebody types them who does not have it: each names what it is "
        "about. Behind each stands its answer, copied from the passage: a name, a date, a number, or a few words.\n\n"
        "[1] Eiffel Tower: The Eiffel Tower was designed by Maurice Koechlin and completed in March 1889. [/1]\n"
        "Question: who designed the eiffel tower\nAnswer: Maurice Koechlin\n"
        "Question: when was the eiffel tower finished\nAnswer: March 1889\n\n{passages}"
    )

    def __post_init__(self) -> None:
        allowed = {
            "draft": {"passages", "question", "abstention"},
            "verify": {"question"},
            "verify_with_passages": {"passages", "question"},
            "listwise": {"question", "candidates"},
            "candidate": {"label", "answer"},
            "candidate_evidence": {"evidence"},
            "standard": {"passages", "question"},
            "synthesis": {"passages", "question", "answer"},
            "questions": {"passages"},
        }
        for field in fields(self):
            if field.name == "examples":
                continue
            text = getattr(self, field.name)
            if field.name == "verdict_header" and text is None:
                continue
            if not isinstance(text, str) or not text.strip():
                raise InvalidInputError(f"Prompts.{field.name} must be a text that is not empty")
            if field.name not in allowed:
                continue
            try:
                named = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
            except ValueError as error:
                raise InvalidInputError(
                    f"Prompts.{field.name}: {error}; write {{{{ and }}}} for braces of the text"
                ) from error
            if unknown := named - allowed[field.name]:
                raise InvalidInputError(
                    f"Prompts.{field.name} has {{{'}, {'.join(sorted(unknown))}}}; it may use "
                    f"{{{'}, {'.join(sorted(allowed[field.name]))}}}"
                )
            if missing := allowed[field.name] - {"abstention"} - named:
                raise InvalidInputError(f"Prompts.{field.name} lacks {{{'}, {'.join(sorted(missing))}}}")

    @classmethod
    def for_small_models(cls) -> Prompts:
        """Prompts for a drafter that was not trained to draft: one worked example in place of instructions.

        A model of 135M parameters does not follow instructions, and copies the abstention marker when it sees it.
        """
        passages = [
            Passage("It was completed in March 1889 by the company of Gustave Eiffel.", title="Eiffel Tower"),
            Passage("The Seine is a river in northern France.", title="Seine"),
        ]
        asked = "{passages}\n\nQuestion: {question}?"
        reply = "Rationale: The Eiffel Tower was completed in March 1889.\nAnswer: March 1889"
        shown = asked.format(passages=format_passages(passages), question="when was the eiffel tower finished")
        return cls(draft=asked, examples=((shown, reply),))

    def save_drafting(self, folder: Path) -> None:
        """Write what a drafter was trained with into the folder of its weights. ``of_drafter`` reads it."""
        content = {name: getattr(self, name) for name in (*DRAFTING_FIELDS, "verdict_header")}
        (folder / _DRAFTING_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def of_drafter(cls, folder: Path) -> Prompts | None:
        """The prompts that the drafter in ``folder`` was trained with; ``None`` where no file says so.

        Raises:
            InvalidInputError: The file cannot be read.
        """
        file = folder / _DRAFTING_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            known = {name: content[name] for name in DRAFTING_FIELDS}
            known["verdict_header"] = content.get("verdict_header")  # older files have none
            return cls(**known | {"examples": tuple((asked, reply) for asked, reply in known["examples"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(f"{file} does not hold a drafter's prompts: {error!r}") from error

    @classmethod
    def trained_with(cls, lm: LanguageModel) -> Prompts | None:
        """The prompts that ``lm`` was trained to draft with; ``None`` where nothing beside its weights says so."""
        return None if lm.folder is None else cls.of_drafter(lm.folder)

    def drafts_like(self, other: Prompts) -> bool:
        """Whether a drafter that was trained with ``other`` sees the same here."""
        return all(getattr(self, name) == getattr(other, name) for name in DRAFTING_FIELDS)

    def draft_text(self, question: str, passages: Sequence[Passage]) -> str:
        """The drafter's turn."""
        return self.draft.format(question=question, passages=format_passages(passages), abstention=self.abstention)

    def verify_text(self, question: str, passages: Sequence[Passage] | None = None) -> str:
        """Q as the verifier sees it, with ``passages`` where there are any."""
        if passages is None:
            return self.verify.format(question=question)
        return self.verify_with_passages.format(question=question, passages=format_passages(passages))

    def listwise_text(self, question: str, drafts: Sequence[Draft]) -> str:
        """The prompt that compares ``drafts``: one label each, in their order, and the last one for none of them."""
        lines = []
        for label, draft in zip(string.ascii_uppercase, drafts, strict=False):
            line = self.candidate.format(label=label, answer=_one_line(draft.text))
            if draft.rationale:
                line += self.candidate_evidence.format(evidence=_one_line(draft.rationale))
            lines.append(line)
        lines.append(self.candidate.format(label=string.ascii_uppercase[len(drafts)], answer=self.none_of_these))
        return self.listwise.format(question=question, candidates="\n".join(lines))

    def standard_text(self, question: str, passages: Sequence[Passage]) -> str:
        """The question of standard RAG."""
        return self.standard.format(question=question, passages=format_passages(passages))

    def synthesis_text(self, question: str, answer: str, passages: Sequence[Passage]) -> str:
        """Asks for the rationale of a known answer."""
        return self.synthesis.format(question=question, answer=answer, passages=format_passages(passages))

    def questions_text(self, passage: Passage) -> str:
        """Asks for questions that ``passage`` answers."""
        return self.questions.format(passages=format_passages([passage]))

    def is_abstention(self, answer: str) -> bool:
        """Whether ``answer`` is the abstention marker, up to case, punctuation and space around it."""
        trim = string.punctuation + string.whitespace
        return answer.strip(trim).casefold() == self.abstention.strip(trim).casefold()


def _one_line(text: str) -> str:
    """``text`` without line breaks: a draft cannot begin a candidate of its own."""
    return " ".join(text.split())


def format_passages(passages: Sequence[Passage]) -> str:
    """Passages in numbered blocks, from ``[1]`` to ``[/1]``.

    When some passage contains text that looks like a delimiter, all delimiters get a mark. It is made from the
    passages' hash, and no passage contains it: ``[1:3fa9] ... [/1:3fa9]``.
    """
    texts = [passage_text(passage).strip() for passage in passages]
    joined = "\n".join(texts)
    mark = ""
    attempt = 0
    while any(f"[/{i}{mark}]" in joined or f"[{i}{mark}]" in joined for i in range(1, len(texts) + 1)):
        mark = ":" + hashlib.sha256(f"{attempt}\n{joined}".encode()).hexdigest()[:4]
        attempt += 1
    return "\n".join(f"[{i}{mark}] {text} [/{i}{mark}]" for i, text in enumerate(texts, start=1))
