"""What `trimkv doctor` finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.products import PRODUCTS
from trimkv_cli import tested
from trimkv_cli.errors import GateMismatch, TrimkvError
from trimkv_cli.loading import checkup, measuring
from trimkv_cli.loading.checkup import Finding
from trimkv_cli.model import machine
from trimkv_cli.model.machine import Machine


def test_everything_is_looked_at() -> None:
    """Catch a check that was written and never called, and faults in a healthy checkout."""
    findings = {finding.name: finding for finding in checkup.checkup()}
    expected = "trimkv, torch, cpu, memory, terminal, cache folder, fp32, mini model, mini gates"
    assert set(expected.split(", ")) <= findings.keys()
    assert not [finding for finding in findings.values() if finding.status == "fault"]


def test_broken_check_is_a_fault_with_its_hint() -> None:
    """Catch one broken check that hides all others behind a traceback."""

    def broken() -> Iterator[Finding]:
        raise GateMismatch("the gates are damaged", hint="get them again")
        yield

    found = list(checkup._guarded(broken))
    assert [(finding.name, finding.status, finding.hint) for finding in found] == [
        ("broken", "fault", "get them again")
    ]
    assert "the gates are damaged" in found[0].detail


def test_folder_under_a_file_is_a_fault(tmp_path: Path) -> None:
    """Catch a cache folder that is reported as writable because it does not exist yet."""
    (tmp_path / "file").touch()
    assert checkup._writable("cache folder", tmp_path / "file" / "cache").status == "fault"
    assert checkup._writable("cache folder", tmp_path / "not" / "there").status == "ok"
    assert not (tmp_path / "not").exists()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catch a missing requirement that passes, and a missing extra that fails."""
    monkeypatch.setattr(checkup, "installed_version", lambda _: None)
    status = {finding.name: finding.status for finding in checkup.versions()}
    assert status["torch"] == "fault"
    assert status["bitsandbytes"] == "note"


def test_version_newer_than_tested_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catch a release that nobody has run passing for one that was tested."""
    monkeypatch.setattr(tested, "installed_version", lambda name: "99.1" if name == "transformers" else "0.0")
    found = {finding.name: finding for finding in checkup.untested_versions()}
    assert found.keys() == {"transformers"}
    assert found["transformers"].status == "note"
    assert f"newer than {tested.NEWEST['transformers']}" in found["transformers"].detail


@pytest.mark.parametrize(("cuda_build", "said"), [(None, "no CUDA"), ("13.0", "driver")])
def test_gpu_that_torch_cannot_use_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, cuda_build: str | None, said: str
) -> None:
    """Catch a machine with a GPU on which everything silently runs on the CPU."""
    monkeypatch.setattr(checkup.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    finding = checkup._no_accelerator(cuda_build=cuda_build)
    assert finding.status == "fault"
    assert said in finding.detail
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert checkup._no_accelerator(cuda_build=cuda_build).status == "note"


def test_speed_of_packed_weights_is_said_with_what_follows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catch a doctor that measures and does not keep it, or that passes an assumption off as a measurement."""
    monkeypatch.setattr(machine, "_file", lambda: tmp_path / "machine.json")
    monkeypatch.setattr(measuring, "measure_products", lambda: {**PRODUCTS, "int8@1": 401.0})
    monkeypatch.setattr(checkup, "measure_machine", lambda: Machine(cpu_runtime_bytes=5))
    (before,) = checkup.products()
    assert (before.status, before.hint) == ("note", "trimkv doctor --measure")
    assert before.detail.startswith("not measured; assumed: GGUF files stay packed, prompts of 64 tokens")
    told = {finding.name: finding.detail for finding in checkup.calibrate()}
    assert told["products"].endswith(f"kept in {tmp_path / 'machine.json'}")
    (after,) = checkup.products()
    assert (after.status, after.hint) == ("ok", None)
    assert "int4@1 70" in after.detail
    assert "a budget takes int4 before int8, prompts of 64 tokens are multiplied in bf16" in after.detail
    assert Machine.here().cpu_runtime_bytes == 5


_MEASURED = """
import json, sys
from pathlib import Path
print("a remark")
print(json.dumps({found}), flush=True)
sys.stdin.read()
Path({gone!r}).touch()
"""


@pytest.mark.parametrize(
    ("found", "context"),
    [
        ({"cpu_runtime_bytes": 9, "reserved_bytes": 200, "cuda_context_bytes": 450}, 450),
        ({"cpu_runtime_bytes": 9, "reserved_bytes": 200}, 500),
        ({"cpu_runtime_bytes": 9, "reserved_bytes": 800}, None),
        ({"cpu_runtime_bytes": 9}, None),
    ],
    ids=["NVML tells", "it does not", "others freed memory", "no GPU"],
)
def test_what_is_free_beside_a_process_tells_what_it_holds(
    found: dict[str, int], context: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catch a GPU whose context is never measured in a container, or one that is measured when the process is gone."""
    gone = tmp_path / "gone"
    free = iter((1000, 300))

    def free_on_gpu() -> int:
        assert not gone.exists()
        return next(free)

    monkeypatch.setattr(checkup, "_PROGRAM", _MEASURED.format(found=found, gone=str(gone)))
    monkeypatch.setattr(checkup, "_free_on_gpu", free_on_gpu)
    measured = checkup.measure_machine()
    assert (measured.cpu_runtime_bytes, measured.cuda_context_bytes) == (9, context)
    assert gone.exists()


def test_a_measurement_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catch a calibration that waits for ever, or fails without a word, when its process dies."""
    monkeypatch.setattr(checkup, "_PROGRAM", "print('{'); raise RuntimeError('no kernel image')")
    with pytest.raises(TrimkvError, match="calibration failed: RuntimeError: no kernel image"):
        checkup.measure_machine()
