"""Every failure as OpenAI's clients read it: {"error": {message, type, param, code}}."""

import dataclasses
import math
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.serving.schemas import first_problem
from opendeep_jax.serving.service import Failed, Full, Unavailable

CLIENT_GONE = 499
"""Status of a request whose client went before the answer; only the metrics see it."""
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "unavailable_error"}


@dataclasses.dataclass
class ApiError(Exception):
    """An answer that is an error: HTTP status, sentence, the field at fault, OpenAI's code for it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


FORESEEN = (ApiError, ValidationError, ConfigError, Unavailable, Failed, TimeoutError, ClientDisconnect, HTTPException)
"""Expected failures of a request; anything else is a bug."""


def as_api_error(error: BaseException) -> ApiError:
    """Return any error as one for the client; unexpected errors show no internals."""
    match error:
        case ApiError():
            return error
        case ValidationError():
            message, param = first_problem(error)
            return ApiError(400, message, param)
        case ConfigError():
            return ApiError(400, str(error))
        case Full():
            return ApiError(429, str(error), code="queue_full", headers=_retry(error))
        case Unavailable():
            return ApiError(503, str(error), code="unavailable", headers=_retry(error))
        case Failed():
            return ApiError(500, str(error), code="engine_failed")
        case TimeoutError():
            return ApiError(
                504, "The answer took longer than the server allows (--timeout); ask for fewer tokens.", code="timeout"
            )
        case ClientDisconnect():
            return ApiError(CLIENT_GONE, "The client went before the answer.")
        case HTTPException():
            return ApiError(error.status_code, _known(error), headers=dict(error.headers or {}))
    return ApiError(500, "The server failed at this request; its log says why.", code="internal_error")


async def error_response(request: Request, error: Exception) -> Response:
    """Return the response for any error that a route raises."""
    found = as_api_error(error)
    if found.status == 404 and found.code is None:
        found = dataclasses.replace(found, code="not_found")
    return JSONResponse(found.body, found.status, headers=found.headers)


def _retry(error: Unavailable) -> dict[str, str]:
    return {"Retry-After": str(math.ceil(error.retry_seconds))}


def _known(error: HTTPException) -> str:
    known = {404: "There is no such address here.", 405: "This address does not take that method."}
    return known.get(error.status_code, error.detail)
