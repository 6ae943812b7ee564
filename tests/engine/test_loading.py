"""Models that cannot be loaded here: what is said of it, and when."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.integrations import accelerate

from trimkv_cli.errors import DoesNotFit, ModelError, OutOfDeviceMemory
from trimkv_cli.loading import loader, packed, placing, quantise
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source
from trimkv_cli.model.machine import memory_bytes, swappable_bytes

MIB = 2**20
OPTIONS: dict[str, Any] = {"gates": "streaming", "kv_budget": "32", "threads": 1, "offline": True}


@pytest.fixture
def folder(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    model = tiny_model("qwen3", hidden_size=64, intermediate_size=128, head_dim=32)
    model.config.dtype = torch.float32
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def cannot_allocate(*_: Any, **__: Any) -> Any:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: 16 bytes")


@pytest.mark.parametrize(
    ("place", "name", "quantize"),
    [
        (quantise.LazyTensor, "__getitem__", "none"),
        (quantise, "_quantised", "nf4"),
        (packed, "pack", "int8"),
        (PreTrainedModel, "to", "none"),
        (loader, "build_gates", "none"),
        (loader, "assemble", "none"),
    ],
    ids=["read", "quantise", "pack", "to the device", "gates", "cache"],
)
def test_a_lack_of_memory_is_not_told_as_broken_weights(
    place: Any, name: str, quantize: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches "get the folder again" for a device that something else fills."""
    monkeypatch.setattr(place, name, cannot_allocate)
    with pytest.raises(OutOfDeviceMemory, match=r"out of memory while .* was loaded: .*can't allocate") as caught:
        load_engine(EngineOptions(model=str(folder), quantize=quantize, **OPTIONS))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("vocab_size", 7, r"config.json says: lm_head.weight is \d+ × 64, not 7 × 64"),
        ("intermediate_size", 192, r"config.json says: model\.layers\.0\.mlp\.\w+\.weight is .*128.*, not .*192"),
    ],
    ids=["vocabulary", "matrices"],
)
def test_weights_of_other_shapes_are_named(name: str, size: int, said: str, quantize: str, folder: Path) -> None:
    """Catches a report that is named and not shown, and quantised weights of a wrong shape that pass."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: size}))
    with pytest.raises(ModelError, match=said):
        load_engine(EngineOptions(model=str(folder), quantize=quantize, **OPTIONS))


@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_memory_that_others_hold_is_none(budget: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a plan that counts on all memory of a device, which then fails, or is killed, while weights are read."""
    monkeypatch.setattr(loader, "free_bytes", lambda _: 2**18)
    monkeypatch.setattr(loader, "swap_bytes", lambda _: 0)
    monkeypatch.setattr(loader, "load_model", cannot_allocate)
    with pytest.raises(DoesNotFit, match=r"are needed, and of the device's .* are 256\.\d+ KiB free"):
        load_engine(EngineOptions(model=str(folder), budget=budget, max_inflight=2, **OPTIONS))


def test_rows_that_nobody_asked_for_are_as_many_as_free_memory_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a batch that is refused on a busy device because of a default."""
    asked = EngineOptions(model=str(folder), **{**OPTIONS, "kv_budget": "96"})
    most = loader.plan_for(loader.find_source(asked, weights=True), asked, torch.device("cpu"))
    monkeypatch.setattr(loader, "swap_bytes", lambda _: 0)
    monkeypatch.setattr(loader, "free_bytes", lambda _: most.run.total_bytes - 2 * most.run.kv_bytes_per_row)
    plan = load_engine(asked).facts.plan
    assert 1 <= plan.run.rows < most.run.rows
    assert (plan.run.kv_budget, plan.run.prefill_chunk, plan.run.dtype) == (96, most.run.prefill_chunk, most.run.dtype)
    assert any("free memory" in choice for choice in plan.choices)


def group(root: Path, path: str, **files: str) -> None:
    (root / path).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / path / name.replace("__", ".")).write_text(text)


def test_a_containers_limit_is_all_memory_there_is(tmp_path: Path) -> None:
    """Catches the machine's memory taken for a container's, and files in the page cache taken for memory in use."""
    whole = memory_bytes(root=tmp_path)
    assert whole[0] > 512 * MIB
    group(tmp_path, "proc/self", cgroup="0::/pod/box\n")
    group(tmp_path, "sys/fs/cgroup/pod/box", memory__max="max", memory__current="1", memory__stat="anon 1\n")
    stat = f"anon 5\ninactive_file {20 * MIB}\nactive_file {10 * MIB}\n"
    group(tmp_path, "sys/fs/cgroup/pod", memory__max=f"{256 * MIB}", memory__current=f"{90 * MIB}", memory__stat=stat)
    assert memory_bytes(root=tmp_path) == (256 * MIB, 196 * MIB)
    assert swappable_bytes(root=tmp_path) == 0 or sys.platform == "darwin"


def test_the_older_form_of_a_containers_limit_is_read(tmp_path: Path) -> None:
    """Catches a limit that is not seen because the container's own folder has another name inside."""
    group(tmp_path, "proc/self", cgroup="4:cpu,memory:/docker/abc\n1:name=systemd:/\n")
    files = {"memory__limit_in_bytes": f"{300 * MIB}", "memory__usage_in_bytes": f"{200 * MIB}"}
    group(tmp_path, "sys/fs/cgroup/memory", memory__stat=f"total_inactive_file {50 * MIB}\n", **files)
    assert memory_bytes(root=tmp_path) == (300 * MIB, 150 * MIB)


@pytest.fixture
def reads_and_places(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Load as onto a GPU, which is the CPU here; return what is read and put there, in order."""
    seen: list[str] = []
    read, place = quantise.LazyTensor.__getitem__, placing._Place._placed

    def reading(self: Any, where: Any) -> Any:
        seen.append("read")
        return read(self, where)

    def placed(self: Any, name: str, *rest: Any) -> Any:
        seen.append("placed")
        return place(self, name, *rest)

    monkeypatch.setattr(quantise.LazyTensor, "__getitem__", reading)
    monkeypatch.setattr(placing._Place, "_placed", placed)
    monkeypatch.setattr(loader, "_quantisation_config", lambda _, *how: placing.placing_config(*how[:2]))
    monkeypatch.setattr(accelerate, "is_accelerate_available", lambda: False)
    return seen


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3", "qwen3_moe", "gpt_oss"])
def test_a_gpus_weights_are_read_one_after_the_other(
    family: str, tiny_model: Callable[..., Any], tmp_path: Path, reads_and_places: list[str]
) -> None:
    """Catches a model that is whole in host memory before any of it is on a GPU, and one that counts as quantised."""
    own = tiny_model(family).to(torch.bfloat16)
    own.save_pretrained(tmp_path)
    source = find_source(EngineOptions(model=str(tmp_path), gates="streaming"), weights=True)
    model = loader.load_model(source, torch.bfloat16, torch.device("cpu"))
    pairs = [*zip(reads_and_places[::2], reads_and_places[1::2], strict=False)]
    assert pairs.count(("read", "placed")) > len(pairs) // 2 or source.spec.routing is not None
    assert reads_and_places.count("placed") >= len(list(own.named_parameters())) - 8
    for (name, want), (other, got) in zip(own.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(want.to(got.dtype), got)
    assert not model.is_quantized
    assert not getattr(model.model, "is_quantized", False)
    assert getattr(model.config, "quantization_config", None) is None
    assert not hasattr(model, "hf_quantizer")


def test_a_gpu_that_is_full_is_not_a_broken_folder(
    folder: Path, reads_and_places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an allocation that fails among what transformers takes for a conversion."""
    source = find_source(EngineOptions(model=str(folder), **OPTIONS), weights=True)
    monkeypatch.setattr(placing._Place, "_placed", cannot_allocate)
    with pytest.raises(OutOfDeviceMemory):
        loader.load_model(source, torch.float32, torch.device("cpu"))
    monkeypatch.undo()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    source = find_source(EngineOptions(model=str(folder), **OPTIONS), weights=True)
    monkeypatch.setattr(loader, "_quantisation_config", lambda _, *how: placing.placing_config(*how[:2]))
    with pytest.raises(ModelError, match=r"is \d+ × 64, not 7 × 64"):
        loader.load_model(source, torch.float32, torch.device("cpu"))
