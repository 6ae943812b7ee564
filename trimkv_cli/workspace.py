"""How many bytes one step allocates beside what stays: the largest of reading a chunk, making a token, and sampling.

Only one layer's tensors live at a time. The terms follow what transformers' layers and our operations hold at their
peaks; `python -m trimkv_cli.bench.memory` measures every one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimkv_cli.spec import DTYPE_BYTES, Dtype, KvDtype, ModelSpec, Quantisation

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
