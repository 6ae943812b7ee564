"""What was measured on a machine, kept and read again; and what plans choose from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.products import PRODUCTS
from trimkv_cli.errors import TrimkvError
from trimkv_cli.loading import measuring
from trimkv_cli.model import machine
from trimkv_cli.model.machine import NEVER, Machine, store, whole_products


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "_file", lambda: tmp_path / "machine.json")
    return tmp_path / "machine.json"


def test_products_are_kept_beside_the_bytes() -> None:
    """Catches a second measurement that drops what the first one kept."""
    store(Machine(cpu_runtime_bytes=5))
    store(Machine(products=PRODUCTS))
    here = Machine.here()
    assert (here.products, here.cpu_runtime_bytes) == (PRODUCTS, 5)
    store(Machine(cpu_runtime_bytes=6))
    assert Machine.here().products == PRODUCTS


@pytest.mark.parametrize("of", ["_versions", "_cpu_flags"])
def test_numbers_of_another_torch_or_processor_do_not_count(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a home folder that moves to another machine, and times of an older torch."""
    store(Machine(cpu_runtime_bytes=5, products=PRODUCTS))
    monkeypatch.setattr(machine, of, lambda: {"torch": "0.1"} if of == "_versions" else frozenset({"neon"}))
    here = Machine.here()
    assert here.products == {}
    assert here.cpu_runtime_bytes == (5 if of == "_cpu_flags" else None)


@pytest.mark.parametrize("said", [{"int4@1": 1.0}, {**PRODUCTS, "unpack": "fast"}, {**PRODUCTS, "unpack": 0}, 7, None])
def test_half_a_measurement_is_none(said: object, place: Path) -> None:
    """Catches a KeyError in every later plan after a file that was written by hand, or cut."""
    store(Machine(products=PRODUCTS))
    place.write_text(json.dumps({**json.loads(place.read_text()), "products": said}))
    assert Machine.here().products == whole_products(said) == {}


def test_nothing_measured_is_judged_by_instructions() -> None:
    """Catches packed weights that nobody uses before `doctor --measure` was run."""
    assert (Machine().packed_pays, Machine().int8_pays, Machine().unpacks_from) == (True, True, 64)
    assert Machine().unpacks_to == "fp32"
    assert Machine(packs_nf4=True).unpacks_to == Machine(packs_keys=True).unpacks_to == "bf16"


def test_measured_products_decide() -> None:
    """Catches a threshold at which unpacking still costs more than it saves, or that comes too late."""
    here = Machine(products=PRODUCTS)
    assert (here.packed_pays, here.int8_pays, here.unpacks_to) == (True, True, "bf16")
    tokens = here.unpacks_from
    assert tokens == 64  # 800 µs over 12.5 µs saved for each token
    assert 800 + tokens / 512 * 5_000 <= tokens / 512 * 11_400
    assert 800 + (tokens - 1) / 512 * 5_000 > (tokens - 1) / 512 * 11_400
    slow = Machine(packs_nf4=True, products={**PRODUCTS, "int4@1": 401, "int8@1": 401, "bf16@512": 13_000})
    assert (slow.packed_pays, slow.int8_pays, slow.unpacks_to, slow.unpacks_from) == (False, False, "fp32", NEVER)


def test_what_is_measured_is_kept_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that fails because its state folder cannot be written, and one that measures every time."""
    monkeypatch.setattr(measuring, "measure_products", lambda: dict(PRODUCTS))
    assert measuring.with_products(Machine(threads=3)) == Machine(threads=3, products=PRODUCTS)
    assert Machine.here().products == PRODUCTS

    def read_only(_: Machine) -> Path:
        raise TrimkvError("no place", hint="none")

    monkeypatch.setattr(measuring, "store", read_only)
    assert measuring.with_products(Machine()).products == PRODUCTS


def test_what_cannot_be_measured_is_assumed(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Catches an empty measurement that is stored, so that no later one is made."""
    monkeypatch.setattr(measuring, "measure_products", dict)
    assert measuring.with_products(Machine()) == Machine()
    assert not place.exists()


def test_products_are_measured_in_a_process_of_their_own() -> None:
    """Catches a program that finds nothing to run, and products that no plan reads."""
    assert whole_products(measuring.measure_products())
