"""Reading ahead: which thread, how far, and what an error does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trimkv_cli.engine.devices import on_threads
from trimkv_cli.model.spec import ModelSpec
from trimkv_cli.train.options import TrainOptions
from trimkv_cli.train.teacher import batches_ahead, prefetch


@pytest.fixture
def two_threads() -> Iterator[None]:
    with on_threads(2):
        yield


@pytest.mark.usefixtures("two_threads")
def test_lessons_come_in_order_a_few_ahead_and_so_does_their_error() -> None:
    """Catches batches without bound or out of order, an error that is lost, and threads that stay divided."""
    drawn: list[Any] = []
    threads = set()

    def draw() -> Iterator[Any]:
        for number in range(9):
            threads.add((threading.current_thread().name, torch.get_num_threads()))
            drawn.append(number)
            yield SimpleNamespace(number=number)
        raise ValueError("the tenth")

    with prefetch(draw(), 2) as batches:
        for number in range(9):
            assert next(batches).number == number
            assert torch.get_num_threads() == 1
            assert len(drawn) <= number + 1 + 2
        with pytest.raises(ValueError, match="the tenth"):
            next(batches)
    assert torch.get_num_threads() == 2
    assert threads == {("teacher_0", 1)}


@pytest.mark.parametrize(("student", "layers", "ahead"), [("evicting", 4, 3), ("evicting", 28, 0), ("fading", 28, 3)])
def test_large_lessons_do_not_wait(student: Any, layers: int, ahead: int) -> None:
    """Catches gigabytes of what the teacher has read, waiting, where it reads a model that people use."""
    sizes = {"hidden_size": 256, "head_dim": 32} if layers == 4 else {"hidden_size": 1024, "head_dim": 128}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4 if layers == 4 else 8}
    config = {"model_type": "qwen3", "vocab_size": 1000, "intermediate_size": 512, "max_position_embeddings": 4096}
    spec = ModelSpec.from_config({**config, **sizes, **heads, "num_hidden_layers": layers})
    assert batches_ahead(spec, TrainOptions(memory_size=64, context=2048, steps=1, student=student)) == ahead
