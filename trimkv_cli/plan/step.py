"""What one step of a run allocates beside what stays: the larger of a chunk of a prompt and a token for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimkv_cli.model.families import FAMILIES, SEQUENTIAL_FAMILIES
from trimkv_cli.model.packing import INT8_TOKENS, Packed
from trimkv_cli.model.spec import DTYPE_BYTES, FASTKVZIP_DIM, FASTKVZIP_SINKS, ModelSpec

if TYPE_CHECKING:
    from trimkv_cli.plan.run import Run

GRAPH_ROWS = (1, 2, 4, 8, 16, 32, 64)  # that decode as one graph on a GPU; others take the next larger one
SAMPLED_ROWS = 4  # whose tokens are chosen at once
_SAMPLING_BYTES = 42  # per logit, with every filter on: scores, their order, weights in 64 bits, padded once more
_CUDA_SAMPLING_BYTES = 70  # and on a GPU, whose sorts have buffers; an estimate
_WAITING_BYTES = 8  # per logit of the other rows: it, and where some rows were taken its copy
_BLOCK_LOGITS = 1024  # of which sums are taken: a vocabulary is padded to a multiple
_INT8_BYTES = 16  # per output of a product of 8 bits: its sums in 32 bits, scaled twice, and cast
_PLANES_BYTES = 18  # per input of a packed one: what is rounded, twice, joined, and in 8 bits
_RANKED_BYTES = 8  # per head and token of a chunk on a GPU: which survivor it is, and the slot of one
_PACKED_FROM = 64  # queries and keys
_BF16_BYTES = 2
_RECURRENT_BLOCK = 64  # tokens
_CHUNK_STATES = 6  # the state of a row before a chunk, after it, and on the way
_DECODE_STATES = 4.2  # and around one token


def forward_bytes(run: Run) -> int:
    """Count the larger of a prefill and a decode."""
    steps = (_attention_bytes(run), _mlp_bytes(run, run.step_tokens), _decode_bytes(run))
    products = (_packed_product_bytes(run, *shape) for shape in run.packing.shapes)
    return max(*steps, _gate_bytes(run), _head_bytes(run), _state_bytes(run), *products)


def _packed_product_bytes(run: Run, form: Packed, outputs: int, inputs: int) -> int:
    """Count one packed product: four vectors of the model, wide ones beside them, and what the product makes."""
    spec, tokens = run.spec, max(run.step_tokens, run.step_rows)
    inner, fused = spec.intermediate_size, spec.model_type == "phi3"
    wide = (3 if fused else 1) * inner if inner in (inputs, outputs) else 0
    vectors = (4 * spec.hidden_size + wide) * run.dtype_bytes
    if form == "int8":
        made = _int8_product_bytes(run, tokens, outputs, inputs)
    else:
        each = DTYPE_BYTES[run.machine.unpacks_to] if run.unpacks else _BF16_BYTES
        cast = 0 if each == run.dtype_bytes else 1
        product = max(each * (cast * inputs + outputs), (each + run.dtype_bytes) * outputs * cast)
        codes = outputs * inputs // 2 + tokens * each * cast * inputs if run.unpacks else 0
        made = max(tokens * product, codes)
    return tokens * vectors + made + _inputs_bytes(run, tokens)


def _int8_product_bytes(run: Run, tokens: int, outputs: int, inputs: int) -> int:
    """Count a product of 8 bits: some tokens while they are rounded, and then their sums; and all that was made."""
    some, narrowed = min(tokens, INT8_TOKENS), run.dtype != "fp32"
    each = max(inputs * (_PLANES_BYTES + 4 * narrowed), inputs * 2 + outputs * _INT8_BYTES)
    before = tokens * outputs * 4 if tokens > some else 0
    return max(some * each + before, tokens * outputs * (4 + run.dtype_bytes) * narrowed)


def unpacked_bytes(run: Run) -> int:
    """Count the scratch that a packed matrix is unpacked into for a prompt."""
    return run.packing.largest * DTYPE_BYTES[run.machine.unpacks_to] if run.unpacks else 0


def dequantising_bytes(run: Run) -> int:
    """Count a step while its largest matrices are unpacked: one that widens vectors, then the one that narrows them."""
    if run.form != "nf4" or run.packs_nf4:
        return 0
    spec = run.spec
    tokens = max(run.step_tokens, run.step_rows)
    hidden, inner = 4 * spec.hidden_size * run.dtype_bytes, spec.intermediate_size
    narrowing = max(rows * columns for rows, columns in spec.matrices if columns == inner)
    widening = max(rows * columns for rows, columns in spec.matrices if rows >= inner)
    moments = (
        tokens * (hidden + 2 * inner * run.dtype_bytes) + widening * run.dtype_bytes,
        tokens * (hidden + _wide_bytes(run)) + narrowing * run.dtype_bytes,
    )
    return max(moments) + _inputs_bytes(run, tokens)


def sampling_bytes(spec: ModelSpec, rows: int, device: str) -> int:
    """Count what choosing one token per row takes at most."""
    padded, at_once = -(-spec.vocab_size // _BLOCK_LOGITS) * _BLOCK_LOGITS, min(rows, SAMPLED_ROWS)
    each = _CUDA_SAMPLING_BYTES if device == "cuda" else _SAMPLING_BYTES
    waiting = (rows - at_once) * spec.vocab_size * _WAITING_BYTES
    return at_once * ((each - 8) * spec.vocab_size + 8 * padded) + waiting


def _inputs_bytes(run: Run, tokens: int) -> int:
    """Token ids and positions, and the cosines and sines of each kind of rotation."""
    spec = run.spec
    rotations = 2 if spec.model_type == "gemma3_text" else 1
    return tokens * (24 + rotations * 2 * spec.head_dim * run.dtype_bytes)


def _mlp_bytes(run: Run, tokens: int) -> int:
    """Embeddings, a layer's input, what attention added, its norm; and the widened vectors: gate, up, product."""
    spec = run.spec
    wide = max(_wide_bytes(run), _expert_bytes(run))
    if run.form == "int8" and not run.packs:
        inner = spec.intermediate_size
        product = inner * (_INT8_BYTES + run.dtype_bytes) + spec.hidden_size
        wide = max(wide, 2 * inner * _INT8_BYTES if spec.model_type == "phi3" else product)
    return tokens * (4 * spec.hidden_size * run.dtype_bytes + wide) + _inputs_bytes(run, tokens)


def _wide_bytes(run: Run) -> int:
    """Count the widened vectors of one token: gate, up and their product, which in Phi-3 are two of one matrix."""
    spec = run.spec
    return (4 if spec.model_type == "phi3" else 3) * spec.intermediate_size * run.dtype_bytes


def _expert_bytes(run: Run) -> int:
    """Count what one token becomes in its experts: sorted by expert it is there once for each of them."""
    routing = run.spec.routing
    if routing is None:
        return 0
    hidden, width = run.spec.hidden_size, routing.width
    gating = hidden + (9 if routing.biased else 4) * width  # gate and up, and what becomes of them; biases gathered
    return routing.per_token * max(gating, 4 * hidden) * run.dtype_bytes


def _gate_bytes(run: Run) -> int:
    """Embeddings, a layer's input, its norm; and what a gate makes of it, before and after its activation.

    One that reads keys and values has those joined, the query beside them, and in rg3 a second vector of its width.
    """
    if run.gate.by_others:
        return _others_gate_bytes(run)
    spec = run.spec
    vector = 3 * spec.hidden_size + (3 if run.gate.variant == "rg3" else 2) * run.gate_hidden
    if run.gate.reads_kv:
        vector += spec.num_heads * spec.head_dim + 2 * run.gate.input_size(spec)
    vectors = run.step_tokens * vector * run.dtype_bytes
    together = 2 * run.step_rows * spec.num_kv_layers * run.gate_hidden * run.dtype_bytes
    return max(vectors + _inputs_bytes(run, run.step_tokens), together)


def _others_gate_bytes(run: Run) -> int:
    """Count the same of gates that others made, whose last steps are in float32: a copy of what enters those."""
    spec, wide = run.spec, run.gate.hidden
    if run.gate.variant == "kvzap":
        cast = 0 if run.dtype_bytes == 4 else 4 * (wide or spec.hidden_size)
        own = max(2 * wide * run.dtype_bytes, wide * run.dtype_bytes + cast + 4 * spec.num_kv_heads)
    else:
        products = 2 * FASTKVZIP_SINKS * spec.num_heads + 3 * spec.num_heads
        own = 4 * (FASTKVZIP_DIM * (spec.num_heads + spec.num_kv_heads) + products)
    return run.step_tokens * (3 * spec.hidden_size * run.dtype_bytes + own) + _inputs_bytes(run, run.step_tokens)


def _head_bytes(run: Run) -> int:
    """Count the copy of the output head that a CPU multiplies with in 16 bits, and the logits it makes.

    Or the product of a packed one, which is in 8 bits.
    """
    spec = run.spec
    if run.packing.head:
        return _int8_product_bytes(run, run.step_rows, spec.vocab_size, spec.hidden_size)
    if run.device != "cpu" or run.dtype_bytes != 2:
        return 0
    return (spec.vocab_size * spec.hidden_size + run.step_rows * spec.vocab_size) * run.dtype_bytes


def _attention_bytes(run: Run) -> int:
    """Embeddings, a layer's input, its norm, query, output, key and value; and what attending needs beside them."""
    spec = run.spec
    heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    fused = heads + kv if spec.model_type == "phi3" else 0  # its values keep the whole product alive
    vectors = run.step_tokens * (3 * spec.hidden_size + 2 * heads + 2 * kv + fused) * run.dtype_bytes
    beside = [
        _attend_bytes(run, layer, rows)
        for layer in _distinct_layers(spec, run.kv_budget)
        for rows in {1, run.step_rows}
    ]
    return vectors + max(beside) + _inputs_bytes(run, run.step_tokens)


def _state_bytes(run: Run) -> int:
    """Count what linear attention takes: a chunk of a prompt in blocks, in float32, or one token per row.

    The factors are what transformers' allocations came to.
    """
    state = run.spec.state
    if state is None:
        return 0
    tokens, blocks = run.step_tokens, -(-run.step_tokens // _RECURRENT_BLOCK)
    keys, joined = (6, 3) if run.spec.model_type == "qwen3_next" else (5, 0.75)
    width = keys * state.key_dim + 5 * state.value_dim + 3.5 * _RECURRENT_BLOCK
    outside = tokens * 4 * run.spec.hidden_size + tokens * int(state.channels + joined * state.values)
    chunk = blocks * _RECURRENT_BLOCK * state.value_heads * int(width) * 4 + outside * run.dtype_bytes
    chunk += min(run.step_rows, blocks) * state.numel * 4 * _CHUNK_STATES + _inputs_bytes(run, tokens)
    decode = run.step_rows * int(state.numel * 4 * _DECODE_STATES) + _mlp_bytes(run, run.step_rows)
    return max(chunk, decode)


def _attend_bytes(run: Run, layer: int, rows: int) -> int:
    """On a GPU what eviction ranks; on a CPU slots and chunk joined, and the masks of what each query sees."""
    spec = run.spec
    slots, kv = spec.slots(layer, run.kv_budget), spec.num_kv_heads * spec.head_dim
    length = max(1, run.step_tokens // rows)
    candidates = rows * slots + run.step_tokens
    if run.device == "cuda":
        return run.step_tokens * spec.num_kv_heads * _RANKED_BYTES + compared_bytes(run, candidates)
    sees = slots + length
    masks = spec.num_heads if spec.windows[layer] is not None else 1
    masked = rows * length * sees * (run.dtype_bytes + 2) * masks
    joined = 2 * candidates * kv * run.dtype_bytes + masked + run.step_tokens * spec.num_heads * 4
    if FAMILIES[spec.model_type].sinks:  # joined once more, with the sinks' key and component; query and output wider
        wide = 2 * (candidates + rows) * spec.num_kv_heads + 2 * run.step_tokens * spec.num_heads
        joined += wide * (spec.head_dim + 1) * run.dtype_bytes
    packed = _packed_bytes(run, rows=rows, queries=length, sees=sees)
    return max(joined + packed + _block_bytes(run, sees), compared_bytes(run, candidates))


def compared_bytes(run: Run, candidates: int) -> int:
    """Count the keys of slots and new tokens where scores are found from them: taken and joined, then in float32."""
    if not run.gate.compares_keys:
        return 0
    each = 2 * run.dtype_bytes if run.dtype == "fp32" else run.dtype_bytes + 4
    return candidates * run.spec.num_kv_heads * (run.spec.head_dim * each + 16)


def _packed_bytes(run: Run, *, rows: int, queries: int, sees: int) -> int:
    """Count keys and values laid out anew for matrix tiles, and the part that each thread turns at a time.

    torch does so in bf16 from 64 queries and 64 keys on, as its allocator shows.
    """
    spec = run.spec
    if run.device != "cpu" or not run.machine.packs_keys or run.dtype != "bf16" or min(queries, sees) < _PACKED_FROM:
        return 0
    keys = sees + sees % 2
    scratch = run.threads * min(512, keys) * spec.head_dim
    return (2 * rows * keys * spec.num_kv_heads * spec.head_dim + scratch) * 2


def _block_bytes(run: Run, sees: int) -> int:
    """Count the block of scores that each thread works on."""
    queries = 256 if run.step_tokens >= 768 else 64 if run.step_tokens >= 192 else 32
    scores = queries * (min(512, sees) + 2 + run.spec.head_dim) * 4
    reduced = queries * min(512, sees) * 2 if run.dtype_bytes == 2 else 0
    return run.threads * (scores + reduced)


def _decode_bytes(run: Run) -> int:
    """Count one token per row: eviction in all layers together, or one layer's slots in float32 and its scores."""
    spec = run.spec
    rows, most = run.step_rows, max(spec.slots(layer, run.kv_budget) for layer in range(spec.num_kv_layers))
    vectors = _mlp_bytes(run, rows) + rows * 3 * spec.num_heads * spec.head_dim * 4
    if run.device == "cuda":
        heads = rows * spec.num_kv_heads
        splits = min(32 * heads, 4096 + 2 * heads)  # of slots: more are chosen for no GPU with 256 multiprocessors
        partial = splits * spec.num_heads // spec.num_kv_heads * (spec.head_dim + 2) * 4
        return vectors + partial + compared_bytes(run, rows * (most + 1))
    if _decodes_together(run):
        slots = sum(spec.slots(layer, run.kv_budget) + 1 for layer in range(spec.num_kv_layers))
        return vectors + rows * spec.num_kv_heads * slots * 16
    copies = 3 if run.kv_dtype != "fp32" else 1
    attended = rows * most * (copies * spec.num_kv_heads * spec.head_dim * 4 + spec.num_heads * 12)
    return vectors + max(attended, compared_bytes(run, rows * (most + 1)))


def _decodes_together(run: Run) -> bool:
    plain = run.dtype == run.kv_dtype == "fp32" and (run.form == "none" or run.packs)
    return plain and run.device == "cpu" and run.spec.model_type in SEQUENTIAL_FAMILIES


def _distinct_layers(spec: ModelSpec, kv_budget: int) -> list[int]:
    """Return one layer of each kind: by window and by slots."""
    kinds = {(window, spec.slots(layer, kv_budget)): layer for layer, window in enumerate(spec.windows)}
    return sorted(kinds.values())
