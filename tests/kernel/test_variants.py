"""How many kernels are compiled as rows fill: each takes up to a second in which every row waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimkv_kernels import Journal, Slots

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from trimkv_kernels import decode as triton_decode
from trimkv_kernels import prefill as triton_prefill
from trimkv_kernels import ranking

ROWS, HEADS, GROUPS, DIM = 2, 2, 2, 16
FILLS = (0, 1, 15, 16, 17, 64, 65, 500, 640, 699, 700)


class Variants:
    """Take the place of a kernel: run nothing, and remember by what it would be compiled."""

    def __init__(self, kernel: Any) -> None:
        compiled = JITFunction(kernel.fn, do_not_specialize=self._fixed(kernel))
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self._bind: Any = create_function_from_signature(compiled.signature, compiled.params, backend)
        self.seen: set[str] = set()

    @staticmethod
    def _fixed(kernel: Any) -> Any:
        return kernel.do_not_specialize if isinstance(kernel, JITFunction) else kernel.kwargs["do_not_specialize"]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            _, *of_what = self._bind(*args, **kwargs)
            self.seen.add(str(of_what))

        return launch


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Variants]:
    owners = {"_scan": triton_decode, "_merge": triton_decode, "_attend": triton_prefill, "_move": triton_prefill}
    owners["_rank"] = ranking
    spies = {name: Variants(getattr(module, name)) for name, module in owners.items()}
    for name, module in owners.items():
        monkeypatch.setattr(module, name, spies[name])
    return spies


def make_slots(size: int) -> Slots:
    where: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    return Slots.empty(rows=ROWS, num_kv_heads=HEADS, slots=size, head_dim=DIM, **where)


def test_a_kernel_is_compiled_once_however_full_the_slots_are(kernels: dict[str, Variants]) -> None:
    """Catches a number of tokens, slots or splits among the constants, and what is compiled for multiples of 16."""
    how: dict[str, Any] = {"scale": 1.0, "window": None}
    for size in (40, 700, 704):
        slots = make_slots(size)
        journal = Journal.beside(slots)
        for fill in (fill for fill in FILLS if fill <= size):
            one = [torch.zeros(ROWS, heads, DIM) for heads in (HEADS * GROUPS, HEADS, HEADS)]
            last = torch.zeros(ROWS, HEADS), torch.full((ROWS,), fill, dtype=torch.int32)
            triton_decode.decode(*one, *last, slots, journal, fill=fill, dense=False, **how)
            for length in (1, 5, 16):
                chunk = [torch.zeros(ROWS, heads, length, DIM) for heads in (HEADS * GROUPS, HEADS, HEADS)]
                positions = torch.arange(fill, fill + length, dtype=torch.int32).expand(ROWS, length)
                given = (*chunk, torch.zeros(ROWS, HEADS, length), positions, slots)
                triton_prefill.prefill(*given, rows=torch.arange(ROWS), fill=fill, **how)
    assert {name: len(kernel.seen) for name, kernel in kernels.items()} == dict.fromkeys(kernels, 1)
