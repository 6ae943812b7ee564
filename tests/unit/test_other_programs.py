"""GGUF files of other programs, in folders as those programs lay them out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimkv_cli.errors import BrokenModel, ModelNotFound
from trimkv_cli.loading.other_programs import kept_files, ollama_file

DIGEST = "sha256:" + "ab" * 32


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("OLLAMA_MODELS", "LLAMA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def put_ollama(home: Path, name: str, tag: str, layers: object) -> Path:
    folder = home / ".ollama" / "models"
    manifest = folder / "manifests" / "registry.ollama.ai" / name / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"layers": layers}))
    blob = folder / "blobs" / DIGEST.replace(":", "-")
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(b"GGUF")
    return blob


MODEL = [
    {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:00"},
    {"mediaType": "application/vnd.ollama.image.model", "digest": DIGEST},
]


def test_a_name_of_ollama_is_its_blob(home: Path) -> None:
    """Catches a tag that is ignored, and a name with an owner."""
    blob = put_ollama(home, "library/llama3.2", "latest", MODEL)
    put_ollama(home, "someone/mine", "1b", MODEL)
    assert ollama_file("ollama:llama3.2") == ollama_file("ollama:llama3.2:latest") == blob
    assert ollama_file("ollama:someone/mine:1b") == blob
    with pytest.raises(ModelNotFound, match=r"no model llama3\.2:3b here") as caught:
        ollama_file("ollama:llama3.2:3b")
    assert "ollama:llama3.2:latest" in str(caught.value.hint)


def test_a_manifest_without_weights_is_named(home: Path) -> None:
    """Catches a KeyError of a manifest that is cut or of another kind."""
    put_ollama(home, "library/half", "latest", MODEL[:1])
    with pytest.raises(BrokenModel, match="names no weights"):
        ollama_file("ollama:half")
    assert kept_files() == []


def test_files_of_all_programs_are_listed(home: Path) -> None:
    """Catches parts of one model that are listed as several, and links that are counted twice."""
    put_ollama(home, "library/llama3.2", "latest", MODEL)
    studio = home / ".lmstudio" / "models" / "someone" / "repo"
    cache = home / ".cache" / "llama.cpp"
    for folder in (studio, cache):
        folder.mkdir(parents=True)
    for part in (1, 2):
        (studio / f"big-0000{part}-of-00002.gguf").write_bytes(b"GGUF")
    (cache / "one.gguf").write_bytes(b"GGUF12")
    (cache / "again.gguf").symlink_to(cache / "one.gguf")
    found = {(kept.program, Path(kept.id).name, kept.size_bytes) for kept in kept_files()}
    assert ("Ollama", "ollama:llama3.2:latest", 4) in found
    assert ("LM Studio", "big-00001-of-00002.gguf", 4) in found
    assert len([each for each in found if each[0] == "llama.cpp"]) == 1
    assert len(found) == 3
