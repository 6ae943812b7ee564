"""`trimkv gates train` as a process: folders, checkpoints, kill -9, refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_training import save_tiny_model, write_conversations
from trimkv_cli.app import main
from trimkv_cli.cache.gate_files import check_gates, read_gates
from trimkv_cli.model.folders import read_model_spec

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--memory-size", "8", "--context", "64", "--batch", "2", "--accumulate", "1", "--hidden", "8", "--lr", "0.01"),
    *("--log-every", "1", "--threads", "1", "--dtype", "fp32", "--position-gap", "200", "--save-every", "3"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture
def arguments(place: Path, tiny_model: Callable[..., Any]) -> list[str]:
    """The command line of a small run, without its output."""
    model, data = place / "model", place / "data.jsonl"
    if not data.exists():
        save_tiny_model(model, tiny_model)
        write_conversations(data)
    return [str(model), "--data", str(data), *SMALL]


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "trimkv_cli", "gates", "train", *arguments]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )


def train(*arguments: str) -> tuple[int, str, str]:
    process = start(*arguments)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def train_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Do as `train`, in this process: the start of another takes seconds."""
    with pytest.raises(SystemExit) as ended:
        main(["gates", "train", *arguments])
    return int(ended.value.code or 0), *capsys.readouterr()


def losses(stderr: str) -> dict[int, str]:
    """Return step → the loss parts as printed."""
    return {int(step): parts for step, parts in re.findall(r"^step (\d+)/\d+  (loss .*?)  lr", stderr, re.MULTILINE)}


def test_gates_are_not_trained_past_learned_sinks(
    tmp_path: Path, tiny_model: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a teacher whose softmax lacks the sinks, which is another model than the one that the gates are for."""
    tiny_model("gpt_oss").save_pretrained(tmp_path / "model")
    code, _, stderr = train_here(
        capsys, str(tmp_path / "model"), "--data", "none.jsonl", *SMALL, "--steps", "1", "-o", str(tmp_path / "gates")
    )
    assert code == 6
    assert "learned sinks" in stderr


@pytest.mark.slow
def test_a_run_killed_goes_on_as_if_it_were_not(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches optimiser state, data order or positions that a checkpoint forgets, one that is ahead, and traces."""
    code, stdout, stderr = train(*arguments, "--steps", "10", "-o", str(tmp_path / "whole"))
    assert (code, stdout) == (0, f"{tmp_path / 'whole'}\n"), stderr
    expected = losses(stderr)
    assert list(expected) == list(range(1, 11))
    assert "\x1b" not in stderr

    ahead = ("--threads", "2")  # with the teacher in a thread of its own
    process = start(*arguments, *ahead, "--steps", "10", "-o", str(tmp_path / "killed"))
    assert process.stderr is not None
    while not process.stderr.readline().startswith("step 5/"):
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed/gates.json").exists()

    code, _, stderr = train_here(capsys, *arguments, *ahead, "--steps", "10", "-o", str(tmp_path / "killed"))
    assert code == 0, stderr
    assert re.search(r"going on from step (3|6|9) of ", stderr)
    resumed = losses(stderr)
    assert resumed == {step: expected[step] for step in resumed}
    assert 10 in resumed
    whole, killed = (load_file(tmp_path / name / "gates.safetensors") for name in ("whole", "killed"))
    assert all(bool((whole[name] == killed[name]).all()) for name in whole)
    records = [json.loads((tmp_path / name / "gates.json").read_text()) for name in ("whole", "killed")]
    assert records[0] == records[1]

    _check_folder(tmp_path / "whole", Path(arguments[0]))
    _check_refusals(tmp_path, arguments, capsys)


def _check_folder(folder: Path, model: Path) -> None:
    """The folder is read like any other, and says how it was made."""
    files = read_gates(folder)
    assert check_gates(read_model_spec(model), files.gate, files.tensors, model_id=str(model)) == ()
    assert (files.gate.memory_size, files.gate.trained_context, files.gate.hidden) == (8, 64, 8)
    training = json.loads((folder / "gates.json").read_text())["training"]
    assert training["base_model"] == str(model)
    assert training["steps"] == 10
    assert training["position_gap"] == 200
    assert len(training["data_sha256"]) == 64
    assert set(training["loss"]) == {"kl", "ntp", "capacity", "total"}


def _check_refusals(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of another run, and gates that would be lost, are refused; names are named."""
    code, _, stderr = train_here(capsys, *arguments, "--steps", "10", "-o", str(tmp_path / "whole"), "--seed", "5")
    assert code == 2
    assert "seed was 0, now 5" in stderr
    (tmp_path / "whole/training.safetensors").unlink()
    code, _, stderr = train_here(capsys, *arguments, "--steps", "10", "-o", str(tmp_path / "whole"))
    assert code == 2
    assert "gates.safetensors exists" in stderr
    assert "--overwrite" in stderr


@pytest.mark.slow
def test_stopped_on_purpose(tmp_path: Path, arguments: list[str]) -> None:
    """Catches Ctrl-C that loses the work: a checkpoint is left, exit 75, and more steps go on from it."""
    process = start(*arguments, "--steps", "100000", "--save-every", "100000", "-o", str(tmp_path))
    assert process.stderr is not None
    while not process.stderr.readline().startswith("step 2/"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert time.monotonic() - started < 30
    assert (tmp_path / "training.safetensors").is_file()
    assert "stopped after step" in stderr


def test_released_format(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an export that the reader of released folders does not take."""
    code, _, stderr = train_here(
        capsys, *arguments, "--steps", "1", "-o", str(tmp_path), "--export", "released", "--gate", "rg10"
    )
    assert code == 0, stderr
    files = read_gates(tmp_path)
    assert (files.gate.variant, files.gate.memory_size) == ("rg10", 8)
    assert {str(tensor.dtype) for tensor in files.tensors.values()} == {"torch.bfloat16"}
    again = train_here(
        capsys, *arguments, "--steps", "1", "-o", str(tmp_path / "own"), "--export", "bf16", "--gate", "rg10"
    )
    assert again[0] == 0
    own = read_gates(tmp_path / "own")
    assert all(torch.equal(own.tensors[name], tensor) for name, tensor in files.tensors.items())


def test_bad_data_and_foreign_families(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a refusal without its place, its exit code, or one that comes after the training."""
    data = tmp_path / "bad.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    code, stdout, stderr = train_here(
        capsys, arguments[0], "--data", str(data), *SMALL, "--steps", "1", "-o", str(tmp_path / "o")
    )
    assert (code, stdout) == (2, "")
    assert f"error: {data}:1: no assistant message" in stderr

    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    code, stdout, stderr = train_here(capsys, str(tmp_path), *arguments[1:], "--steps", "1", "-o", str(tmp_path / "o"))
    assert (code, stdout) == (6, "")
    assert "model type bert is not supported" in stderr
    assert not (tmp_path / "o").exists()

    code, _, stderr = train_here(capsys, *arguments, "--steps", "1", "-o", str(tmp_path / "o"), "--context", "4096")
    assert code == 4
    assert "4,296 positions" in stderr


def test_what_teaches_nothing_is_said(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches answers that --context cuts off while the loss reads 0.0000 and nobody says why."""
    talk = [{"role": "user", "content": "count " * 60}, {"role": "assistant", "content": "ok"}]
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"messages": talk}) + "\n")
    options = (*SMALL, "--batch", "1", "--steps", "3", "-o", str(tmp_path / "o"))
    code, _, stderr = train_here(capsys, arguments[0], "--data", str(data), *options)
    assert code == 0, stderr
    told = re.findall(r"warning: (.*?) had no answer", stderr)
    assert told[0] == "1 of 1 sequences so far"
    assert re.fullmatch(r"[23] of 3 sequences", told[-1])
    assert "longer than --context" in stderr
    (length, holds) = re.findall(r"long\.jsonl:1 has (\d+) tokens and is cut.*: --context (\d+) holds it", stderr)[0]
    assert length == holds
    begun = stderr.index("holds it")
    assert begun < stderr.index("step 1/3")
    options = (*options, "--context", holds, "--overwrite")
    code, _, stderr = train_here(capsys, arguments[0], "--data", str(data), *options)
    assert (code, "is cut" in stderr, "warning" in stderr) == (0, False, False)


def test_a_run_begins_with_other_gates(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches gates that are read and not used, a run that goes on with changed ones, and gates of another form."""
    first, second = tmp_path / "first", tmp_path / "second"
    evicting = ("--student", "evicting", "--attention-steps", "2", "--steps", "3")
    code, _, stderr = train_here(capsys, *arguments, *evicting, "-o", str(first))
    assert code == 0, stderr
    again = [*arguments, *evicting, "-o", str(second), "--begin-with", str(first)]
    code, _, stderr = train_here(capsys, *again, "--lr", "1e-9")
    assert code == 0, stderr
    made, kept = (load_file(folder / "gates.safetensors") for folder in (first, second))
    assert all((made[name] - kept[name]).abs().max() < 1e-6 for name in made)
    assert "attention" in stderr
    assert "begin_with" in train_here(capsys, *again, "--lr", "1e-9", "--begin-with", str(second))[2]
    code, _, stderr = train_here(
        capsys, *arguments, *evicting, "-o", str(tmp_path / "o"), "--begin-with", str(first), "--hidden", "16"
    )
    assert code == 6
    assert "--hidden 8" in stderr
