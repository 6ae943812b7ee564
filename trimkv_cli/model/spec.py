"""What a model and its gates measure: every number the plan needs, from config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from trimkv_cli.errors import GateMismatch, UsageError
from trimkv_cli.model.families import (
    FAMILIES,
    StateShape,
    language_config,
    layer_matrices,
    layer_windows,
    original_max_positions,
    positive,
    state_shape,
    supported_type,
    weight_numel,
)
from trimkv_cli.model.packing import Form, Packing, Tensors, packs_int4
from trimkv_cli.model.quantised import Quantised

Dtype = Literal["bf16", "fp16", "fp32"]
KvDtype = Literal["bf16", "fp16", "fp32", "fp8"]
Quantisation = Literal["none", "int8", "int4", "nf4", "stored"]
TrainedVariant = Literal["rg", "rg10", "rg2", "rg3"]
OthersVariant = Literal["kvzap", "fastkvzip"]
GateVariant = TrainedVariant | OthersVariant | Literal["streaming", "keydiff", "none"]

DTYPE_BYTES: Mapping[KvDtype, int] = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}
QUANTISATIONS: tuple[Quantisation, ...] = ("none", "int8", "int4", "nf4", "stored")
PACKED: tuple[Quantisation, ...] = ("int8", "int4", "stored")  # on a CPU, by torch's own products
SLOT_STATE_BYTES = 8  # log_beta float32 and position int32 of one slot
_POSITION_BYTES = 4
_STATIC_VARIANTS: frozenset[str] = frozenset({"kvzap", "fastkvzip", "keydiff"})
TRAINED_VARIANTS: Mapping[str, TrainedVariant] = {"rg": "rg", "rg10": "rg10", "rg2": "rg2", "rg3": "rg3"}
OTHERS_VARIANTS: Mapping[str, OthersVariant] = {"kvzap": "kvzap", "fastkvzip": "fastkvzip"}
FASTKVZIP_DIM = FASTKVZIP_SINKS = 16  # the width of its queries and keys, and how many keys each is weighed against
_JOURNAL_STATE_BYTES = 16  # the same and the slot's index, int64
STORED_DTYPES: Mapping[str, Dtype] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_DTYPES: Mapping[str, Dtype] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufForm:
    """How a GGUF file stores the weights, and what of them can stay packed on a CPU."""

    bytes: int
    types: str
    packing: Packing = field(default_factory=Packing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How many experts a token goes through, how wide each is, and whether their products have biases."""

    per_token: int
    width: int
    biased: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The shape of one decoder; `windows` has one entry per layer with keys and values, None where attention is full.

    `state` is what the other layers have instead.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    windows: tuple[int | None, ...]
    dtype: Dtype
    tied: bool
    original_max_positions: int | None  # long-RoPE: where the short factors end
    weight_numel: int
    quantised: Quantised | None = None  # how the checkpoint itself is stored
    gguf: GgufForm | None = None
    state: StateShape | None = None
    routing: Routing | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a transformers config.json of any 4.x or 5.x form.

        Raises:
            UnsupportedModel: a family or form that trimkv does not run.
            BrokenModel: a key that is missing or has a value that makes no sense.
        """
        config = language_config(config)
        model_type = supported_type(config)
        full = {**FAMILIES[model_type].defaults, **config}
        heads = positive(full, "num_attention_heads")
        hidden = positive(full, "hidden_size")
        shape = {
            "num_layers": positive(full, "num_hidden_layers"),
            "hidden_size": hidden,
            "num_heads": heads,
            "num_kv_heads": positive(full, "num_key_value_heads", heads),
            "head_dim": positive(full, "head_dim", hidden // heads),
            "intermediate_size": positive(full, "intermediate_size", full.get("moe_intermediate_size")),
            "vocab_size": positive(full, "vocab_size"),
        }
        dtype = _DTYPES.get(str(full.get("dtype") or full.get("torch_dtype")).removeprefix("torch."), "fp32")
        numel, tied = weight_numel(model_type, full, **shape), bool(full["tie_word_embeddings"])
        quantised = None
        if full.get("quantization_config") is not None:
            vocab = shape["vocab_size"] * hidden * (1 if tied else 2)
            quantised = Quantised.from_config(
                full, weight_numel=numel, vocab_numel=vocab, dtype_bytes=DTYPE_BYTES[dtype]
            )
        return cls(
            model_type=model_type,
            **shape,
            max_positions=positive(full, "max_position_embeddings"),
            windows=layer_windows(model_type, full),
            state=state_shape(model_type, full),
            routing=_routing(model_type, full),
            dtype=dtype,
            tied=tied,
            original_max_positions=original_max_positions(full),
            weight_numel=numel,
            quantised=quantised,
            gguf=None,
        )

    @property
    def num_kv_layers(self) -> int:
        """How many layers have keys and values."""
        return len(self.windows)

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """The indices of the layers with keys and values in the model."""
        others = () if self.state is None else self.state.at
        return tuple(layer for layer in range(self.num_layers) if layer not in others)

    @property
    def state_bytes(self) -> int:
        """What the layers without keys and values hold of one sequence, whatever its length."""
        return 0 if self.state is None else self.state.layers * self.state.numel * 4

    @property
    def slot_numel(self) -> int:
        """K and V elements of one slot of one head."""
        return 2 * self.head_dim

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in the model's own dtype, or as a quantised checkpoint stores them."""
        if self.quantised is not None:
            return self.quantised.stored_bytes
        return self.weight_numel * DTYPE_BYTES[self.dtype]

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight as the model is stored."""
        return bits_per_weight(self, self.weight_bytes if self.gguf is None else self.gguf.bytes)

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """The linear layers (outputs, inputs) of one decoder layer, which quantisation makes smaller."""
        return layer_matrices(
            self.model_type,
            hidden=self.hidden_size,
            intermediate=self.intermediate_size,
            q=self.num_heads * self.head_dim,
            kv=self.num_kv_heads * self.head_dim,
        )

    def packing(self, quantize: Quantisation) -> Packing:
        """Say what is packed on a CPU: the matrices of the decoder layers, and vocabulary matrices as int8."""
        if quantize not in PACKED:
            return Packing()
        if quantize == "stored":
            return Packing() if self.gguf is None else self.gguf.packing
        vocab = (self.vocab_size, self.hidden_size)
        layers = (self._packed(shape, _form(shape, quantize), self.num_layers) for shape in self.matrices)
        return Packing.of([*layers, self._packed(vocab, "int8", 1 if self.tied else 2, label="vocabulary")])

    def _packed(self, shape: tuple[int, int], form: Form, count: int, *, label: str = "matrices") -> Tensors:
        return Tensors(label=label, shape=shape, form=form, count=count, is_vocab=label == "vocabulary")

    def slots(self, layer: int, kv_budget: int) -> int:
        """Count the slots per KV head of a layer: a window needs no more than itself."""
        window = self.windows[layer]
        return kv_budget if window is None else min(kv_budget, window)

    def kv_bytes_per_row(self, kv_budget: int, dtype_bytes: int) -> int:
        """Count the bytes that one sequence's cache takes, whatever its length."""
        slots = sum(self.slots(layer, kv_budget) for layer in range(self.num_kv_layers))
        return self.num_kv_heads * slots * (self.slot_numel * dtype_bytes + SLOT_STATE_BYTES) + self.state_bytes

    def journal_bytes_per_row(self, dtype_bytes: int) -> int:
        """Count the bytes that keep what one decode step displaced in one sequence."""
        slots = self.num_kv_layers * self.num_kv_heads * (self.slot_numel * dtype_bytes + _JOURNAL_STATE_BYTES)
        return slots + (0 if self.state is None else self.state_bytes + self.state.layers * _POSITION_BYTES)

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Count K and V of one token over all layers, as a full cache without windows stores them."""
        return self.num_kv_layers * self.num_kv_heads * self.slot_numel * dtype_bytes


def _form(shape: tuple[int, int], quantize: Quantisation) -> Form:
    if quantize == "int8":
        return "int8"
    return "int4" if packs_int4(*shape) else "plain"


def bits_per_weight(spec: ModelSpec, weight_bytes: int) -> float:
    """Return how many bits one weight comes to, in two decimals."""
    return round(8 * weight_bytes / spec.weight_numel, 2)


def _routing(model_type: str, config: Mapping[str, Any]) -> Routing | None:
    experts = FAMILIES[model_type].experts
    if experts is None:
        return None
    per_token = positive(config, "num_experts_per_tok", 2)
    return Routing(per_token=per_token, width=positive(config, experts.width), biased=experts.biased)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateShape:
    """What gates say of the model that they were made for, as far as they do."""

    hidden_size: int | None = None
    num_kv_heads: int | None = None
    num_layers: int | None = None
    queries_per_kv_head: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSpec:
    """What ranks the tokens: a released gate, "streaming", "keydiff" or a full cache ("none")."""

    variant: GateVariant
    id: str
    hidden: int = 512  # width of the gate's MLP; 0 = a linear gate
    memory_size: int | None = None  # the M it was trained for
    largest_memory_size: int | None = None  # the most of them, where it was trained for several
    trained_context: int | None = None
    base_model: str | None = None
    buffer_size: int | None = None  # reported; trimkv evicts at every step
    model_type: str | None = None
    sinks: int = 4  # the first tokens, which streaming and KeyDiff never forget
    shape: GateShape | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, id: str) -> Self:
        """Read the config.json of a released gate folder, where `memory_size` may be a float.

        Raises:
            GateMismatch: an unknown gate variant, or sizes that are not whole positive numbers.
        """
        said = config.get("retention_gate")
        variant = TRAINED_VARIANTS.get(said) if isinstance(said, str) else None
        if variant is None:
            raise GateMismatch(
                f"{id}: gate variant {said!r} is not one that trimkv runs ({', '.join(TRAINED_VARIANTS)})",
                hint="try --gates streaming",
            )
        return cls(
            variant=variant,
            id=id,
            hidden=_whole(config, "retention_gate_intermediate_size", id) or 512,
            memory_size=_whole(config, "memory_size", id),
            largest_memory_size=_whole(config, "largest_memory_size", id),
            trained_context=_whole(config, "max_seq_len", id) or _whole(config, "trained_context", id),
            base_model=config.get("base_model"),
            buffer_size=_whole(config, "buffer_size", id),
            model_type=config.get("model_type"),
        )

    @property
    def trained(self) -> bool:
        return self.variant in TRAINED_VARIANTS or self.by_others

    @property
    def by_others(self) -> bool:
        """Whether it is trained, but by none of the authors of this method."""
        return self.variant in OTHERS_VARIANTS

    @property
    def kept(self) -> int:
        """The first tokens of a sequence that this gate itself never evicts."""
        return self.sinks if self.variant in ("streaming", "keydiff") else 0

    @property
    def static(self) -> bool:
        """Whether its score of a token is the same at any age, and of any sign."""
        return self.variant in _STATIC_VARIANTS

    @property
    def compares_keys(self) -> bool:
        """Whether static scores are found from all keys that a head holds, before each eviction."""
        return self.variant == "keydiff"

    @property
    def reads_kv(self) -> bool:
        """Whether it scores a token by its keys and values, not by the hidden states that enter attention."""
        return self.variant in ("rg2", "rg3")

    def input_size(self, model: ModelSpec) -> int:
        """Count the numbers by which a trained gate scores a token."""
        return model.num_kv_heads * model.slot_numel if self.reads_kv else model.hidden_size

    def numel(self, model: ModelSpec) -> int:
        """Count the parameters of the gates of all layers, each layer with its own copy of a shared tensor."""
        if not self.trained:
            return 0
        if self.variant == "kvzap":
            inner = (model.hidden_size + 1) * self.hidden
            return self.layers(model) * (inner + self.exact_numel(model))
        if self.variant == "fastkvzip":
            heads = model.num_heads + model.num_kv_heads
            projections = FASTKVZIP_DIM * (heads * model.hidden_size + model.num_heads)
            return self.layers(model) * (projections + self.exact_numel(model))
        first, last = self.input_size(model) * self.hidden, (self.hidden + 1) * model.num_kv_heads
        more = {"rg3": first, "rg10": self.hidden + self.hidden * self.hidden + self.hidden}
        return model.num_kv_layers * (first + more.get(self.variant, self.hidden) + last)

    def exact_numel(self, model: ModelSpec) -> int:
        """Count the parameters of one layer that stay in float32, whatever the model computes in."""
        if self.variant == "kvzap":
            return ((self.hidden or model.hidden_size) + 1) * model.num_kv_heads
        if self.variant == "fastkvzip":
            return 2 * FASTKVZIP_DIM + model.num_kv_heads * FASTKVZIP_SINKS * FASTKVZIP_DIM + model.num_heads
        return model.num_kv_heads

    def layers(self, model: ModelSpec) -> int:
        """Count the layers with a gate of their own."""
        return len(scored_layers(model)) if self.variant == "fastkvzip" else model.num_kv_layers


def gate_bytes(model: ModelSpec, gate: GateSpec, dtype: Dtype) -> int:
    """Count the bytes of the gates in the compute dtype; the per-head biases stay in float32."""
    if not gate.trained:
        return 0
    exact = gate.layers(model) * gate.exact_numel(model)
    return (gate.numel(model) - exact) * DTYPE_BYTES[dtype] + exact * 4


def scored_layers(model: ModelSpec) -> tuple[int, ...]:
    """Return which layers with keys and values Fast KVzip scores: those without a window, where there are both."""
    whole = tuple(index for index, window in enumerate(model.windows) if window is None)
    return whole or tuple(range(model.num_kv_layers))


def streaming_gate(sinks: int = 4) -> GateSpec:
    """Describe the constant gate: the first tokens and the latest ones stay."""
    return GateSpec(variant="streaming", id=f"streaming:{sinks}", sinks=sinks)


def keydiff_gate() -> GateSpec:
    """Describe KeyDiff (arXiv 2504.15364), which needs no training: the keys that differ most from the others stay."""
    return GateSpec(variant="keydiff", id="keydiff")


def full_gate() -> GateSpec:
    """Describe a full cache, which never evicts."""
    return GateSpec(variant="none", id="none")


def parse_dtype(text: str, default: Dtype) -> Dtype:
    """Read a dtype flag; "auto" is the default given."""
    names: dict[str, Dtype] = {**_DTYPES, "bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
    if text == "auto":
        return default
    if text not in names:
        raise UsageError(f"{text!r} is not a dtype", hint="one of auto, bf16, fp16, fp32")
    return names[text]


def parse_kv_dtype(text: str) -> KvDtype | None:
    """Read the dtype of cached keys and values; "auto" is None, that of the weights."""
    if text in ("fp8", "float8_e4m3fn"):
        return "fp8"
    return None if text == "auto" else parse_dtype(text, "fp32")


def parse_quantisation(text: str) -> Quantisation | None:
    """Read `--quantize`; "auto" is None, the plan's choice."""
    found = next((known for known in QUANTISATIONS if known == text), None)
    if found is None and text != "auto":
        raise UsageError(f"{text!r} is not a quantisation", hint=f"one of auto, {', '.join(QUANTISATIONS)}")
    return found


def _whole(config: Mapping[str, Any], key: str, id: str) -> int | None:
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or value != int(value) or value < 1:
        hint = "get the gates again, or --gates streaming"
        raise GateMismatch(f"{id}: {key} = {value!r} is not a whole number above 0", hint=hint)
    return int(value)
