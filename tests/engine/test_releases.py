"""Releases of transformers that call things by other names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

from trimkv_cli.cache.attention import RetentionView, install
from trimkv_cli.cache.gates import FullGate
from trimkv_cli.cache.releases import cache_argument, decoder_layers, entering, given_cache
from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_cli.errors import UnsupportedModel


class _Newer:
    def forward(self, input_ids: Any, cache: Any = None, **_: Any) -> None: ...


class _Older:
    def forward(self, input_ids: Any, past_key_values: Any = None, **_: Any) -> None: ...


class _Unknown:
    def forward(self, input_ids: Any, memory: Any = None, **_: Any) -> None: ...


def test_cache_goes_by_the_name_of_the_release() -> None:
    """Catch a warning, or a cache that is passed over, when the argument has its other name."""
    assert [cache_argument(model) for model in (_Newer(), _Older())] == ["cache", "past_key_values"]
    assert given_cache({"cache": 1}) == given_cache({"past_key_values": 1, "cache": None}) == 1


def test_unknown_form_names_the_releases_that_work() -> None:
    """Catch a KeyError or AttributeError out of the middle of a model when a release renames what is used."""
    model: Any = nn.Linear(1, 1)
    for ask in (
        lambda: cache_argument(_Unknown()),
        lambda: given_cache({"memory": 1}),
        lambda: entering((), {"states": torch.zeros(1)}),
        lambda: decoder_layers(model),
    ):
        with pytest.raises(UnsupportedModel, match="has a form that trimkv does not know") as caught:
            ask()
        assert "5.18" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_hook_takes_either_name(name: str, tiny_model: Callable[..., Any]) -> None:
    """Catch the first token of every command dying because a layer is given its cache under another name."""
    model = tiny_model("qwen3")
    heads = model.config.num_key_value_heads
    install(model, [FullGate(num_kv_heads=heads) for _ in model.model.layers], undo=ExitStack())
    layers = len(model.model.layers)
    cache = RetentionCache(
        rows=1,
        kv_budget=8,
        num_kv_heads=heads,
        head_dim=16,
        windows=[None] * layers,
        dtype=torch.float32,
        device=model.device,
    )
    view = RetentionView(cache)
    view.step_for = lambda *_: Step  # type: ignore[method-assign, assignment, return-value]
    hook = next(iter(model.model.layers[0].self_attn._forward_pre_hooks.values()))
    given = {"hidden_states": torch.zeros(1, 1, 64), name: view, "position_ids": None, "attention_mask": None}
    _, passed = hook(model.model.layers[0].self_attn, (), given)
    assert passed["layer_cache"] is cache.layers[0]


class Step:
    """Stand for a step of one token."""

    positions = torch.zeros(1, 1, dtype=torch.int32)
    pinned = None
