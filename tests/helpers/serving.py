"""The endpoint, for tests: in a process of its own, or in this one over any engine."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import orjson
from starlette.routing import Route
from starlette.types import ASGIApp

from helpers.fake_engine import FakeEngine, FakeText
from helpers.programs import COMMAND, ENVIRONMENT
from trimkv_cli.events import RunStats, TokenEvent
from trimkv_cli.jobs.lines import Rules
from trimkv_cli.jobs.records import Recorder
from trimkv_cli.mini import MODEL_FOLDER
from trimkv_cli.model.spec import ModelSpec, streaming_gate
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.plan import make_plan
from trimkv_cli.serve.app import Trust, make_app
from trimkv_cli.serve.bodies import Bodies
from trimkv_cli.serve.completions import Completions
from trimkv_cli.serve.histories import Histories
from trimkv_cli.serve.server import Server, bind
from trimkv_cli.serve.worker import Worker, WorkerOptions

SAID = [{"role": "user", "content": "abc"}]


class Scripted(FakeEngine):
    """Answer with the prompt, as `FakeEngine` does, as slowly as is said; keep nothing."""

    def __init__(self, *, step_s: float = 0.0, max_rows: int = 3, max_positions: int = 5000) -> None:
        super().__init__(max_rows=max_rows, text=FakeText(), max_positions=max_positions)
        self.step_s = step_s
        self.kept: dict[str, object] = {}
        self.kv_bytes = self.peak_bytes = self.evicted = 0
        self.stats = RunStats(
            prefill_tokens=0, decode_tokens=0, shared_prefix_tokens=0, steps=0, prefill_s=0, decode_s=0
        )
        spec = ModelSpec.from_config(orjson.loads((MODEL_FOLDER / "config.json").read_bytes()))
        plan = make_plan(spec, streaming_gate(), PlanOptions(kv_budget=64, max_inflight=max_rows))
        self.facts = SimpleNamespace(
            model_id="fake",
            plan=plan,
            gate=plan.run.gate,
            weight_bytes=0,
            gate_bytes=0,
            sampling_defaults={},
            max_positions=max_positions,
            eos_token_ids=frozenset(),
            notes=(),
            warnings=(),
        )
        self.ran: list[str] = []
        self.aborted: list[str] = []
        self.closed = False

    @property
    def free_rows(self) -> int:
        return max(0, self.max_rows - len(self.queue))

    def add(self, request: Any) -> None:
        self.ran.append(request.id)
        super().add(request)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        super().abort(request_id)
        self.made.pop(request_id, None)  # it may come again

    def step(self) -> list[TokenEvent]:
        time.sleep(self.step_s)
        return super().step()

    def close(self) -> None:
        self.closed = True


@dataclass(kw_only=True)
class Endpoint:
    """An endpoint in this process, and where it listens."""

    worker: Worker
    app: ASGIApp
    port: int
    client: httpx.Client
    engines: list[Any] = field(default_factory=list)

    @property
    def engine(self) -> Any:
        return self.engines[-1]

    def chat(self, messages: Sequence[Any] = SAID, **body: Any) -> httpx.Response:
        """Ask for a chat completion."""
        return self.client.post("/v1/chat/completions", json={"messages": messages, **body})

    def metrics(self) -> dict[str, float]:
        """Read the metrics, by name."""
        return read_metrics(self.client.get("/metrics").text)

    def settled(self, wanted: Callable[[dict[str, float]], bool], *, within_s: float = 10.0) -> dict[str, float]:
        """Wait until the metrics are as wanted, and return them."""
        return settled(self.metrics, wanted, within_s=within_s)


@contextmanager
def endpoint(
    load: Callable[[], Any] = Scripted,
    *,
    kept: int = 2,
    options: WorkerOptions | None = None,
    trust: Trust | None = None,
    rules: Rules | None = None,
    max_body_bytes: int = 1 << 20,
    continues: bool = True,
    others: Callable[[Completions], Sequence[Route]] = lambda _: (),
) -> Iterator[Endpoint]:
    """Serve an engine from this process, on a free port."""
    engines: list[Any] = []

    def remembered() -> Any:
        engines.append(load())
        return engines[-1]

    worker = Worker(remembered, Histories(kept), options=options or WorkerOptions())
    worker.start()
    completions = Completions(
        worker=worker,
        text=engines[0].text,
        rules=rules or Rules(),
        recorder=Recorder(model="mini", run_seed=0, kv_budget=64, prefill_chunk=512),
        bodies=Bodies(max_body_bytes),
        continues=continues,
    )
    app = make_app(
        completions, model_id="mini", names=frozenset({"mini"}), trust=trust or Trust(), others=others(completions)
    )
    opened = bind("127.0.0.1", 0)
    port = opened.getsockname()[1]
    try:
        with Server(app, opened, grace_s=1) as server:
            while not server._server.started:
                time.sleep(0.005)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                yield Endpoint(worker=worker, app=app, port=port, client=client, engines=engines)
        server._thread.join()
    finally:
        worker.close()


@dataclass(kw_only=True)
class Served:
    """A server in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    errors: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def metrics(self) -> dict[str, float]:
        return read_metrics(httpx.get(f"{self.url}/metrics").text)

    def end(self, number: int, *, within_s: float = 30.0) -> tuple[int, str]:
        """Send a signal; return the exit code, and what was said on stderr."""
        self.process.send_signal(number)
        return self.process.wait(within_s), self.errors.read_text()


@contextmanager
def served(
    folder: Path,
    *arguments: str,
    command: Sequence[str] = (*COMMAND, "serve"),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Served]:
    """Run `trimkv serve` on a free port."""
    errors = folder / "stderr"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, *arguments, "--port", "0"],
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            env={**ENVIRONMENT, **(environment or {})},
        )
    try:
        while (found := re.search(r"answers at http://[^ ]*:(\d+)/v1", errors.read_text())) is None:
            assert process.poll() is None, errors.read_text()
            time.sleep(0.02)
        yield Served(process=process, port=int(found[1]), errors=errors)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def read_metrics(text: str) -> dict[str, float]:
    """Read Prometheus's text format."""
    rows = (line.split() for line in text.splitlines() if not line.startswith("#"))
    return {name.removeprefix("trimkv_"): float(value) for name, value in rows}


def settled(
    metrics: Callable[[], dict[str, float]], wanted: Callable[[dict[str, float]], bool], *, within_s: float = 10.0
) -> dict[str, float]:
    """Wait until the metrics are as wanted, and return them."""
    until = time.monotonic() + within_s
    while not wanted(found := metrics()):
        assert time.monotonic() < until, found
        time.sleep(0.01)
    return found
