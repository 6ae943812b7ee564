"""The built-in model: where its files lie."""

from __future__ import annotations

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
GATES_FOLDER = MODEL_FOLDER / "gates"
