"""``/v1/files``: texts for RAPID to read."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from specrag._abandoned import in_thread
from specrag.serving.errors import ApiError, BodyError, refused
from specrag.serving.files import check_name, text_of
from specrag.serving.routes._common import OwnerOf, StateOf, unless_gone

router = APIRouter()


@router.post("/v1/files")
async def upload_file(request: Request, state: StateOf, owner: OwnerOf) -> dict[str, Any]:
    """Keep the text of a file: plain text in any encoding, Markdown, HTML or PDF."""
    state.check_rapid()
    state.files.check_room(owner)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise refused("send the file as multipart/form-data", "file", "invalid_type")
    try:
        async with request.form(max_files=1, max_fields=8) as form:
            file, purpose = form.get("file"), form.get("purpose", "user_data")
            if not isinstance(file, UploadFile):
                raise ApiError(
                    400, "Missing required parameter: 'file'", param="file", code="missing_required_parameter"
                )
            if not isinstance(purpose, str) or len(purpose) > 64:
                raise refused("a short text is expected", "purpose", "invalid_type")
            name, raw = check_name(file.filename), await file.read()
    except BodyError:
        raise
    except HTTPException as error:  # starlette's, of a form that is damaged or has too many parts
        raise ApiError(error.status_code, str(error.detail), param="file", code="invalid_form") from None

    async def read() -> tuple[str, tuple[str, ...]]:
        async with state.gate.turn():
            return await in_thread(text_of, raw, name)

    text, notes = await unless_gone(request, read())
    return state.files.add(owner, name, purpose, len(raw), text, notes).to_dict()


@router.get("/v1/files")
async def list_files(state: StateOf, owner: OwnerOf) -> dict[str, Any]:
    """The files of this key."""
    return {"object": "list", "data": [file.to_dict() for file in state.files.of(owner)], "has_more": False}


@router.get("/v1/files/{file_id}")
async def get_file(file_id: str, state: StateOf, owner: OwnerOf) -> dict[str, Any]:
    """One of them."""
    return state.files.get(owner, file_id).to_dict()


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, state: StateOf, owner: OwnerOf) -> dict[str, Any]:
    """Forget a file, and what RAPID has read for this key."""
    state.files.delete(owner, file_id)
    if state.rapid is not None:
        await state.rapid.forget(owner)
    return {"id": file_id, "object": "file", "deleted": True}
