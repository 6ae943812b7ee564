"""The recipe of the built-in model: its tokens, positions, curriculum and checkpoints, and that it learns."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from examples.mini import blocks, recipe
from examples.mini.rows import (
    ANSWER_WEIGHT,
    EARLY,
    LAST,
    LATE,
    LISTS,
    THINGS,
    Encoder,
    Mixture,
    add_pairs,
    make_batch,
    make_conversation,
)
from examples.mini.tokenizer import VOCAB_SIZE, build_tokenizer
from examples.mini.training import Schedule, Trainer, predict
from trimkv_cli.mini.language import TOKENS_PER_WORD, Talk, make_multi_turn, make_recall

MAX_POSITIONS = 4096
CONFIG = {
    **recipe.CONFIG, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
SHORT = Schedule(
    seed=1, tokens=20 * 512, cpu_minutes=60, lengths=(32, 64), tokens_per_step=512, warmup_steps=2, log_steps=1,
    checkpoint_s=0, max_positions=MAX_POSITIONS,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(seed=1, max_length=MAX_POSITIONS)


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tokenizer)


def small_model(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> torch.nn.Module:
    model: torch.nn.Module = recipe.build_model(
        tokenizer, config={**CONFIG, **changes}, max_positions=MAX_POSITIONS, seed=1
    )
    return model


@pytest.mark.parametrize("mixture", [EARLY, LATE, LAST, LISTS])
def test_encoder_writes_what_the_template_writes(
    tokenizer: PreTrainedTokenizerFast, encoder: Encoder, mixture: Mixture
) -> None:
    """Catch a model that is trained on other tokens than the commands feed it."""
    for seed in range(20):
        messages = make_conversation(Random(seed), 150, mixture).messages
        plain = [{"role": message.role, "content": message.content} for message in messages]
        ids, scored = encoder.encode(messages)
        assert ids == tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False)
        answers = [message.content for message in messages if message.scored]
        spans = tokenizer.decode([token for token, one in zip(ids, scored, strict=True) if one])
        assert spans == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_tokenizer_is_a_function_of_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catch merges that differ from run to run: weights and ids would no longer fit."""
    assert build_tokenizer(seed=1, max_length=MAX_POSITIONS).get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == VOCAB_SIZE


@pytest.mark.parametrize("text", [" two  spaces\n\n\tand a tab", "Überraschung 漢字 🙂", "12 May, 'x'"])
def test_tokenizer_gives_every_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Catch a pre-tokenizer that drops what it has no pattern for."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_per_word_holds(encoder: Encoder) -> None:
    """Catch evaluations of "1,000 tokens" that are far from it."""
    for make in (make_recall, make_multi_turn):
        made = [make(Random(seed), length=450) for seed in range(20)]
        tokens = sum(len(encoder.encode(conversation.messages)[0]) for conversation in made) / len(made)
        assert tokens == pytest.approx(450 * TOKENS_PER_WORD, rel=0.2)


def test_positions_rise_within_the_promised_range_and_some_jump(encoder: Encoder) -> None:
    """Catch positions past the config's range, or answers torn apart by a jump."""
    batch = make_batch(encoder, Random(1), rows=64, length=200, max_positions=MAX_POSITIONS)
    steps = batch.positions.diff(dim=1)
    assert (batch.positions >= 0).all()
    assert (batch.positions < MAX_POSITIONS).all()
    assert (steps >= 1).all()
    assert 10 < (steps > 1).any(1).sum() < 54
    inside = (batch.weights[:, 1:] == ANSWER_WEIGHT) & (batch.weights[:, :-1] == ANSWER_WEIGHT)
    assert (steps[inside] == 1).all()


def test_jumps_are_no_borders_between_sequences(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catch transformers reading jumps in the positions as packed sequences: nothing could be recalled past one."""
    model = small_model(tokenizer).eval()
    positions = torch.tensor([[0, 1, 2, 100, 101]])
    first, other = torch.tensor([[9, 8, 7, 6, 5]]), torch.tensor([[9, 400, 7, 6, 5]])
    last = [predict(model, ids, positions)[0, -1] for ids in (first, other)]
    assert (last[0] - last[1]).abs().max() > 1e-4


@pytest.mark.parametrize("length", [1, 128, 129, 300, blocks.LONG])
def test_blocks_attend_as_transformers_does(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    """Catch a block that sees the future, or misses the past."""
    model = small_model(tokenizer, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2).eval()
    ids = torch.randint(0, 512, (2, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).expand(2, -1)
    assert model.config._attn_implementation == blocks.NAME
    ours = predict(model, ids, positions)
    model.set_attn_implementation("sdpa")
    assert torch.allclose(ours, predict(model, ids, positions), atol=1e-5)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    tokenizer: PreTrainedTokenizerFast, encoder: Encoder, tmp_path: Path
) -> None:
    """Catch a checkpoint without the optimizers, the step or the stage."""

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 8:
            raise KeyboardInterrupt

    whole, halves = small_model(tokenizer), small_model(tokenizer)
    Trainer(whole, encoder, SHORT, report=lambda _: None).run(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        Trainer(halves, encoder, SHORT, report=stop).run(tmp_path / "halves.pt")
    halves = small_model(tokenizer)
    Trainer(halves, encoder, SHORT, report=lambda _: None).run(tmp_path / "halves.pt")
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_next_length_comes_when_the_present_one_is_mastered(
    tokenizer: PreTrainedTokenizerFast, encoder: Encoder
) -> None:
    """Catch a curriculum that moves on too early, or never."""
    lines: list[dict[str, Any]] = []
    trainer = Trainer(small_model(tokenizer), encoder, replace(SHORT, lengths=(32, 64, 128)), report=lines.append)
    trainer.progress.stage = 1
    for _ in range(100):
        trainer._grade(0.96)
    assert trainer.progress.stage == 1
    for _ in range(100):
        trainer._grade(1.0)
    assert trainer.progress.stage == 2
    assert [line["mastered"] for line in lines] == [64]


def test_pairs_are_about_more_things_once_these_are_mastered(
    tokenizer: PreTrainedTokenizerFast, encoder: Encoder
) -> None:
    """Catch pairs about all things at once, from which nothing is learnt, and a stage that does not end."""
    trainer = Trainer(small_model(tokenizer), encoder, replace(SHORT, lengths=(32, 64, 128)), report=lambda _: None)
    seen: list[int | None] = []
    for _ in range(300):
        seen.append(trainer.progress.things)
        trainer._grade(0.95 if len(seen) < 50 else 0.97)
        if trainer.progress.stage == 1:
            break
        assert trainer._mixture.things == trainer.progress.things
    order = list(dict.fromkeys(seen))
    assert order == [2, 3, 5, 8, 12, 18, 27, 41, 62, 80, None]
    assert seen.count(2) >= 50
    assert trainer._mixture == EARLY
    stuck = Trainer(small_model(tokenizer), encoder, SHORT, report=lambda _: None)
    stuck.progress.stage_tokens = SHORT.stage_tokens
    stuck._grade(0.1)
    assert stuck.progress.stage == 1


@pytest.mark.parametrize("things", [2, 5, None])
def test_pairs_tell_what_is_asked(things: int | None) -> None:
    """Catch questions about what was not told, and more things than were allowed."""
    for seed in range(50):
        talk = Talk(Random(seed))
        add_pairs(talk, most=6, things=things)
        told, asked = talk.messages[0].content, talk.messages[2:]
        for question, answer in zip(asked[::2], asked[1::2], strict=True):
            names = question.content.removeprefix("The ").removesuffix("?").split(", the ")
            values = answer.content.removeprefix("The ").removesuffix(".").split(", the ")
            assert answer.scored
            assert all(name in THINGS[:things] and name in told for name in names)
            assert all(value.removeprefix(name).strip() in told for name, value in zip(names, values, strict=True))


def test_the_rate_warms_up_and_cools_down_twice(tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> None:
    """Catch a run that ends at full rate, where the answers are not yet sharp, and one without its second spell."""
    trainer = Trainer(small_model(tokenizer), encoder, SHORT, report=lambda _: None)
    assert trainer._warmth() == pytest.approx(0.5)
    trainer.progress.step, trainer.progress.tokens = 10, SHORT.tokens // 2
    assert trainer._warmth() == 1.0
    first, second = SHORT.first_spell, 1 - SHORT.first_spell
    for done, warmth in (
        (first * (1 - SHORT.cooldown / 2), 0.5),
        (first - 0.001, 0.01),
        (first + 0.05 * second, SHORT.second_rate),
        (first + 0.5 * second, SHORT.second_rate / 2),
        (1.0, 0.01),
    ):
        trainer.progress.tokens = round(SHORT.tokens * done)
        assert trainer._warmth() == pytest.approx(warmth, abs=0.01)


def test_the_last_stage_turns_to_what_is_hardest_and_then_to_lists(
    tokenizer: PreTrainedTokenizerFast, encoder: Encoder
) -> None:
    """Catch a mixture that never comes, and one that comes while lengths still grow."""
    trainer = Trainer(small_model(tokenizer), encoder, replace(SHORT, lengths=(32, 64, 128)), report=lambda _: None)
    for stage, done, mixture in ((1, 0.95, EARLY), (2, 0.3, LATE), (2, 0.5, LAST), (2, 0.95, LISTS)):
        trainer.progress.stage, trainer.progress.tokens = stage, round(SHORT.tokens * done)
        assert trainer._mixture == mixture


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Catch gradients that are not shared, or counts that let two processes drift apart."""
    schedule = replace(SHORT, tokens=3 * 512)
    for workers in (1, 2):
        recipe.build(tmp_path / str(workers), schedule, config=CONFIG, workers=workers)
    one, two = (torch.load(tmp_path / f"{workers}/checkpoint.pt", weights_only=True) for workers in (1, 2))
    assert one["progress"]["tokens"] == two["progress"]["tokens"] == schedule.tokens
    for name, tensor in one["model"].items():
        assert torch.allclose(tensor, two["model"][name], atol=1e-4), name


_LEAD = """
import os
import signal
import time

from examples.mini.training import work_together


def wait(team):
    os.write(1, f"{os.getpid()}\\n".encode())  # whole lines, whoever writes first
    time.sleep(600)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what it does not wait for
    work_together(2, wait)
"""


@pytest.mark.slow
def test_processes_end_with_the_one_that_began_them(tmp_path: Path) -> None:
    """Catch a training that goes on, unseen, after it was killed."""
    script = tmp_path / "lead.py"
    script.write_text(_LEAD)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    with subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE) as leader:
        assert leader.stdout is not None
        try:
            workers = [psutil.Process(int(leader.stdout.readline())) for _ in range(2)]
        finally:
            leader.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
