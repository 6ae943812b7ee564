"""Build the built-in model from nothing: tokenizer, training, evaluation, folder.

`python -m examples.mini.recipe OUT` trains for 91 minutes of CPU time at most, about 50 minutes on two cores, and
goes on from `OUT/checkpoint.pt` when it was stopped; the folder to ship is `OUT/model`. A CPU without matrix
tiles for bf16 reads fewer tokens in that time.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.mini import blocks
from examples.mini.exam import examine, write_card
from examples.mini.rows import Encoder
from examples.mini.tokenizer import END_OF_TEXT, TURN_END, VOCAB_SIZE, build_tokenizer
from examples.mini.training import Progress, Schedule, Team, Trainer, work_together
from trimkv_cli.files import whole_file

CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": True,
    # Far more than the positions need: five pairs of dimensions turn by about a radian or less over 50,000 of them, and
    # so can compare contents at any distance.
    "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0},
    "dtype": "bfloat16",
}
TOY_CONFIG: dict[str, Any] = {**CONFIG, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
TOY = Schedule(
    tokens=400_000,
    cpu_minutes=3.0,
    lengths=(64, 64, 128),
    stage_tokens=100_000,
    tokens_per_step=2048,
    rows_per_step=16,
    warmup_steps=20,
)


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, config: dict[str, Any], max_positions: int, seed: int
) -> Qwen3ForCausalLM:
    """Draw a model; its config names the trained range of positions, past which the program refuses to go."""
    end, turn_end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    torch.manual_seed(seed)
    blocks.register()
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **{**config, "dtype": "float32"},
            max_position_embeddings=max_positions,
            eos_token_id=turn_end,
            pad_token_id=end,
            bos_token_id=None,
            attn_implementation=blocks.NAME,
        )
    )
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=[turn_end, end], pad_token_id=end)
    return model.float()


def build(out: Path, schedule: Schedule, *, config: dict[str, Any] | None = None, workers: int = 1) -> None:
    """Train a model as `schedule` says, from `out`'s checkpoint where there is one, and write it to `out/model`.

    Each report is a line of `out/log.jsonl`.
    """
    out.mkdir(parents=True, exist_ok=True)
    work_together(workers, partial(_build, out, schedule, config or CONFIG))


def _build(out: Path, schedule: Schedule, config: dict[str, Any], team: Team) -> None:
    tokenizer = build_tokenizer(seed=schedule.seed, max_length=schedule.max_positions)
    model = build_model(tokenizer, config=config, max_positions=schedule.max_positions, seed=schedule.seed)

    def report(line: dict[str, Any]) -> None:
        with (out / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    Trainer(model, Encoder(tokenizer), schedule, report=report, team=team).run(out / "checkpoint.pt")
    if team.rank == 0:
        model.to(torch.bfloat16).save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")


def describe(out: Path, schedule: Schedule) -> None:
    """Examine the model in `out/model` and write its card."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    progress = Progress(**state["progress"])
    facts = {
        "parameters": sum(t.numel() for name, t in state["model"].items() if name != "lm_head.weight") / 1e6,
        "tokens": progress.tokens / 1e6,
        "cpu_minutes": progress.cpu_s / 60,
        "lengths": ", ".join(f"{length:,}" for length in schedule.lengths),
        "reached": f"{schedule.lengths[progress.stage]:,}",
        "longest": schedule.lengths[progress.stage],
        "pass_accuracy": schedule.pass_accuracy,
        "stage_tokens": schedule.stage_tokens,
        "second_rate": schedule.second_rate,
        "positions": schedule.max_positions,
    }
    lines = []
    for line in examine(out / "model"):
        print(json.dumps(line), flush=True)
        lines.append(line)
    with whole_file(out / "model" / "README.md") as partial:
        partial.write_text(write_card(facts=facts, exam=lines), encoding="utf-8")


def main() -> None:
    """Build the model that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cpu-minutes", type=float, help="stop after this much CPU time, of all processes")
    parser.add_argument("--tokens", type=int, help="train on this many tokens")
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2), help="processes of one thread each")
    parser.add_argument("--toy", action="store_true", help="a much smaller model, within minutes")
    parser.add_argument("--exam", action="store_true", help="only examine the model that is there")
    args = parser.parse_args()
    torch.set_num_threads(args.workers)
    given = {name: value for name in ("cpu_minutes", "tokens") if (value := getattr(args, name)) is not None}
    schedule = replace(TOY if args.toy else Schedule(), **given)
    if not args.exam:
        build(args.out, schedule, config=TOY_CONFIG if args.toy else None, workers=args.workers)
    describe(args.out, schedule)


if __name__ == "__main__":
    main()
