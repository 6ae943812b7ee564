"""How many bytes a run takes: every part, counted from the shapes that will be allocated."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimkv_cli.model.machine import MIB, Machine
from trimkv_cli.model.spec import DTYPE_BYTES, Dtype, GateSpec, KvDtype, ModelSpec, Quantisation, gate_bytes

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


SAMPLING_BYTES = 44  # per logit, with every filter on: scores, their order, weights in 64 bits, running sums
PENALTY_BYTES = 12  # per logit, kept between steps: what was seen, what was made, a bias
_BLOCK_LOGITS = 1024  # of which sums are taken: a vocabulary is padded to a multiple
_INT8_BYTES = 16  # per output of a quantised product: sums in 32 bits, scaled twice, and cast
_EVICTION_BYTES = 64  # per candidate of a chunk: score, rank, order and their intermediates
_PACKED_FROM = 64  # queries and keys
_DECODERS = ("llama", "mistral", "phi3", "qwen2", "qwen3")  # families that decode without modules on a CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The sizes that decide what a step allocates: `rows` decode together, `tokens` of prompts are read together."""

    kv_budget: int
    tokens: int
    rows: int
    dtype: Dtype
    kv_dtype: KvDtype
    quantize: Quantisation
    device: str
    gate_hidden: int = 0  # width of the gates; 0 for constant ones
    threads: int = 1
    packs_keys: bool = False  # in bf16, on a CPU with matrix tiles

    @property
    def bytes(self) -> int:
        """Bytes of a number that the model computes with."""
        return DTYPE_BYTES[self.dtype]


def forward_bytes(spec: ModelSpec, step: Step) -> int:
    """Count the larger of a prefill and a decode."""
    steps = (_attention_bytes(spec, step), _mlp_bytes(spec, step, step.tokens), _decode_bytes(spec, step))
    return max(*steps, _gate_bytes(spec, step), _head_bytes(spec, step))


def dequantising_bytes(spec: ModelSpec, step: Step) -> int:
    """Count a step while its largest matrices are unpacked: one that widens vectors, then the one that narrows them."""
    tokens = max(step.tokens, step.rows)
    hidden, inner = 4 * spec.hidden_size * step.bytes, spec.intermediate_size
    narrowing = max(rows * columns for rows, columns in spec.matrices if columns == inner)
    widening = max(rows * columns for rows, columns in spec.matrices if rows >= inner)
    moments = (
        tokens * (hidden + 2 * inner * step.bytes) + widening * step.bytes,
        tokens * (hidden + _wide_bytes(spec, step)) + narrowing * step.bytes,
    )
    return max(moments) + _inputs_bytes(spec, step, tokens)


def sampling_bytes(spec: ModelSpec, rows: int) -> int:
    """Count what choosing one token per row takes at most."""
    padded = -(-spec.vocab_size // _BLOCK_LOGITS) * _BLOCK_LOGITS
    return rows * ((SAMPLING_BYTES - 8) * spec.vocab_size + 8 * padded)


def _inputs_bytes(spec: ModelSpec, step: Step, tokens: int) -> int:
    """Token ids and positions, and the cosines and sines of each kind of rotation."""
    rotations = 2 if spec.model_type == "gemma3_text" else 1
    return tokens * (24 + rotations * 2 * spec.head_dim * step.bytes)


def _mlp_bytes(spec: ModelSpec, step: Step, tokens: int) -> int:
    """Embeddings, a layer's input, what attention added, its norm; and the widened vectors: gate, up, product."""
    wide = _wide_bytes(spec, step)
    if step.quantize == "int8":
        inner = spec.intermediate_size
        product = inner * (_INT8_BYTES + step.bytes) + spec.hidden_size
        wide = max(wide, 2 * inner * _INT8_BYTES if spec.model_type == "phi3" else product)
    return tokens * (4 * spec.hidden_size * step.bytes + wide) + _inputs_bytes(spec, step, tokens)


def _wide_bytes(spec: ModelSpec, step: Step) -> int:
    """Count the widened vectors of one token: gate, up and their product, which in Phi-3 are two of one matrix."""
    return (4 if spec.model_type == "phi3" else 3) * spec.intermediate_size * step.bytes


def _gate_bytes(spec: ModelSpec, step: Step) -> int:
    """Embeddings, a layer's input, its norm; and what a gate makes of it, before and after its activation."""
    vectors = step.tokens * (3 * spec.hidden_size + 2 * step.gate_hidden) * step.bytes
    together = 2 * step.rows * spec.num_layers * step.gate_hidden * step.bytes
    return max(vectors + _inputs_bytes(spec, step, step.tokens), together)


def _head_bytes(spec: ModelSpec, step: Step) -> int:
    """Count the copy of the output head that a CPU multiplies with in 16 bits, and the logits it makes."""
    if step.device != "cpu" or step.bytes != 2:
        return 0
    return (spec.vocab_size * spec.hidden_size + step.rows * spec.vocab_size) * step.bytes


def _attention_bytes(spec: ModelSpec, step: Step) -> int:
    """Embeddings, a layer's input, its norm, query, output, key and value; and what attending needs beside them."""
    heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    fused = heads + kv if spec.model_type == "phi3" else 0  # its values keep the whole product alive
    vectors = step.tokens * (3 * spec.hidden_size + 2 * heads + 2 * kv + fused) * step.bytes
    beside = [
        _attend_bytes(spec, step, layer, rows)
        for layer in _distinct_layers(spec, step.kv_budget)
        for rows in {1, step.rows}
    ]
    return vectors + max(beside) + _inputs_bytes(spec, step, step.tokens)


def _attend_bytes(spec: ModelSpec, step: Step, layer: int, rows: int) -> int:
    """On a GPU what eviction ranks; on a CPU slots and chunk joined, and the masks of what each query sees."""
    slots, kv = spec.slots(layer, step.kv_budget), spec.num_kv_heads * spec.head_dim
    length = max(1, step.tokens // rows)
    candidates = rows * slots + step.tokens
    if step.device == "cuda":
        return candidates * spec.num_kv_heads * _EVICTION_BYTES
    sees = slots + length
    masks = spec.num_heads if spec.windows[layer] is not None else 1
    masked = rows * length * sees * (step.bytes + 2) * masks
    joined = 2 * candidates * kv * step.bytes + masked + step.tokens * spec.num_heads * 4
    packed = _packed_bytes(spec, step, rows=rows, queries=length, sees=sees)
    return joined + packed + _block_bytes(spec, step, sees)


def _packed_bytes(spec: ModelSpec, step: Step, *, rows: int, queries: int, sees: int) -> int:
    """Count keys and values laid out anew for matrix tiles, and the part that each thread turns at a time.

    torch does so in bf16 from 64 queries and 64 keys on, as its allocator shows.
    """
    if not step.packs_keys or step.dtype != "bf16" or min(queries, sees) < _PACKED_FROM:
        return 0
    keys = sees + sees % 2
    scratch = step.threads * min(512, keys) * spec.head_dim
    return (2 * rows * keys * spec.num_kv_heads * spec.head_dim + scratch) * 2


def _block_bytes(spec: ModelSpec, step: Step, sees: int) -> int:
    """Count the block of scores that each thread works on."""
    queries = 256 if step.tokens >= 768 else 64 if step.tokens >= 192 else 32
    scores = queries * (min(512, sees) + 2 + spec.head_dim) * 4
    reduced = queries * min(512, sees) * 2 if step.bytes == 2 else 0
    return step.threads * (scores + reduced)


def _decode_bytes(spec: ModelSpec, step: Step) -> int:
    """Count one token per row: eviction in all layers together, or one layer's slots in float32 and its scores."""
    rows, most = step.rows, max(spec.slots(layer, step.kv_budget) for layer in range(spec.num_layers))
    vectors = _mlp_bytes(spec, step, rows) + rows * 3 * spec.num_heads * spec.head_dim * 4
    if step.device == "cuda":
        return vectors + rows * spec.num_heads * spec.head_dim * 4 * 16  # partial sums of a split over slots
    if _decodes_together(spec, step):
        slots = sum(spec.slots(layer, step.kv_budget) + 1 for layer in range(spec.num_layers))
        return vectors + rows * spec.num_kv_heads * slots * 16
    copies = 3 if step.kv_dtype != "fp32" else 1
    return vectors + rows * most * (copies * spec.num_kv_heads * spec.head_dim * 4 + spec.num_heads * 12)


def _decodes_together(spec: ModelSpec, step: Step) -> bool:
    plain = step.dtype == step.kv_dtype == "fp32" and step.quantize == "none"
    return plain and step.device == "cpu" and spec.model_type in _DECODERS


def _distinct_layers(spec: ModelSpec, kv_budget: int) -> list[int]:
    """Return one layer of each kind: by window and by slots."""
    kinds = {(window, spec.slots(layer, kv_budget)): layer for layer, window in enumerate(spec.windows)}
    return sorted(kinds.values())


_NF4_BLOCK = 64  # weights that share one scale
_SCALE_BLOCK = 256  # scales that share one scale of their own
_SCALE_CODE_BYTES = 1024  # the table of 8-bit scales, one for each matrix
_NF4_CODE_BYTES = 64  # the 16 values, one table for each matrix
_OFFSET_BYTES = 4


def weight_bytes(spec: ModelSpec, dtype: Dtype, quantize: Quantisation, *, packs_nf4: bool = False) -> int:
    """Count the weights; embeddings, norms, biases and output head are never quantised, tied ones count once.

    `packs_nf4`: the device is a CPU with bf16 instructions, for which bitsandbytes lays nf4 out anew.
    """
    small = [shape for shape in spec.matrices if quantisable(shape[1], quantize)]
    whole = spec.weight_numel - spec.num_layers * sum(rows * columns for rows, columns in small)
    each = (matrix_bytes(rows, columns, quantize, packs_nf4=packs_nf4) for rows, columns in small)
    return whole * DTYPE_BYTES[dtype] + spec.num_layers * sum(each)


def matrix_bytes(rows: int, columns: int, quantize: Quantisation, *, packs_nf4: bool) -> int:
    """Count one quantised matrix and its state: int8 has a scale per row, nf4 one per 64 weights."""
    if quantize == "int8":
        return rows * columns + rows * 4
    values, blocks = -(-rows * columns // 2), -(-rows * columns // _NF4_BLOCK)
    if packs_nf4 and packable(rows):
        return values + blocks * 2 + _NF4_CODE_BYTES + _OFFSET_BYTES
    scales = blocks + -(-blocks // _SCALE_BLOCK) * 4 + _SCALE_CODE_BYTES
    return values + scales + _NF4_CODE_BYTES + _OFFSET_BYTES


def quantisable(columns: int, quantize: Quantisation) -> bool:
    """Say whether a matrix is quantised: on a CPU bitsandbytes misreads nf4 whose rows are no whole blocks."""
    return quantize == "int8" or (quantize == "nf4" and columns % _NF4_BLOCK == 0)


def packable(rows: int) -> bool:
    """Say whether the layout for CPUs has room for a matrix with so many rows."""
    return rows % 32 == 0
