"""Gates that score a token by its rotated keys and its values: rg2 and rg3, beside a model in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from helpers.engines import Shape, gate_tensors, greedy, make_engine, run
from helpers.oracle import Head
from trimkv_cli.cache.gates import tensor_key
from trimkv_cli.model.spec import GateSpec, ModelSpec, TrainedVariant

TinyModel = Callable[..., Any]
VARIANTS: tuple[TrainedVariant, ...] = ("rg2", "rg3")
PROMPT = tuple((7 * n * n + 3 * n) % 125 + 3 for n in range(31))


def log_beta_of(gate: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """Score `[T, 2 · Hkv · D]` as retention.md writes the variants down: `[T, Hkv]`."""
    if "gate_proj.weight" in gate:
        inner = functional.silu(states @ gate["gate_proj.weight"].T) * (states @ gate["up_proj.weight"].T)
        logits = inner @ gate["down_proj.weight"].T
    else:
        inner = functional.silu(states @ gate["linear1.weight"].T + gate["linear1.bias"])
        logits = inner @ gate["linear2.weight"].T
    return functional.logsigmoid(logits + gate["bias"])


class PlainLlama:
    """A Llama with a list of kept tokens per layer and KV head."""

    def __init__(self, model: Any, gates: Mapping[str, Tensor], *, budget: int) -> None:
        self.model, self.config = model.model, model.config
        self.output = model.lm_head.weight
        self.seen = 0
        heads, layers = self.config.num_key_value_heads, self.config.num_hidden_layers
        self.heads = [[Head(budget=budget) for _ in range(heads)] for _ in range(layers)]
        prefixes = [tensor_key(layer, "") for layer in range(layers)]
        self.gates = [{k.removeprefix(p): t for k, t in gates.items() if k.startswith(p)} for p in prefixes]

    def feed(self, ids: list[int]) -> int:
        """Read a chunk; return the next token."""
        dim, x = self.config.head_dim, self.model.embed_tokens.weight[ids]
        frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        angles = torch.arange(self.seen, self.seen + len(ids))[:, None, None] * frequency
        turn = torch.polar(torch.ones_like(angles), angles)
        self.seen += len(ids)
        for layer, gate, heads in zip(self.model.layers, self.gates, self.heads, strict=True):
            own, mlp = layer.self_attn, layer.mlp
            inner = self.norm(x, layer.input_layernorm)
            q, k, v = ((inner @ p.weight.T).unflatten(1, (-1, dim)) for p in (own.q_proj, own.k_proj, own.v_proj))
            q, k = (torch.cat((z.real, z.imag), -1) for z in (torch.complex(*s.chunk(2, -1)) * turn for s in (q, k)))
            log_beta = log_beta_of(gate, torch.cat((k.flatten(1), v.flatten(1)), dim=1))
            groups = q.shape[1] // len(heads)
            parts = [
                head.step(
                    q[:, n * groups : (n + 1) * groups].transpose(0, 1).numpy(),
                    k[:, n].numpy(),
                    v[:, n].numpy(),
                    log_beta[:, n].numpy(),
                    dim**-0.5,
                )
                for n, head in enumerate(heads)
            ]
            attended = torch.cat([torch.from_numpy(part).float() for part in parts]).transpose(0, 1).flatten(1)
            x = x + attended @ own.o_proj.weight.T
            inner = self.norm(x, layer.post_attention_layernorm)
            wide = functional.silu(inner @ mlp.gate_proj.weight.T) * (inner @ mlp.up_proj.weight.T)
            x = x + wide @ mlp.down_proj.weight.T
        return int((self.norm(x[-1], self.model.norm) @ self.output.T).argmax())

    def norm(self, x: Tensor, module: Any) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps) * module.weight


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("chunk", [1, 6])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_kept_sets_and_tokens_are_those_of_a_plain_model(
    variant: TrainedVariant, chunk: int, fast_path: bool, tiny_model: TinyModel
) -> None:
    """Catches keys before their rotation, values before keys, heads in another order, a gate of the neighbour layer."""
    budget, new = 7, 12
    engine = make_engine(
        tiny_model("llama"), Shape(kv_budget=budget, prefill_chunk=chunk, gate=variant, rows=2), fast_path=fast_path
    )
    got = run(engine, [greedy("a", PROMPT, new, keep=True)])["a"]
    model = tiny_model("llama")
    gate = GateSpec(variant=variant, id="random", hidden=24)
    plain = PlainLlama(model, gate_tensors(gate, ModelSpec.from_config(model.config.to_dict())), budget=budget)
    chunks = [list(PROMPT[start : start + chunk]) for start in range(0, len(PROMPT), chunk)]
    want = [[plain.feed(ids) for ids in chunks][-1]]
    while len(want) < new:
        want.append(plain.feed(want[-1:]))
    assert got == want
    kept = [[head.kept for head in heads] for heads in plain.heads]
    assert [[sorted(head) for head in heads] for heads in engine.kept.positions("a")] == kept
    assert kept != [[list(range(plain.seen - budget, plain.seen))] * len(heads) for heads in kept]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_full_budget_gives_the_tokens_of_transformers(variant: str, tiny_model: TinyModel) -> None:
    """Catches attention that is changed by a score, and rows of a batch whose scores are mixed up."""
    prompts = [PROMPT, PROMPT[:3], PROMPT[5:20]]
    model = tiny_model("gemma3")
    want = [
        model.generate(torch.tensor([p]), max_new_tokens=9, do_sample=False, pad_token_id=0)[0, len(p) :].tolist()
        for p in prompts
    ]
    engine = make_engine(model, Shape(kv_budget=64, prefill_chunk=7, gate=variant, rows=3))
    got = run(engine, [greedy(str(i), p, 9) for i, p in enumerate(prompts)])
    assert [got[str(i)] for i in range(3)] == want
