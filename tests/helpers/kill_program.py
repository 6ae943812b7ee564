"""`trimkv run` around an engine that needs no model: quick to start, and to be killed. For tests.

With TRIMKV_TEST_CLUSTER set, two workers of a Ray cluster have such an engine each.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from helpers.fake_engine import FakeEngine, FakeText
from trimkv_cli.commands.run import work as run_work
from trimkv_cli.jobs.cluster import ClusterOptions, RayBackend
from trimkv_cli.jobs.job import Backend, BackendFacts, LocalBackend


class SlowEngine(FakeEngine):
    """Take a moment for each step, so that a kill meets it at work."""

    def step(self) -> list[Any]:
        time.sleep(0.02 if "TRIMKV_TEST_CLUSTER" in os.environ else 0.001)
        return super().step()


FACTS = BackendFacts(
    model_id="fake",
    fingerprint={"weights": "fake"},
    template="",
    sampling_defaults={},
    kv_budget=1,
    prefill_chunk=1,
    rows=8,
)


def load(*_: object) -> tuple[SlowEngine, BackendFacts]:
    return SlowEngine(max_rows=8, text=FakeText()), FACTS


def backend(*_: object) -> Backend:
    if "TRIMKV_TEST_CLUSTER" in os.environ:
        return RayBackend(load, ClusterOptions(cpus_per_worker=max(1, (os.cpu_count() or 2) // 2)))
    return LocalBackend(*load())


if __name__ == "__main__":
    run_work.open_backend = backend
    from trimkv_cli.app import main

    main(["run", *sys.argv[1:]])
