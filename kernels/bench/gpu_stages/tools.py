"""Stage 9: what NVIDIA's own tools say of the kernels where they are installed, and quantised weights in a graph."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.gpu_stages import smoke
from bench.gpu_stages.engine import WAYS, closing
from bench.gpu_stages.memory import GIB, load, obstacle
from bench.gpu_stages.stage import Check, Evidence, Setting, not_shown
from helpers.engines import greedy, run
from trimkv_kernels import StepOperations, operations_for, step_operations_for, step_reference

_CUDA = Path("/usr/local/cuda/bin")
_FOUND = 99  # the exit code of a sanitizer that has found something
_TOOL_S = 40.0
_METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of bandwidth",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% of arithmetic",
    "launch__registers_per_thread": "registers",
}
_PROFILED = "regex:_scan|_merge|_attend|_evict|_add_norm|_rotate|_activate"
_SMALL = smoke.Shape(rows=2, num_kv_heads=2, groups=2, head_dim=64, slots=130, fill=130, chunk=33, dtype="bf16")
_REAL = smoke.Shape(rows=8, num_kv_heads=8, groups=4, head_dim=128, slots=1024, fill=1024, chunk=512, dtype="bf16")


def smallest(setting: Setting) -> Iterator[Evidence]:
    """Run the program that the tools look into, alone."""
    code, said = _watched([], setting, "small")
    yield Evidence(check="the smallest case", ok=code == 0, facts={"exit_code": code, "said": said[-200:]})


def sanitizers(setting: Setting) -> Iterator[Evidence]:
    """Look for accesses out of bounds and for races in every operation."""
    program = find("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if program is None or not setting.on_gpu:
            yield not_shown(tool, "there is no compute-sanitizer" if program is None else "a CPU has other tools")
            continue
        code, said = _watched([program, "--tool", tool, "--error-exitcode", str(_FOUND)], setting, "small")
        lines = [line for line in said.splitlines() if line.startswith("=========")]
        yield Evidence(check=tool, ok=code == 0, facts={"exit_code": code, "said": lines[-1:], "first": lines[1:6]})


def counters(setting: Setting) -> Iterator[Evidence]:
    """Read a GPU's counters of each kernel at the size of Qwen3-4B's layers."""
    program = find("ncu")
    if program is None or not setting.on_gpu:
        yield not_shown("ncu", "there is no ncu" if program is None else "a CPU has other counters")
        return
    how = [program, "--clock-control", "none", "--csv", "--page", "raw", "--kernel-name", _PROFILED]
    code, said = _watched([*how, "--metrics", ",".join(_METRICS)], setting, "real")
    (setting.scratch / "ncu.csv").write_text(said, encoding="utf-8")
    kernels = parse_counters(said)
    if not kernels:
        why = next((line for line in said.splitlines() if "ERR" in line or "==ERROR" in line), f"exit code {code}")
        yield not_shown("ncu", why[:200])
    for number, (name, values) in enumerate(kernels):
        yield Evidence(check=f"ncu {number} {name}", ok=True, facts=values)


def parse_counters(said: str) -> list[tuple[str, dict[str, str]]]:
    """Return kernels and their counters from ncu's CSV, which begins after its talk and has a line of units."""
    lines = said.splitlines()
    first = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = [row for row in csv.DictReader(lines[first:]) if row.get("ID")]
    return [(row["Kernel Name"], {name: row[key] for key, name in _METRICS.items() if row.get(key)}) for row in rows]


def find(name: str) -> str | None:
    """Return the path of one of NVIDIA's tools, None where it is not installed."""
    return shutil.which(name) or shutil.which(name, path=str(_CUDA))


def _watched(tool: Sequence[str], setting: Setting, size: str) -> tuple[int | None, str]:
    """Run every operation once under a tool; return its exit code, None when it took too long, and what it printed."""
    command = [*tool, sys.executable, "-m", "bench.gpu_stages.tools", str(setting.device), size]
    path = setting.scratch / "said.txt"
    with path.open("w", encoding="utf-8") as file:  # no pipe: what a tool has started holds it open when the tool ends
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(_TOOL_S if setting.on_gpu else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    said = path.read_text(encoding="utf-8", errors="replace")
    print(said)
    return code, said


def quantised(setting: Setting) -> Iterator[Evidence]:
    """Decode with the matrices of bitsandbytes from graphs, and in step: the tokens are the same."""
    for quantize in ("nf4",) if setting.tiny else ("int8", "nf4"):
        check, why = f"{quantize} from a graph", obstacle(quantize)
        if why is not None:
            yield not_shown(check, why)
            continue
        tokens, graphs = [], None
        for way in WAYS:
            with closing(load(setting, "bf16", quantize, 4 * GIB)) as engine:
                if way == "in step":
                    engine._runner._ahead = None
                elif not setting.on_gpu:
                    engine._runner.run_ahead(())
                tokens.append(run(engine, [greedy(str(n), range(5 + n, 45 + 3 * n), 20) for n in range(3)]))
                graphs = engine._runner.no_graph
        ok = tokens[0] == tokens[1] and graphs is None
        yield Evidence(check=check, ok=ok, facts={"same": tokens[0] == tokens[1], "no_graph": graphs})


def _run_every_operation(device: torch.device, shape: smoke.Shape) -> int:
    """Run decode, prefill and a step's operations once, beside their reference."""
    found = list(smoke.compare(operations_for(device), shape, device))
    found += smoke.compare_steps(step_operations_for(device) or StepOperations.of(step_reference), shape, device)
    print(*found, sep="\n")
    return int(len(found) < 3 or any(not one.ok for one in found))


CHECKS: tuple[Check, ...] = (smallest, quantised, sanitizers, counters)

if __name__ == "__main__":
    sys.exit(_run_every_operation(torch.device(sys.argv[1]), _SMALL if sys.argv[2] == "small" else _REAL))
