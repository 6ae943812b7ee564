"""Files of a model or of gates: in a folder, in the Hugging Face cache, or from the hub, asked in this order."""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trimkv_cli.errors import (
    BrokenModel,
    ModelError,
    ModelNotFound,
    OfflineError,
    TrimkvError,
    UnsupportedModel,
    UsageError,
)
from trimkv_cli.model.folders import read_config
from trimkv_cli.model.gguf import is_gguf
from trimkv_cli.model.other_gates import (
    FASTKVZIP_FILES,
    FASTKVZIP_REPOSITORY,
    KVZAP_WEIGHTS,
    fastkvzip_file,
    is_kvzap,
)
from trimkv_cli.model.profiles import list_profiles

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported

Kind = Literal["model", "config", "gates"]

GATE_PAIRS = (("gates.json", "gates.safetensors"), ("config.json", "trimkv_weights.pth"))
# No pickles of model weights, no second copy of them (consolidated*, original/, onnx/), no code.
WANTED: dict[Kind, list[str]] = {
    "model": ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"],
    "config": ["config.json"],
    "gates": [name for pair in GATE_PAIRS for name in pair],
}
UNWANTED = ["consolidated*", "*/*"]


def resolve(
    name: str, *, kind: Kind = "model", revision: str | None = None, offline: bool = False, refresh: bool = False
) -> Path:
    """Return the folder, or the file, of what `name` stands for: a path, a hub id, or `repo:FILE` of one.

    Files are GGUF files, and of gates those of Fast KVzip, where `repo:FOLDER` is the folder of a base model.

    A complete copy in the Hugging Face cache is used as it is, without asking the network; `refresh` asks first.

    Raises:
        ModelNotFound: no such folder, repository or revision, or nothing of this kind in it.
        UsageError: a revision of a folder or file.
        UnsupportedModel: weights that are neither safetensors nor GGUF.
        OfflineError: not in the cache, and the network is off (`offline`) or unreachable.
        ModelError: the repository's licence has to be accepted, or access is denied.
    """
    path = _local_path(name)
    if path is not None:
        is_file = path.is_file() and _is_of_kind(path, kind)
        if not is_file and not path.is_dir():
            raise _no_folder(path)
        if revision is not None:
            what = "file" if is_file else "folder"
            raise UsageError(f"{name} is a {what} and has no revisions", hint="leave out --revision")
        return path if is_file else _checked(path, kind, name)
    repository, colon, file = name.partition(":")
    if colon and repository.count("/") == 1 and kind == "gates":
        return _folder_of(repository, file, revision, offline=offline, refresh=refresh)
    if colon and repository.count("/") == 1:
        return _gguf_of(repository, file, revision, offline=offline, refresh=refresh)
    if name.count("/") != 1:
        raise _no_such_gates(name) if kind == "gates" else no_such_model(name)
    if kind == "gates" and name.lower() == FASTKVZIP_REPOSITORY.lower():
        raise ModelNotFound(
            f"{name} holds gates for several models", hint=f"say for which: {name}:qwen3-4b-instruct-2507"
        )
    folder = None if refresh else _cached(name, kind, revision)
    return _checked(folder or _download(name, kind, revision, offline=offline), kind, name)


def pull(name: str, *, revision: str | None = None) -> Path:
    """Bring the newest files of a repository of gates or of a model into the cache; raises as `resolve` does."""
    if name.lower().startswith(f"{FASTKVZIP_REPOSITORY.lower()}:"):
        return resolve(name, kind="gates", revision=revision, refresh=True)
    if _local_path(name) is None and name.count("/") == 1 and ":" not in name:
        folder = _download(name, "gates", revision, offline=False)  # of a model's files only its config
        if holds(folder, "gates"):
            return folder
    return resolve(name, revision=revision, refresh=True)


def holds(folder: Path, kind: Kind) -> bool:
    if kind == "gates":
        if (is_kvzap(folder) and (folder / KVZAP_WEIGHTS).is_file()) or fastkvzip_file(folder) is not None:
            return True
        return any((folder / config).is_file() and (folder / weights).is_file() for config, weights in GATE_PAIRS)
    return (folder / "config.json").is_file() and (kind == "config" or _has_weights(folder))


def _is_of_kind(file: Path, kind: Kind) -> bool:
    return fastkvzip_file(file) is not None if kind == "gates" else is_gguf(file) or file.suffix == ".gguf"


def _local_path(name: str) -> Path | None:
    """Return the path when `name` exists, or can only be meant as one."""
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError):  # a name too long, a home that nobody has
        return None
    of_hub = ":" in name and name.partition(":")[0].count("/") == 1
    file = name.endswith((".gguf", "/")) and not of_hub
    spelled_as_path = name.startswith(("/", ".", "~")) or file or "\\" in name
    return path if exists or spelled_as_path else None


def _cached(name: str, kind: Kind, revision: str | None) -> Path | None:
    from huggingface_hub.errors import HFValidationError

    try:
        folder = _kept(name, revision, WANTED[kind], UNWANTED)
    except OSError:  # not there, or not readable: the download finds out
        return None
    except HFValidationError as error:
        raise explain(error, name, revision) from None
    return folder if holds(folder, kind) else None


def _download(name: str, kind: Kind, revision: str | None, *, offline: bool) -> Path:
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    if offline:
        raise OfflineError(f"{name} is not in the cache", hint=f"{pull_command(name, revision)}, without --offline")
    try:
        folder = _fetch(name, revision, WANTED[kind], UNWANTED)
        # Models have a file of this name, too: only now is it known that this one is small.
        return _fetch(name, revision, [KVZAP_WEIGHTS]) if kind == "gates" and is_kvzap(folder) else folder
    except (HTTPError, OSError, HFValidationError) as error:
        raise explain(error, name, revision) from None


def _kept(name: str, revision: str | None, wanted: list[str], unwanted: list[str] | None = None) -> Path:
    """Return the folder of a repository in the cache; raises as `snapshot_download` does when it is not there."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted, local_files_only=True
        )
    )


def _fetch(name: str, revision: str | None, wanted: list[str], unwanted: list[str] | None = None) -> Path:
    """Download files of a repository, and hold what came now against the checksums that the hub names.

    Raises:
        BrokenModel: a file arrived with other bytes; it is deleted.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if sys.stderr is None or not sys.stderr.isatty():
        disable_progress_bars()
    started = time.time()
    folder = Path(
        snapshot_download(
            name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted, local_files_only=False
        )
    )
    for path in (path for path in folder.rglob("*") if path.is_file()):
        blob = path.resolve()
        if _SHA256.fullmatch(blob.name) and blob.stat().st_mtime >= started - 1 and _sha256(blob) != blob.name:
            blob.unlink()
            path.unlink(missing_ok=True)
            raise BrokenModel(f"{path.name} of {name} arrived damaged", hint=pull_command(name, revision))
    return folder


_SHA256 = re.compile(r"[0-9a-f]{64}")  # what large files are called in the cache; small ones have a shorter sum


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_of(name: str, base: str, revision: str | None, *, offline: bool, refresh: bool) -> Path:
    """Return the folder of gates for a base model, in a repository that has some for several."""
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    wanted = [f"{base}/{FASTKVZIP_FILES}"]
    try:
        folder = None if refresh else _kept(name, revision, wanted) / base
    except OSError:
        folder = None
    if folder is not None and holds(folder, "gates"):
        return folder
    if offline:
        hint = f"{pull_command(f'{name}:{base}', revision)}, without --offline"
        raise OfflineError(f"{name}:{base} is not in the cache", hint=hint)
    try:
        folder = _fetch(name, revision, wanted) / base
    except (HTTPError, OSError, HFValidationError) as error:
        raise explain(error, name, revision) from None
    if not holds(folder, "gates"):
        there = _listed_files(name, revision, ".pt")
        hint = f"it has them for {', '.join(file.rpartition('/')[0] for file in there)}" if there else _NO_GATES
        raise ModelNotFound(f"{name} has no gates for {base}", hint=hint)
    return folder


_NO_GATES = "without trained ones: --gates streaming"


def _gguf_of(name: str, wanted: str, revision: str | None, *, offline: bool, refresh: bool) -> Path:
    """Return a repository's GGUF file: by its name, or by its quantisation as in `unsloth/Qwen3-4B-GGUF:Q4_K_M`."""
    exact = wanted.lower().endswith(".gguf")
    endings = (
        [wanted] if exact else [f"*{tag}{end}" for tag in {wanted, wanted.upper(), wanted.lower()} for end in _ENDS]
    )
    if not refresh:
        found = _matching(name, wanted, endings, revision, local_files_only=True)
        if found is not None:
            return found
    if offline:
        raise OfflineError(
            f"{name}:{wanted} is not in the cache",
            hint=f"{pull_command(f'{name}:{wanted}', revision)}, without --offline",
        )
    found = _matching(name, wanted, endings, revision, local_files_only=False)
    if found is None:
        raise ModelNotFound(f"{name} has no GGUF file {wanted}", hint=_files_there(name, revision))
    return found


_ENDS = (".gguf", "-00001-of-*.gguf", "-*-of-*.gguf")  # a whole file, or the parts of one


def _matching(
    name: str, wanted: str, endings: list[str], revision: str | None, *, local_files_only: bool
) -> Path | None:
    """Return the first file of a repository that matches, with its other parts beside it."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    parts = [re.sub(r"-00001-of-", "-*-of-", ending) for ending in endings]
    try:
        folder = _kept(name, revision, parts) if local_files_only else _fetch(name, revision, parts)
    except (HTTPError, OSError, HFValidationError) as error:
        if local_files_only and isinstance(error, OSError):
            return None
        if isinstance(error, HfHubHTTPError | HFValidationError):
            raise explain(error, name, revision) from None
        raise explain(error, f"{name}:{wanted}", revision) from None
    files = sorted(path for path in folder.rglob("*.gguf") if any(path.match(ending) for ending in endings))
    return next((path for path in files if "-of-" not in path.name or "-00001-of-" in path.name), None)


def _files_there(name: str, revision: str | None) -> str:
    """Name the GGUF files of a repository."""
    files = _listed_files(name, revision, ".gguf")
    return f"it has {', '.join(files[:20])}" if files else "take a repository with *.gguf files"


def _listed_files(name: str, revision: str | None, ending: str) -> list[str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return [file for file in HfApi().list_repo_files(name, revision=revision) if file.endswith(ending)]
    except (HfHubHTTPError, OSError):
        return []


def _checked(folder: Path, kind: Kind, name: str) -> Path:
    """Return the folder when it holds the kind, else say what it is instead."""
    if holds(folder, kind):
        return folder
    raise _no_gates(name) if kind == "gates" else _no_model(folder, name)


def _no_folder(path: Path) -> TrimkvError:
    if path.exists():
        return ModelNotFound(f"{path} is a file, not a folder", hint=f"give its folder: {path.resolve().parent}")
    kind = "file" if path.suffix == ".gguf" else "folder"
    return ModelNotFound(f"there is no {kind} {path}", hint=HUB_IDS)


def _no_such_gates(name: str) -> ModelNotFound:
    hint = "auto, streaming or streaming:SINKS, keydiff, none, a folder, a hub id or a profile"
    return ModelNotFound(f"--gates {name}: there is nothing of this name", hint=hint)


def _no_gates(name: str) -> TrimkvError:
    pairs = ", ".join(f"{config} and {weights}" for config, weights in GATE_PAIRS)
    others = f"KVzap's config.json and {KVZAP_WEIGHTS}, or Fast KVzip's {FASTKVZIP_FILES}"
    return ModelNotFound(f"{name} holds no gates", hint=f"gates are {pairs}, {others}; {_NO_GATES}")


def _no_model(folder: Path, name: str) -> TrimkvError:
    if any(folder.glob("*.gguf")) or name.lower().endswith("-gguf"):
        return _which_gguf(folder, name)
    if not (folder / "config.json").is_file():
        return ModelNotFound(f"{name} has no config.json", hint="give the folder or hub id of a transformers model")
    read_config(folder)  # a broken one is the first thing to say
    if any(folder.glob("*.safetensors")):
        return ModelNotFound(f"{name} lacks some of its weight files", hint=f"trimkv models pull {name}")
    hint = "take a repository with *.safetensors, or save the model again with transformers' save_pretrained"
    return UnsupportedModel(f"{name} has no safetensors weights", hint=hint)


def _which_gguf(folder: Path, name: str) -> ModelNotFound:
    here = sorted(path.name for path in folder.glob("*.gguf"))
    local = _local_path(name) is not None
    hint = f"give one: {folder / here[0]}" if here and local else f"say which: {name}:Q4_K_M, or {name}:FILE.gguf"
    return ModelNotFound(f"{name} holds GGUF files", hint=hint)


def _has_weights(folder: Path) -> bool:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(path.is_file() for path in folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
    return all((folder / shard).is_file() for shard in shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedRepository:
    """A repository of the Hugging Face cache; `kind` is what its newest revision holds."""

    id: str
    kind: Literal["model", "gates", "other"]
    size_bytes: int
    revisions: tuple[str, ...]  # newest first
    folder: Path


def cached_repositories() -> list[CachedRepository]:
    """List the models and gates in the Hugging Face cache, by name."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return sorted((_described(repo) for repo in repositories if repo.repo_type == "model"), key=lambda repo: repo.id)


def _described(repo: CachedRepoInfo) -> CachedRepository:
    revisions = sorted(repo.revisions, key=lambda revision: revision.last_modified, reverse=True)
    folder = revisions[0].snapshot_path if revisions else repo.repo_path
    kinds: tuple[Literal["gates", "model"], ...] = ("gates", "model")
    found: Literal["model", "gates", "other"] = next((kind for kind in kinds if holds(folder, kind)), "other")
    return CachedRepository(
        id=repo.repo_id,
        kind="gates" if found == "other" and any(folder.glob(f"*/{FASTKVZIP_FILES}")) else found,
        size_bytes=repo.size_on_disk,
        revisions=tuple(revision.commit_hash for revision in revisions),
        folder=folder,
    )


HUB_IDS = "give a folder, a GGUF file, a profile (trimkv profiles list) or a hub id as Qwen/Qwen3-4B"


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
