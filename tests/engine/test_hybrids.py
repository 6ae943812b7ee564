"""Models whose linear attention keeps a state of constant size per row: whatever rows can do, the states do too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from bench.live_bytes import LiveBytes
from bench.memory import measure, save_model
from helpers.engines import Shape, greedy, make_engine, run
from trimkv_cli.cache.releases import cache_argument
from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_cli.engine.row_files import read_row, write_row
from trimkv_cli.errors import UnsupportedModel
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source
from trimkv_cli.model.spec import ModelSpec, streaming_gate
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.plan import make_plan
from trimkv_cli.train.options import RunFiles, TrainOptions
from trimkv_cli.train.run import Listener, train_gates

TinyModel = Callable[..., Any]
HYBRID = "qwen3_5_text"
PROMPTS = (range(3, 12), range(20, 60), range(5, 95))
SYSTEM = (5, 9, 33, 7)


def states(cache: RetentionCache) -> list[torch.Tensor]:
    return [tensor for state in cache.states for tensor in state.now]


def everything(cache: RetentionCache) -> list[torch.Tensor]:
    return [*(tensor for layer in cache.layers for tensor in layer.slots), *states(cache)]


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text"])
def test_states_are_those_of_transformers(family: str, tiny_model: TinyModel) -> None:
    """Catches padding that decays a state or enters a convolution, a chunk that starts anew."""
    model, want = tiny_model(family), []
    for prompt in PROMPTS:
        output = model(input_ids=torch.tensor([list(prompt)]), use_cache=True)
        layers = getattr(output, cache_argument(model)).layers
        want.append([state[0][0] for at in layers if hasattr(at, "conv_states") for state in _pair(at)])
    for chunk in (0, 7, 512):
        engine = make_engine(tiny_model(family), Shape(prefill_chunk=chunk, rows=3))
        run(engine, [greedy(str(index), prompt, 1, keep=True) for index, prompt in enumerate(PROMPTS)])
        for index, expected in enumerate(want):
            row = engine._scheduler.parked[str(index)].index
            for tensor, state in zip(states(engine._runner.cache), expected, strict=True):
                torch.testing.assert_close(tensor[row], state, atol=1e-4, rtol=1e-3)
        engine.close()


def _pair(layer: Any) -> tuple[Any, Any]:
    return layer.conv_states, layer.recurrent_states


def test_rows_of_one_length_are_read_together_and_others_beside_them(tiny_model: TinyModel) -> None:
    """Catches a group of rows whose states or outputs go to each other."""
    prompts = [tuple(range(3 + i, 12 + i)) for i in range(4)] + [tuple(range(40, 43)), tuple(range(50, 90))]
    requests = [greedy(str(i), prompt, 12) for i, prompt in enumerate(prompts)]
    model = tiny_model(HYBRID)
    want = {str(i): _generated(model, prompt, 12) for i, prompt in enumerate(prompts)}
    for rows in (6, 1):
        assert run(make_engine(tiny_model(HYBRID), Shape(prefill_chunk=512, rows=rows)), requests) == want


class Fault(Exception):
    pass


def fail(*_: Any, **__: Any) -> None:
    raise Fault


@pytest.mark.parametrize("failing_layer", [0, 1, 3, 4])
def test_a_decode_that_failed_at_any_layer_can_be_undone(failing_layer: int, tiny_model: TinyModel) -> None:
    """Catches a state that is not taken back, or one that is although the step never reached its layer."""
    model = tiny_model(HYBRID)
    engine = make_engine(model, Shape(kv_budget=24, gate="random"))
    for index, prompt in enumerate(PROMPTS):
        engine.add(greedy(str(index), prompt, 40))
    for _ in range(9):
        engine.step()
    cache = engine._runner.cache
    before, positions = [tensor.clone() for tensor in everything(cache)], list(cache.seen)[: len(PROMPTS)]
    layers = model.get_decoder().layers
    module = layers[failing_layer].mlp if failing_layer < len(layers) else model.lm_head
    fault = module.register_forward_pre_hook(fail)
    with pytest.raises(Fault):
        engine.step()
    fault.remove()
    assert any(not torch.equal(now, then) for now, then in zip(everything(cache), before, strict=True))
    cache.undo_decode(positions)
    assert all(torch.equal(now, then) for now, then in zip(everything(cache), before, strict=True))


def test_a_finished_decode_can_be_undone_for_some_rows(tiny_model: TinyModel) -> None:
    """Catches an undo that touches the states of rows which go on."""
    engine = make_engine(tiny_model(HYBRID), Shape(kv_budget=8, gate="random"))
    for index, prompt in enumerate(PROMPTS):
        engine.add(greedy(str(index), prompt, 40))
    engine.step()
    cache = engine._runner.cache
    before, seen = [tensor.clone() for tensor in states(cache)], list(cache.seen)
    engine.step()
    after = [tensor.clone() for tensor in states(cache)]
    cache.undo_decode([-1, seen[1]])
    for now, then, later in zip(states(cache), before, after, strict=True):
        assert torch.equal(now[1], then[1])
        assert torch.equal(now[[0, 2]], later[[0, 2]])


def test_running_ahead_changes_no_token(tiny_model: TinyModel) -> None:
    """Catches a state that stays one token ahead after a row has ended or waits."""
    shape = Shape(kv_budget=16, gate="random", rows=3, prefill_chunk=16)
    requests = [greedy(str(i), range(3 + i, 20 + 3 * i), 1 + 5 * i, keep=i == 4) for i in range(5)]
    outputs = []
    for ahead in (False, True):
        engine = make_engine(tiny_model(HYBRID), shape)
        if ahead:
            engine._runner.run_ahead(frozenset())
        first = run(engine, requests)
        outputs.append((first, run(engine, [greedy("on", (5, 6), 9, continues="4")])))
    assert outputs[0] == outputs[1]


def test_shared_prefixes_and_later_turns_go_on_from_their_states(tiny_model: TinyModel) -> None:
    """Catches a prefix copied without its states, and a continued row that begins with an empty or another's state."""
    prompts = [(*SYSTEM, *range(40 + i, 46 + 3 * i)) for i in range(4)]
    model = tiny_model(HYBRID)
    engine = make_engine(model, Shape(prefill_chunk=8, rows=3))
    got = run(engine, [greedy(str(i), p, 6, prefix_len=len(SYSTEM), keep=i == 3) for i, p in enumerate(prompts)])
    assert engine.stats.shared_prefix_tokens > 0
    again = run(engine, [greedy("on", (got["3"][-1], 9, 8), 6, continues="3")])["on"]
    engine.close()
    model = tiny_model(HYBRID)
    want = {str(i): _generated(model, prompt, 6) for i, prompt in enumerate(prompts)}
    assert got == want
    assert again == _generated(model, (*prompts[3], *want["3"], 9, 8), 6)


def _generated(model: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


def test_another_process_goes_on_as_the_first_would_have(tmp_path: Path, tiny_model: TinyModel) -> None:
    """Catches a state that a file lacks, or that comes back rounded or in another layer; a copy kept in memory too."""
    shape = Shape(kv_budget=11, rows=2, prefill_chunk=16, gate="random")
    engine, path = make_engine(tiny_model("qwen3_next"), shape), tmp_path / "read.kv"
    run(engine, [greedy("1", range(3, 60), 5, keep=True)])
    saved = engine.kept.save("1")
    write_row(path, saved, model_id="tiny", fingerprint=engine.fingerprint)
    question = (saved.last_token or 0, 9, 8, 7)
    want = run(engine, [greedy("2", question, 9, continues="1")])["2"]
    engine.kept.restore(saved, "1")
    assert run(engine, [greedy("2", question, 9, continues="1")])["2"] == want
    fresh = make_engine(tiny_model("qwen3_next"), shape)
    read = read_row(path, model_id="tiny", fingerprint=fresh.fingerprint)
    assert read.nbytes == saved.nbytes
    pairs = zip(read.states, saved.states, strict=True)
    assert all(torch.equal(new, old) for made, kept in pairs for new, old in zip(made, kept, strict=True))
    fresh.kept.restore(read, "1")
    assert run(fresh, [greedy("2", question, 9, continues="1")])["2"] == want


def test_the_language_model_of_a_multimodal_checkpoint_runs_alone(tmp_path: Path, tiny_model: TinyModel) -> None:
    """Catches weights that are not found under their other names, and a head for further tokens counted or read."""
    alone = tiny_model(HYBRID)
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    whole: Any = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=alone.config.to_dict(), vision_config=vision)
    )
    whole.model.language_model.load_state_dict(alone.model.state_dict())
    whole.lm_head.load_state_dict(alone.lm_head.state_dict())
    whole.save_pretrained(tmp_path, state_dict={**whole.state_dict(), "mtp.fc.weight": torch.zeros(64, 128)})
    options = EngineOptions(model=str(tmp_path), offline=True, device="cpu", dtype="fp32", gates="none", kv_budget="96")
    engine = load_engine(options)
    assert engine.facts.spec.weight_numel == sum(parameter.numel() for parameter in alone.parameters())
    prompt = tuple(range(3, 60))
    assert run(engine, [greedy("a", prompt, 12)])["a"] == _generated(alone, prompt, 12)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text"])
def test_the_plan_counts_what_is_allocated(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Catches slots planned for layers without keys and values, states that are forgotten, and the peak of a step."""
    shape = Shape(kv_budget=24, rows=3, prefill_chunk=16, gate="streaming")
    engine = make_engine(tiny_model(family), shape)
    cache, planned = engine._runner.cache, engine.facts.plan.run
    assert cache.nbytes == planned.part_bytes("kv") + planned.part_bytes("shared_prefix")
    assert cache.journal_nbytes == planned.part_bytes("journal")
    config = {"intermediate_size": 192, "linear_key_head_dim": 16, "linear_value_head_dim": 24}
    folder = save_model(tiny_model(family, **config).config.to_dict(), tmp_path / "model")
    for dtype in ("fp32", "bf16"):
        made = measure(folder, dtype=dtype, quantize="none", rows=3, kv_budget=40, chunk=64)
        assert 0.98 <= made["planned_over_measured"] <= 1.02, made


def test_a_stream_through_few_slots_takes_no_more_bytes(tiny_model: TinyModel) -> None:
    """Catches a state or a step that grows with what was seen."""
    model = tiny_model(HYBRID, max_position_embeddings=4096)
    engine = make_engine(model, Shape(kv_budget=16, rows=1, prefill_chunk=32, gate="streaming"))
    before, peaks = engine.kv_bytes, []
    for index, (tokens, more) in enumerate(((range(100), {}), (range(600), {"continues": "0"}))):
        with LiveBytes() as live:
            run(engine, [greedy(str(index), [3 + token % 90 for token in tokens], 9, keep=True, **more)])
        peaks.append(live.peak)
    assert engine.kept.seen("1") > 700
    assert engine.kv_bytes == before
    assert peaks[1] - peaks[0] < 65_536  # token ids, and the row that a prefill may begin again from


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"quantize": "nf4"}, "does not quantise qwen3_5_text"), ({"rebases": True}, "rebase does not know qwen3_5_text")],
)
def test_what_a_hybrid_does_not_do_is_refused_by_name(
    changes: dict[str, Any], said: str, tiny_model: TinyModel
) -> None:
    """Catches an AttributeError out of the middle of loading, or keys that are rotated as no state can be."""
    spec = ModelSpec.from_config(tiny_model(HYBRID).config.to_dict())
    with pytest.raises(UnsupportedModel, match=said):
        make_plan(spec, streaming_gate(), PlanOptions(**changes))


def test_gates_are_not_trained_for_a_hybrid(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Catches a training run that fails at its first step, after everything was loaded."""
    tiny_model(HYBRID).save_pretrained(tmp_path)
    engine = EngineOptions(model=str(tmp_path), offline=True)
    assert find_source(engine, weights=True).spec.state is not None
    files = RunFiles(data=(tmp_path / "data.jsonl",), output=tmp_path / "gates")
    listener = Listener(note=print, step=print, should_stop=lambda: False)
    with pytest.raises(UnsupportedModel, match="not trained for qwen3_5_text: most of its attention is linear"):
        train_gates(engine, TrainOptions(memory_size=8, context=64, steps=1), files, listener)
