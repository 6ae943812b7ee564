"""Stage 1: the operations at the shapes of real models, beside attention in float64 and the reference's evictions."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bench.gpu_stages.stage import Check, Evidence, Setting
from trimkv_kernels import (
    Journal,
    Operations,
    Slots,
    StepOperations,
    operations_for,
    reference,
    step_operations_for,
    step_reference,
)
from trimkv_kernels.slots import LayerTable
from trimkv_kernels.step_reference import Norm

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of an output vector's length: what rounding the weights and the result to this dtype may come to.
TOLERANCE = {"fp32": 2e-5, "fp16": 3e-3, "bf16": 2e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One call of each operation: `fill` slots of each head are in use, the prefill feeds `chunk` tokens."""

    rows: int
    num_kv_heads: int
    groups: int
    head_dim: int
    slots: int
    fill: int
    chunk: int
    dtype: Literal["fp32", "fp16", "bf16"]
    window: int | None = None


def shapes(setting: Setting) -> Iterator[Shape]:
    """Yield Qwen3-4B's heads, then other widths and dtypes; small ones for a rehearsal."""
    if setting.tiny:
        small: dict[str, Any] = {"num_kv_heads": 2, "groups": 2, "head_dim": 16, "slots": 37, "chunk": 9}
        for dtype in ("fp32", "bf16"):
            yield Shape(rows=1, fill=37, dtype=dtype, **small)
            yield Shape(rows=3, fill=20, dtype=dtype, **small)
        yield Shape(rows=2, fill=30, dtype="fp32", window=11, **small)
        return
    qwen3: dict[str, Any] = {"num_kv_heads": 8, "groups": 4, "head_dim": 128, "chunk": 512}
    for slots in (1024, 4096):
        for rows in (1, 8):
            yield Shape(rows=rows, slots=slots, fill=slots, dtype="bf16", **qwen3)
    yield Shape(rows=8, slots=1024, fill=700, dtype="bf16", **qwen3)
    yield Shape(rows=8, slots=1024, fill=1024, dtype="bf16", window=1024, **qwen3)
    yield Shape(rows=2, slots=1024, fill=1024, dtype="fp16", **qwen3)
    yield Shape(rows=2, slots=1024, fill=1024, dtype="fp32", **qwen3)
    odd: dict[str, Any] = {"rows": 2, "num_kv_heads": 4, "slots": 601, "fill": 601, "chunk": 100}
    yield Shape(groups=8, head_dim=96, dtype="fp16", **odd)
    yield Shape(groups=4, head_dim=256, dtype="bf16", **odd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Slots and a chunk of new tokens; a decode feeds the chunk's first token."""

    slots: Slots
    query: Tensor
    key: Tensor
    value: Tensor
    log_beta: Tensor
    positions: Tensor


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Fill slots in any order; others have what may be read and not be seen. The last of several rows gets no token."""
    generator = torch.Generator().manual_seed(shape.slots + shape.head_dim)
    dtype, heads = DTYPES[shape.dtype], shape.num_kv_heads

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    slots = Slots.empty(
        rows=shape.rows, num_kv_heads=heads, slots=shape.slots, head_dim=shape.head_dim, dtype=dtype, device=device
    )
    for tensor, empty in ((slots.key, torch.nan), (slots.value, 96.0)):
        tensor.fill_(empty)
        tensor[:, :, : shape.fill] = normal(shape.rows, heads, shape.fill, shape.head_dim)
    order = torch.rand(shape.rows, heads, shape.fill, generator=generator).argsort(-1)
    slots.position[:, :, : shape.fill] = order.int().to(device)
    slots.log_beta[:, :, : shape.fill] = -torch.rand(shape.rows, heads, shape.fill, generator=generator).to(device)
    positions = torch.arange(shape.fill, shape.fill + shape.chunk, dtype=torch.int32).repeat(shape.rows, 1)
    if shape.rows > 1:
        positions[-1] = -1
    new = (shape.rows, heads, shape.chunk)
    return Inputs(
        slots=slots,
        query=normal(shape.rows, heads * shape.groups, shape.chunk, shape.head_dim),
        key=normal(*new, shape.head_dim),
        value=normal(*new, shape.head_dim),
        log_beta=-0.3 * torch.rand(new, generator=generator).to(device),
        positions=positions.to(device),
    )


def attend(inputs: Inputs, shape: Shape, tokens: int) -> Tensor:
    """Return `[R, Hq, tokens, D]` in float64: softmax over the slots in use and the chunk up to each query."""
    rows = [_attend_row(inputs, shape, tokens, row) for row in range(shape.rows)]
    return torch.stack(rows)


def _attend_row(inputs: Inputs, shape: Shape, tokens: int, row: int) -> Tensor:
    now = inputs.positions[row, :tokens]
    new = now.expand(shape.num_kv_heads, -1)
    held = torch.cat([inputs.slots.position[row, :, : shape.fill], new], dim=1)
    keys, values = (
        torch.cat([old[row, :, : shape.fill], fresh[row, :, :tokens]], dim=1).double()
        for old, fresh in ((inputs.slots.key, inputs.key), (inputs.slots.value, inputs.value))
    )
    hidden = (held < 0)[:, None] | (held[:, None] > now[:, None])
    if shape.window is not None:
        hidden |= held[:, None] <= now[:, None] - shape.window
    query = inputs.query[row, :, :tokens].double().view(shape.num_kv_heads, shape.groups, tokens, -1)
    logits = query @ keys[:, None].transpose(2, 3) * shape.head_dim**-0.5
    weights = logits.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    return (weights @ values[:, None]).flatten(0, 1)


def decode(operations: Operations, inputs: Inputs, shape: Shape) -> tuple[Tensor, list[Tensor]]:
    """Return what a decode gives `[R, Hq, 1, D]`, and the slots and the journal after it."""
    slots = Slots(*(tensor.clone() for tensor in inputs.slots))
    journal = Journal.beside(slots)
    one = [tensor[:, :, 0] for tensor in (inputs.query, inputs.key, inputs.value, inputs.log_beta)]
    output = operations.decode(*one, inputs.positions[:, 0], slots, journal, dense=False, **_settings(shape))
    return output[:, :, None], [*slots, *journal]


def prefill(operations: Operations, inputs: Inputs, shape: Shape) -> tuple[Tensor, list[Tensor]]:
    """Return what a prefill of the whole chunk gives `[R, Hq, T, D]`, and the slots after it."""
    slots = Slots(*(tensor.clone() for tensor in inputs.slots))
    new = inputs.query, inputs.key, inputs.value, inputs.log_beta, inputs.positions
    rows = torch.arange(shape.rows, device=inputs.positions.device)
    return operations.prefill(*new, slots, rows=rows, **_settings(shape)), [*slots]


def _settings(shape: Shape) -> dict[str, Any]:
    return {"fill": shape.fill, "scale": shape.head_dim**-0.5, "window": shape.window}


def compare(operations: Operations, shape: Shape, device: torch.device) -> Iterator[Evidence]:
    """Run both operations once, and their reference beside them."""
    plain = Operations(reference.decode, reference.prefill)
    inputs = make_inputs(shape, device)
    fed = max(1, shape.rows - 1)
    for name, operation, tokens in (("decode", decode, 1), ("prefill", prefill, shape.chunk)):
        got, after = operation(operations, inputs, shape)
        _, expected = operation(plain, inputs, shape)
        want = attend(inputs, shape, tokens)[:fed]
        error = ((got[:fed].double() - want).norm(dim=-1) / want.norm(dim=-1)).max().item()
        same = all(
            torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(after, expected, strict=True)
        )
        changed = int((after[3] != inputs.slots.position).sum())
        ok = error <= TOLERANCE[shape.dtype] and same and changed > 0
        facts = {"error": error, "slots_equal": same, "slots_changed": changed, **asdict(shape)}
        yield Evidence(check=f"{name} {shape.dtype} rows {shape.rows} M {shape.slots} D {shape.head_dim}"
                             f"{'' if shape.window is None else ' window'}", ok=ok, facts=facts)  # fmt: skip


def compare_steps(run: StepOperations, shape: Shape, device: torch.device) -> Iterator[Evidence]:
    """Run what stands between the products of a whole step once, in two layers, and its reference beside it."""
    plain = StepOperations.of(step_reference)
    inputs = make_inputs(shape, device)
    got, after = _step(run, inputs, shape)
    want, expected = _step(plain, inputs, shape)
    # Of another's rounding, as often as something is rounded on the way.
    worst = {name: _worst(got[name], value) for name, value in want.items()}
    same = all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(after, expected, strict=True))
    changed = int((after[3] != inputs.slots.position).sum())
    ok = same and changed > 0 and all(error <= TOLERANCE[shape.dtype] for error in worst.values())
    facts = {"errors": worst, "slots_equal": same, "slots_changed": changed, **asdict(shape)}
    yield Evidence(check=f"step {shape.dtype} rows {shape.rows} M {shape.slots} D {shape.head_dim}"
                         f"{'' if shape.window is None else ' window'}", ok=ok, facts=facts)  # fmt: skip


def _worst(got: Tensor, want: Tensor) -> float:
    rows = got.double().flatten(1), want.double().flatten(1)
    return float(((rows[0] - rows[1]).norm(dim=-1) / rows[1].norm(dim=-1)).max().item())


def _step(run: StepOperations, inputs: Inputs, shape: Shape) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return what each operation makes of the first token of those rows that have one, and the last layer's slots."""
    layers = []
    for _ in range(2):
        slots = Slots(*(tensor.clone() for tensor in inputs.slots))
        layers.append((slots, Journal.beside(slots)))
    fed = max(1, shape.rows - 1)
    position, dtype = inputs.positions[:, 0].contiguous(), inputs.query.dtype
    query, key, value = (each[:, :, 0].flatten(1) for each in (inputs.query, inputs.key, inputs.value))
    qkv, width = torch.cat([query, key, value], dim=1), query.shape[1]
    wide, narrow = (
        Norm(torch.linspace(0.5, 1.5, size, device=query.device).to(dtype), 1e-6, 1.0)
        for size in (width, shape.head_dim)
    )
    stream = query.clone()
    made = {"norm": run.add_norm(stream, query.flip(1).contiguous(), wide, before=wide), "stream": stream}
    angles = position.float()[:, None] / torch.arange(1, shape.head_dim // 2 + 1, device=query.device)
    cos, sin = torch.cat((angles.cos(),) * 2, dim=-1), torch.cat((-angles.sin(), angles.sin()), dim=-1)
    keys, values = (query.new_empty(2, shape.rows, shape.num_kv_heads, shape.head_dim) for _ in range(2))
    lowest = torch.empty(2, shape.rows, shape.num_kv_heads, device=query.device)
    loser = lowest.int()
    for layer, (slots, _) in enumerate(layers):
        new = {"key": keys[layer], "value": values[layer], "query_norm": narrow, "key_norm": narrow}
        turned = run.rotate(qkv, cos, sin, **new)
        given = inputs.query[:, :, 0], inputs.key[:, :, 0], inputs.value[:, :, 0]
        found = {"lowest": lowest[layer], "loser": loser[layer]}
        how: dict[str, Any] = {"scale": shape.head_dim**-0.5, "window": shape.window, **found}
        made["attended"] = run.attend(*given, position, slots, **how)
    made |= {"query": turned, "key": keys[1].clone(), "value": values[1].clone()}
    made |= {"active": run.activate(qkv, "silu"), "active too": run.activate(qkv, "gelu_tanh")}
    for new, given in ((keys, inputs.key), (values, inputs.value)):  # exactly the same for both to evict with
        new.copy_(given[:, :, 0])
    log_beta = inputs.log_beta[:, :, 0].expand(2, -1, -1)
    run.evict(keys, values, log_beta, position, LayerTable.of(layers), lowest=lowest, loser=loser)
    return {name: tensor[:fed] for name, tensor in made.items()}, [
        *layers[1][0],
        *(each[:fed] for each in layers[1][1]),
    ]


def steps(setting: Setting) -> Iterator[Evidence]:
    """Compare a whole step's operations at every shape."""
    chosen = step_operations_for(setting.device)
    yield Evidence(check="a step has its own kernels", ok=(chosen is not None) == setting.on_gpu, facts={})
    for shape in shapes(setting):
        yield from compare_steps(chosen or StepOperations.of(step_reference), shape, setting.device)


def kernels(setting: Setting) -> Iterator[Evidence]:
    """Count the kernels of one layer at real sizes: what the GPU ran, those of a product counted singly."""
    from bench.step_kernels import counted  # transformers, which the other checks do without

    for form in ("qwen3", "llama", "gemma3_text"):
        for rows in (1, 8):
            if setting.on_gpu:
                few, more = (_ran(form, layers=layers, rows=rows, device=setting.device) for layers in (2, 3))
                facts: dict[str, Any] = {"per_layer": len(more) - len(few), "step": few}
            else:
                facts = counted(form, rows=rows)
            yield Evidence(check=f"kernels {form} rows {rows}", ok=facts["per_layer"] <= 12, facts=facts)


def _ran(form: str, *, layers: int, rows: int, device: torch.device) -> list[str]:
    """Return the names of what a decode step ran on a GPU."""
    from bench.step_kernels import real_step

    with real_step(form, layers=layers, rows=rows, device=device) as run:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
    ran = [event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name[:80] for event in sorted(ran, key=lambda event: event.time_range.start)]


def operations(setting: Setting) -> Iterator[Evidence]:
    """Compare what this device gets, at every shape."""
    chosen = operations_for(setting.device)
    triton = chosen.decode is not reference.decode
    yield Evidence(check="triton is what is compared", ok=triton == setting.on_gpu, facts={"triton": triton})
    for shape in shapes(setting):
        yield from compare(chosen, shape, setting.device)


def interpreted(setting: Setting) -> Iterator[Evidence]:
    """Run the kernels of Triton at the smallest shape in its interpreter: a rehearsal has them nowhere else."""
    if setting.on_gpu or importlib.util.find_spec("triton") is None:
        where = "a GPU" if setting.on_gpu else "no triton"
        yield Evidence(check="interpreter", ok=True, facts={"left_out": where})
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", "bench.gpu_stages.smoke"], env=environment, check=False)
    yield Evidence(check="interpreter", ok=done.returncode == 0, facts={"exit_code": done.returncode})


def _interpret() -> int:
    """Compare Triton's operations in the interpreter, on the CPU."""
    from trimkv_kernels import step
    from trimkv_kernels.decode import decode as triton_decode
    from trimkv_kernels.prefill import prefill as triton_prefill

    shape = Shape(rows=2, num_kv_heads=1, groups=2, head_dim=16, slots=9, fill=5, chunk=3, dtype="fp32")
    found = list(compare(Operations(triton_decode, triton_prefill), shape, torch.device("cpu")))
    found += compare_steps(StepOperations.of(step), shape, torch.device("cpu"))
    print(*found, sep="\n")
    return int(len(found) < 3 or any(not one.ok for one in found))


CHECKS: tuple[Check, ...] = (operations, steps, kernels, interpreted)

if __name__ == "__main__":
    sys.exit(_interpret())
