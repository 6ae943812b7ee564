"""What Prometheus reads of a server: memory against the budget, rows, tokens, time."""

from __future__ import annotations

from collections.abc import Callable

from trimkv_cli.serve.worker import Gauge

# Name, kind, help, and how it is read.
_ROWS: tuple[tuple[str, str, str, Callable[[Gauge], float]], ...] = (
    ("loaded", "gauge", "1 while the model is in memory", lambda g: int(g.loaded)),
    ("model_loads_total", "counter", "times the model was loaded", lambda g: g.loads),
    ("budget_bytes", "gauge", "memory that the process may use; 0 = no budget", lambda g: g.budget_bytes or 0),
    ("planned_bytes", "gauge", "memory that the plan counts on", lambda g: g.planned_bytes),
    ("peak_bytes", "gauge", "largest memory of the process so far", lambda g: g.peak_bytes),
    ("kv_bytes", "gauge", "the cache of all rows", lambda g: g.kv_bytes),
    ("kept_bytes", "gauge", "conversations put aside in memory", lambda g: g.kept_bytes),
    ("kept_conversations", "gauge", "conversations that a request can go on from", lambda g: g.kept),
    ("rows", "gauge", "sequences that may run at the same time", lambda g: g.rows),
    ("requests_running", "gauge", "sequences that run", lambda g: g.running),
    ("requests_waiting", "gauge", "requests that wait for a row", lambda g: g.waiting),
    ("requests_total", "counter", "sequences that have ended", lambda g: g.requests),
    ("prompt_tokens_total", "counter", "prompt tokens read", lambda g: g.prompt_tokens),
    ("continued_tokens_total", "counter", "tokens not read again, as their row was kept", lambda g: g.continued_tokens),
    ("completion_tokens_total", "counter", "tokens generated", lambda g: g.completion_tokens),
    ("batch_lines_done_total", "counter", "lines of batches that were answered", lambda g: g.batch_done),
    ("batch_lines_failed_total", "counter", "lines of batches that were not", lambda g: g.batch_failed),
    ("evictions_total", "counter", "slots of heads given to newer tokens", lambda g: g.evictions),
    ("prefill_seconds_total", "counter", "time in which prompts were read", lambda g: g.prefill_s),
    ("decode_seconds_total", "counter", "time in which tokens were generated", lambda g: g.decode_s),
)


def metrics_text(gauge: Gauge) -> str:
    """Return the text format of Prometheus, version 0.0.4."""
    lines = []
    for name, kind, help, read in _ROWS:
        lines += [f"# HELP trimkv_{name} {help}", f"# TYPE trimkv_{name} {kind}", f"trimkv_{name} {read(gauge)}"]
    return "\n".join(lines) + "\n"
