"""How many bytes a run takes: every part, counted from the shapes that will be allocated."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimkv_cli.machine import MIB, Machine
from trimkv_cli.spec import DTYPE_BYTES, Dtype, GateSpec, KvDtype, ModelSpec, Quantisation, gate_bytes
from trimkv_cli.weights import weight_bytes
from trimkv_cli.workspace import PENALTY_BYTES, Step, dequantising_bytes, forward_bytes, sampling_bytes

_REORDERED_FROM = 3  # rows that decode together
_RANK_BYTES = 4  # per slot, where positions are given anew
_QUANTISING_BYTES = 16  # per weight, of the one matrix that is being quantised or repacked
_HEAP_BYTES = 40 * MIB  # of small things: tokenizer, objects of a run, ends of blocks, holes that loading leaves
_CUDA_BLOCKS = 64 * MIB  # blocks of the caching allocator that are cut and not full
_GRAPH_BYTES = 64 * MIB  # the private pools of captured steps
_QUANTISER_BYTES = 64 * MIB  # of host memory: bitsandbytes, what it imports, and what it leaves in the heap


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes that decide the bytes; a chunk of 0 is the whole prompt."""

    kv_budget: int
    prefill_chunk: int
    rows: int
    dtype: Dtype
    kv_dtype: KvDtype
    quantize: Quantisation = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a run needs beside its shape: the longest prompt, rows that decode pads to, the device."""

    longest_prompt: int
    padded_rows: int
    device: str
    counts_runtime: bool
    snapshots: int = 0
    rebases: bool = False
    machine: Machine = field(default_factory=Machine)

    @property
    def packs_nf4(self) -> bool:
        """Whether nf4 matrices are laid out anew for this machine's CPU."""
        return self.device == "cpu" and self.machine.packs_nf4

    @property
    def reorders_halves(self) -> bool:
        """Whether 16-bit matrices are there a second time, laid out anew for this machine's CPU."""
        return self.device == "cpu" and self.machine.reorders_halves

    @property
    def threads(self) -> int:
        """How many threads hold blocks of their own at a time."""
        return self.machine.threads if self.device == "cpu" else 1

    @property
    def packs_keys(self) -> bool:
        """Whether keys and values in bf16 are laid out anew for this machine's CPU."""
        return self.device == "cpu" and self.machine.packs_keys


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a plan."""

    name: str
    bytes: int


def footprint(spec: ModelSpec, gate: GateSpec, shape: Shape, around: Surroundings) -> tuple[Part, ...]:
    """Count every part of a run's memory."""
    rows = max(shape.rows, around.padded_rows)
    shares_prefix = shape.rows > 1 and shape.prefill_chunk > 0
    row_bytes = spec.kv_bytes_per_row(shape.kv_budget, DTYPE_BYTES[shape.kv_dtype])
    journal_bytes = spec.journal_bytes_per_row(DTYPE_BYTES[shape.kv_dtype])
    rank_bytes = spec.num_layers * spec.num_kv_heads * shape.kv_budget * _RANK_BYTES
    forward, sampling = workspace_bytes(spec, gate, shape, around), sampling_bytes(spec, rows)
    parts = [
        Part("weights", weight_bytes(spec, shape.dtype, shape.quantize, packs_nf4=around.packs_nf4)),
        Part("reordered", _reordered_bytes(spec, shape, rows) if around.reorders_halves else 0),
        Part("gates", gate_bytes(spec, gate, shape.dtype)),
        Part("kv", rows * row_bytes),
        Part("shared_prefix", row_bytes if shares_prefix else 0),
        Part("rebase", (rows + shares_prefix) * rank_bytes if around.rebases else 0),
        Part("journal", (rows + shares_prefix) * journal_bytes),
        Part("undo", around.snapshots * row_bytes if around.device == "cpu" else 0),
        Part("workspace", forward),
        Part("logits", max(0, sampling - forward) + rows * spec.vocab_size * PENALTY_BYTES),
        Part("dequantised", _dequantised_bytes(spec, gate, shape, around, forward)),
        Part("graphs", _GRAPH_BYTES if around.device == "cuda" else 0),
    ]
    parts.append(Part("loading", _loading_bytes(spec, shape, around, later=sum(part.bytes for part in parts[1:]))))
    if around.counts_runtime:
        parts.append(Part("slack", slack_bytes(sum(part.bytes for part in parts), around.device)))
        parts.append(Part("runtime", around.machine.runtime_bytes(around.device)))
        parts.append(Part("quantiser", _QUANTISER_BYTES if shape.quantize != "none" and around.device == "cpu" else 0))
    return tuple(parts)


def workspace_bytes(spec: ModelSpec, gate: GateSpec, shape: Shape, around: Surroundings) -> int:
    """Count what one step allocates."""
    return forward_bytes(spec, _step(gate, shape, around))


def _step(gate: GateSpec, shape: Shape, around: Surroundings) -> Step:
    return Step(
        kv_budget=shape.kv_budget,
        tokens=shape.prefill_chunk or around.longest_prompt,
        rows=max(shape.rows, around.padded_rows),
        dtype=shape.dtype,
        kv_dtype=shape.kv_dtype,
        quantize=shape.quantize,
        device=around.device,
        gate_hidden=gate.hidden if gate.trained else 0,
        threads=around.threads,
        packs_keys=around.packs_keys,
    )


def slack_bytes(allocated: int, device: str) -> int:
    """Count what an allocator takes beyond what is asked of it: ends of blocks, and holes between them."""
    return allocated // 32 + (_CUDA_BLOCKS if device == "cuda" else _HEAP_BYTES)


def _loading_bytes(spec: ModelSpec, shape: Shape, around: Surroundings, *, later: int) -> int:
    """Count what loading takes beyond what running does: the tensors in transit, as stored and as they become."""
    matrix = max(rows * columns for rows, columns in spec.matrices)
    if around.device != "cpu":  # what is read lies in host memory; a matrix is there whole while it is quantised
        return max(0, 2 * matrix * DTYPE_BYTES[shape.dtype] - later) if shape.quantize != "none" else 0
    embeddings = spec.vocab_size * spec.hidden_size
    stored = DTYPE_BYTES[spec.dtype] if shape.dtype != spec.dtype or shape.quantize != "none" else 0
    transit = (embeddings + 3 * matrix) * stored  # up to four files' readers at a time
    if shape.quantize != "none":
        transit = max(transit, matrix * (DTYPE_BYTES[shape.dtype] + _QUANTISING_BYTES))
    return max(0, transit - later)


def _reordered_bytes(spec: ModelSpec, shape: Shape, rows: int) -> int:
    """Count the decoder's matrices once more: what several rows in 16 bits were seen to take beside them."""
    if shape.quantize != "none" or DTYPE_BYTES[shape.dtype] != 2 or rows < _REORDERED_FROM:
        return 0
    return spec.num_layers * sum(outputs * inputs for outputs, inputs in spec.matrices) * 2


def _dequantised_bytes(spec: ModelSpec, gate: GateSpec, shape: Shape, around: Surroundings, forward: int) -> int:
    """Count what a step takes beyond `forward` while a matrix is brought back to full precision to be multiplied."""
    if shape.quantize != "nf4" or around.packs_nf4:
        return 0
    return max(0, dequantising_bytes(spec, _step(gate, shape, around)) - forward)
