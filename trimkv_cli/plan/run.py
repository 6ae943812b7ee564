"""One run of a model, and the bytes of each of its parts, counted from the shapes that will be allocated."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimkv_cli.model.families import SEQUENTIAL_FAMILIES
from trimkv_cli.model.machine import MIB, Machine
from trimkv_cli.model.packing import Packing
from trimkv_cli.model.pins import Pins
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
from trimkv_cli.plan.step import (
    GRAPH_ROWS,
    SAMPLED_ROWS,
    compared_bytes,
    dequantising_bytes,
    forward_bytes,
    sampling_bytes,
    unpacked_bytes,
)

_REORDERED_FROM = 3  # rows that decode together
_RANK_BYTES = 4  # per slot, where positions are given anew
_QUANTISING_BYTES = 16  # per weight, of the one matrix that is being quantised or repacked
_TOKEN_BYTES = 450  # of each token in a tokenizer built of a GGUF file, as two of them were seen to take
_TOKEN_BYTES_BUILT = 1650  # and meanwhile
_HEAP_BYTES = 40 * MIB  # of small things: tokenizer, objects of a run, ends of blocks, holes that loading leaves
_CUDA_BLOCKS = 64 * MIB  # blocks of the caching allocator that are cut and not full
_GRAPH_BYTES = 64 * MIB  # the private pools of captured steps
_STREAMS = 2  # that multiply: the main one, and the one on which graphs are captured
_HOPPER, _HOPPER_BLAS_BYTES = 9, 32 * MIB  # major capability, and what cuBLAS takes there for each stream
_BLAS_BYTES = 8320 * 1024  # and elsewhere: two blocks of 4 MiB, eight of 16 KiB
_QUANTISER_BYTES = 64 * MIB  # of host memory: bitsandbytes, what it imports, and what it leaves in the heap
_PENALTY_BYTES = 12  # per logit, kept between steps: what was seen, what was made, a bias
_NF4_BLOCK = 64  # weights that share one scale
_SCALE_BLOCK = 256  # scales that share one scale of their own
_SCALE_CODE_BYTES = 1024  # the table of 8-bit scales, one for each matrix
_NF4_CODE_BYTES = 64  # the 16 values, one table for each matrix
_OFFSET_BYTES = 4


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
    prefill_rows: int = 1  # whose chunks are read together
    padded_rows: int = 0  # rows that every decode has, whatever runs
    snapshots: int = 0  # of whole rows, to undo turns; in host memory
    requests_bytes: int = 0  # of a server: requests that are read, in host memory
    rebases: bool = False  # sequences may outgrow the model's positions
    pins: Pins = field(default_factory=Pins)
    counts_runtime: bool = False  # what the process holds without a model is part of the budget
    loaded: bool = False  # no tensor is in transit any more
    machine: Machine = field(default_factory=Machine)

    @property
    def most_pinned(self) -> int:
        """The most tokens that are pinned at once in each head, beside a system message."""
        return self.pins.count(0, self.kv_budget, sinks=self.gate.kept, turns=self.snapshots > 0)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every part of the memory, in the order in which it is told."""
        spec, cpu, rows = self.spec, self.device == "cpu", self.step_rows
        shared = int(self.shares_prefix)
        forward, sampling = forward_bytes(self), sampling_bytes(spec, rows, self.device)
        parts = [
            Part("weights", self.weight_bytes),
            Part("reordered", _reordered_bytes(self)),
            Part("gates", gate_bytes(spec, self.gate, self.dtype)),
            Part("kv", rows * self.kv_bytes_per_row),
            Part("shared_prefix", shared * self.kv_bytes_per_row),
            Part("rebase", (rows + shared) * self._rank_bytes if self.rebases else 0),
            Part("journal", (rows + shared) * spec.journal_bytes_per_row(DTYPE_BYTES[self.kv_dtype])),
            Part("undo", self.snapshots * self.kv_bytes_per_row if cpu else 0),
            Part("requests", self.requests_bytes if cpu else 0),
            Part("workspace", forward),
            Part("logits", max(0, sampling - forward) + rows * spec.vocab_size * _PENALTY_BYTES),
            Part("dequantised", max(0, dequantising_bytes(self) - forward)),
            Part("unpacked", unpacked_bytes(self)),
            Part("graphs", _graph_bytes(self)),
        ]
        weights, *others = (part.bytes for part in parts)
        steps = ("workspace", "logits", "graphs")
        joining = _joining_bytes(self) - sum(part.bytes for part in parts if part.name in steps)
        loading = max(_loading_bytes(self, later=sum(others)), joining)
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
        return forward_bytes(self)

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
        return self.prefill_chunk * min(self.rows, self.prefill_rows) or self.longest_prompt

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


def _graph_bytes(run: Run) -> int:
    """Count what decodes as graphs keep on a GPU: pools, logits of each number of rows, workspaces of products.

    What choosing tokens takes is kept once for each number of rows that are chosen for at once.
    """
    if run.device != "cuda":
        return 0
    sizes = {*(rows for rows in GRAPH_ROWS if rows <= run.rows), run.rows}
    logits = sum(sizes) * run.spec.vocab_size * run.dtype_bytes
    sampling = sum(sampling_bytes(run.spec, rows, "cuda") for rows in {min(size, SAMPLED_ROWS) for size in sizes})
    capability = run.machine.cuda_capability
    workspace = _HOPPER_BLAS_BYTES if capability is None or capability[0] == _HOPPER else _BLAS_BYTES
    compared = compared_bytes(run, run.rows * (run.kv_budget + 1))  # in the graphs' own pool, beside that of prompts
    return _GRAPH_BYTES + logits + sampling + _STREAMS * workspace + _kept_through_bytes(run) + compared


def _kept_through_bytes(run: Run) -> int:
    """Count what a step keeps from layer to layer until gates and eviction of all come: hidden states, keys, values."""
    spec = run.spec
    if spec.model_type not in SEQUENTIAL_FAMILIES:
        return 0
    each = spec.hidden_size + 2 * spec.num_kv_heads * spec.head_dim
    return run.rows * spec.num_kv_layers * each * run.dtype_bytes


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


def _joining_bytes(run: Run) -> int:
    """Count what becomes one tensor before a GPU decodes, and is there twice meanwhile, beside the cache."""
    spec = run.spec
    if run.device != "cuda" or run.form != "none" or spec.model_type not in SEQUENTIAL_FAMILIES:
        return 0
    outputs = [rows for rows, _ in spec.matrices]
    if spec.model_type == "phi3":  # whose matrices are one as they are
        outputs = []
    matrix = max(sum(outputs[:3]), sum(outputs[4:6])) * spec.hidden_size * run.dtype_bytes
    return max(matrix, gate_bytes(spec, run.gate, run.dtype))


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
