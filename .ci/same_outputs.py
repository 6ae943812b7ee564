"""Whether two checkouts say the same: every JSON output of the built-in model, times aside.

    .venv/bin/python .ci/same_outputs.py OLD NEW

Both run with this interpreter's packages and their own code, in folders of their own. Prints each output that differs
and exits 1 when one does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMED = re.compile(r"_s$|_ms$|_tps$|^(id|created|time|started|date|seconds|elapsed|trimkv|version|commit)$|rss|peak")
PROMPT = "My cat is called Zubo. The code of the safe is 4711. What is my cat called?"
BUDGETS = ("", "600MiB", "4GiB", "8GiB", "24GiB")
PLANNER = """
import contextlib, io, json, sys
from trimkv_cli.app import main
for arguments in json.load(sys.stdin):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding='utf-8') for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as ended:
            code = ended.code
    said = []
    for stream in (out, err):
        stream.seek(0)
        said.append(stream.read())
    print(json.dumps([arguments, code, *said]))
"""
PROFILES = (
    "mini",
    "phi-3-mini-128k-instruct",
    "qwen3-1.7b-math",
    "qwen3-14b-math",
    "qwen3-4b-instruct-2507",
    "dbtrimkv-qwen3-4b-math",
    "qwen3-8b-math",
)
SHAPES = (
    (),
    ("--rows", "8"),
    ("--quantize", "nf4"),
    ("--quantize", "int8", "--kv-dtype", "bf16"),
    ("--kv-budget", "96", "--prefill-chunk", "64"),
    ("--kv-budget", "256MiB", "--dtype", "bf16"),
    ("--device", "cuda", "--context", "20000"),
    ("--device", "cuda", "--kv-dtype", "fp8", "--rows", "3"),
    ("--gates", "streaming", "--prefill-chunk", "0", "--context", "3000"),
    ("--gates", "none", "--context", "2000"),
)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield a name for each command, and its arguments."""
    ask = ["ask", PROMPT, "--json", "--threads", "1"]
    yield "ask", ask
    yield "ask-small", [*ask, "--kv-budget", "32", "--greedy", "--stats"]
    yield "ask-seeded", [*ask, "--temperature", "0.9", "--top-k", "20", "--seed", "5", "--min-p", "0.05", "-n", "40"]
    yield "ask-pinned", [*ask, "--pin", "sinks:4,recent:8", "--kv-budget", "24", "--prefill-chunk", "8"]
    yield "ask-logprobs", [*ask, "--budget", "700MiB", "--deterministic", "--repetition-penalty", "1.2"]
    yield "summarize", ["summarize", "notes.txt", "story.txt", "--json", "--threads", "1", "--greedy"]
    yield (
        "summarize-map",
        ["summarize", "notes.txt", "--json", "--threads", "1", "--on-overflow", "map-reduce", "--context", "300"],
    )
    yield "inspect", ["inspect", "-f", "story.txt", "What is my dog called?", "--kv-budget", "64", "--json", "--greedy"]
    yield (
        "eval",
        [
            "eval",
            "mini",
            "--tasks",
            "recall,kv-retrieval",
            "--context",
            "300",
            "--budgets",
            "32",
            "--samples",
            "3",
            "--json",
        ],
    )
    job = ["--kv-budget", "48", "--threads", "2", "--order", "input", "-q", "--deterministic"]
    yield "run", ["run", "mixed.jsonl", "-o", "mixed-out.jsonl", *job]
    yield "run-resumed", ["run", "mixed.jsonl", "-o", "cut-out.jsonl", *job]
    yield "run-validate", ["run", "mixed.jsonl", "--validate", "--strict"]
    yield "models", ["models", "show", "mini", "--json"]
    yield "profiles", ["profiles", "list", "--json"]
    yield "gates", ["gates", "show", "mini", "--json"]


def plans() -> Iterator[list[str]]:
    """Yield the arguments of every plan that is compared."""
    for profile in PROFILES:
        for budget in BUDGETS:
            for shape in SHAPES:
                yield ["plan", profile, "--json", "--offline", *(["--budget", budget] if budget else []), *shape]


def mixed_lines() -> Iterator[str]:
    """Yield 200 lines of every kind that `run` takes, some of them bad."""
    names = ("Zubo", "Mirto", "Belka", "Karo", "Milo")
    for number in range(200):
        name = names[number % 5]
        text = f"My cat is called {name}. I have {number} cards. What is my cat called?"
        body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 4 + number % 9}
        match number % 10:
            case 0:
                yield json.dumps({"id": f"p{number}", "prompt": text, "max_tokens": 8})
            case 1:
                yield json.dumps({"id": f"p{number}", "prompt_token_ids": [5, 6, 7, 8 + number % 20], "max_tokens": 6})
            case 2:
                yield json.dumps(
                    {**body, "id": f"p{number}", "temperature": 0.8, "seed": number, "n": 2, "logprobs": True}
                )
            case 3:
                yield json.dumps({**body, "custom_id": f"p{number}", "stop": [".", "!"]})
            case 4:
                yield json.dumps(
                    {
                        "custom_id": f"p{number}",
                        "method": "POST",
                        "url": "/v1/completions",
                        "body": {"prompt": text, "max_tokens": 6, "logprobs": 2},
                    }
                )
            case 5 if number % 20 == 5:
                yield '{"broken": '
            case 6 if number % 20 == 6:
                yield json.dumps({"id": f"p{number}", "prompt": text, "temperature": -1, "unknown": 1})
            case 7 if number % 40 == 7:
                yield json.dumps(
                    {**body, "id": f"p{number}", "response_format": {"type": "json_object"}, "max_tokens": 16}
                )
            case _:
                yield json.dumps(
                    {"custom_id": f"p{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
                )


def timeless(value: Any) -> Any:
    """Return the value without what a clock, a machine or chance decides."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if not TIMED.search(key)}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def surroundings(checkout: Path) -> dict[str, str]:
    """Return what a process sees that runs the checkout's code."""
    sources = f"{checkout}:{checkout / 'kernels'}"
    return os.environ | {"PYTHONPATH": sources, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}


def run_plans(checkout: Path, folder: Path) -> list[str]:
    """Run all plans in one process of the checkout's code; return what each said."""
    planned = subprocess.run(
        [sys.executable, "-c", PLANNER],
        cwd=folder, env=surroundings(checkout), input=json.dumps(list(plans())), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return planned.stdout.replace(str(checkout), "CHECKOUT").splitlines()


def run(checkout: Path, arguments: list[str], folder: Path) -> str:
    """Run the checkout's trimkv; return its exit code and what it wrote, without times."""
    ended = subprocess.run(
        [sys.executable, "-m", "trimkv_cli", *arguments],
        cwd=folder, env=surroundings(checkout), capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    out = ended.stdout.replace(str(checkout), "CHECKOUT")
    if "-o" in arguments:
        out += (folder / arguments[arguments.index("-o") + 1]).read_text(encoding="utf-8")
    return f"exit {ended.returncode}\n" + "\n".join(map(line_without_times, out.splitlines())) + said(ended.stderr)


def line_without_times(line: str) -> str:
    """Return a line of JSON without times, another one as it is."""
    try:
        return json.dumps(timeless(json.loads(line)))
    except ValueError:
        return line


def said(text: str) -> str:
    """Return a command's talk without times and speeds."""
    return "\nstderr: " + re.sub(r"[0-9.]+ ?(s|ms|tok/s|MiB|GiB|min|/s)\b", "#", text)


def prepare(folder: Path, checkout: Path) -> None:
    """Fill a folder with what the commands read."""
    for name in ("notes.txt", "story.txt"):
        (folder / name).write_bytes((checkout / "examples" / name).read_bytes())
    (folder / "mixed.jsonl").write_text("\n".join(mixed_lines()) + "\n", encoding="utf-8")


def half(folder: Path) -> None:
    """Leave half of an ended job, to be resumed."""
    for found in folder.glob("mixed-out.jsonl*"):
        found.with_name(found.name.replace("mixed-out", "cut-out")).write_bytes(found.read_bytes())
    out = folder / "cut-out.jsonl"
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:90]))


def main() -> None:
    """Compare the two checkouts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", default="", help="names of commands that begin like this")
    asked = parser.parse_args()
    different = ran = 0
    sides = [asked.old.resolve(), asked.new.resolve()]
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / side for side in ("old", "new")]
        for folder in folders:
            folder.mkdir()
            prepare(folder, asked.old)
        pairs = list(zip(sides, folders, strict=True))
        for name, arguments in commands():
            if not name.startswith(asked.only):
                continue
            if name == "run-resumed":
                for folder in folders:
                    half(folder)
            old, new = (run(side, arguments, folder) for side, folder in pairs)
            ran += 1
            different += tell(f"{name}: trimkv {' '.join(arguments)}", old, new)
        if "plan".startswith(asked.only):
            for arguments, old, new in zip(plans(), *(run_plans(side, folder) for side, folder in pairs), strict=True):
                ran += 1
                different += tell(f"trimkv {' '.join(arguments)}", old, new)
    print(f"{ran} outputs compared, {different} differ")
    sys.exit(bool(different))


def tell(name: str, old: str, new: str) -> bool:
    """Say whether two outputs differ, and print both when they do."""
    if old != new:
        print(f"differs: {name}\n--- old\n{old[:3000]}\n--- new\n{new[:3000]}")
    elif os.environ.get("SHOW"):
        print(name, new[:300])
    return old != new


if __name__ == "__main__":
    main()
