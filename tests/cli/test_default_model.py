"""Which model answers where none is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.programs import trimkv


@pytest.mark.slow
def test_a_default_model_is_one_line_of_the_users_file(tmp_path: Path) -> None:
    """Catches settings that are lost, a line inside a table, and a model that is not there."""
    places = {f"XDG_{kind}_HOME": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA")}
    config = tmp_path / "config" / "trimkv" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("# mine\nkv_budget = 100\n")
    for _ in range(2):
        done = trimkv("models", "default", "mini", environment=places)
        assert done.returncode == 0, done.stderr
        assert config.read_text() == 'model = "mini"\n# mine\nkv_budget = 100\n'
    asked = trimkv("ask", "My cat is called Zubo. What is my cat called?", environment=places)
    assert (asked.returncode, b"no model given" in asked.stderr) == (0, False)
    missing = trimkv("models", "default", "smollm2-135m-instruct", environment=places)
    assert (missing.returncode, b"trimkv models pull smollm2-135m-instruct" in missing.stderr) == (6, True)
    config.unlink()
    plain = trimkv("ask", "My cat is called Zubo. What is my cat called?", environment=places)
    assert b"trimkv models pull smollm2-135m-instruct (93.8 MiB)" in plain.stderr
