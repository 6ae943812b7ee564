"""Gates that others made, of static scores: what KVzap's and Fast KVzip's folders say without their tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimkv_cli.errors import GateMismatch
from trimkv_cli.model.spec import GateShape, GateSpec, ModelSpec

KVZAP_CONFIG, KVZAP_WEIGHTS = "config.json", "model.safetensors"
FASTKVZIP_REPOSITORY = "Jang-Hyun/Fast-KVzip"  # one folder per base model, in small letters
FASTKVZIP_FILES = "q*_dim16_sink16.pt"  # * = query heads per KV head
_FASTKVZIP_FILE = re.compile(r"q([1-9]\d*)_dim16_sink16\.pt")
_KVZAP_NAME = re.compile(r"KVzap-(?:mlp|linear)-(.+)")
_GGUF = re.compile(r"[-_.]gguf(:.*)?$")
HINT = "use the gates made for this model, or --gates streaming"


def is_kvzap(folder: Path) -> bool:
    """Tell whether a folder's config is that of KVzap gates."""
    try:
        config = json.loads((folder / KVZAP_CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "kvzap"


def fastkvzip_file(place: Path) -> Path | None:
    """Return the Fast KVzip gates that a file is, or that a folder holds.

    Raises:
        GateMismatch: it holds several.
    """
    if place.is_file():
        return place if _FASTKVZIP_FILE.fullmatch(place.name) else None
    found = sorted(path for path in place.glob(FASTKVZIP_FILES) if _FASTKVZIP_FILE.fullmatch(path.name))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise GateMismatch(f"{place} holds several gates: {names}", hint=f"give one: {found[0]}")
    return found[0] if found else None


def kvzap_gate(config: Mapping[str, Any], *, id: str) -> GateSpec:
    """Read the config.json of KVzap gates (arXiv 2601.07891): linear ones, or MLPs where it has a `hidden_dim`.

    Raises:
        GateMismatch: sizes that are missing, or no whole numbers above 0.
    """
    sizes = {key: _size(config, key, id) for key in ("input_dim", "output_dim", "n_modules")}
    named = _KVZAP_NAME.fullmatch(re.split(r"[/\\]", id.rstrip("/\\"))[-1])
    return GateSpec(
        variant="kvzap",
        id=id,
        hidden=0 if config.get("hidden_dim") is None else _size(config, "hidden_dim", id),
        base_model=named[1] if named else None,
        shape=GateShape(
            hidden_size=sizes["input_dim"], num_kv_heads=sizes["output_dim"], num_layers=sizes["n_modules"]
        ),
    )


def fastkvzip_gate(file: Path, *, id: str) -> GateSpec:
    """Read what the name of a file of Fast KVzip gates (arXiv 2601.17668) says, and its folder's: the base model."""
    named = _FASTKVZIP_FILE.fullmatch(file.name)
    assert named is not None, "a file that fastkvzip_file found"
    folder = file.resolve().parent.name if ":" not in id else id.rpartition(":")[2]
    return GateSpec(
        variant="fastkvzip",
        id=id,
        hidden=16,
        base_model=None if folder == "gates" else folder,
        shape=GateShape(queries_per_kv_head=int(named[1])),
    )


def _size(config: Mapping[str, Any], key: str, id: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise GateMismatch(f"{id}: {key} = {value!r} is not a whole number above 0", hint="get the gate folder again")
    return value


def check_fit(gate: GateSpec, model: ModelSpec, *, model_id: str) -> None:
    """Refuse gates of another family, of another shape, or that others made for another model of the hub.

    Raises:
        GateMismatch: they do not fit; all that differs is named.
    """
    if gate.model_type not in (None, model.model_type):
        raise GateMismatch(f"{gate.id} holds gates for {gate.model_type}, the model is {model.model_type}", hint=HINT)
    faults = ", ".join(_differences(gate.shape, model))
    if faults:
        base = f" ({gate.base_model})" if gate.base_model else ""
        raise GateMismatch(f"{gate.id} does not fit the model: it was made for {faults}{base}", hint=HINT)
    if gate.by_others and gate.base_model and _is_hub_id(model_id) and not named_after(model_id, gate.base_model):
        raise GateMismatch(
            f"{gate.id} was made for {gate.base_model}, not for {model_id}",
            hint=f"{HINT}; a model trained on from it is taken as a folder",
        )


def _differences(shape: GateShape | None, model: ModelSpec) -> Iterator[str]:
    if shape is None:
        return
    pairs = {
        "layers": (shape.num_layers, model.num_layers),
        "KV heads": (shape.num_kv_heads, model.num_kv_heads),
        "hidden size": (shape.hidden_size, model.hidden_size),
        "query heads per KV head": (shape.queries_per_kv_head, model.num_heads // model.num_kv_heads),
    }
    for name, (made, found) in pairs.items():
        if made is not None and made != found:
            yield f"{made} {name} instead of {found}" if name != "hidden size" else f"{name} {made} instead of {found}"


def _is_hub_id(model_id: str) -> bool:
    return model_id.partition(":")[0].count("/") == 1 and not Path(model_id).expanduser().exists()


def named_after(model_id: str, base: str) -> bool:
    """Tell whether a model's name holds its base's, as those of quantised copies do."""
    return base.rpartition("/")[2].lower() in model_id.lower().rpartition("/")[2]


def fastkvzip_name(model_id: str) -> str:
    """Return what the folder of a model's gates is called in the authors' repository."""
    return _GGUF.sub("", re.split(r"[/\\]", model_id.rstrip("/\\").lower())[-1])
