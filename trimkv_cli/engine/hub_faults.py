"""What the hub's faults mean to a user: each becomes one line and what to do about it."""

from __future__ import annotations

import difflib
import errno

from trimkv_cli.errors import ModelError, ModelNotFound, OfflineError, TrimkvError
from trimkv_cli.profiles import list_profiles

HUB_IDS = "give a folder, a profile (trimkv profiles list) or a hub id as Qwen/Qwen3-4B"


def explain(error: Exception, name: str, revision: str | None) -> TrimkvError:
    """Translate what huggingface_hub raised while it looked for `name`."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return _gated(name)
    if isinstance(error, errors.RevisionNotFoundError):
        hint = "leave out --revision to take the default branch"
        return ModelNotFound(f"{name} has no revision {revision or 'main'}", hint=hint)
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return no_such_model(name)
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(name, error.response.status_code)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space, or set HF_HOME to another disk"
        return TrimkvError("the disk of the model cache is full", hint=hint)
    if isinstance(error, PermissionError):
        return TrimkvError(f"cannot write to the model cache: {error}", hint="set HF_HOME to a folder of yours")
    return OfflineError(
        f"{name} is not in the cache, and the hub cannot be reached",
        hint=f"when the network is back: {pull_command(name, revision)}",
    )


def pull_command(name: str, revision: str | None) -> str:
    """Return the command that brings a repository into the cache."""
    return f"trimkv models pull {name}" + (f" --revision {revision}" if revision else "")


def no_such_model(name: str) -> ModelNotFound:
    """Say that nothing has this name, and which profiles have one like it."""
    profiles = [profile.name for profile in list_profiles()]
    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), profiles, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    private = "; a private repository needs HF_TOKEN" if "/" in name else ""
    return ModelNotFound(f"there is no model {name}", hint=hint + HUB_IDS + private)


def _gated(name: str) -> ModelError:
    from huggingface_hub import constants

    return ModelError(
        f"{name} is gated: its owner wants its licence accepted first",
        hint=f"accept it at {constants.ENDPOINT}/{name}, then set HF_TOKEN to a token of yours, or: hf auth login",
    )


def _refused(name: str, status: int) -> ModelError:
    if status in (401, 403):
        hint = "set HF_TOKEN to a valid token of an account that may read it, or: hf auth login"
        return ModelError(f"the hub denies access to {name} ({status})", hint=hint)
    return OfflineError(f"the hub could not serve {name} ({status})", hint="try again later")
