"""The tree of errors that a user can meet; each class fixes one exit code.

TrimkvError                  1  failure at run time
├── UsageError               2  flags, sizes, configuration
│   ├── ConfigError             a profile or settings file
│   └── InputError              the one input cannot be read or parsed
│       └── NotUtf8             text that is in no encoding we read
├── PartialFailure           3  several inputs, some failed
├── DoesNotFit               4  more memory than the budget
│   └── ContextOverflow         more positions than the model was trained for
├── OutOfDeviceMemory        5  after all fallbacks
├── ModelError               6  model or gates missing, mismatched, unsupported
│   ├── ModelNotFound
│   ├── BrokenModel             its files are damaged or make no sense
│   ├── OfflineError            would need the network
│   ├── UnsupportedModel
│   ├── GateMismatch
│   └── CacheMismatch           a saved cache that another model, gates or sizes made
├── Stopped                 75  stopped on purpose, resumable
└── ClosedPipe             141  the reader of stdout is gone; nothing is printed
"""

from __future__ import annotations

import errno

_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "status_alloc_failed",
)


class TrimkvError(Exception):
    """Carry one line that says what happened, in `hint` what to try, and in `param` which key of a request is meant."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param


class UsageError(TrimkvError):
    """Report a flag or value that cannot be used."""

    exit_code = 2


class ConfigError(UsageError):
    """Report a faulty profile or settings file."""


class InputError(UsageError):
    """Report an input that cannot be read or parsed."""


class NotUtf8(InputError):
    """Report text that holds bytes which are not UTF-8."""


class PartialFailure(TrimkvError):
    """Report that some of several inputs failed."""

    exit_code = 3


class DoesNotFit(TrimkvError):
    """Report that the memory asked for exceeds the budget."""

    exit_code = 4


class ContextOverflow(DoesNotFit):
    """Report positions past what the model was trained for, or past what a full cache holds."""


class OutOfDeviceMemory(TrimkvError):
    """Report that the device ran out of memory after all fallbacks."""

    exit_code = 5


class ModelError(TrimkvError):
    """Report a model or gates that cannot be used."""

    exit_code = 6


class ModelNotFound(ModelError):
    """Report a model id or folder that holds no model."""


class BrokenModel(ModelError):
    """Report a model whose files are cut off, damaged or contradict each other."""


class OfflineError(ModelError):
    """Report a file that is not in the cache while the network is off or unreachable."""


class UnsupportedModel(ModelError):
    """Report a model of a family or form that trimkv does not run."""


class GateMismatch(ModelError):
    """Report gates whose tensors do not belong to the model."""


class CacheMismatch(ModelError):
    """Report a saved cache that another model, other gates or other sizes made."""


class Stopped(TrimkvError):
    """Report a run that was stopped on purpose and can be resumed."""

    exit_code = 75


class ClosedPipe(TrimkvError):
    """Report that nobody reads stdout any more."""

    exit_code = 141


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that an allocation failed, on a GPU, on a CPU or in Python itself.

    The one place that knows; it needs no torch, of which only some kinds say so by their class.
    """
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
