"""What the tests of this folder share."""

from __future__ import annotations

from helpers.here import here

__all__ = ["here"]
