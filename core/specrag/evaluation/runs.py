"""One run of an evaluation: a folder that holds what was asked, of whom, and every answer.

``run.json`` says which data, systems and settings; ``questions.jsonl`` holds the questions, in specrag's own format;
``answers.jsonl`` has one row per system and question, written as soon as it is made. A run that was killed goes on:
a line that is half written is cut off, and what is there is not asked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

from specrag._files import turn_of, whole, write_text, writing
from specrag.errors import InvalidInputError, NotFoundError
from specrag.evaluation.formats import load
from specrag.evaluation.formats.own import to_row
from specrag.evaluation.records import Question
from specrag.schema import SpeculativeAnswer, Usage, Verdict

RUN_FILE, QUESTIONS_FILE, ANSWERS_FILE = "run.json", "questions.jsonl", "answers.jsonl"
# Settings of a system that older runs do not tell: where they are not there, they are not compared.
_LATER = ("embedder",)
_VERSION = 1  # of the layout of the folder

#: A row of ``answers.jsonl`` by what it answers: (system, id of the question).
Key = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """What one system says to one question: a row of ``answers.jsonl``.

    Attributes:
        system: The name under which the run knows the system.
        id: The question's.
        text: The answer; empty when the system abstained or failed.
        right: Whether it is right, by the measure that fits the question.
        abstained: The system did not answer.
        metrics: Further measures by name, each in [0, 1].
        confidence: The calibrated probability of being right; ``None`` where no calibration fits the models.
        seconds: How long the answer took.
        timings: Seconds of each stage.
        usage: Tokens by the role of the model that read and wrote them ("drafter", "verifier", "target").
        answer: How it was made, see ``details_of``; ``None`` where it failed.
        rapid: How a system over a long context made it; see ``docs/evaluation.md``.
        error: Why there is no answer; ``None`` where there is one.
    """

    system: str
    id: str
    text: str = ""
    right: bool = False
    abstained: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    confidence: float | None = None
    seconds: float = 0.0
    timings: Mapping[str, float] = field(default_factory=dict)
    usage: Mapping[str, Usage] = field(default_factory=dict)
    answer: Mapping[str, Any] | None = None
    rapid: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def key(self) -> Key:
        """What it answers."""
        return self.system, self.id

    def to_row(self) -> dict[str, Any]:
        """The row as plain JSON values. A number that JSON lacks (an infinite one, NaN) becomes ``None``."""
        row = {f.name: getattr(self, f.name) for f in fields(self)}
        row["usage"] = {
            role: {"prompt_tokens": used.prompt_tokens, "completion_tokens": used.completion_tokens}
            for role, used in self.usage.items()
        }
        row.pop("rapid" if self.rapid is None else "answer")
        return {name: _plain(value) for name, value in row.items()}

    @classmethod
    def of(cls, row: Any) -> AnswerRow:
        """A row that ``to_row`` made.

        Raises:
            InvalidInputError: It is none; the message says what is missing or unknown.
        """
        if not isinstance(row, Mapping):
            raise InvalidInputError(f"expected a row of answers, got {row!r:.80}")
        known = {f.name for f in fields(cls)}
        if missing := [name for name in ("system", "id", "text", "right") if name not in row]:
            raise InvalidInputError(f"a row of answers lacks {', '.join(missing)}; it has {', '.join(map(str, row))}")
        if unknown := sorted(set(row) - known):
            raise InvalidInputError(f"unknown fields {', '.join(unknown)}: a row of answers has {', '.join(known)}")
        try:
            usage = {str(role): Usage(**used) for role, used in (row.get("usage") or {}).items()}
        except (TypeError, AttributeError) as error:
            raise InvalidInputError(f"'usage' must be roles with their tokens, got {row.get('usage')!r}") from error
        return cls(**{**row, "usage": usage})


def details_of(answer: SpeculativeAnswer, right: Callable[[str], bool] | None = None) -> dict[str, Any]:
    """What ``AnswerRow.answer`` holds of ``answer``.

    It is ``SpeculativeAnswer.details()`` with four more keys: ``rationale``; ``reason`` (why it abstained); ``subset``
    (positions of the passages that the answer rests on); and ``drafts``, the chosen one first unless the system
    abstained or escalated. A draft is its ``Verdict.to_row()`` with ``drafter``, ``log_agreement``, ``same`` (indexes
    of the drafts that it stands for), ``verified``, and ``right`` where the measure ``right`` is given.
    """
    verdicts = [(verdict, True) for verdict in answer.verdicts]
    verdicts += [(Verdict(draft), False) for draft in answer.unverified]
    drafts = [
        verdict.to_row()
        | {"drafter": verdict.draft.drafter, "log_agreement": verdict.log_agreement, "same": list(verdict.same)}
        | {"verified": verified}
        | ({} if right is None else {"right": not verdict.draft.abstained and right(verdict.draft.text)})
        for verdict, verified in verdicts
    ]
    own = {"rationale": answer.rationale, "reason": answer.reason, "subset": list(answer.subset), "drafts": drafts}
    return {**answer.details(), **own}


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a run is: ``run.json``.

    Attributes:
        data: The data set: where it came from, how many questions, and their digest.
        systems: The settings of each system, by its name.
        settings: What else changes the answers: the seed.
        versions: Of the packages in use. They are written down, and not compared.
    """

    data: Mapping[str, Any]
    systems: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def about(
        cls,
        questions: Sequence[Question],
        systems: Mapping[str, Mapping[str, Any]],
        *,
        source: str = "",
        settings: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> RunInfo:
        """The run of ``systems`` over ``questions``, which came from ``source``."""
        data = {"source": source, "questions": len(questions), "digest": digest_of(questions)}
        return cls(data=data, systems=systems, settings=settings or {}, versions=versions or {})

    def to_json(self) -> str:
        """The text of ``run.json``."""
        content = {"version": _VERSION} | {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"

    @classmethod
    def read(cls, file: Path) -> RunInfo:
        """What ``run.json`` says.

        Raises:
            InvalidInputError: The file is not that of a run, or of a later version of specrag.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            made = cls(**{f.name: dict(content[f.name]) for f in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(f"{file} does not describe a run of an evaluation: {error!r}") from error
        if content.get("version") != _VERSION:
            raise InvalidInputError(f"{file} has version {content.get('version')!r}; this specrag reads {_VERSION}")
        return made

    def joined(self, other: RunInfo, folder: Path) -> RunInfo:
        """This run with the systems of ``other`` too, which continues it.

        Raises:
            InvalidInputError: The data, the settings, or those of a system that both have are not the same.
        """
        mine, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        differing = [
            f"{part}.{name}: {mine[part].get(name)!r} there, {theirs[part].get(name)!r} now"
            for part in ("data", "settings")
            for name in sorted({*mine[part], *theirs[part]})
            if mine[part].get(name) != theirs[part].get(name) and (part, name) != ("data", "source")
        ]
        differing += [
            f"{system}.{name}: {mine['systems'][system].get(name)!r} there, {theirs['systems'][system].get(name)!r} now"
            for system in sorted({*mine["systems"]} & {*theirs["systems"]})
            for name in sorted({*mine["systems"][system], *theirs["systems"][system]})
            if mine["systems"][system].get(name) != theirs["systems"][system].get(name)
            and not (name in _LATER and name not in mine["systems"][system])
        ]
        if differing:
            raise InvalidInputError(
                f"{folder} holds another run: {'; '.join(differing)}. Give another folder, or the same data and "
                "settings"
            )
        systems = {**self.systems, **{name: other.systems[name] for name in other.systems if name not in self.systems}}
        return RunInfo(data=self.data, systems=systems, settings=self.settings, versions=other.versions)


def digest_of(questions: Sequence[Question]) -> str:
    """A short text that is the same for the same questions with the same answers and passages, in the same order."""
    said = "\n".join(json.dumps(_plain(to_row(question)), ensure_ascii=False, sort_keys=True) for question in questions)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """A run as it lies in its folder, whole or unfinished.

    Attributes:
        folder: Where it lies.
        info: What it is.
        questions: In the order in which they were asked.
        answers: One row per system and question that has one; the last where a failed question was asked again.
    """

    folder: Path
    info: RunInfo
    questions: tuple[Question, ...]
    answers: tuple[AnswerRow, ...]

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """The run in ``folder``. A last line that is half written is passed over.

        Raises:
            NotFoundError: No run is there.
            InvalidInputError: A file is damaged; the message names the line.
        """
        where = whole(folder)
        if not (where / RUN_FILE).is_file():
            raise NotFoundError(f"no run of an evaluation in {where}: it has no {RUN_FILE}")
        info = RunInfo.read(where / RUN_FILE)
        questions = tuple(load(where / QUESTIONS_FILE, "specrag"))
        return cls(where, info, questions, tuple(_answers_in(where / ANSWERS_FILE)[0].values()))

    def of_system(self, name: str) -> dict[str, AnswerRow]:
        """The rows of one system by the id of the question."""
        return {row.id: row for row in self.answers if row.system == name}


class AnswerLog:
    """Takes the answers of a run as they are made. ``writing_run`` opens it.

    Attributes:
        done: The rows that are there, by system and question.
    """

    def __init__(self, file: BinaryIO, path: Path, done: dict[Key, AnswerRow]) -> None:
        self.done = done
        self._file, self._path = file, path

    def append(self, row: AnswerRow) -> None:
        """Write ``row`` at once: it is there even if this process is killed right after.

        Raises:
            InvalidInputError: The question has an answer of this system already, and that was no failure.
            SpecRAGError: The disk is full.
        """
        before = self.done.get(row.key)
        if before is not None and before.error is None:
            raise InvalidInputError(f"{row.system!r} has answered question {row.id!r} already")
        line = json.dumps(row.to_row(), ensure_ascii=False, allow_nan=False) + "\n"
        with writing(self._path):
            self._file.write(line.encode())
            self._file.flush()
        self.done[row.key] = row


@contextlib.contextmanager
def writing_run(folder: str | Path, info: RunInfo, questions: Sequence[Question]) -> Iterator[AnswerLog]:
    """Begin a run in ``folder``, or go on with it, while this process alone writes there.

    Args:
        folder: Made where it is not there.
        info: What the run is. A run that is there may have other systems too; they stay.
        questions: Written down when the run begins.

    Raises:
        InvalidInputError: The folder holds another run or other files, another process writes there, or two questions
            have one id.
        SpecRAGError: The disk is full, or writing is not allowed.
    """
    where = whole(folder)
    ids = [question.id for question in questions]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InvalidInputError(f"two questions have the id {twice!r}: each needs its own")
    if where.exists() and not where.is_dir():
        raise InvalidInputError(f"{where} is a file: give a folder for the run")
    busy = f"another process writes the run in {where}: wait for it, or give another folder"
    file = where / ANSWERS_FILE
    with writing(where), turn_of(where / "run", busy=busy):
        _begin(where, info, questions)
        done, end = _answers_in(file)
        with file.open("ab") as opened:
            opened.truncate(end)
            yield AnswerLog(opened, file, done)
            opened.flush()
            os.fsync(opened.fileno())


def _begin(folder: Path, info: RunInfo, questions: Sequence[Question]) -> None:
    """Write what the run is, or check that it is the one in ``folder``."""
    if (folder / RUN_FILE).exists():
        info = RunInfo.read(folder / RUN_FILE).joined(info, folder)
    else:
        foreign = sorted(f.name for f in folder.iterdir() if f.name != QUESTIONS_FILE and not f.name.startswith("."))
        if foreign:
            raise InvalidInputError(f"{folder} holds other files ({', '.join(foreign[:3])}): give an empty folder")
        lines = (json.dumps(_plain(to_row(question)), ensure_ascii=False) + "\n" for question in questions)
        write_text(folder / QUESTIONS_FILE, "".join(lines))
    write_text(folder / RUN_FILE, info.to_json())  # last: a folder with it holds the questions


def _answers_in(file: Path) -> tuple[dict[Key, AnswerRow], int]:
    """The rows of ``file``, and how many bytes they have without a last line that is half written.

    Raises:
        InvalidInputError: Another line is damaged.
    """
    content = file.read_bytes() if file.exists() else b""
    end = content.rfind(b"\n") + 1
    found: dict[Key, AnswerRow] = {}
    for number, line in enumerate(content[:end].split(b"\n")[:-1], 1):
        try:
            row = AnswerRow.of(json.loads(line))
        except (ValueError, InvalidInputError) as error:
            raise InvalidInputError(f"{file}, line {number}: {error}") from error
        found[row.key] = row
    return found, end


def _plain(value: Any) -> Any:
    """``value`` as JSON has it; a number that JSON lacks becomes ``None``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)
