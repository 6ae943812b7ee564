"""Names become folders without a needless look at the network, and each fault says what to do."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from trimkv_cli.errors import ModelError, ModelNotFound, OfflineError, TrimkvError, UnsupportedModel
from trimkv_cli.loading import hub

GOLDEN = Path(__file__).parents[1] / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def put(cache: Path, id: str, source: Path, *, branch: str = "main", commit: str = COMMIT) -> Path:
    """Lay a folder into the cache as huggingface_hub would."""
    repository = cache / f"models--{id.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(source, snapshot)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    return snapshot


def fault(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    """Make an error as the hub's client raises it."""
    http = pytest.importorskip(errors.HTTPError.__module__.split(".")[0])
    response = http.Response(status, request=http.Request("GET", "https://hub.example"))
    return kind("a long story\nin several lines", response=response)


def fails_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: object, local_files_only: bool, **__: object) -> str:
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_a_folder_is_itself() -> None:
    """Catches a folder that is taken for a hub id."""
    assert hub.resolve(str(GOLDEN / "qwen3_base")) == GOLDEN / "qwen3_base"
    assert hub.resolve(str(GOLDEN / "qwen3_rg"), kind="gates") == GOLDEN / "qwen3_rg"
    assert hub.resolve(str(GOLDEN / "qwen3_rg"), kind="config") == GOLDEN / "qwen3_rg"


def test_a_cached_model_needs_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a look at the hub before each run, which fails on a plane."""
    snapshot = put(cache, "some/model", GOLDEN / "qwen3_base")
    monkeypatch.setattr(hub, "_download", lambda *_, **__: pytest.fail("asked the network"))
    assert hub.resolve("some/model") == snapshot
    assert hub.resolve("some/model", offline=True) == snapshot
    assert hub.resolve("some/model", revision=COMMIT) == snapshot


def test_refresh_asks_the_network_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pull that never sees a new revision."""
    put(cache, "some/model", GOLDEN / "qwen3_base")
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(GOLDEN / "qwen3_base")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub.resolve("some/model", revision="v2", refresh=True)
    assert [(call["name"], call["revision"], call["local_files_only"]) for call in asked] == [
        ("some/model", "v2", False)
    ]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("tokenizer.json", True),
        ("tokenizer.model", True),
        ("merges.txt", True),
        ("chat_template.jinja", True),
        ("pytorch_model.bin", False),
        ("consolidated.safetensors", False),
        ("original/consolidated.00.pth", False),
        ("onnx/model.safetensors", False),
        ("modeling_custom.py", False),
        ("model-Q4_K_M.gguf", False),
    ],
)
def test_what_is_downloaded(name: str, wanted: bool) -> None:
    """Catches pickles, code and second copies of the weights."""
    from huggingface_hub.utils import filter_repo_objects

    kept = filter_repo_objects([name], allow_patterns=hub.WANTED["model"], ignore_patterns=hub.UNWANTED)
    assert bool(list(kept)) == wanted


def test_a_snapshot_that_lacks_a_shard_is_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run on the half of a download that was interrupted."""
    snapshot = put(cache, "some/model", GOLDEN / "qwen3_base")
    shards = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(shards))
    fails_with(monkeypatch, errors.LocalEntryNotFoundError("no network"))
    with pytest.raises(OfflineError):
        hub.resolve("some/model")
    with pytest.raises(ModelNotFound, match="lacks some of its weight files"):
        hub.resolve(str(snapshot))


def test_offline_and_not_cached(cache: Path) -> None:
    """Catches --offline that goes on to the network."""
    with pytest.raises(OfflineError, match="not in the cache") as caught:
        hub.resolve("some/model", revision="v2", offline=True)
    assert caught.value.hint == "trimkv models pull some/model --revision v2, without --offline"
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("error", "expected", "message", "hint"),
    [
        (lambda: fault(errors.GatedRepoError, 403), ModelError, "is gated", "HF_TOKEN"),
        (lambda: fault(errors.RepositoryNotFoundError, 404), ModelNotFound, "there is no model", "HF_TOKEN"),
        (lambda: fault(errors.RepositoryNotFoundError, 401), ModelNotFound, "there is no model", "HF_TOKEN"),
        (lambda: fault(errors.RevisionNotFoundError, 404), ModelNotFound, "has no revision v9", "--revision"),
        (lambda: fault(errors.HfHubHTTPError, 401), ModelError, "denies access", "HF_TOKEN"),
        (lambda: fault(errors.HfHubHTTPError, 403), ModelError, "denies access", "HF_TOKEN"),
        (lambda: fault(errors.HfHubHTTPError, 503), OfflineError, r"\(503\)", "later"),
        (lambda: errors.LocalEntryNotFoundError("no net"), OfflineError, "cannot be reached", "models pull"),
        (
            lambda: errors.IncompleteSnapshotError("half", snapshot_path="x"),
            OfflineError,
            "cannot be reached",
            "models pull",
        ),
        (lambda: errors.OfflineModeIsEnabled("off"), OfflineError, "cannot be reached", "models pull"),
        (lambda: errors.HTTPError("reset by peer"), OfflineError, "cannot be reached", "models pull"),
        (lambda: ConnectionError("refused"), OfflineError, "cannot be reached", "models pull"),
        (lambda: OSError(errno.ENOSPC, "No space left"), TrimkvError, "disk of the model cache is full", "HF_HOME"),
        (lambda: PermissionError(errno.EACCES, "denied"), TrimkvError, "cannot write", "HF_HOME"),
    ],
)
def test_faults_of_the_hub_are_explained(
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[], Exception],
    expected: type[TrimkvError],
    message: str,
    hint: str,
) -> None:
    """Catches a traceback of an HTTP library, and a gated repository called missing."""
    fails_with(monkeypatch, error())
    with pytest.raises(TrimkvError, match=message) as caught:
        hub.resolve("some/model", revision="v9")
    assert type(caught.value) is expected
    assert hint in str(caught.value.hint)
    assert "\n" not in caught.value.message


def test_a_gated_repository_names_its_licence_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a hint that leaves the user to search for the page."""
    fails_with(monkeypatch, fault(errors.GatedRepoError, 403))
    with pytest.raises(ModelError) as caught:
        hub.resolve("some/model")
    assert f"{constants.ENDPOINT}/some/model" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["mimi", "a/b/c", "", "with space/model", "x" * 5_000, "~nobody-here/model", "a\0b"])
def test_names_that_can_be_nothing(cache: Path, name: str) -> None:
    """Catches a typo that is looked up on the network, and an OSError for a long name."""
    with pytest.raises(ModelNotFound):
        hub.resolve(name)


def test_a_typo_gets_a_suggestion() -> None:
    """Catches an error that leaves the user to guess."""
    with pytest.raises(ModelNotFound, match="there is no model mimi") as caught:
        hub.resolve("mimi")
    assert str(caught.value.hint).startswith("did you mean mini")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "../no/where", "no/where/"])
def test_a_path_that_is_not_there(name: str) -> None:
    """Catches a mistyped path that is asked for on the hub."""
    with pytest.raises(ModelNotFound, match="there is no folder"):
        hub.resolve(name)


def test_a_file_instead_of_a_folder() -> None:
    """Catches a NotADirectoryError."""
    with pytest.raises(ModelNotFound, match="is a file, not a folder") as caught:
        hub.resolve(str(GOLDEN / "qwen3_base/model.safetensors"))
    assert str(GOLDEN / "qwen3_base") in str(caught.value.hint)


def test_a_gguf_file_is_itself_and_a_folder_of_several_asks_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a GGUF model that is only called incomplete."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "blob").write_bytes(b"GGUF")
    assert hub.resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    assert hub.resolve(str(tmp_path / "blob"), kind="config") == tmp_path / "blob"
    monkeypatch.setattr(hub, "_cached", lambda *_: tmp_path / "nothing")
    (tmp_path / "nothing").mkdir()
    for name, hint in ((str(tmp_path), "model.gguf"), ("some/Model-GGUF", "some/Model-GGUF:Q4_K_M")):
        with pytest.raises(ModelNotFound, match="holds GGUF files") as caught:
            hub.resolve(name)
        assert hint in str(caught.value.hint)
    with pytest.raises(ModelNotFound, match="there is no file no/such/file"):
        hub.resolve("no/such/file.gguf")


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    """Catches a loader that finds out only after minutes."""
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        hub.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(UnsupportedModel, match="has no safetensors weights"):
        hub.resolve(str(tmp_path))
    with pytest.raises(ModelNotFound, match="holds no gates"):
        hub.resolve(str(GOLDEN / "qwen3_base"), kind="gates")


def test_a_repository_without_any_wanted_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a message about a cache folder that huggingface_hub names but does not make."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshots/none"))
    with pytest.raises(ModelNotFound, match=r"^some/data has no config\.json$"):
        hub.resolve("some/data")


def test_cached_repositories(cache: Path) -> None:
    """Catches gates that are listed as models, and a cache that does not exist yet."""
    put(cache, "z/model", GOLDEN / "qwen3_base")
    put(cache, "a/gates", GOLDEN / "qwen3_rg", commit="f" * 40)
    (cache / "models--b--notes/snapshots" / COMMIT).mkdir(parents=True)
    found = hub.cached_repositories()
    assert [(repo.id, repo.kind) for repo in found if repo.id != "b/notes"] == [
        ("a/gates", "gates"),
        ("z/model", "model"),
    ]
    assert found[0].revisions == ("f" * 40,)
    assert found[-1].size_bytes > 500_000
    assert hub.holds(found[-1].folder, "model")
    shutil.rmtree(cache)
    assert hub.cached_repositories() == []
