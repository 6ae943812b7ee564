"""What goes wrong, as OpenAI's error object with its status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimkv_cli.errors import ContextOverflow, ModelError, OutOfDeviceMemory, TrimkvError, UsageError
from trimkv_cli.jobs.lines import BadLine
from trimkv_cli.serve.worker import Busy, Closing

RETRY_AFTER_S = 2
# Words by which programs know that a history has to become shorter: litellm looks for them, not for the code.
_TOO_LONG = "the requested token count exceeds the model's maximum context length"


class ApiError(Exception):
    """End a request with an error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @classmethod
    def of_line(cls, bad: BadLine) -> ApiError:
        """Say what `trimkv run` would write of such a line."""
        return cls(bad.status or 400, "; ".join((bad.message, *bad.further)), param=bad.param, code=bad.code)

    @classmethod
    def of(cls, error: Exception, *, limit_key: str = "max_tokens") -> ApiError:
        """Give an error the status that clients know; our own have a hint, which goes with the message."""
        if isinstance(error, cls):
            return error
        if not isinstance(error, TrimkvError):
            return cls(500, f"{type(error).__name__}: {error}")
        param = limit_key if error.param == "max_tokens" else error.param
        message = f"{error.message} ({error.hint})" if error.hint else error.message
        if isinstance(error, ContextOverflow):
            message = f"{_TOO_LONG}: {message}"
        for kind, status, code in _STATUSES:
            if isinstance(error, kind):
                headers = {"retry-after": str(RETRY_AFTER_S)} if status == 429 else {}
                return cls(status, message, param=param, code=code, headers=headers)
        return cls(500, message, param=param)

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        return {"error": {"message": self.message, "type": self._type, "param": self.param, "code": self.code}}

    @property
    def _type(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


_STATUSES: tuple[tuple[type[TrimkvError], int, str | None], ...] = (
    (Busy, 429, "too_many_requests"),
    (Closing, 503, "server_closing"),
    (ContextOverflow, 400, "context_length_exceeded"),
    (UsageError, 400, None),
    (OutOfDeviceMemory, 503, "out_of_memory"),
    (ModelError, 503, "model_not_available"),
)
_TYPES: Mapping[int, str] = {401: "authentication_error", 429: "rate_limit_error"}
