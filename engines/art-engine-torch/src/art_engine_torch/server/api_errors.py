"""The one form of every error that the server answers with: OpenAI's, with a status, a code and what to do."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer other than 2xx. `param` names the field at fault, `code` is for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request asks for something that cannot be."""
    return ApiError(400, message, param=param, code=code)


def context_exceeded(limit: int, what: str, param: str) -> ApiError:
    """A conversation has outgrown the context. Harnesses look for these words; `what` says how far."""
    message = f"This model's maximum context length is {limit} tokens. However, {what}. Shorten it."
    return bad_request(message, param, "context_length_exceeded")
