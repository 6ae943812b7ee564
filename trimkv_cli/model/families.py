"""Supported families: what their configs may leave out, their windows, their parameters.

A new dense family, or one with routed experts, is one line of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trimkv_cli.errors import BrokenModel, UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Routed experts: the config's keys for how many there are, how wide, and which layers have none."""

    count: str = "num_local_experts"  # or num_experts: transformers takes the one for the other
    width: str = "moe_intermediate_size"
    shared: str | None = None  # experts that every token goes through, of the same width
    gated_width: str | None = None  # how wide the one is that every token goes through behind a gate of its own
    dense_layers: str | None = None  # the first layers, which have an ordinary MLP
    biased: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family differs from Llama; `defaults` is what transformers assumes for a key that config.json lacks."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    bias: Literal["no", "qkv", "qkvo"] = "qkvo"  # of attention, where `attention_bias` says so
    always_biased: bool = False
    qk_norm: Literal["no", "head", "whole", "asked"] = "no"
    mlp: Literal["gated", "fused", "plain"] = "gated"  # fused: gate and up are one matrix; plain: no gate
    fused_qkv: bool = False
    norms: int = 2  # of a layer, each as wide as the model
    extra: int = 0  # further parameters of a layer
    sinks: bool = False  # a learned logit of each query head, which takes its part of the softmax and has no value
    slides: Literal["no", "all", "asked"] | int = "no"  # a number n: every n-th layer sees everything
    experts: Experts | None = None
    hybrid: bool = False  # layers of linear attention, a gated delta rule, between those with keys and values
    gated: bool = False  # what attention says passes a gate as wide as the queries
    sequential: bool = False  # norms around attention and MLP, no more: a CPU decodes it without its modules


_UNTIED: Mapping[str, Any] = {"tie_word_embeddings": False}
_TIED: Mapping[str, Any] = {"tie_word_embeddings": True}
_QWEN: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_LLAMA: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_MISTRAL: Mapping[str, Any] = {
    **_LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_PHI: Mapping[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_GEMMA: Mapping[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
_HYBRID: Mapping[str, Any] = {
    **_UNTIED,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
FAMILIES: Mapping[str, Family] = {
    "qwen3": Family(defaults={**_QWEN, "head_dim": 128}, qk_norm="head", slides="asked", sequential=True),
    "qwen2": Family(defaults=_QWEN, bias="qkv", always_biased=True, slides="asked", sequential=True),
    "llama": Family(defaults=_LLAMA, sequential=True),
    "mistral": Family(defaults=_MISTRAL, bias="no", slides="all", sequential=True),
    "phi3": Family(defaults=_PHI, bias="no", mlp="fused", fused_qkv=True, slides="all", sequential=True),
    "gemma3_text": Family(defaults=_GEMMA, qk_norm="head", norms=4, slides=6, sequential=True),
    "ministral": Family(defaults={**_UNTIED, "sliding_window": 4096}, bias="no", slides="all"),
    "ministral3": Family(defaults=_UNTIED, bias="no", slides="all"),
    "smollm3": Family(defaults=_TIED),
    "olmo2": Family(defaults=_UNTIED, qk_norm="whole"),
    "olmo3": Family(defaults={**_UNTIED, "sliding_window": 4096}, qk_norm="whole", slides=4),
    "granite": Family(defaults=_UNTIED),
    "glm": Family(defaults={**_UNTIED, "attention_bias": True}, bias="qkv", mlp="fused"),
    "glm4": Family(defaults={**_UNTIED, "attention_bias": True}, bias="qkv", mlp="fused", norms=4),
    "cohere2": Family(defaults={**_TIED, "sliding_window": 4096}, norms=1, slides=4),
    "seed_oss": Family(defaults={**_UNTIED, "attention_bias": True}, bias="qkv"),
    "exaone4": Family(defaults={**_UNTIED, "sliding_window": 4096}, bias="no", qk_norm="head", slides=4),
    "apertus": Family(defaults=_UNTIED, qk_norm="head", mlp="plain", extra=2),
    "qwen3_moe": Family(defaults={**_UNTIED, "sliding_window": 4096}, qk_norm="head", experts=Experts()),
    "mixtral": Family(
        defaults=_UNTIED,
        bias="no",
        slides="all",
        experts=Experts(width="intermediate_size"),
    ),
    "olmoe": Family(defaults=_UNTIED, qk_norm="whole", experts=Experts(width="intermediate_size")),
    "glm4_moe": Family(
        defaults=_UNTIED,
        bias="qkv",
        qk_norm="asked",
        experts=Experts(count="n_routed_experts", shared="n_shared_experts", dense_layers="first_k_dense_replace"),
    ),
    "gpt_oss": Family(
        defaults={**_UNTIED, "attention_bias": True, "head_dim": 64, "sliding_window": 128},
        slides=2,
        sinks=True,
        experts=Experts(width="intermediate_size", biased=True),
    ),
    "qwen3_next": Family(
        defaults=_HYBRID,
        qk_norm="head",
        hybrid=True,
        gated=True,
        experts=Experts(gated_width="shared_expert_intermediate_size"),
    ),
    "qwen3_5_text": Family(defaults=_HYBRID, qk_norm="head", hybrid=True, gated=True),
    "qwen3_5_moe_text": Family(
        defaults=_HYBRID,
        qk_norm="head",
        hybrid=True,
        gated=True,
        experts=Experts(gated_width="shared_expert_intermediate_size"),
    ),
}
SEQUENTIAL_FAMILIES = frozenset(name for name, family in FAMILIES.items() if family.sequential)


# Multimodal models whose language model is one of the families, as it is alone.
_HOLD_LANGUAGE_MODEL = ("gemma3", "llava", "mistral3", "qwen3_5", "qwen3_5_moe")


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of a multimodal model's language model, or the config itself.

    Raises:
        UnsupportedModel: a multimodal model whose language model trimkv does not run.
        BrokenModel: a `text_config` that is no object.
    """
    inner = config.get("text_config")
    if inner is None:
        return config
    if not isinstance(inner, Mapping):
        raise _senseless("text_config", inner, "an object")
    outer, model_type = config.get("model_type"), inner.get("model_type")
    if outer not in _HOLD_LANGUAGE_MODEL or model_type not in FAMILIES:
        hint = f"language models of {', '.join(_HOLD_LANGUAGE_MODEL)} run alone; or take a text-only checkpoint"
        raise UnsupportedModel(f"{outer} is a multimodal model, and its {model_type} does not run alone", hint=hint)
    if config.get("quantization_config") is not None:
        hint = "take its original weights, or a text-only checkpoint"
        raise UnsupportedModel(f"a quantised checkpoint of {outer}, a multimodal model, does not run", hint=hint)
    shared = ("dtype", "torch_dtype", "tie_word_embeddings")
    return {**{key: config[key] for key in shared if config.get(key) is not None}, **inner}


def supported_type(config: Mapping[str, Any]) -> str:
    """Return the config's model type.

    Raises:
        UnsupportedModel: a family or form that trimkv does not run.
    """
    model_type = str(config.get("model_type"))
    why = _REFUSED.get(model_type)
    if model_type not in FAMILIES:
        what = f"is not supported{f': {why}' if why else ''}"
        raise UnsupportedModel(f"model type {model_type} {what}", hint=f"supported: {', '.join(FAMILIES)}")
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel("an embedding model (bidirectional attention) writes no text", hint="take its base")
    return model_type


_MLA = "its keys and values are latent (MLA), not per head"
_ENCODER = "an encoder-decoder reads and writes with two stacks"
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "longcat_flash", "minicpm3", "glm4_moe_lite"), _MLA),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), "an index chooses what its attention reads"),
    **dict.fromkeys(("t5", "umt5", "mt5", "bart", "mbart", "t5gemma", "whisper", "pegasus"), _ENCODER),
    **dict.fromkeys(("mamba", "mamba2", "rwkv"), "it keeps no keys and values"),
}


def original_max_positions(config: Mapping[str, Any]) -> int | None:
    """Find where long-RoPE switches its factors; transformers 5 says `rope_parameters`, 4 `rope_scaling`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise _senseless("rope_scaling", rope, "an object")
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("longrope", "su"):
        return None
    key = "original_max_position_embeddings"
    return positive({key: config.get(key) or rope.get(key)}, key, positive(config, "max_position_embeddings"))


def positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Read a whole number above 0; null means the default.

    Raises:
        BrokenModel: something else.
    """
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _senseless(key, value, "a whole number above 0")
    return value


def _senseless(key: str, value: object, wanted: str) -> BrokenModel:
    return BrokenModel(f"config.json: {key} = {value!r} is not {wanted}", hint="get the folder again")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateShape:
    """What one sequence leaves in each layer of linear attention: the newest inputs of a convolution, and a matrix."""

    at: tuple[int, ...]  # the indices of these layers in the model
    kernel: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def layers(self) -> int:
        return len(self.at)

    @property
    def values(self) -> int:
        """How wide the values of all heads are."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """How wide queries, keys and values of all heads are."""
        return 2 * self.key_heads * self.key_dim + self.values

    @property
    def numel(self) -> int:
        """Count the numbers of one layer and one sequence."""
        return self.channels * self.kernel + self.value_heads * self.key_dim * self.value_dim

    def matrices(self, hidden: int) -> tuple[tuple[int, int], ...]:
        """List the linear layers (outputs, inputs) of one layer, however transformers joins them."""
        return (self.channels + self.values, hidden), (2 * self.value_heads, hidden), (hidden, self.values)

    def weight_numel(self, hidden: int) -> int:
        """Count the parameters of one layer's linear attention."""
        matrices = sum(rows * columns for rows, columns in self.matrices(hidden))
        return matrices + self.channels * self.kernel + 2 * self.value_heads + self.value_dim


def state_shape(model_type: str, config: Mapping[str, Any]) -> StateShape | None:
    """Say what the layers of linear attention remember; None where every layer has keys and values.

    Raises:
        BrokenModel: no layer has keys and values, or a size makes no sense.
    """
    if not FAMILIES[model_type].hybrid:
        return None
    kinds = _layer_types(config)
    if kinds is None:
        every = positive(config, "full_attention_interval")
        layers = range(positive(config, "num_hidden_layers"))
        kinds = ["full_attention" if (layer + 1) % every == 0 else "linear_attention" for layer in layers]
    at = tuple(layer for layer, kind in enumerate(kinds) if kind == "linear_attention")
    if len(at) == len(kinds):
        raise _senseless("layer_types", kinds, "one with a layer of full attention")
    shape = StateShape(
        at=at,
        kernel=positive(config, "linear_conv_kernel_dim"),
        key_heads=positive(config, "linear_num_key_heads"),
        value_heads=positive(config, "linear_num_value_heads"),
        key_dim=positive(config, "linear_key_head_dim"),
        value_dim=positive(config, "linear_value_head_dim"),
    )
    return shape if at else None


def _layer_types(config: Mapping[str, Any]) -> list[str] | None:
    kinds, layers = config.get("layer_types"), positive(config, "num_hidden_layers")
    if kinds and (not isinstance(kinds, list) or len(kinds) != layers):
        raise _senseless("layer_types", kinds, f"a list of {layers} names")
    return kinds or None


def layer_windows(model_type: str, config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Give the attention window (the query counted) of each layer with keys and values, None where it is full."""
    state = state_shape(model_type, config)
    if state is not None:
        return (None,) * (positive(config, "num_hidden_layers") - state.layers)
    layers, slides = positive(config, "num_hidden_layers"), FAMILIES[model_type].slides
    window = None if config.get("sliding_window") is None else positive(config, "sliding_window")
    kinds = _layer_types(config)
    if slides == "asked" and not config.get("use_sliding_window"):
        window = None
    if kinds and slides not in ("no", "all"):
        sliding = [kind == "sliding_attention" for kind in kinds]
    elif slides == "asked":
        first = config["max_window_layers"]
        if window is not None and not isinstance(first, int):
            raise _senseless("max_window_layers", first, "a whole number")
        sliding = [window is not None and layer >= first for layer in range(layers)]
    elif isinstance(slides, int):
        every = positive(config, "sliding_window_pattern", slides)
        sliding = [(layer + 1) % every != 0 for layer in range(layers)]
    else:
        sliding = [slides == "all"] * layers
    return tuple(window if one else None for one in sliding)


def layer_matrices(model_type: str, *, hidden: int, intermediate: int, q: int, kv: int) -> tuple[tuple[int, int], ...]:
    """List the linear layers (outputs, inputs) of a decoder layer with attention, as transformers makes them.

    Experts are none.
    """
    family = FAMILIES[model_type]
    queries = 2 * q if family.gated else q
    attention = ((q + 2 * kv, hidden),) if family.fused_qkv else ((queries, hidden), (kv, hidden), (kv, hidden))
    if family.experts is not None:
        return (*attention, (hidden, q))
    first = {"gated": ((intermediate, hidden),) * 2, "fused": ((2 * intermediate, hidden),)}
    return *attention, (hidden, q), *first.get(family.mlp, ((intermediate, hidden),)), (hidden, intermediate)


def weight_numel(
    model_type: str,
    config: Mapping[str, Any],
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    vocab_size: int,
) -> int:
    """Count the parameters that transformers allocates; tied embeddings count once."""
    family = FAMILIES[model_type]
    q, kv = num_heads * head_dim, num_kv_heads * head_dim
    queries = 2 * q if family.gated else q
    attention = hidden_size * (queries + 2 * kv) + q * hidden_size
    if family.always_biased or (family.bias != "no" and config.get("attention_bias")):
        attention += queries + 2 * kv + (hidden_size if family.bias == "qkvo" else 0)
    norms = {"no": 0, "head": 2 * head_dim, "whole": q + kv, "asked": 2 * head_dim * bool(config.get("use_qk_norm"))}
    attention += norms[family.qk_norm] + (num_heads if family.sinks else 0)
    state = state_shape(model_type, config)
    mixing = num_layers * attention
    if state is not None:
        mixing += state.layers * (state.weight_numel(hidden_size) - attention)
    dense = (2 if family.mlp == "plain" else 3) * hidden_size * intermediate_size
    if model_type == "llama" and config.get("mlp_bias"):
        dense += 2 * intermediate_size + hidden_size
    dense_layers, routed = (num_layers, 0) if family.experts is None else _routed(family.experts, config, hidden_size)
    embeddings = vocab_size * hidden_size * (1 if config["tie_word_embeddings"] else 2)
    layers = num_layers * (family.norms * hidden_size + family.extra)
    layers += dense_layers * dense + (num_layers - dense_layers) * routed
    return mixing + layers + hidden_size + embeddings


def _routed(experts: Experts, config: Mapping[str, Any], hidden: int) -> tuple[int, int]:
    """Count the layers without experts, and the parameters of a layer's experts and their router."""
    key = experts.count if config.get(experts.count) is not None else "num_experts"
    count, width = positive(config, key), positive(config, experts.width)
    shared = int(config.get(experts.shared) or 0) if experts.shared is not None else 0
    biases = count * (2 * width + hidden + 1) if experts.biased else 0
    gated = hidden * (3 * positive(config, experts.gated_width) + 1) if experts.gated_width is not None else 0
    dense_layers = _dense_layers(experts, config)
    return dense_layers, (count + shared) * 3 * hidden * width + count * hidden + biases + gated


def _dense_layers(experts: Experts, config: Mapping[str, Any]) -> int:
    """Count the layers without experts: the first ones, those named, and those between every n-th."""
    first = int(config.get(experts.dense_layers) or 0) if experts.dense_layers is not None else 0
    named, every = config.get("mlp_only_layers") or (), positive(config, "decoder_sparse_step", 1)
    layers = range(first, positive(config, "num_hidden_layers"))
    return first + sum(layer in named or (layer + 1) % every != 0 for layer in layers)
