"""Every refusal and failure as OpenAI's API tells it: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from specrag.errors import InvalidInputError, MissingExtraError, NotFoundError, SpecRAGError

INVALID, SERVER = "invalid_request_error", "server_error"


class ApiError(Exception):
    """A request that is refused, or failed.

    Args:
        status: The HTTP status.
        message: For the client.
        param: The field of the request that is wrong.
        code: A short name of what is wrong.
        kind: OpenAI's ``type``; by default what belongs to the status.
        headers: Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or (INVALID if status < HTTPStatus.INTERNAL_SERVER_ERROR else SERVER)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response that tells it."""
        return JSONResponse(self.body(), self.status, self.headers)


class BodyError(HTTPException):
    """A body that cannot be taken, and is read no further. FastAPI lets only its own exceptions through."""

    def __init__(self, told: ApiError) -> None:
        super().__init__(told.status, told.message)
        self.told = told


class ClientGoneError(ApiError):
    """The client has gone away: nobody reads the response."""

    def __init__(self) -> None:
        super().__init__(499, "the client closed the connection", code="client_closed_request")


def refused(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """Status 400, for a field of the request."""
    return ApiError(400, message, param=param, code=code)


def not_found(what: str, param: str, code: str) -> ApiError:
    """Status 404. What is not there and what another key owns are told alike."""
    return ApiError(404, f"{what} does not exist, or this key may not use it", param=param, code=code)


def busy(status: int, message: str, code: str, seconds: float) -> ApiError:
    """Status 429 or 503, with ``Retry-After`` in seconds."""
    wait = str(max(1, math.ceil(seconds)))
    kind = "requests" if status == HTTPStatus.TOO_MANY_REQUESTS else SERVER
    return ApiError(status, message, code=code, kind=kind, headers={"Retry-After": wait})


def of_failure(error: Exception, *, param: str | None = None) -> ApiError:
    """What the client is told of an error of the models.

    What is the client's matter (a question that is too long) is told as it is. Other failures are told by their kind:
    their messages name servers and paths of this side, and the log has them.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidInputError):
        said = str(error)
        too_long = "positions" in said or "too long" in said
        return refused(said, param, "context_length_exceeded" if too_long else "invalid_value")
    if isinstance(error, SpecRAGError) and not isinstance(error, NotFoundError | MissingExtraError):
        return ApiError(502, f"the models failed ({type(error).__name__})", code="model_error")
    return ApiError(500, f"the server failed ({type(error).__name__})", code="internal_error")


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors about a request."""
    first = errors[0]
    kind, param = str(first["type"]), _param(first["loc"])
    message = str(first["msg"])
    if kind == "json_invalid":
        return refused(f"the body is not JSON: {first.get('ctx', {}).get('error', message)}", None, "invalid_json")
    if kind == "extra_forbidden":
        return refused(f"Unrecognized request argument supplied: {param}", param, "unknown_parameter")
    if kind == "missing":
        if param is None:
            return refused("the request has no body: send a JSON object with Content-Type: application/json", None)
        return refused(f"Missing required parameter: '{param}'", param, "missing_required_parameter")
    code = kind if kind == "unsupported_value" else "invalid_type" if kind.endswith("_type") else "invalid_value"
    where = f"'{param}': " if param else "the body: "
    return refused(where + message[:1].lower() + message[1:], param, code)


def _param(location: Sequence[Any]) -> str | None:
    """``("body", "messages", 0, "role")`` as ``messages[0].role``."""
    name = ""
    for part in location[1:]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name or None
