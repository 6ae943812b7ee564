"""Catches a plan that loads something heavy, an exit code that scripts cannot trust, and offers that do not work."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WATCH = """
import sys
from trimkv_cli.app import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "huggingface_hub"} & set(sys.modules)
    if heavy:
        print("LOADED", heavy, file=sys.stderr)
"""


def trimkv(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", WATCH, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", **environment},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        check=False,
    )


def plan(*arguments: str) -> dict[str, Any]:
    done = trimkv("plan", *arguments, "--json")
    assert done.returncode in (0, 4), done.stderr
    assert "LOADED" not in done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode == 0) == made["fits"]
    return made


def part(made: dict[str, Any], name: str) -> int:
    return sum(entry["bytes"] for entry in made["parts"] if entry["name"] == name)


def test_the_built_in_model_needs_no_name_and_no_network() -> None:
    """Catches pins that a program would have to read from a sentence, beside sizes that do not add up."""
    made = plan("--pin", "system,recent:8,prompt:10%")
    assert (made["fits"], made["kv_budget"], made["offers"]) == (True, 64, [])
    assert made["total_bytes"] == sum(entry["bytes"] for entry in made["parts"])
    assert made["pinned"] == {
        "system": True, "system_most": None, "sinks": 0, "recent": 8, "prompt_end": 6, "at_most": 20,
        "at_most_in_conversation": 26,
    }  # fmt: skip


def test_a_profile_plans_offline_with_exact_weights() -> None:
    made = plan("qwen3-4b-math", "--dtype", "bf16", "--budget", "12GiB")
    assert part(made, "weights") == 4_022_468_096 * 2
    assert made["kv_bytes_per_sequence"] == 512 * (147_456 + 2_304)
    assert made["total_bytes"] <= made["budget_bytes"] == 12 * 2**30


def test_a_budget_smaller_than_the_weights_is_exit_4_with_offers_that_fit() -> None:
    made = plan("qwen3-8b-math", "--budget", "5GiB", "--device", "cuda")
    assert not made["fits"]
    assert len(made["offers"]) >= 2
    for offer in made["offers"]:
        words = shlex.split(offer)
        assert words[:2] == ["trimkv", "plan"]
        assert plan(*words[2:])["fits"]


def test_a_refusal_prints_one_offer_per_line() -> None:
    done = trimkv("plan", "qwen3-4b-math", "--budget", "1GiB")
    assert done.returncode == 4
    offers = [line for line in done.stdout.splitlines() if line.startswith("  trimkv plan qwen3-4b-math ")]
    assert len(offers) >= 2
    assert done.stderr.startswith("error: ")
    assert "\nhint: trimkv plan " in done.stderr


def test_a_folder_of_models_and_one_of_gates() -> None:
    made = plan("golden/qwen3_base", "--gates", "golden/qwen3_rg", "--kv-budget", "8", "--max-inflight", "1")
    assert part(made, "kv") == 3 * 2 * 8 * (2 * 32 * 4 + 8)
    assert made["gates"]["trained_memory_size"] == 32


def test_a_hub_model_that_a_profile_knows_needs_no_network() -> None:
    assert plan("Qwen/Qwen3-4B")["gates"]["id"] == "ngocbh/TrimKV-Qwen3-4B-Math"
    assert plan("Qwen/Qwen3-4B", "--gates", "streaming:8")["kv_budget"] == 1024


def test_the_full_cache_of_a_context_is_named() -> None:
    made = plan("qwen3-4b-math", "--dtype", "bf16", "--context", "32768")
    assert made["full_cache"] == {"context": 32768, "bytes": 32768 * 147_456}
    assert "one sequence of 32768 tokens" in trimkv("plan", "qwen3-4b-math", "--context", "32768").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mini", "--kv-budget", "0"], 2, "keeps no token"),
        (["mini", "--budget", "8 GiBs"], 2, "is not a size"),
        (["mini", "--dtype", "fp8"], 2, "fp8"),
        (["mini", "--device", "tpu"], 2, "tpu"),
        (["mini", "--context", "100000"], 4, "positions"),
        (["mini", "--kv-budget", "1.5"], 2, "hold no slot"),
        (["mini", "--gates", "streaming:-1"], 2, "streaming:-1"),
        (["mini", "--revision", "main"], 2, "no revisions"),
        (["golden/qwen3_base", "--gates", "streaming", "--revision", "main"], 2, "no revisions"),
        (["no-such-model"], 6, "no-such-model"),
        (["golden"], 6, "config.json"),
        (["phi-3-mini-128k-instruct", "--gates", "mini"], 6, "gates for qwen3"),
    ],
)
def test_bad_input_is_one_error_line_and_a_hint(arguments: list[str], code: int, message: str) -> None:
    done = trimkv("plan", *arguments)
    assert done.returncode == code
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert [line[:6] for line in lines[1:]] == ["hint: "]


def test_a_broken_config_is_said_before_missing_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    done = trimkv("ask", "-m", str(tmp_path), "--gates", "streaming", "Hello")
    assert (done.returncode, "not valid JSON" in done.stderr) == (6, True)


def test_a_whole_prompt_in_one_chunk_can_be_had_with_a_shorter_context() -> None:
    whole = ("--dtype", "bf16", "--quantize", "none", "--prefill-chunk", "0")
    made = plan("qwen3-4b-math", *whole, "--budget", "10GiB")
    assert not made["fits"]
    assert any("--context" in offer for offer in made["offers"])
    assert all(plan(*shlex.split(offer)[2:])["fits"] for offer in made["offers"])


def test_an_environment_variable_is_a_default_that_a_flag_overrides() -> None:
    with_variable = trimkv("plan", "mini", "--json", TRIMKV_KV_BUDGET="16")
    assert json.loads(with_variable.stdout)["kv_budget"] == 16
    with_flag = trimkv("plan", "mini", "--json", "--kv-budget", "32", TRIMKV_KV_BUDGET="16")
    assert json.loads(with_flag.stdout)["kv_budget"] == 32


def test_a_configured_model_gives_way_to_the_argument() -> None:
    done = trimkv("plan", "mini", "--json", TRIMKV_MODEL="qwen3-4b-math")
    assert json.loads(done.stdout)["model"] == "mini"


def test_profiles_are_listed_shown_and_found() -> None:
    listed = trimkv("profiles", "list", "--json")
    assert "mini" in [profile["name"] for profile in json.loads(listed.stdout)]
    assert "LOADED" not in listed.stderr
    assert 'model = "Qwen/Qwen3-4B"' in trimkv("profiles", "show", "qwen3-4b-math").stdout
    assert str(ROOT / "profiles") in trimkv("profiles", "path").stdout
    missing = trimkv("profiles", "show", "qwen3-4b-maths")
    assert (missing.returncode, "did you mean qwen3-4b-math?" in missing.stderr) == (6, True)


def test_a_gpu_that_is_not_here_is_planned_for_and_named() -> None:
    """Catches a plan that looks as if it had been compared with a GPU that nobody asked."""
    done = trimkv("plan", "mini", "--device", "cuda:9")
    assert done.returncode == 0
    assert "no cuda:9 here" in done.stderr
