"""Mistakes that only a kill in the middle, a small disk or a closed stdout brings out."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.programs import ENVIRONMENT

pytestmark = pytest.mark.slow

PROGRAM = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "kill_program.py")]
COUNT = 500


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    lines = [{"custom_id": f"r{n}", "prompt": f"text {n}", "max_tokens": 1 + n % 9} for n in range(COUNT)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    command = [*PROGRAM, *map(str, arguments)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": {**ENVIRONMENT, "CI": "1"}, **options}
    return subprocess.Popen(command, **streams)


def answers(output: Path) -> dict[str, str]:
    """Return what stands in an output; no id may stand there twice."""
    from trimkv_cli.jobs.reading import open_input

    with open_input(str(output)) as stream:
        records = [json.loads(line) for line in stream]
    found = {record["custom_id"]: record["response"]["body"]["choices"][0]["message"]["content"] for record in records}
    assert len(found) == len(records)
    return found


@pytest.mark.parametrize(("name", "order"), [("out.jsonl", "completion"), ("out.jsonl.zst", "input")])
def test_killed_five_times_a_job_is_what_it_would_have_been(
    tmp_path: Path, source: Path, name: str, order: str
) -> None:
    """Catches lines that are lost, doubled, torn or out of order by kill -9 at random moments."""
    rng = random.Random(7)
    output = tmp_path / name
    for _ in range(5 if name == "out.jsonl" else 2):
        process = start(source, "-o", output, "--order", order)
        written = output.stat().st_size if output.exists() else 0
        while process.poll() is None and (not output.exists() or output.stat().st_size == written):
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
    last = start(source, "-o", output, "--order", order)
    assert last.wait(120) == 0, last.stderr and last.stderr.read()
    last.communicate()
    found, expected = answers(output), {f"r{n}": (f"text {n}" * 2)[: 1 + n % 9] for n in range(COUNT)}
    assert found == expected
    assert order == "completion" or list(found) == list(expected)
    assert sorted(path.name for path in tmp_path.iterdir() if "torn" not in path.name) == sorted(
        ["in.jsonl", name, f"{name}.trimkv.json"]
    )


def test_a_disk_that_fills_up_is_one_line_and_the_same_command_resumes(tmp_path: Path, source: Path) -> None:
    """A limit on the size of files stands for a full disk: both cut a write short and then refuse."""
    output = tmp_path / "out.jsonl"
    process = start(
        source, "-o", output, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_001, 50_001))
    )
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"error: cannot write {output}: File too large".encode() in said
    assert b"Traceback" not in said
    assert output.stat().st_size == 50_001
    again = start(source, "-o", output)
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert len(answers(output)) == COUNT


def test_a_second_writer_is_refused_while_the_first_one_works(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.jsonl"
    first = start("-", "-o", output, stdin=subprocess.PIPE)
    try:
        while first.poll() is None and not (tmp_path / "out.jsonl.trimkv.json").exists():
            time.sleep(0.01)
        second = start(source, "-o", output)
        _, said = second.communicate(timeout=120)
        assert second.returncode == 2
        assert b"another trimkv run writes" in said
    finally:
        first.kill()
        first.communicate()


def test_a_closed_stdout_is_told_and_a_closed_pipe_is_141(source: Path) -> None:
    closed = start(source, preexec_fn=lambda: os.close(1), stdout=None)
    _, said = closed.communicate(timeout=120)
    assert (closed.returncode, b"Traceback" in said) == (1, False)
    read_end, write_end = os.pipe()
    os.close(read_end)
    broken = start(source, stdout=write_end)
    os.close(write_end)
    _, said = broken.communicate(timeout=120)
    assert (broken.returncode, b"Traceback" in said) == (141, False)


def test_a_cluster_that_loses_a_worker_loses_no_line(tmp_path: Path, source: Path) -> None:
    """Two workers on this machine, one of them killed at work: the same answers, each once, and the same sidecar."""
    output = tmp_path / "out.jsonl"
    environment = {**ENVIRONMENT, "CI": "1", "TRIMKV_TEST_CLUSTER": "1"}
    process = start(source, "-o", output, env=environment)
    workers: list[psutil.Process] = []
    while process.poll() is None and (len(workers) < 2 or not (output.exists() and output.stat().st_size)):
        time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if child.name().startswith("ray::Worker")]
    workers[0].kill()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert len(workers) == 2
    assert answers(output) == {f"r{n}": (f"text {n}" * 2)[: 1 + n % 9] for n in range(COUNT)}
    again = start(source, "-o", output)  # one process takes up what the cluster wrote
    _, said = again.communicate(timeout=120)
    assert (again.returncode, b"500 answered before" in said) == (0, True)
