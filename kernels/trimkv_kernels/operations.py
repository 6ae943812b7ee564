"""Which implementation of the operations a device gets, chosen once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trimkv_kernels import reference


class Operations(NamedTuple):
    """The operations of one device; `reference` says what they do."""

    decode: Callable[..., Tensor]
    prefill: Callable[..., Tensor]


def operations_for(device: torch.device) -> Operations:
    """Return the Triton operations on a CUDA device, elsewhere the reference."""
    if device.type != "cuda":
        return Operations(reference.decode, reference.prefill)
    from trimkv_kernels.decode import decode
    from trimkv_kernels.prefill import prefill

    return Operations(decode, prefill)
