"""Rows of data files: JSON lines, a JSON list, a JSON object with a list in it, and tab-separated text; gzip or plain.

A reader takes a ``Row`` and asks it for fields; the row says what was expected, and where, when a field is not there.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, cast, overload

from specrag._encodings import marked
from specrag.errors import InvalidInputError

_CONTAINERS = ("data", "Data")  # SQuAD and TriviaQA keep their rows under these
_LONGEST_CELL = 2**27  # characters; csv's own limit of 131,072 is shorter than long news articles


@dataclass(frozen=True)
class Row:
    """One record of a file.

    Attributes:
        values: Its fields.
        number: Its number in the file, from 1; for JSON lines and tab-separated text, the number of its line.
        where: The file and the line or entry, for messages.
        path: The file.
    """

    values: Mapping[str, Any]
    number: int
    where: str
    path: Path

    def wrong(self, expected: str) -> InvalidInputError:
        """An error that says where and what was expected."""
        return InvalidInputError(f"{self.where}: expected {expected}")

    def get(self, *keys: str) -> Any:
        """The first of ``keys`` that is there and not ``None``; ``None`` when none is."""
        return next((self.values[key] for key in keys if self.values.get(key) is not None), None)

    def text(self, *keys: str) -> str:
        """The text under the first of ``keys`` that is there."""
        value = self.get(*keys)
        if not isinstance(value, str):
            raise self.wrong(f"{_either(keys)} to be a text, got {_shown(value)}")
        return value

    def texts(self, *keys: str) -> tuple[str, ...]:
        """The list of texts under the first of ``keys`` that is there; one text counts as a list of one."""
        value = self.get(*keys)
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list | tuple) or not all(isinstance(item, str) for item in listed):
            raise self.wrong(f"{_either(keys)} to be a list of texts, got {_shown(value)}")
        return tuple(listed)

    def answers(self, *keys: str) -> tuple[str, ...]:
        """The same, without repetitions and blanks; at least one must be left."""
        texts = tuple(dict.fromkeys(text for text in self.texts(*keys) if text.strip()))
        if not texts:
            raise self.wrong(f"at least one answer under {_either(keys)}, got {_shown(self.get(*keys))}")
        return texts

    @overload
    def real(self, key: str, default: float) -> float: ...
    @overload
    def real(self, key: str, default: None) -> float | None: ...
    def real(self, key: str, default: float | None) -> float | None:
        """The number under ``key``, which may be written as a text; ``default`` when there is none."""
        value = self.get(key)
        try:
            return default if value is None else float(value)
        except (TypeError, ValueError) as error:
            raise self.wrong(f"'{key}' to be a number, got {_shown(value)}") from error

    def flag(self, key: str) -> bool | None:
        """The truth value under ``key``; ``None`` when there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(f"'{key}' to be true or false, got {_shown(value)}")
        return value

    def rows(self, key: str) -> list[Row]:
        """The list of records under ``key``."""
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise self.wrong(f"'{key}' to be a list of objects, got {_shown(value)}")
        return [replace(self, values=item, where=f"{self.where}, {key}[{i}]") for i, item in enumerate(value)]

    def row(self, key: str) -> Row:
        """The record under ``key``."""
        value = self.get(key)
        if not isinstance(value, Mapping):
            raise self.wrong(f"'{key}' to be an object, got {_shown(value)}")
        return replace(self, values=value, where=f"{self.where}, {key}")

    def name(self, *keys: str) -> str:
        """The identifier under the first of ``keys`` that is there; the row's number when none is."""
        value = self.get(*keys)
        return str(self.number if value is None or value == "" else value)

    def rest(self, *used: str) -> dict[str, Any]:
        """The fields that are not ``used``."""
        return {key: value for key, value in self.values.items() if key not in used}


def read_rows(path: Path) -> Iterator[Row]:
    """Every record of a file, in order. JSON lines are read one at a time, so that a large file may be cut short.

    Raises:
        InvalidInputError: There is no such file, or it cannot be read as JSON, JSON lines or tab-separated text.
    """
    try:
        with _opened(path) as file:
            yield from _rows(file, path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InvalidInputError(f"{path}: there is no such file") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise InvalidInputError(f"{path}: the gzip file is damaged ({error})") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path}: expected UTF-8 text ({error})") from error


def _opened(path: Path) -> TextIO:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(b"\x1f\x8b"):
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    return path.open(encoding=marked(start) or "utf-8", newline="")  # Excel saves its text files as UTF-16


def _rows(file: TextIO, path: Path) -> Iterator[Row]:
    lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    number, line = next(lines, (0, ""))
    if line.lstrip().startswith("["):
        yield from _entries(_parsed(line + file.read(), f"{path}"), path)
    elif line.lstrip().startswith("{"):
        try:
            first = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:  # an object over several lines, or a broken line
            yield from _entries(_parsed(line + file.read(), f"{path}, line {number}", error), path)
            return
        if _contained(first) is not None:
            yield from _entries(first, path)
            return
        yield _row(first, number, f"{path}, line {number}", path)
        for number, line in lines:
            where = f"{path}, line {number}"
            yield _row(_parsed(line, where), number, where, path)
    elif "\t" in line:
        yield from _cells(line, file, number, path)
    elif line:
        raise InvalidInputError(
            f"{path}, line {number}: expected JSON, JSON lines or tab-separated text, got {_shown(line.strip())}"
        )


def _parsed(text: str, where: str, cause: Exception | None = None) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidInputError(f"{where}: not valid JSON ({cause or error})") from error


def _contained(value: Any) -> list[Any] | None:
    for key in _CONTAINERS:
        if isinstance(value, dict) and isinstance(value.get(key), list):
            return cast(list[Any], value[key])
    return None


def _entries(value: Any, path: Path) -> Iterator[Row]:
    entries = _contained(value)
    if entries is None:
        entries = value if isinstance(value, list) else [value]
    for number, entry in enumerate(entries, start=1):
        yield _row(entry, number, f"{path}, entry {number}", path)


def _row(values: Any, number: int, where: str, path: Path) -> Row:
    if not isinstance(values, dict):
        raise InvalidInputError(f"{where}: expected an object, got {_shown(values)}")
    return Row(values, number, where, path)


def _cells(header: str, file: TextIO, skipped: int, path: Path) -> Iterator[Row]:
    names = header.rstrip("\r\n").split("\t")
    with _long_cells():
        reader = csv.reader(file, delimiter="\t")
        try:
            for cells in reader:
                where = f"{path}, line {skipped + reader.line_num}"
                if len(cells) == len(names) + 1:  # PubHealth's test file: an index without a name comes first
                    cells = cells[1:]
                if len(cells) != len(names):
                    raise InvalidInputError(f"{where}: expected {len(names)} columns, got {len(cells)}")
                yield Row(dict(zip(names, cells, strict=True)), skipped + reader.line_num, where, path)
        except csv.Error as error:
            raise InvalidInputError(f"{path}, line {skipped + reader.line_num}: {error}") from error


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _either(keys: tuple[str, ...]) -> str:
    return " or ".join(f"'{key}'" for key in keys)


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
