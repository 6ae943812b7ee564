"""What decides the numbers in a cache: two engines with one fingerprint understand each other's rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from trimkv_cli import __version__
from trimkv_cli.pins import Pins
from trimkv_cli.plan import Plan

_SAMPLED = 64  # values of each parameter; whole files would take as long to read as to load


def make_fingerprint(model: nn.Module, gates: Iterable[nn.Module], plan: Plan, pins: Pins) -> Mapping[str, str]:
    """Name what a row of the cache depends on, as strings: sizes as they are, weights as short hashes."""
    return {
        "trimkv": __version__,
        "weights": _hash(asdict(plan.spec), [model]),
        "gates": _hash({**asdict(plan.gate), "id": None}, gates),  # a folder may move
        "kv_budget": str(plan.kv_budget),
        "prefill_chunk": str(plan.prefill_chunk),
        "dtype": plan.dtype,
        "quantize": plan.quantize,
        "kv_dtype": plan.kv_dtype,
        "pins": str(pins),
    }


def _hash(config: Mapping[str, Any], modules: Iterable[nn.Module]) -> str:
    """Hash a configuration, and of each parameter its name, shape and some values spread over it."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for module in modules:
        # Not state_dict(): bitsandbytes turns packed weights back for it.
        for name, tensor in module.named_parameters(remove_duplicate=False):
            flat = tensor.reshape(-1)
            some = flat[:: max(1, len(flat) // _SAMPLED)].contiguous().view(torch.uint8)
            digest.update(f"{name}{list(tensor.shape)}".encode())
            digest.update(bytes(some.tolist()))
    return digest.hexdigest()[:16]
