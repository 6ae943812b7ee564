"""Packed matrices in the cache folder: written where packing was slow, equal, and never those of another file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.gguf_files import write_gguf
from trimkv_cli.loading.loader import load_model
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.packed_cache import PackedForm, forms_of, identity, kept_forms
from trimkv_cli.loading.sources import find_source
from trimkv_cli.model.spec import Quantisation


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", "llama", kind="Q4_1", num_attention_heads=8, num_key_value_heads=8)
    return tmp_path / "tiny.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "packed"


def load(
    place: Path, folder: Path, *, slow_s: float = 0.0, quantize: Quantisation = "stored"
) -> tuple[dict[str, torch.Tensor], PackedForm]:
    """Return all tensors of a loaded model, and the form that was read or kept."""
    kept = PackedForm(place, folder=folder, slow_s=slow_s)
    source = find_source(EngineOptions(model=str(place), gates="none"), weights=True)
    loaded = load_model(source, torch.float32, torch.device("cpu"), quantize=quantize, kept=kept)
    return {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}, kept


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_only_what_took_long_is_kept(model: Path, folder: Path) -> None:
    """Catches a disk that fills with what is made in a moment."""
    load(model, folder, slow_s=1e9)
    assert not folder.exists()


def test_the_second_load_reads_what_the_first_made(model: Path, folder: Path) -> None:
    """Catches scales, columns or an order that are lost on the way, and a cache that nobody reads."""
    first, made = load(model, folder)
    second, read = load(model, folder)
    assert made.seconds > 0
    assert read.seconds == 0
    assert same(first, second)
    assert any(name.endswith("columns") for name in first)
    assert {tensor.dtype for tensor in first.values()} >= {torch.uint8, torch.int8, torch.bfloat16}


@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_a_folder_is_kept_in_each_form(
    quantize: Quantisation, tiny_model: Callable[..., Any], tmp_path: Path, folder: Path
) -> None:
    """Catches int8 that is taken for int4, and a folder that is packed each time."""
    tiny_model("qwen3", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    load(tmp_path / "model", folder, quantize="int8" if quantize == "int4" else "int4")
    first, made = load(tmp_path / "model", folder, quantize=quantize)
    second, read = load(tmp_path / "model", folder, quantize=quantize)
    assert made.seconds > 0
    assert read.seconds == 0
    assert same(first, second)
    assert len(kept_forms(folder)) == 2


def alter(path: Path, numbers: slice) -> None:
    """Change some bytes of a file, and keep its time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[numbers] = bytes(byte ^ 1 for byte in data[numbers])
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_another_file_of_the_same_name_and_size(model: Path, folder: Path) -> None:
    """Catches the weights of a file that was replaced, and what was made of it staying for ever."""
    before, _ = load(model, folder)
    alter(model, slice(-20_000, None))
    expected, _ = load(model, folder.with_name("elsewhere"))
    found, made = load(model, folder)
    assert made.seconds > 0
    assert same(found, expected)
    assert not same(found, before)
    assert [form.path.name[:32] for form in kept_forms(folder)] == [identity(model)]


def test_a_weight_that_was_edited_in_place(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an edit between the samples, which only the file's time shows."""
    monkeypatch.setattr("trimkv_cli.loading.packed_cache._SAMPLE_BYTES", 1)
    monkeypatch.setattr("trimkv_cli.loading.packed_cache._FIRST_BYTES", 1)
    load(model, folder)
    name = identity(model)
    alter(model, slice(-3001, -3000))
    os.utime(model, ns=(1, 1))
    assert identity(model) == name
    expected, _ = load(model, folder.with_name("elsewhere"))
    found, made = load(model, folder)
    assert made.seconds > 0
    assert same(found, expected)
    _, read = load(model, folder)
    assert read.seconds == 0


def test_a_moved_file_is_known_by_its_contents(model: Path, folder: Path, tmp_path: Path) -> None:
    """Catches a form that is made twice, and one that cannot be removed under the new name."""
    load(model, folder)
    moved = shutil.copy(model, tmp_path / "moved.gguf")
    _, read = load(Path(moved), folder)
    assert read.seconds == 0
    assert forms_of(Path(moved), folder) == forms_of(model, folder) == kept_forms(folder)


def test_all_parts_of_a_split_file_count(tmp_path: Path) -> None:
    """Catches a second part that was replaced."""
    parts = [tmp_path / f"tiny-0000{part}-of-00002.gguf" for part in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF" + bytes(1000))
    before = identity(parts[0])
    parts[1].write_bytes(b"GGUF" + bytes(999) + b"1")
    assert identity(parts[0]) != before


def test_a_blob_of_the_hub_is_known_by_its_name(tmp_path: Path) -> None:
    """Catches files read to name what their names say."""
    for number, name in enumerate(("a" * 64, "b" * 64, "sha256-" + "a" * 64)):
        (tmp_path / name).write_bytes(bytes([number]))
        (tmp_path / f"{number}.gguf").symlink_to(tmp_path / name)
    names = [identity(tmp_path / f"{number}.gguf") for number in range(3)]
    assert names[0] == names[2] != names[1]


@pytest.mark.parametrize("damage", ["cut", "header", "scales", "codes", "empty", "extended"])
def test_a_damaged_file_is_made_anew(damage: str, model: Path, folder: Path) -> None:
    """Catches weights that a full disk, a bad one or a kill left behind."""
    expected, _ = load(model, folder)
    path = kept_forms(folder)[0].path
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    flipped = {"header": whole.index(b"shape") + 8, "scales": len(whole) - 100, "codes": size + 1000}
    if damage in flipped:
        at = flipped[damage]
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    else:
        path.write_bytes({"cut": whole[:-1], "empty": b"", "extended": whole + b"more"}[damage])
    found, made = load(model, folder)
    assert made.seconds > 0
    assert same(found, expected)
    assert path.read_bytes() == whole
    _, read = load(model, folder)
    assert read.seconds == 0


def test_a_folder_that_cannot_be_written_is_only_a_note(model: Path, tmp_path: Path) -> None:
    """Catches a load that fails because its cache does."""
    (tmp_path / "file").write_bytes(b"")
    expected, _ = load(model, tmp_path / "fine")
    found, kept = load(model, tmp_path / "file" / "packed")
    assert same(found, expected)
    assert kept.note is not None
    assert "is not kept" in kept.note


def test_a_full_disk_is_only_a_note(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a disk that is filled to its last byte."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    _, kept = load(model, folder)
    assert kept.note is not None
    assert "nearly full" in kept.note
    assert kept_forms(folder) == []


def test_while_another_process_writes_nothing_is_written(model: Path, folder: Path) -> None:
    """Catches two processes that write one file."""
    from filelock import FileLock

    folder.mkdir()
    with FileLock(folder / ".lock"):
        _, kept = load(model, folder)
    assert kept.note is None
    assert kept_forms(folder) == []
