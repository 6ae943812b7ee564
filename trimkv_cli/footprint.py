"""How many bytes a run takes: every part, counted from the shapes that will be allocated."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimkv_cli.machine import Machine
from trimkv_cli.spec import DTYPE_BYTES, Dtype, GateSpec, KvDtype, ModelSpec, Quantisation, gate_bytes
from trimkv_cli.weights import weight_bytes

# Per logit: float32 scores, 64-bit weights, sorted copies with indices, sums, two counts, bias, log probabilities.
_SAMPLER_BYTES = 88
_EVICTION_BYTES = 64  # per candidate: score, rank, order and their intermediates
_RANK_BYTES = 4  # per slot, where positions are given anew
_SCORE_BYTES = 16  # per query and key: mask, logits, probabilities in float32


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
    copies: int = 0
    rebases: bool = False
    machine: Machine = field(default_factory=Machine)

    @property
    def packs_nf4(self) -> bool:
        """Whether nf4 matrices are laid out anew for this machine's CPU."""
        return self.device == "cpu" and self.machine.packs_nf4


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a plan."""

    name: str
    bytes: int


def footprint(spec: ModelSpec, gate: GateSpec, shape: Shape, around: Surroundings) -> tuple[Part, ...]:
    """Count every part of a run's memory."""
    rows = max(shape.rows, around.padded_rows)
    row_bytes = spec.kv_bytes_per_row(shape.kv_budget, DTYPE_BYTES[shape.kv_dtype])
    journal_bytes = spec.journal_bytes_per_row(DTYPE_BYTES[shape.kv_dtype])
    rank_bytes = spec.num_layers * spec.num_kv_heads * shape.kv_budget * _RANK_BYTES
    shares_prefix = shape.rows > 1 and shape.prefill_chunk > 0
    parts = [
        Part("weights", weight_bytes(spec, shape.dtype, shape.quantize, packs_nf4=around.packs_nf4)),
        Part("gates", gate_bytes(spec, gate, shape.dtype)),
        Part("kv", rows * row_bytes),
        Part("shared_prefix", row_bytes if shares_prefix else 0),
        Part("rebase", (rows + shares_prefix) * rank_bytes if around.rebases else 0),
        Part("journal", (rows + shares_prefix) * journal_bytes),
        Part("workspace", workspace_bytes(spec, shape, around)),
    ]
    parts.append(Part("loading", _loading_bytes(spec, shape, around, later=sum(part.bytes for part in parts[1:]))))
    if around.counts_runtime:
        parts.append(Part("runtime", around.machine.runtime_bytes(around.device)))
    return tuple(parts)


def workspace_bytes(spec: ModelSpec, shape: Shape, around: Surroundings) -> int:
    """Count what one step of the torch reference path allocates: the larger of prefill and decode, and sampling.

    Only one layer's tensors live at a time.
    """
    rows, tokens = max(shape.rows, around.padded_rows), shape.prefill_chunk or around.longest_prompt
    prefill = _activation_bytes(spec, shape, tokens) + _prefill_bytes(spec, shape, rows=rows, tokens=tokens)
    decode = _activation_bytes(spec, shape, rows) + _decode_bytes(spec, shape, rows=rows)
    return max(prefill, decode) + rows * spec.vocab_size * _SAMPLER_BYTES + _repacked_bytes(spec, shape, around)


def _loading_bytes(spec: ModelSpec, shape: Shape, around: Surroundings, *, later: int) -> int:
    """Count what loading on a CPU takes beyond what running does: the stored weights beside their converted copy."""
    converts = around.device == "cpu" and shape.dtype != spec.dtype
    return max(0, spec.weight_bytes - later) if converts else 0


def _repacked_bytes(spec: ModelSpec, shape: Shape, around: Surroundings) -> int:
    """Count the copy of its largest matrix that a CPU makes for a product in 16 bits."""
    if around.device != "cpu" or shape.dtype == "fp32":
        return 0
    return max(spec.vocab_size, spec.intermediate_size) * spec.hidden_size * DTYPE_BYTES[shape.dtype]


def _activation_bytes(spec: ModelSpec, shape: Shape, tokens: int) -> int:
    """Hidden states (residual, norm, output; the norm in float32), Q/K/V before and after RoPE, the MLP's three."""
    heads = 2 * (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    compute = 4 * spec.hidden_size + heads + 3 * spec.intermediate_size
    return tokens * (compute * DTYPE_BYTES[shape.dtype] + 2 * spec.hidden_size * 4)


def _prefill_bytes(spec: ModelSpec, shape: Shape, *, rows: int, tokens: int) -> int:
    """Slots gathered and joined with the chunk, repeated for grouped queries; scores; what eviction ranks.

    The rows of one prefill share `tokens`, so their chunks add up to it.
    """
    slots = _largest_layer(spec, shape)
    candidates = rows * slots + tokens
    kv = candidates * spec.head_dim * DTYPE_BYTES[shape.dtype] * 2
    scores = spec.num_heads * tokens * (slots + tokens) * _SCORE_BYTES
    evict = candidates * spec.num_kv_heads * _EVICTION_BYTES
    return kv * (2 * spec.num_kv_heads + spec.num_heads) + scores + evict


def _decode_bytes(spec: ModelSpec, shape: Shape, *, rows: int) -> int:
    """K and V of all slots in float32, scores of one query per head, what eviction ranks."""
    slots = rows * _largest_layer(spec, shape)
    kv = slots * spec.num_kv_heads * spec.slot_numel * 4
    return kv + slots * (spec.num_heads * _SCORE_BYTES + spec.num_kv_heads * _EVICTION_BYTES)


def _largest_layer(spec: ModelSpec, shape: Shape) -> int:
    return max(spec.slots(layer, shape.kv_budget) for layer in range(spec.num_layers))
