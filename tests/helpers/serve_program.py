"""`trimkv serve` around an engine that needs no model: quick to start. For tests; TRIMKV_TEST_STEP_S slows it down."""

from __future__ import annotations

import os
import sys
from typing import Any

from helpers.serving import Scripted
from trimkv_cli.commands import answers


def open_engine(*_: Any, **__: Any) -> Scripted:
    return Scripted(step_s=float(os.environ.get("TRIMKV_TEST_STEP_S", "0.02")))


if __name__ == "__main__":
    answers.open_engine = open_engine  # type: ignore[assignment]
    from trimkv_cli.app import main

    main(["serve", *sys.argv[1:]])
