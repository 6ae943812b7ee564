"""Stage 3: the built-in model on this device, as users run it: recall beside the CPU's record, and a killed job."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.gpu_stages.stage import Check, Evidence, Setting
from bench.kills import read_answers, write_job

RECORD = Path(__file__).parents[1] / "results" / "recall-mini.json"
DTYPES = ("fp32", "bf16")
BUDGET = 32


def answers(setting: Setting) -> Iterator[Evidence]:
    """Ask what the prompt has just told."""
    done = _trimkv(setting, "ask", "--greedy", "My cat is called Zubo. What is my cat called?")
    yield Evidence(check="an answer", ok="Zubo" in done, facts={"answer": done.strip()[:80]})


def recall(setting: Setting) -> Iterator[Evidence]:
    """Repeat the first questions of the CPU's record, in both dtypes."""
    samples = 8 if setting.tiny else 100
    recorded = next(
        row
        for row in json.loads(RECORD.read_text())["rows"]
        if (row["policy"], row["kv_budget"], row["context"]) == ("gates", BUDGET, 1000)
    )
    for dtype in DTYPES[:1] if setting.tiny else DTYPES:
        asked = f"--tasks recall --context 1000 --policies gates --budgets {BUDGET} --samples {samples} --seed 7"
        asked += " --logprob"
        (row,) = json.loads(_trimkv(setting, "eval", "mini", *asked.split(), "--json", dtype=dtype))["rows"]
        low, high = row["ci95"]
        ok = low <= recorded["accuracy"] <= high and row["n"] == samples
        facts = {name: row[name] for name in ("accuracy", "n", "ci95", "answer_logprob", "decode_tps")}
        yield Evidence(
            check=f"recall {dtype}", ok=ok, facts={**facts, "recorded": recorded["accuracy"], "of": recorded["n"]}
        )


def killed_job(setting: Setting) -> Iterator[Evidence]:
    """Kill a job after its first records, resume it, and compare it with one that ran in peace."""
    lines = 24 if setting.tiny else 200
    source, killed, quiet = (setting.scratch / name for name in ("in.jsonl", "killed.jsonl", "quiet.jsonl"))
    write_job(source, lines)
    undisturbed = subprocess.Popen(_job(setting, source, quiet), stdin=subprocess.DEVNULL)
    at_kill = _kill(_job(setting, source, killed), killed)
    resumed = subprocess.run(_job(setting, source, killed), stdin=subprocess.DEVNULL, check=False).returncode
    codes = [resumed, undisturbed.wait()]
    got, doubled = read_answers(killed, whole_lines=False)
    want, _ = read_answers(quiet, whole_lines=False)
    others = sum(got.get(key) != choices for key, choices in want.items())
    facts = {"lines": lines, "at_kill": at_kill, "answered": len(got), "doubled": doubled, "other_answers": others,
             "exit_codes": codes}  # fmt: skip
    # Other rows beside it may turn a near-tie: that is no fault of resuming.
    ok = not any(codes) and 0 < at_kill < lines and len(got) == len(want) == lines
    ok = ok and not doubled and others <= lines // 100
    yield Evidence(check="a job killed and resumed", ok=ok, facts=facts)


def _job(setting: Setting, source: Path, output: Path) -> list[str]:
    sizes = ("--kv-budget", str(BUDGET), "--max-inflight", "4")
    return _command(setting, "run", str(source), "-o", str(output), *sizes)


def _kill(command: Sequence[str], output: Path) -> int:
    """Start a job, kill it once it has written something, and return how many whole lines there are then."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while process.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.002)
    process.kill()
    process.wait()
    return output.read_bytes().count(b"\n") if output.exists() else 0


def _trimkv(setting: Setting, *arguments: str, dtype: str = "fp32") -> str:
    """Run trimkv to its end on this device and return what it prints; raises when it fails."""
    done = subprocess.run(
        _command(setting, *arguments, dtype=dtype),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def _command(setting: Setting, *arguments: str, dtype: str = "fp32") -> list[str]:
    device = str(setting.device)
    threads = () if setting.on_gpu else ("--threads", "1")
    return [sys.executable, "-m", "trimkv_cli", *arguments, "--device", device, "--dtype", dtype, *threads, "-q"]


CHECKS: tuple[Check, ...] = (answers, recall, killed_job)
