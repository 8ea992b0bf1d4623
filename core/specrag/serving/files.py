"""Uploaded files as texts, in memory, each for the key that uploaded it.

A file's name is kept to be shown. It is never a path.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from specrag._encodings import decode
from specrag.errors import InvalidInputError, MissingExtraError
from specrag.retrieval.documents import SUFFIXES, read_documents
from specrag.serving.errors import ApiError, not_found, refused
from specrag.serving.keys import Owner


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file. ``bytes``: of the upload; ``created``: seconds since 1970."""

    id: str
    owner: Owner
    name: str
    purpose: str
    bytes: int
    created: int
    expires: int
    text: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created,
            "expires_at": self.expires,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
            "specrag": {"characters": len(self.text), "notes": list(self.notes)},
        }


class FileStore:
    """The files of all keys. A key reaches its own alone.

    Args:
        most: Files that one key may have.
        seconds: How long a file is kept.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._files: dict[str, StoredFile] = {}

    def check_room(self, owner: Owner) -> None:
        """Whether ``owner`` may upload another file.

        Raises:
            ApiError: There are too many.
        """
        if len(self.of(owner)) >= self._most:
            raise refused(f"there are {self._most} files already: delete one first", "file", "too_many_files")

    def add(self, owner: Owner, name: str, purpose: str, size: int, text: str, notes: tuple[str, ...]) -> StoredFile:
        """Keep a text. Raises what ``check_room`` raises."""
        self.check_room(owner)
        now = time.time()
        made = StoredFile(
            f"file-{secrets.token_urlsafe(24)}",
            owner,
            name,
            purpose,
            size,
            int(now),
            int(now + self._seconds),
            text,
            notes,
        )
        self._files[made.id] = made
        return made

    def of(self, owner: Owner) -> list[StoredFile]:
        """The files of ``owner``, oldest first."""
        now = time.time()
        for file in [file for file in self._files.values() if file.expires <= now]:
            del self._files[file.id]
        return [file for file in self._files.values() if file.owner == owner]

    def get(self, owner: Owner, id: str, param: str = "file_id") -> StoredFile:  # noqa: A002 - OpenAI's name
        """A file of ``owner``.

        Raises:
            ApiError: There is none with this id, or it is another key's: both are the same 404.
        """
        found = next((file for file in self.of(owner) if file.id == id), None)
        if found is None:
            raise not_found(f"the file {id[:80]!r}", param, "file_not_found")
        return found

    def delete(self, owner: Owner, id: str) -> StoredFile:  # noqa: A002
        """Forget a file. Raises what ``get`` raises."""
        return self._files.pop(self.get(owner, id).id)


def text_of(raw: bytes, name: str) -> tuple[str, tuple[str, ...]]:
    """The text of an upload, and what is to be told of it.

    HTML and PDF files are known by the ending of their names; everything else is read as plain text.

    Raises:
        ApiError: It is empty or no text (status 400).
    """
    shown = repr(PurePosixPath(name).name[:80])
    suffix = PurePosixPath(name).suffix.lower()
    notes: list[str] = []
    try:
        if suffix in SUFFIXES and suffix not in (".txt", ".md", ".markdown"):
            text = _converted(raw, suffix, shown, notes)
        else:
            decoded = decode(raw)
            text = decoded.text
            if decoded.note:
                notes.append(decoded.note)
    except InvalidInputError as error:
        raise refused(f"the file {shown} {error}", "file", "invalid_file") from None
    except MissingExtraError:
        raise refused(f"this server cannot read {suffix} files: send plain text", "file", "invalid_file") from None
    if not text.strip():
        raise refused(f"the file {shown} holds no text", "file", "invalid_file")
    return text, tuple(notes)


def _converted(raw: bytes, suffix: str, shown: str, notes: list[str]) -> str:
    with tempfile.TemporaryDirectory(prefix="specrag-") as folder:
        file = Path(folder, f"upload{suffix}")
        file.write_bytes(raw)
        try:
            documents = read_documents(file, notes=notes)
        except InvalidInputError as error:
            raise InvalidInputError(str(error).replace(str(file), "").strip()) from None
        finally:
            notes[:] = [note.replace(str(file), shown) for note in notes]
    return "\n\n".join(document.text for document in documents)


def check_name(name: str | None) -> str:
    """A file's name as it is shown: its last part.

    Raises:
        ApiError: The upload has none.
    """
    shown = PurePosixPath((name or "").replace("\\", "/")).name
    if not shown:
        raise ApiError(400, "the field 'file' must be a file with a name", param="file", code="invalid_file")
    return shown[:255]
