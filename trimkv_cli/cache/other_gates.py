"""Gates that others made: from what enters a layer's attention to a token's value, whatever its age."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimkv_cli.cache.retention_gate import RetentionGate
from trimkv_cli.model.spec import FASTKVZIP_DIM, FASTKVZIP_SINKS, GateSpec, ModelSpec, scored_layers
from trimkv_kernels.reference import finite

_EPSILON = 1e-6


class KVzapGate(RetentionGate):
    """Score with KVzap's MLP, or its linear layer where `hidden` is 0 (arXiv 2601.07891).

    The last layer is kept in float32: in 16 bits its scores, logs of attention, would tie.
    """

    def __init__(self, *, input_size: int, hidden: int, num_kv_heads: int) -> None:
        super().__init__()
        self.inner = nn.Linear(input_size, hidden) if hidden else None
        self.output = nn.Linear(hidden or input_size, num_kv_heads, dtype=torch.float32)

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        states = hidden_states if self.inner is None else functional.gelu(self.inner(hidden_states))
        return finite(self.output(states.float()))


class FastKVzipGate(RetentionGate):
    """Score with Fast KVzip's sink attention of low rank (arXiv 2601.17668), in (0, 1).

    A token's queries are weighed against its own key and some learned ones, and the share of its own key is averaged
    over the queries of a KV head. All but the projections is kept in float32.
    """

    q_norm: nn.Parameter  # [16]
    k_norm: nn.Parameter  # [16]
    k_base: nn.Parameter  # [Hkv, 16, 16]
    b: nn.Parameter  # [Hkv, G]

    def __init__(self, *, input_size: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        dim, groups = FASTKVZIP_DIM, num_heads // num_kv_heads
        self.q_proj = nn.Linear(input_size, num_heads * dim)
        self.k_proj = nn.Linear(input_size, num_kv_heads * dim, bias=False)
        exact = {
            "q_norm": (dim,),
            "k_norm": (dim,),
            "k_base": (num_kv_heads, FASTKVZIP_SINKS, dim),
            "b": (num_kv_heads, groups),
        }
        for name, shape in exact.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32)))

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        heads, groups = self.b.shape
        query = _normed(self.q_proj(hidden_states).float().unflatten(-1, (heads, groups, -1)), self.q_norm)
        key = _normed(self.k_proj(hidden_states).float().unflatten(-1, (heads, 1, -1)), self.k_norm)
        scale = FASTKVZIP_DIM**-0.5
        own = (query * key).sum(-1) * scale + self.b  # [B, T, Hkv, G]
        others = torch.einsum("bthgd,hjd->bthgj", query, self.k_base) * scale
        return finite(torch.sigmoid(own - others.logsumexp(-1)).mean(-1))


class NewestGate(RetentionGate):
    """Score by position, in layers that nobody scores: windows keep their newest tokens."""

    def __init__(self, *, num_kv_heads: int) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        return positions.float()[..., None].repeat(1, 1, self.num_kv_heads)


def _normed(states: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(states, weight.shape, weight, _EPSILON)


def shapes_of_others(gate: GateSpec, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape that each tensor of a file must have.

    Files of Fast KVzip have gates either for all layers or for those that it scores, one after the other.
    """
    if gate.variant == "kvzap":
        layers: tuple[int, ...] = spec.kv_layers
    else:
        count = len({key.partition(".")[0] for key in tensors})
        layers = tuple(range(spec.num_kv_layers if count == spec.num_kv_layers else len(scored_layers(spec))))
    return {f"{_place(gate, layer)}.{name}": shape for layer in layers for name, shape in _shapes(gate, spec).items()}


def _place(gate: GateSpec, layer: int) -> str:
    return f"layers.{layer}" if gate.variant == "kvzap" else str(layer)


def _shapes(gate: GateSpec, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of one layer by its name in the file."""
    hidden, heads, wide = spec.hidden_size, spec.num_kv_heads, gate.hidden
    if gate.variant == "kvzap":
        if wide == 0:
            return {"weight": (heads, hidden), "bias": (heads,)}
        return {"0.weight": (wide, hidden), "0.bias": (wide,), "2.weight": (heads, wide), "2.bias": (heads,)}
    dim, queries = FASTKVZIP_DIM, spec.num_heads
    return {
        "q_proj.weight": (queries * dim, hidden),
        "q_proj.bias": (queries * dim,),
        "k_proj.weight": (heads * dim, hidden),
        "q_norm.weight": (dim,),
        "k_norm.weight": (dim,),
        "k_base": (heads, 1, FASTKVZIP_SINKS, dim),
        "b": (heads, 1, queries // heads),
    }


_NAMES: Mapping[str, str] = {
    "0.weight": "inner.weight", "0.bias": "inner.bias", "2.weight": "output.weight", "2.bias": "output.bias",
    "weight": "output.weight", "bias": "output.bias", "q_norm.weight": "q_norm", "k_norm.weight": "k_norm",
}  # fmt: skip
_IN_COMPUTE_DTYPE = ("inner.", "q_proj.", "k_proj.")


def build_others(
    gate: GateSpec, spec: ModelSpec, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device | str
) -> Iterator[RetentionGate]:
    """Yield a gate per layer with keys and values, of tensors as `shapes_of_others` wants them."""
    if gate.variant == "kvzap":
        for layer in spec.kv_layers:
            yield _loaded(gate, spec, tensors, _place(gate, layer), dtype=dtype, device=device)
        return
    scored = scored_layers(spec)
    of_all = len({key.partition(".")[0] for key in tensors}) == spec.num_kv_layers
    for layer in range(spec.num_kv_layers):
        if layer in scored:
            place = _place(gate, layer if of_all else scored.index(layer))
            yield _loaded(gate, spec, tensors, place, dtype=dtype, device=device)
        else:
            yield NewestGate(num_kv_heads=spec.num_kv_heads)


def _loaded(
    gate: GateSpec,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    place: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> RetentionGate:
    with torch.device("meta"):
        module: RetentionGate = (
            KVzapGate(input_size=spec.hidden_size, hidden=gate.hidden, num_kv_heads=spec.num_kv_heads)
            if gate.variant == "kvzap"
            else FastKVzipGate(input_size=spec.hidden_size, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads)
        )
    own = {}
    for name in _shapes(gate, spec):
        known, tensor = _NAMES.get(name, name), tensors[f"{place}.{name}"]
        kept = dtype if known.startswith(_IN_COMPUTE_DTYPE) else torch.float32
        own[known] = tensor.to(device=device, dtype=kept).reshape(module.get_parameter(known).shape)
    module.load_state_dict(own, assign=True)
    return module.requires_grad_(requires_grad=False)
