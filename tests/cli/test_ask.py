"""Mistakes in the contracts that every command keeps: what stands on stdout, error lines and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.programs import COMMAND, ENVIRONMENT, Run, trimkv, trimkv_on_a_terminal

GOLDEN = Path(__file__).parents[1] / "golden"
ASK = ("ask", "Tell me something", "--greedy", "-n", "24", "--ignore-eos", "--threads", "1")


@pytest.mark.slow
def test_stdout_is_the_same_bytes_everywhere() -> None:
    """Catches progress, colour or cursor codes that find their way into the answer."""
    plain = trimkv(*ASK)
    assert plain.returncode == 0
    assert plain.stdout.endswith(b"\n")
    assert not plain.stdout.endswith(b"\n\n")
    assert b"\x1b" not in plain.stderr
    for more, name in (((), "CI"), (("--no-stream",), "FORCE_COLOR")):
        other = trimkv(*ASK, *more, environment={name: "1"})
        assert other.stdout == plain.stdout
        assert b"\x1b" not in other.stderr
    shown = trimkv_on_a_terminal(*ASK, "-q", "--no-live", environment={"FORCE_COLOR": "1"})
    assert shown.replace(b"\r\n", b"\n") == plain.stdout


@pytest.mark.slow
def test_a_closed_pipe_ends_at_once_with_141() -> None:
    """Catches a traceback, a wrong code, and generating on for nobody."""
    process = subprocess.Popen(
        [*COMMAND, "ask", "go on", "-n", "8000", "--ignore-eos", "-q", "--threads", "1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert errors == b""


def test_keydiff_needs_no_files_of_gates(here: Run, tmp_path: Path) -> None:
    """Catches a name that is looked up as a folder, a bound that is passed, a batch that differs from one alone."""
    small = ("--kv-budget", "16", "--gates", "keydiff", "--prefill-chunk", "16", "--json")
    alone = json.loads(here(*ASK, *small).stdout)
    assert alone["trimkv"]["cache"]["kept_per_head"] == 16
    streamed = json.loads(here(*ASK, *small, "--gates", "streaming").stdout)
    assert streamed["choices"][0]["message"]["content"] != alone["choices"][0]["message"]["content"]
    batch = tmp_path / "in.jsonl"
    messages = [{"role": "user", "content": ASK[1]}]
    batch.write_text(json.dumps({"id": "a", "messages": messages}) + "\n", encoding="utf-8")
    options = ("--greedy", "-n", "24", "--ignore-eos", "--threads", "1", *small[:-1])
    assert here("run", batch, "-o", tmp_path / "out.jsonl", *options).returncode == 0
    body = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["response"]["body"]
    assert body["choices"][0]["message"]["content"] == alone["choices"][0]["message"]["content"]


def test_json_is_one_chat_completion_with_what_it_cost(here: Run) -> None:
    """Catches a record that lacks a promised key or miscounts."""
    done = here(*ASK, "--json", "--kv-budget", "16")
    record = json.loads(done.stdout)
    assert record["object"] == "chat.completion"
    assert record["choices"][0]["message"]["role"] == "assistant"
    assert record["usage"]["completion_tokens"] == 24
    own = record["trimkv"]
    assert own["cache"]["seen_tokens"] == record["usage"]["prompt_tokens"] + 23
    assert own["cache"]["kept_per_head"] == 16
    assert own["memory"]["kv_bytes"] == 4 * 4 * 16 * (2 * 32 * 4 + 8)  # layers · heads · M · (2 · head_dim · 4 + 8)
    assert {"model", "gates", "budget", "memory", "cache", "timing", "sampling", "warnings"} <= own.keys()


def test_a_seed_is_drawn_and_reported_and_repeats_the_answer(here: Run) -> None:
    """Catches a seed that is fixed behind the user's back, or that does not decide the tokens."""
    sampled = ("ask", "Tell me", "-n", "12", "--ignore-eos", "--temperature", "1", "--json", "-q", "--threads", "1")
    first, second = (json.loads(here(*sampled).stdout) for _ in range(2))
    seeds = [record["trimkv"]["sampling"]["seed"] for record in (first, second)]
    assert seeds[0] != seeds[1]
    again = json.loads(here(*sampled, "--seed", str(seeds[0])).stdout)
    assert again["choices"] == first["choices"]


def test_piped_text_and_files_are_appended_to_the_prompt(here: Run, tmp_path: Path) -> None:
    """Catches stdin or -f being forgotten: more input must be more prompt tokens."""
    note = tmp_path / "note.txt"
    note.write_text("some words in a file")
    counts = [
        json.loads(here(*ASK, *more, "--json", stdin=stdin).stdout)["usage"]["prompt_tokens"]
        for more, stdin in (((), ""), ((), "some words in a pipe"), (("-f", note), "some words in a pipe"))
    ]
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("ask", "hi", "-m", "no/such-model", "--offline"), 6, "models pull no/such-model"),
        (("ask", "hi", "-m", "/no/such/folder"), 6, "/no/such/folder"),
        (("ask", "hi", "-m", "qwen3-4b-moth"), 6, "qwen3-4b-math"),
        (("ask", "hi", "-m", str(GOLDEN / "qwen3_base")), 6, "no tokenizer"),
        (("ask", "hi", "-m", str(GOLDEN / "qwen3_base"), "--gates", "streaming"), 6, "no tokenizer"),
        (("ask", "hi", "--gates", str(GOLDEN / "qwen3_base")), 6, "holds no gates"),
        (("ask", "hi", "--kv-budget", "0"), 2, "--kv-budget 512"),
        (("ask", "hi", "--budget", "12XB"), 2, "8GiB"),
        (("ask", "hi", "--budget", "20MiB"), 4, "--budget"),
        (("ask", "hi", "-n", "70000"), 4, "65536"),
        (("ask", "hi", "--context", "70000"), 4, "65536"),
        (("ask", "hi", "-n", "0"), 2, "max_tokens"),
        (("ask", "hi", "--threads", "0"), 2, "--threads"),
        (("ask", "hi", "--dtype", "int3"), 2, "fp32"),
        (("ask", "hi", "-f", "/no/such/file"), 2, "/no/such/file"),
        (("ask", "hi", "-o", "/no/such/folder/out"), 2, "-o"),
        (("ask", "hi", "--no-such-flag"), 2, "--no-such-flag"),
        (("ask",), 2, "no prompt"),
        (("summarize", "/no/such/file"), 2, "/no/such/file"),
        (("inspect", "--prompt-token-ids", "/no/such/file"), 2, "/no/such/file"),
        (("chat",), 2, "trimkv ask"),
        (("no-such-command",), 2, "no-such-command"),
    ],
)
def test_bad_input_gets_one_error_line_a_hint_and_its_code(
    here: Run, arguments: tuple[str, ...], code: int, words: str
) -> None:
    """Catches tracebacks, wrong exit codes, and hints that say nothing."""
    done = here(*arguments)
    lines = [line for line in done.stderr.decode().splitlines() if line.startswith(("error: ", "hint: "))]
    assert done.returncode == code, done.stderr
    assert done.stdout == b""
    assert [line.split(":")[0] for line in lines] == ["error", "hint"]
    assert words in " ".join(lines)
    assert b"Traceback" not in done.stderr


def test_a_gguf_and_a_broken_weight_file_are_named(tmp_path: Path) -> None:
    """Catches library errors that reach the user as they are."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    done = trimkv("ask", "hi", "-m", gguf)
    assert done.returncode == 6
    assert b"is cut off within its header" in done.stderr
    folder = tmp_path / "cut"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((GOLDEN / "qwen3_base" / name).read_bytes()[:5000])
    done = trimkv("ask", "hi", "-m", folder, "--gates", "streaming")
    assert done.returncode == 6
    assert b"Traceback" not in done.stderr


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    """Catches an import of torch or transformers on the way to a help text."""
    code = (
        "import sys, time\n"
        "from trimkv_cli.app import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'bitsandbytes', 'triton', 'tokenizers'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["ask", "--help"], ["plan", "mini"], ["plan", "--help"], ["profiles", "list"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, env=ENVIRONMENT, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr


def test_control_characters_of_a_model_cannot_drive_the_terminal(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Catches an escape sequence on its way to stdout."""
    from trimkv_cli.ui.plain import AnswerWriter, neutralise

    assert neutralise("a\x1b[2Jb\r\x07\x9bc\td\n\x7f") == "a␛[2Jb␍␇\ufffdc\td\n␡"
    writer = AnswerWriter()
    for piece in ("one\n", "\n", "two\x1b]0;x\n\n"):
        writer.push(piece)
    writer.close()
    assert capfdbinary.readouterr().out == "one\n\ntwo␛]0;x\n".encode()


def test_a_byte_that_is_not_utf_8_is_refused_before_a_model_is_loaded() -> None:
    """Catches an internal error of the tokenizer, after loading."""
    for command in ("ask", "inspect"):
        refused = trimkv(command, "caf\udce9")
        assert (refused.returncode, refused.stdout) == (2, b"")
        assert refused.stderr.startswith(b"error: the prompt is not UTF-8: byte e9 after 'caf'\nhint: ")


def test_a_raw_prompt_with_special_tokens_is_warned_about_or_read_as_such(here: Run) -> None:
    """Catches a prompt rendered elsewhere whose tokens are read as letters, without a word about it."""
    prompt = "<|im_start|>user\nMy cat is called Zubo.<|im_end|>\n<|im_start|>assistant\n"
    ways: tuple[tuple[str, ...], ...] = ((), ("--special-tokens",))
    plain, special = (here("ask", "--raw", *more, "--json", "-n", "1", prompt) for more in ways)
    assert b"warning: the prompt holds <|im_start|>, <|im_end|>, read as text: --special-tokens" in plain.stderr
    assert [w["code"] for w in json.loads(plain.stdout)["trimkv"]["warnings"]] == ["special_tokens_as_text"]
    assert b"warning" not in special.stderr
    counts = [json.loads(done.stdout)["usage"]["prompt_tokens"] for done in (plain, special)]
    assert counts[1] < counts[0] - 10
    assert here("ask", "--special-tokens", "hi").returncode == 2
