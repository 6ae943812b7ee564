"""Run transformers models inside a KV cache of fixed size; importing this package loads nothing heavy."""

from __future__ import annotations

__version__ = "0.1.0"
