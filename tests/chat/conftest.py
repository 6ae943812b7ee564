"""An engine for tests of conversations, loaded once for each file of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from talking import load


@pytest.fixture(scope="module")
def engine() -> Any:
    return load()


@pytest.fixture
def llm(engine: Any) -> Iterator[Any]:
    yield engine
    for request_id in list(engine._scheduler.parked):
        engine.release(request_id)
