"""An engine for tests of conversations, loaded once for each file of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from helpers.talking import load


@pytest.fixture(scope="module")
def engine() -> Any:
    return load()


@pytest.fixture
def llm(engine: Any) -> Iterator[Any]:
    yield engine
    for request_id in list(engine._scheduler.parked):
        engine.kept.release(request_id)
