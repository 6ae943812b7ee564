"""One run of a model, and the bytes of each of its parts, counted from the shapes that will be allocated."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimkv_cli.model.families import FAMILIES, SEQUENTIAL_FAMILIES
from trimkv_cli.model.machine import MIB, Machine
from trimkv_cli.model.packing import INT8_TOKENS, Packed, Packing
from trimkv_cli.model.spec import (
    DTYPE_BYTES,
    PACKED,
    Dtype,
    GateSpec,
    KvDtype,
    ModelSpec,
    Quantisation,
    bits_per_weight,
    gate_bytes,
)

_REORDERED_FROM = 3  # rows that decode together
_RANK_BYTES = 4  # per slot, where positions are given anew
_QUANTISING_BYTES = 16  # per weight, of the one matrix that is being quantised or repacked
_TOKEN_BYTES = 450  # of each token in a tokenizer built of a GGUF file, as two of them were seen to take
_TOKEN_BYTES_BUILT = 1650  # and meanwhile
_HEAP_BYTES = 40 * MIB  # of small things: tokenizer, objects of a run, ends of blocks, holes that loading leaves
_CUDA_BLOCKS = 64 * MIB  # blocks of the caching allocator that are cut and not full
_GRAPH_BYTES = 64 * MIB  # the private pools of captured steps
_QUANTISER_BYTES = 64 * MIB  # of host memory: bitsandbytes, what it imports, and what it leaves in the heap
_SAMPLING_BYTES = 44  # per logit, with every filter on: scores, their order, weights in 64 bits, running sums
_PENALTY_BYTES = 12  # per logit, kept between steps: what was seen, what was made, a bias
_BLOCK_LOGITS = 1024  # of which sums are taken: a vocabulary is padded to a multiple
_INT8_BYTES = 16  # per output of a product of 8 bits: its sums in 32 bits, scaled twice, and cast
_PLANES_BYTES = 18  # per input of a packed one: what is rounded, twice, joined, and in 8 bits
_EVICTION_BYTES = 64  # per candidate of a chunk: score, rank, order and their intermediates
_PACKED_FROM = 64  # queries and keys
_NF4_BLOCK = 64  # weights that share one scale
_SCALE_BLOCK = 256  # scales that share one scale of their own
_SCALE_CODE_BYTES = 1024  # the table of 8-bit scales, one for each matrix
_NF4_CODE_BYTES = 64  # the 16 values, one table for each matrix
_OFFSET_BYTES = 4
_BF16_BYTES = 2
_RECURRENT_BLOCK = 64  # tokens
_CHUNK_STATES = 6  # the state of a row before a chunk, after it, and on the way
_DECODE_STATES = 4.2  # and around one token


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a plan."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that decides what a run takes; its bytes follow from these fields.

    A `prefill_chunk` of 0 reads the whole prompt at once, which may be `longest_prompt` tokens.
    """

    spec: ModelSpec
    gate: GateSpec
    kv_budget: int
    rows: int
    prefill_chunk: int
    dtype: Dtype
    kv_dtype: KvDtype
    quantize: Quantisation
    device: str  # cpu, cuda or mps
    longest_prompt: int
    padded_rows: int = 0  # rows that every decode has, whatever runs
    snapshots: int = 0  # of whole rows, to undo turns
    rebases: bool = False  # sequences may outgrow the model's positions
    counts_runtime: bool = False  # what the process holds without a model is part of the budget
    loaded: bool = False  # no tensor is in transit any more
    machine: Machine = field(default_factory=Machine)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every part of the memory, in the order in which it is told."""
        spec, cpu, rows = self.spec, self.device == "cpu", self.step_rows
        shared = int(self.shares_prefix)
        forward, sampling = _forward_bytes(self), _sampling_bytes(spec, rows)
        parts = [
            Part("weights", self.weight_bytes),
            Part("reordered", _reordered_bytes(self)),
            Part("gates", gate_bytes(spec, self.gate, self.dtype)),
            Part("kv", rows * self.kv_bytes_per_row),
            Part("shared_prefix", shared * self.kv_bytes_per_row),
            Part("rebase", (rows + shared) * self._rank_bytes if self.rebases else 0),
            Part("journal", (rows + shared) * spec.journal_bytes_per_row(DTYPE_BYTES[self.kv_dtype])),
            Part("undo", self.snapshots * self.kv_bytes_per_row if cpu else 0),
            Part("workspace", forward),
            Part("logits", max(0, sampling - forward) + rows * spec.vocab_size * _PENALTY_BYTES),
            Part("dequantised", max(0, _dequantising_bytes(self) - forward)),
            Part("unpacked", _unpacked_bytes(self)),
            Part("graphs", _GRAPH_BYTES if self.device == "cuda" else 0),
        ]
        weights, *others = (part.bytes for part in parts)
        loading = _loading_bytes(self, later=sum(others))
        parts.append(Part("loading", max(loading, _built_bytes(self) - weights - sum(others))))
        if self.counts_runtime:
            parts.append(Part("slack", _slack_bytes(sum(part.bytes for part in parts), self.device)))
            parts.append(Part("runtime", self.machine.runtime_bytes(self.device)))
            by_library = cpu and not self.packs and self.form != "none"
            parts.append(Part("quantiser", _QUANTISER_BYTES if by_library else 0))
            parts.append(Part("tokenizer", _tokenizer_bytes(self)))
        return tuple(part for part in parts if not (self.loaded and part.name == "loading"))

    @property
    def total_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def part_bytes(self, name: str) -> int:
        """Return the bytes of one part, 0 when the run has no such part."""
        return sum(part.bytes for part in self.parts if part.name == name)

    @property
    def workspace_bytes(self) -> int:
        """What one step allocates beside what stays."""
        return _forward_bytes(self)

    @property
    def kv_bytes_per_row(self) -> int:
        """What one sequence's cache takes, whatever its length."""
        return self.spec.kv_bytes_per_row(self.kv_budget, DTYPE_BYTES[self.kv_dtype])

    def full_cache_bytes(self, context: int) -> int:
        """Count what one sequence of `context` tokens takes in a cache that forgets only what left a window."""
        row = self.spec.kv_bytes_per_row(context, DTYPE_BYTES[self.kv_dtype])
        return row - 8 * self.spec.num_kv_heads * sum(
            self.spec.slots(layer, context) for layer in range(self.spec.num_kv_layers)
        )

    @property
    def precision(self) -> str:
        if self.spec.quantised is not None and self.form != "none":
            return self.spec.quantised.label
        return self.dtype if self.quantize == "none" else self.quantize

    @property
    def form(self) -> Quantisation:
        """What the matrices are in while the model runs; other packed ones are unpacked step by step, as nf4 is."""
        stored = self.spec.quantised
        if stored is None or stored.unpacks:
            return self.quantize
        return "int8" if stored.method == "bitsandbytes" and stored.bits == 8 else "nf4"

    @property
    def packs(self) -> bool:
        """Whether matrices are packed for torch's own products."""
        return self.device == "cpu" and self.quantize in PACKED

    @property
    def packing(self) -> Packing:
        """What is packed for them."""
        return self.spec.packing(self.quantize) if self.packs else Packing()

    @property
    def weight_bytes(self) -> int:
        """What the model holds."""
        if not self.packs:
            return weight_bytes(self.spec, self.dtype, self.quantize, packs_nf4=self.packs_nf4)
        packing = self.packing
        return packing.bytes + (self.spec.weight_numel - packing.numel) * self.dtype_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of what the model holds."""
        return bits_per_weight(self.spec, self.weight_bytes)

    @property
    def unpacks(self) -> bool:
        """Whether a chunk of a prompt is long enough for a packed matrix to be unpacked."""
        return self.packing.largest > 0 and max(self.step_tokens, self.step_rows) >= self.machine.unpacks_from

    @property
    def step_rows(self) -> int:
        """The rows that decode together."""
        return max(self.rows, self.padded_rows)

    @property
    def step_tokens(self) -> int:
        """The tokens of prompts that are read together."""
        return self.prefill_chunk or self.longest_prompt

    @property
    def shares_prefix(self) -> bool:
        return self.rows > 1 and self.prefill_chunk > 0

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a number that the model computes with."""
        return DTYPE_BYTES[self.dtype]

    @property
    def gate_hidden(self) -> int:
        """Width of the gates; 0 for constant ones."""
        return self.gate.hidden if self.gate.trained else 0

    @property
    def packs_nf4(self) -> bool:
        """Whether nf4 matrices are laid out anew for this machine's CPU."""
        stored = self.spec.quantised
        by_bitsandbytes = stored is None or stored.method == "bitsandbytes"
        return self.device == "cpu" and self.machine.packs_nf4 and by_bitsandbytes

    @property
    def threads(self) -> int:
        """How many threads hold blocks of their own at a time."""
        return self.machine.threads if self.device == "cpu" else 1

    @property
    def _rank_bytes(self) -> int:
        return self.spec.num_kv_layers * self.spec.num_kv_heads * self.kv_budget * _RANK_BYTES


def _slack_bytes(allocated: int, device: str) -> int:
    """Count what an allocator takes beyond what is asked of it: ends of blocks, and holes between them."""
    return allocated // 32 + (_CUDA_BLOCKS if device == "cuda" else _HEAP_BYTES)


def _tokenizer_bytes(run: Run) -> int:
    """Count a tokenizer that was built of a GGUF file's vocabulary; a small one is among what any process holds."""
    return 0 if run.spec.gguf is None else run.spec.vocab_size * _TOKEN_BYTES


def _built_bytes(run: Run) -> int:
    """Count what is there while it is built, before a weight is read."""
    return 0 if run.spec.gguf is None else run.spec.vocab_size * _TOKEN_BYTES_BUILT


def _loading_bytes(run: Run, *, later: int) -> int:
    """Count what loading takes beyond what running does: the tensors in transit, as stored and as they become."""
    spec, stored_so = run.spec, run.spec.quantised
    quantised = run.quantize != "none" or stored_so is not None
    matrix = max(rows * columns for rows, columns in spec.matrices)
    if run.device != "cpu":  # what is read lies in host memory; a matrix is there whole while it is quantised
        return max(0, 2 * matrix * run.dtype_bytes - later) if quantised else 0
    embeddings = spec.vocab_size * spec.hidden_size
    stored = DTYPE_BYTES[spec.dtype] if run.dtype != spec.dtype or quantised else 0
    transit = (embeddings + 3 * matrix) * stored  # up to four files' readers at a time
    if run.packs:  # of what stays plain, a GGUF file is read some rows at a time as well
        whole = spec.gguf is None and run.packing.unpacked > 0
        transit = max(run.packing.transit_bytes, 3 * matrix * stored if whole else 0)
    elif quantised:
        transit = max(transit, matrix * (run.dtype_bytes + _QUANTISING_BYTES))
    if stored_so is not None and not stored_so.streams:
        transit += stored_so.stored_bytes  # mapped while it is copied
    return max(0, transit - later)


def _reordered_bytes(run: Run) -> int:
    """Count the decoder's matrices once more: what several rows in 16 bits were seen to take beside them."""
    halves = run.form == "none" and run.dtype_bytes == 2 and run.step_rows >= _REORDERED_FROM
    if run.device != "cpu" or not run.machine.reorders_halves or not halves:
        return 0
    spec, state = run.spec, run.spec.state
    numel = spec.num_layers * sum(outputs * inputs for outputs, inputs in spec.matrices)
    if state is not None:  # their MLP is that of the others
        mlp = spec.matrices[4:]
        mixing = sum(outputs * inputs for outputs, inputs in (*state.matrices(spec.hidden_size), *mlp))
        numel = numel // spec.num_layers * spec.num_kv_layers + state.layers * mixing
    return numel * 2


def _forward_bytes(run: Run) -> int:
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


def _unpacked_bytes(run: Run) -> int:
    """Count the scratch that a packed matrix is unpacked into for a prompt."""
    return run.packing.largest * DTYPE_BYTES[run.machine.unpacks_to] if run.unpacks else 0


def _dequantising_bytes(run: Run) -> int:
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


def _sampling_bytes(spec: ModelSpec, rows: int) -> int:
    """Count what choosing one token per row takes at most."""
    padded = -(-spec.vocab_size // _BLOCK_LOGITS) * _BLOCK_LOGITS
    return rows * ((_SAMPLING_BYTES - 8) * spec.vocab_size + 8 * padded)


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
    spec = run.spec
    vector = 3 * spec.hidden_size + (3 if run.gate.variant == "rg3" else 2) * run.gate_hidden
    if run.gate.reads_kv:
        vector += spec.num_heads * spec.head_dim + 2 * run.gate.input_size(spec)
    vectors = run.step_tokens * vector * run.dtype_bytes
    together = 2 * run.step_rows * spec.num_kv_layers * run.gate_hidden * run.dtype_bytes
    return max(vectors + _inputs_bytes(run, run.step_tokens), together)


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
        return candidates * spec.num_kv_heads * _EVICTION_BYTES
    sees = slots + length
    masks = spec.num_heads if spec.windows[layer] is not None else 1
    masked = rows * length * sees * (run.dtype_bytes + 2) * masks
    joined = 2 * candidates * kv * run.dtype_bytes + masked + run.step_tokens * spec.num_heads * 4
    if FAMILIES[spec.model_type].sinks:  # joined once more, with the sinks' key and component; query and output wider
        wide = 2 * (candidates + rows) * spec.num_kv_heads + 2 * run.step_tokens * spec.num_heads
        joined += wide * (spec.head_dim + 1) * run.dtype_bytes
    packed = _packed_bytes(run, rows=rows, queries=length, sees=sees)
    return joined + packed + _block_bytes(run, sees)


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
        return vectors + rows * spec.num_heads * spec.head_dim * 4 * 16  # partial sums of a split over slots
    if _decodes_together(run):
        slots = sum(spec.slots(layer, run.kv_budget) + 1 for layer in range(spec.num_kv_layers))
        return vectors + rows * spec.num_kv_heads * slots * 16
    copies = 3 if run.kv_dtype != "fp32" else 1
    return vectors + rows * most * (copies * spec.num_kv_heads * spec.head_dim * 4 + spec.num_heads * 12)


def _decodes_together(run: Run) -> bool:
    plain = run.dtype == run.kv_dtype == "fp32" and (run.form == "none" or run.packs)
    return plain and run.device == "cpu" and run.spec.model_type in SEQUENTIAL_FAMILIES


def _distinct_layers(spec: ModelSpec, kv_budget: int) -> list[int]:
    """Return one layer of each kind: by window and by slots."""
    kinds = {(window, spec.slots(layer, kv_budget)): layer for layer, window in enumerate(spec.windows)}
    return sorted(kinds.values())


def weight_bytes(spec: ModelSpec, dtype: Dtype, quantize: Quantisation, *, packs_nf4: bool = False) -> int:
    """Count the weights; embeddings, norms, biases and output head are never quantised, tied ones count once.

    A checkpoint that stays packed takes what it stores. `packs_nf4`: the device is a CPU with bf16 instructions, where
    bitsandbytes lays nf4 out anew.
    """
    stored = spec.quantised
    if stored is not None and not stored.unpacks:
        return (stored.repacked_bytes if packs_nf4 else None) or stored.stored_bytes
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
