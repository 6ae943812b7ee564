"""Saved rows as files: what goes in comes out, and nothing foreign gets in."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.engines import Shape, greedy, make_engine, run
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.row_files import RowState, read_row, write_row
from trimkv_cli.errors import CacheMismatch, InputError, UsageError

TinyModel = Callable[..., Any]
SHAPE = Shape(kv_budget=11, rows=1, prefill_chunk=16, gate="random")
PROMPT = tuple(range(3, 60))


def write(path: Path, engine: Engine) -> RowState:
    run(engine, [greedy("1", PROMPT, 5, keep=True)])
    state = engine.kept.save("1")
    write_row(path, state, model_id="tiny", fingerprint=engine.fingerprint)
    return state


def read(path: Path, engine: Engine) -> RowState:
    return read_row(path, model_id="other", fingerprint=engine.fingerprint)


def test_another_process_goes_on_as_the_first_would_have(tmp_path: Path, tiny_model: TinyModel) -> None:
    """Catches anything that the next tokens depend on and the file lacks."""
    engine, path = make_engine(tiny_model("qwen3"), SHAPE), tmp_path / "read.kv"
    state = write(path, engine)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    question = (state.last_token or 0, 9, 8, 7)
    want = run(engine, [greedy("2", question, 9, continues="1")])["2"]
    fresh = make_engine(tiny_model("qwen3"), SHAPE)
    fresh.kept.restore(read(path, fresh), "1")
    assert run(fresh, [greedy("2", question, 9, continues="1")])["2"] == want
    assert fresh.stats.prefill_tokens == len(question)


@pytest.mark.parametrize(
    ("said", "shape"),
    [
        ("other gates .*, another --kv-budget .11, here 200", replace(SHAPE, gate="none", kv_budget=200)),
        ("another --kv-budget .11, here 12", replace(SHAPE, kv_budget=12)),
        ("another --prefill-chunk .16, here 8", replace(SHAPE, prefill_chunk=8)),
    ],
)
def test_what_other_sizes_or_gates_made_is_refused(
    said: str, shape: Shape, tmp_path: Path, tiny_model: TinyModel
) -> None:
    """Catches a cache that is taken although it would give other answers."""
    write(tmp_path / "read.kv", make_engine(tiny_model("qwen3"), SHAPE))
    with pytest.raises(CacheMismatch, match=said):
        read(tmp_path / "read.kv", make_engine(tiny_model("qwen3"), shape))


def test_what_another_model_made_is_refused(tmp_path: Path, tiny_model: TinyModel) -> None:
    """Catches a fingerprint that looks at shapes and not at weights."""
    write(tmp_path / "read.kv", make_engine(tiny_model("qwen3"), SHAPE))
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(CacheMismatch, match=r"another model \(tiny, here other\)"):
        read(tmp_path / "read.kv", make_engine(model, SHAPE))


def test_a_row_that_has_outgrown_the_positions_goes_on_elsewhere(tmp_path: Path, tiny_model: TinyModel) -> None:
    """Catches ranks that are not saved, and an engine that takes them for positions."""
    shape, model = replace(SHAPE, rebases=True), lambda: tiny_model("qwen3", max_position_embeddings=40)
    engine, path = make_engine(model(), shape), tmp_path / "read.kv"
    assert write(path, engine).rebased is not None
    want = run(engine, [greedy("2", (9, 8, 7), 30, continues="1")])["2"]
    fresh = make_engine(model(), shape)
    fresh.kept.restore(read(path, fresh), "1")
    assert run(fresh, [greedy("2", (9, 8, 7), 30, continues="1")])["2"] == want
    other = make_engine(model(), SHAPE)
    with pytest.raises(CacheMismatch, match="outgrown"):
        other.kept.restore(read(path, other), "1")


def test_what_another_version_made_is_refused(tmp_path: Path, tiny_model: TinyModel) -> None:
    """Catches a file whose numbers an older trimkv computed otherwise."""
    engine = make_engine(tiny_model("qwen3"), SHAPE)
    write(tmp_path / "read.kv", engine)
    with pytest.raises(CacheMismatch, match=r"another version of trimkv .*, here 99"):
        read_row(tmp_path / "read.kv", model_id="tiny", fingerprint={**engine.fingerprint, "trimkv": "99"})


def test_broken_files_and_paths_are_named(tmp_path: Path, tiny_model: TinyModel) -> None:
    """Catches a traceback where a path is wrong or a file is cut, and a partial file left behind."""
    engine, path = make_engine(tiny_model("qwen3"), SHAPE), tmp_path / "read.kv"
    state = write(path, engine)
    data = path.read_bytes()
    for broken in (b"", data[:50], data[:-9], b"text" * 99):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"read\.kv"):
            read(path, engine)
    for wrong in (tmp_path / "absent.kv", tmp_path):
        with pytest.raises(InputError):
            read(wrong, engine)
    for wrong in (tmp_path / "no folder" / "read.kv", tmp_path):
        with pytest.raises(UsageError, match="cannot write"):
            write_row(wrong, state, model_id="tiny", fingerprint=engine.fingerprint)
    assert list(tmp_path.iterdir()) == [path]
