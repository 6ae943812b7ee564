"""`trimkv gates` and `trimkv models`: data on stdout, talk on stderr, exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from helpers.engines import gate_tensors
from helpers.other_gates import write_fastkvzip, write_kvzap
from helpers.programs import Run
from trimkv_cli.cache.gate_files import write_gates
from trimkv_cli.commands import gates, models
from trimkv_cli.loading.packed_cache import Matrix, PackedForm
from trimkv_cli.mini import MODEL_FOLDER
from trimkv_cli.model import profiles
from trimkv_cli.model.folders import read_gate_spec, read_model_spec
from trimkv_cli.model.spec import GateSpec, ModelSpec

Text = Callable[..., subprocess.CompletedProcess[str]]
GOLDEN = Path(__file__).parents[1] / "golden"
GATES, MODEL = str(GOLDEN / "qwen3_rg"), str(GOLDEN / "qwen3_base")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, offline as all tests are."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, id: str, source: str) -> Path:
    repository = cache / f"models--{id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c" * 40)
    return Path(shutil.copytree(source, repository / "snapshots" / ("c" * 40)))


@pytest.fixture
def trimkv(here: Run) -> Text:
    def invoke(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = here(*arguments)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return invoke


def test_gates_show(trimkv: Text) -> None:
    """Catches a fact that is missing from the text for people."""
    done = trimkv("gates", "show", GATES)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rg, 64 → 32 → 2, silu" in done.stdout
    assert "32 slots per head, contexts up to 4,096" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["layer", "2", "bias", "2.87", "…", "3.43"]


def test_gates_show_json(trimkv: Text) -> None:
    """Catches a key that scripts rely on."""
    facts = json.loads(trimkv("gates", "show", GATES, "--json").stdout)
    assert facts["memory_size"] == 32
    assert facts["file_bytes"] == 30781
    assert facts["sha256"] == "1ff24301d063c5f8f831b7d17ce70ffa0c8f21331152055efe0d9dc589dc1434"
    assert [layer["layer"] for layer in facts["layers"]] == [0, 1, 2]


def test_gates_verify(trimkv: Text) -> None:
    """Catches an answer that is not one line on stdout."""
    done = trimkv("gates", "verify", GATES, "--model", MODEL)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"ok: {GATES} (rg) fits {MODEL}: 3 layers of 2 KV heads, 12 tensors\n"


def test_gates_that_read_keys_and_values(trimkv: Text, tmp_path: Path) -> None:
    """Catches a variant that is read and not shown, or that fits no model."""
    model = ModelSpec.from_config(json.loads(Path(MODEL, "config.json").read_text()))
    gate = GateSpec(variant="rg3", id="mine", hidden=24, memory_size=8, base_model=MODEL)
    write_gates(tmp_path, gate, gate_tensors(gate, model))
    shown = trimkv("gates", "show", str(tmp_path))
    assert "rg3, 128 → 24 → 2, silu" in shown.stdout
    done = trimkv("gates", "verify", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"ok: {tmp_path} (rg3) fits {MODEL}: ")


def test_gates_of_others(trimkv: Text, tmp_path: Path) -> None:
    """Catches gates of others that are shown as ours, checked against nothing, or taken for a model they do not fit."""
    model = ModelSpec.from_config(json.loads(Path(MODEL, "config.json").read_text()))
    zap, fast = tmp_path / "KVzap-linear-qwen3_base", tmp_path / "qwen3_base/q2_dim16_sink16.pt"
    write_kvzap(zap, model, hidden=None)
    write_fastkvzip(fast.parent, model)
    shown = {str(path): trimkv("gates", "show", str(path)).stdout for path in (zap, fast)}
    assert "kvzap, 64 → 2, linear" in shown[str(zap)]
    assert "fastkvzip, 64 → 2 queries of 16 per head → 2" in shown[str(fast)]
    assert all("static" in text and "layer 2" in text for text in shown.values())
    assert json.loads(trimkv("gates", "show", str(zap), "--json").stdout)["shape"]["num_layers"] == 3
    for path, tensors in ((zap, 6), (fast, 21)):
        done = trimkv("gates", "verify", str(path), "--model", MODEL)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith(f" fits {MODEL}: 3 layers of 2 KV heads, {tensors} tensors\n")
        alone = trimkv("gates", "verify", str(path))
        assert (alone.returncode, "name the model with --model" in alone.stderr) == (2, True)
        other = trimkv("gates", "verify", str(path), "--model", "mini")
        assert (other.returncode, "does not fit the model" in other.stderr) == (6, True)


@pytest.mark.parametrize("kind", ["kvzap", "fastkvzip"])
def test_a_model_runs_with_gates_of_others(kind: str, trimkv: Text, tmp_path: Path) -> None:
    """Catches gates that a command does not take, or that fit a plan and not the engine."""
    model = read_model_spec(MODEL_FOLDER)
    (write_kvzap if kind == "kvzap" else write_fastkvzip)(tmp_path / "gates", model)
    asked = ["-m", "mini", "--gates", str(tmp_path / "gates"), "--kv-budget", "32", "--greedy", "-n", "4"]
    answered = trimkv("ask", *asked, "My cat is called Zubo. " * 20)
    assert answered.returncode == 0, answered.stderr
    assert ("protect the newest 128 tokens; of 32 slots" in answered.stderr) == (kind == "kvzap")
    (tmp_path / "in.jsonl").write_text('{"prompt": "My cat is called Zubo."}\n')
    ran = trimkv("run", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *asked)
    assert ran.returncode == 0, ran.stderr
    assert '"status_code":200' in (tmp_path / "out.jsonl").read_text()
    planned = trimkv("plan", *asked[:6])
    assert (planned.returncode, "gates" in planned.stdout) == (0, True), planned.stderr
    wrong = trimkv("plan", "-m", "qwen3-4b-math", *asked[2:6])  # 4 query heads per KV head
    assert (wrong.returncode, "does not fit the model" in wrong.stderr) == (6, True)


def test_gates_verify_without_a_model_takes_the_base(trimkv: Text, cache: Path) -> None:
    """Catches gates that are checked against the default model instead of their own."""
    assert trimkv("gates", "verify", "mini").stdout.startswith("ok: mini (rg) fits mini: ")
    done = trimkv("gates", "verify", GATES)
    assert done.returncode == 2
    assert done.stderr.endswith("hint: name the model with --model\n")


def test_gates_verify_of_another_model(trimkv: Text, tmp_path: Path) -> None:
    """Catches exit code 0 for gates that do not fit."""
    config = json.loads(Path(MODEL, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    done = trimkv("gates", "verify", GATES, "--model", str(tmp_path))
    assert (done.returncode, done.stdout) == (6, "")
    assert "model.layers.0.self_attn.retention_gate.linear2.weight is [2, 32] instead of [4, 32]" in done.stderr
    assert done.stderr.count("\n") == 2
    assert done.stderr.splitlines()[1].startswith("hint: ")


@pytest.mark.parametrize("name", ["streaming", "./nowhere", MODEL, "some/gates", "Jang-Hyun/Fast-KVzip"])
def test_gates_that_are_none(trimkv: Text, cache: Path, name: str) -> None:
    """Catches a traceback for a constant gate, a missing folder, a model folder, an uncached id."""
    done = trimkv("gates", "show", name)
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr.startswith("error: ")
    assert "\nhint: " in done.stderr


def test_models_list(trimkv: Text, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a list without the built-in model, or one that needs a cache folder."""
    monkeypatch.setenv("HOME", str(cache))
    monkeypatch.setenv("XDG_DATA_HOME", str(cache / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "cache"))
    assert [model["id"] for model in json.loads(trimkv("models", "list", "--json").stdout)["models"]] == ["mini"]
    put(cache, "some/model", MODEL)
    put(cache, "some/gates", GATES)
    rows = [line.split() for line in trimkv("models", "list").stdout.splitlines()]
    assert rows[0] == ["NAME", "KIND", "SIZE", "WHERE"]
    assert [row[:2] for row in rows[1:]] == [["mini", "model"], ["some/gates", "gates"], ["some/model", "model"]]
    assert rows[-1][-1] == "cccccccc"


def keep_packed(place: Path) -> PackedForm:
    """Keep a packed form of something."""
    form = PackedForm(place, slow_s=-1)
    form.open({"a.weight": "int8"})
    form.keep({"a.weight": Matrix(torch.zeros(1000, 1000, dtype=torch.int8), torch.zeros(1000), None)})
    return form


def test_models_lists_and_removes_packed_forms(
    trimkv: Text, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches packed forms that are not counted or that stay, and a model that goes with them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    snapshot = put(cache, "some/model", MODEL)
    (tmp_path / "alone.gguf").write_bytes(b"GGUF")
    keep_packed(snapshot)
    keep_packed(tmp_path / "alone.gguf")
    rows = [line.split()[:2] for line in trimkv("models", "list").stdout.splitlines()]
    assert {name for name, kind in rows if kind == "packed"} == {"some/model", str(tmp_path / "alone.gguf")}
    said = json.loads(trimkv("models", "list", "--json").stdout)["packed"]
    assert {form["model"] for form in said} == {"some/model", None}
    assert [form["size_bytes"] for form in said] == [Path(form["file"]).stat().st_size for form in said]
    assert "removed 1 packed form of some/model, 98" in trimkv("models", "remove", "some/model").stderr
    assert "no packed form of some/model is kept" in trimkv("models", "remove", "some/model").stderr
    assert (snapshot / "config.json").exists()
    assert trimkv("models", "remove").returncode == 2
    assert trimkv("models", "remove", "--packed", "some/model").returncode == 2
    (tmp_path / "alone.gguf").unlink()
    keep_packed(snapshot)
    assert "removed 1 packed form" in trimkv("models", "remove", str(tmp_path / "alone.gguf")).stderr
    assert "removed 1 packed form, " in trimkv("models", "remove", "--packed").stderr
    assert json.loads(trimkv("models", "list", "--json").stdout)["packed"] == []


def test_models_show(trimkv: Text, cache: Path) -> None:
    """Catches bytes that are not those of the specification: 2 · layers · KV heads · head_dim · 4 bytes."""
    put(cache, "some/model", MODEL)
    facts = json.loads(trimkv("models", "show", "some/model", "--offline", "--json").stdout)
    assert facts["kv_bytes_per_token"] == 2 * 3 * 2 * 32 * 4
    assert facts["full_cache_bytes"] == facts["kv_bytes_per_token"] * 4096
    assert facts["weight_bytes"] == 551424
    assert (facts["quantised"], facts["bits_per_weight"]) == (None, 32.0)
    text = trimkv("models", "show", "some/model").stdout
    assert "1.5 KiB per token, 6.0 MiB when full" in text


def test_models_show_loads_neither_torch_nor_weights() -> None:
    """Catches a look at a config that takes seconds."""
    code = (
        "import sys\nfrom trimkv_cli.app import main\n"
        "try: main(['models', 'show', sys.argv[1]])\n"
        "except SystemExit as end: assert end.code in (0, None), end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, MODEL], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_models_pull_prints_the_folder(trimkv: Text, cache: Path) -> None:
    """Catches progress on stdout: `$(trimkv models pull ID)` must be a path."""
    folder = put(cache, "some/model", MODEL)
    gates = put(cache, "some/gates", GATES)
    for id, expected in (("some/model", folder), ("some/gates", gates), (MODEL, Path(MODEL))):
        done = trimkv("models", "pull", id)
        assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr
    mini = Path(trimkv("models", "pull", "mini").stdout.strip())
    assert (mini / "config.json").is_file()


def test_models_pull_without_network(trimkv: Text, cache: Path) -> None:
    """Catches a pull that fails without a word on what to do."""
    done = trimkv("models", "pull", "some/model")
    assert (done.returncode, done.stdout) == (6, "")
    assert "hint: when the network is back: trimkv models pull some/model" in done.stderr


def test_gates_train_names_the_choices(trimkv: Text) -> None:
    """Catches the words of a validator in front of our users' error."""
    train = ["gates", "train", "mini", "--data", "no.jsonl", "-o", "no", "--memory-size", "8", "--context", "64"]
    done = trimkv(*train, "--steps", "1", "--student", "sleeping")
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[0]
        == "error: Invalid value for '--student': 'sleeping' is not one of 'fading', 'evicting'."
    )


def test_gates_that_come_along_are_not_pulled() -> None:
    """Catches a pull of a built-in profile that asks the hub for a repository of the profile's name."""
    assert [part.id for part in models._parts("smollm2-135m-instruct", None)] == ["smollm2-135m-instruct"]
    both = [part.id for part in models._parts("qwen3-8b-math", None)]
    assert both == [
        "Qwen/Qwen3-8B",
        "ngocbh/TrimKV-Qwen3-8B-Math",
    ]
    spec = read_gate_spec(profiles.built_in_gates("smollm2-135m-instruct") or Path(), id="smollm2-135m-instruct")
    assert gates._base_model(spec, "smollm2-135m-instruct") == "smollm2-135m-instruct"


def test_gates_are_listed(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    """Catches names that --gates does not take, and gates in the cache that are said to be on the hub."""
    put(cache, "ngocbh/TrimKV-Qwen3-8B-Math", GATES)
    gates.list_(json=True)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["mini"]["where"] == rows["smollm2-135m-instruct"]["where"] == "comes along"
    assert rows["qwen3-8b-math"] == {
        "name": "qwen3-8b-math", "model": "Qwen/Qwen3-8B", "kind": "rg", "slots": 512, "where": "cached"
    }  # fmt: skip
    assert rows["keydiff"]["model"] is None
    gates.list_(json=False)
    assert "any" in capsys.readouterr().out
