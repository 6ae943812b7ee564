"""The GGUF files that Ollama, LM Studio and llama.cpp keep on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from trimkv_cli.errors import BrokenModel, ModelNotFound

OLLAMA = "ollama:"
_REGISTRY = "registry.ollama.ai"
_MODEL_LAYER = "application/vnd.ollama.image.model"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptFile:
    """A model of another program: `id` is what --model takes."""

    id: str
    program: str
    path: Path

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size


def ollama_file(id: str) -> Path:
    """Return the blob of `ollama:NAME[:TAG]`.

    Raises:
        ModelNotFound: Ollama has no such model here.
        BrokenModel: its manifest names no weights.
    """
    name, _, tag = id.removeprefix(OLLAMA).partition(":")
    if not name:
        raise ModelNotFound(f"{id} names no model", hint="ollama:llama3.2, or ollama:llama3.2:3b")
    wanted = f"{OLLAMA}{name}:{tag or 'latest'}"
    for manifest in _manifests():
        if _ollama_id(manifest) == wanted:
            return _blob(manifest)
    here = [_ollama_id(manifest) for manifest in _manifests()]
    near = get_close_matches(wanted, here, n=1) or here[:1]
    hint = f"did you mean {near[0]}?" if near else f"ollama pull {id.removeprefix(OLLAMA)}"
    raise ModelNotFound(f"Ollama has no model {id.removeprefix(OLLAMA)} here", hint=hint)


def kept_files() -> list[KeptFile]:
    """List what the other programs keep, by program and name."""
    return [*_of_ollama(), *_of_folders("LM Studio", _lm_studio_folders()), *_of_folders("llama.cpp", _llama_folders())]


def _of_ollama() -> Iterator[KeptFile]:
    for manifest in _manifests():
        try:
            yield KeptFile(id=_ollama_id(manifest), program="Ollama", path=_blob(manifest))
        except (BrokenModel, ModelNotFound):
            continue  # a model that is being pulled, or of another kind


def _of_folders(program: str, folders: Iterator[Path]) -> Iterator[KeptFile]:
    seen = set()
    for folder in folders:
        for path in sorted(folder.rglob("*.gguf")):
            first = "-of-" not in path.name or "-00001-of-" in path.name
            if first and path.is_file() and path.resolve() not in seen:
                seen.add(path.resolve())
                yield KeptFile(id=str(path), program=program, path=path)


def _ollama_folders() -> Iterator[Path]:
    said = os.environ.get("OLLAMA_MODELS")
    if said:
        yield Path(said).expanduser()
        return
    yield Path.home() / ".ollama" / "models"
    yield Path("/usr/share/ollama/.ollama/models")


def _lm_studio_folders() -> Iterator[Path]:
    yield Path.home() / ".lmstudio" / "models"
    yield Path.home() / ".cache" / "lm-studio" / "models"


def _llama_folders() -> Iterator[Path]:
    yield Path(os.environ.get("LLAMA_CACHE") or Path.home() / ".cache" / "llama.cpp").expanduser()


def _manifests() -> list[Path]:
    """List the manifests, which lie as HOST/USER/NAME/TAG."""
    found: list[Path] = []
    for folder in _ollama_folders():
        try:
            found += sorted(path for path in (folder / "manifests").glob("*/*/*/*") if path.is_file())
        except OSError:
            continue
    return found


def _ollama_id(manifest: Path) -> str:
    """Write a manifest's model as Ollama does: host and user only where they are not the usual ones."""
    host, user, name, tag = manifest.parts[-4:]
    owner = "" if (host, user) == (_REGISTRY, "library") else f"{user}/" if host == _REGISTRY else f"{host}/{user}/"
    return f"{OLLAMA}{owner}{name}:{tag}"


def _blob(manifest: Path) -> Path:
    try:
        layers = json.loads(manifest.read_bytes())["layers"]
        digest = next(layer["digest"] for layer in layers if layer["mediaType"] == _MODEL_LAYER)
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        raise BrokenModel(f"{manifest} names no weights", hint="ollama pull the model again") from None
    path = manifest.parents[4] / "blobs" / str(digest).replace(":", "-")
    if not path.is_file():
        raise ModelNotFound(f"the weights of {_ollama_id(manifest)} are not here", hint="ollama pull the model again")
    return path
