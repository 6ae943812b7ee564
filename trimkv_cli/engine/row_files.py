"""Rows of finished requests kept aside, in memory and files: to undo a turn, fork a conversation, save a read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from trimkv_cli import __version__
from trimkv_cli.cache.linear_state import State
from trimkv_cli.cache.rebase import RebasedRow
from trimkv_cli.engine.devices import stored_parts
from trimkv_cli.errors import CacheMismatch, InputError
from trimkv_cli.files import whole_file
from trimkv_cli.model.pins import PromptSpan
from trimkv_cli.plan.plan import Plan
from trimkv_kernels import Slots


@dataclass(frozen=True, slots=True, kw_only=True)
class RowState:
    """One row of the cache between two requests, in host memory whatever the device.

    The token ids are the sampler's state too: every request starts its counts and steps anew from them.
    """

    layers: tuple[Slots, ...]  # [1, Hkv, slots in use, …] each
    token_ids: tuple[int, ...]  # fed to the row so far
    unread: tuple[int, ...]  # prompt tokens that a stopped request had not read
    last_token: int | None  # generated, not yet fed
    long_rope: bool
    prompt: PromptSpan = PromptSpan()
    rebased: RebasedRow | None = None
    states: tuple[State, ...] = ()  # [1, …] each

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers) + sum(state.nbytes for state in self.states)


_SAMPLED = 64  # values of each parameter; whole files would take as long to read as to load


def make_fingerprint(model: nn.Module, gates: Iterable[nn.Module], plan: Plan) -> Mapping[str, str]:
    """Name what a row of the cache depends on, as strings: sizes as they are, weights as short hashes."""
    shape = asdict(plan.run.spec)
    del shape["quantised"], shape["gguf"]  # the weights themselves differ
    return {
        "trimkv": __version__,
        "weights": _hash(shape, [model]),
        "gates": _hash({**asdict(plan.run.gate), "id": None}, gates),  # a folder may move
        "kv_budget": str(plan.run.kv_budget),
        "prefill_chunk": str(plan.run.prefill_chunk),
        "dtype": plan.run.dtype,
        "quantize": plan.run.quantize,
        "kv_dtype": plan.run.kv_dtype,
        "pins": str(plan.run.pins),
    }


def _hash(config: Mapping[str, Any], modules: Iterable[nn.Module]) -> str:
    """Hash a configuration, and of each parameter its name, shape and some values spread over it."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for module in modules:
        # Not state_dict(): bitsandbytes turns packed weights back for it.
        for name, tensor in module.named_parameters(remove_duplicate=False):
            digest.update(f"{name}{list(tensor.shape)}".encode())
            for flat in (part.reshape(-1) for part in stored_parts(tensor)):
                some = flat[:: max(1, len(flat) // _SAMPLED)].contiguous().view(torch.uint8)
                digest.update(bytes(some.tolist()))
    return digest.hexdigest()[:16]


FORMAT_VERSION = 2
_SAYS = {
    "trimkv": "another version of trimkv",
    "weights": "another model",
    "gates": "other gates",
    "kv_budget": "another --kv-budget",
    "prefill_chunk": "another --prefill-chunk",
    "dtype": "another --dtype",
    "quantize": "another --quantize",
    "kv_dtype": "another --kv-dtype",
    "pins": "another --pin",
}


def write_row(path: Path, state: RowState, *, model_id: str, fingerprint: Mapping[str, str]) -> None:
    """Write a file that only its owner may read; it appears whole or not at all.

    Raises:
        UsageError: there can be no such file.
        TrimkvError: the disk is full.
    """
    tensors = {"token_ids": torch.tensor(state.token_ids, dtype=torch.int64)}
    for index, layer in enumerate(state.layers):
        tensors |= {f"layers.{index}.{name}": tensor.contiguous() for name, tensor in layer._asdict().items()}
    for index, kept in enumerate(state.states):
        tensors |= {f"states.{index}.{name}": tensor.contiguous() for name, tensor in kept._asdict().items()}
    header: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "model": model_id,
        "fingerprint": dict(fingerprint),
        "token_ids_sha256": hash_ids(state.token_ids),
        "unread": state.unread,
        "last_token": state.last_token,
        "long_rope": state.long_rope,
        "prompt": asdict(state.prompt),
    }
    if state.rebased is not None:
        tensors |= {f"ranks.{index}": ranks for index, ranks in enumerate(state.rebased.ranks)}
        header["rebased"] = [state.rebased.offset, state.rebased.since]
    with whole_file(path, private=True) as partial:
        save_file(tensors, partial, metadata={"trimkv": json.dumps(header)})


def read_row(path: Path, *, model_id: str, fingerprint: Mapping[str, str]) -> RowState:
    """Read a file that `write_row` wrote for an engine with this fingerprint.

    Raises:
        InputError: no such file, or not a whole one of this kind.
        CacheMismatch: another model, other gates, sizes or another version made it; all are named.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(file.metadata())
            _check(path, header, model_id, fingerprint)
            names = list(file.keys())
            layers = range(sum(name.endswith(".position") for name in names))
            states = range(sum(name.endswith(".recurrent") for name in names))
            state = RowState(
                layers=tuple(
                    Slots(*(file.get_tensor(f"layers.{index}.{name}") for name in Slots._fields)) for index in layers
                ),
                token_ids=tuple(file.get_tensor("token_ids").tolist()),
                unread=tuple(header["unread"]),
                last_token=header["last_token"],
                long_rope=header["long_rope"],
                prompt=PromptSpan(**header["prompt"]),
                rebased=_rebased(file, header, len(layers)),
                states=tuple(
                    State(*(file.get_tensor(f"states.{index}.{name}") for name in State._fields)) for index in states
                ),
            )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {path}: {error}", hint="give a file that --save-cache wrote") from error
    if hash_ids(state.token_ids) != header["token_ids_sha256"]:
        raise InputError(f"{path} is damaged: its token ids are not those that were written", hint="save it again")
    return state


def hash_ids(token_ids: Sequence[int]) -> str:
    """Hash token ids, so that a transcript and a cache can be told to belong together."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()


def _rebased(file: Any, header: Mapping[str, Any], num_layers: int) -> RebasedRow | None:
    if "rebased" not in header:
        return None
    offset, since = header["rebased"]
    ranks = tuple(file.get_tensor(f"ranks.{index}") for index in range(num_layers))
    return RebasedRow(offset=offset, since=since, ranks=ranks)


def _header(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if metadata is None or "trimkv" not in metadata:
        raise ValueError("it holds no saved cache")
    header: dict[str, Any] = json.loads(metadata["trimkv"])
    return header


def _check(path: Path, header: Mapping[str, Any], model_id: str, fingerprint: Mapping[str, str]) -> None:
    if header["format"] != FORMAT_VERSION:
        raise CacheMismatch(f"{path} has format {header['format']}, this trimkv reads {FORMAT_VERSION}", hint=_AGAIN)
    made = header["fingerprint"]
    faults = [
        f"{said} ({header['model']}, here {model_id})"
        if name == "weights"
        else f"{said} ({made.get(name)}, here {fingerprint[name]})"
        for name, said in _SAYS.items()
        if made.get(name) != fingerprint[name]
    ]
    if faults:
        raise CacheMismatch(f"{path} was made with {', '.join(faults)}", hint=_AGAIN)


_AGAIN = "give the options that made it, or read the text again"
