"""How fast this processor multiplies packed and plain matrices, measured once and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from trimkv_cli.engine import cpu
from trimkv_cli.errors import TrimkvError
from trimkv_cli.model.machine import Machine, store, whole_products

# The file alone, as its package imports all of transformers.
_PROGRAM = "import json, runpy, sys; print(json.dumps(runpy.run_path(sys.argv[1])['measure_products']()))"


def measure_products() -> object:
    """Measure in a process of its own, as this one would keep what no plan counts; None where that fails."""
    program = [sys.executable, "-c", _PROGRAM, str(Path(cpu.__file__).with_name("packed.py"))]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=alone, capture_output=True, text=True, check=False)
    with suppress(ValueError):
        return json.loads(done.stdout)
    return None


def measured(machine: Machine) -> Machine:
    """Return the machine with its products measured now; without them where they cannot be."""
    return replace(machine, products=whole_products(measure_products()))


def with_products(machine: Machine) -> Machine:
    """Return the machine with its products, measured and kept for later runs where a file can be written."""
    found = measured(machine)
    if found.products:
        with suppress(TrimkvError):
            store(Machine(products=found.products))
    return found
