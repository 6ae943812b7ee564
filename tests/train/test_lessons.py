"""Reading ahead: which thread, how far, and what an error does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trimkv_cli.train.lessons import AHEAD, read_ahead


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_lessons_come_in_order_a_few_ahead_and_so_does_their_error() -> None:
    """Catches lessons without bound or out of order, an error that is lost, and threads that stay divided."""
    drawn: list[Any] = []
    threads = set()

    def draw() -> Iterator[Any]:
        for number in range(9):
            threads.add((threading.current_thread().name, torch.get_num_threads()))
            drawn.append(number)
            yield SimpleNamespace(number=number)
        raise ValueError("the tenth")

    with read_ahead(draw()) as lessons:
        for number in range(9):
            assert next(lessons).number == number
            assert torch.get_num_threads() == 1
            assert len(drawn) <= number + 1 + AHEAD
        with pytest.raises(ValueError, match="the tenth"):
            next(lessons)
    assert torch.get_num_threads() == 2
    assert threads == {("teacher_0", 1)}
