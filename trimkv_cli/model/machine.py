"""This machine as a plan knows it: the size of a process without a model, and its CPU. Plain Python."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import Literal, Self

from trimkv_cli.files import whole_file, writing
from trimkv_cli.tested import installed_version

MIB = 1024 * 1024
# What a process holds before a weight is read: on a CPU torch and transformers, on a GPU its context and workspaces.
# Guesses until `trimkv doctor --measure` has put this machine's own numbers into the state folder.
RUNTIME_BYTES: Mapping[str, int] = {"cpu": 480 * MIB, "cuda": 768 * MIB, "mps": 768 * MIB}
# Microseconds of one product of a 1536 × 1536 matrix with so many rows, and of unpacking it from int4.
PRODUCTS = ("fp32@1", "bf16@1", "int8@1", "int4@1", "fp32@512", "bf16@512", "int4@512", "unpack")
NEVER = 1 << 40  # tokens
_MANY = 512  # rows of the products of a prompt
_UNPACKS_FROM = 64  # tokens, where nothing was measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Say what was measured here; None where nothing was.

    `cpu_runtime_bytes` is the resident memory of a process with everything imported and no model,
    `cuda_context_bytes` what a GPU lost to a process beyond what its allocator holds, `products` the microseconds of
    each of `PRODUCTS`, or nothing. `cuda_capability` is what the GPU that is planned for can do, not measured.
    """

    cpu_runtime_bytes: int | None = None
    cuda_context_bytes: int | None = None
    cuda_capability: tuple[int, int] | None = None
    packs_nf4: bool = False  # bf16 instructions: bitsandbytes lays nf4 matrices out anew
    reorders_halves: bool = False  # vectors of 512 bits: torch lays 16-bit matrices out anew for several rows
    packs_keys: bool = False  # bf16 matrix tiles: torch lays keys and values out anew for each chunk
    threads: int = 1  # that torch computes with, each on blocks of its own
    products: Mapping[str, float] = field(default_factory=dict, hash=False)

    @classmethod
    def here(cls) -> Self:
        """Describe this machine, with what was measured on it before."""
        known = _measured()
        measured = {key: size for key, size in known.items() if isinstance(size, int) and size > 0}
        instructions = _cpu_flags()
        processor = known.get("processor") == _processor()
        return cls(
            cpu_runtime_bytes=measured.get("cpu_runtime_bytes"),
            cuda_context_bytes=measured.get("cuda_context_bytes"),
            packs_nf4="avx512_bf16" in instructions,
            reorders_halves="avx512bw" in instructions,
            packs_keys="amx_bf16" in instructions,
            threads=_usable_cores(),
            products=whole_products(known.get("products")) if processor else {},
        )

    def runtime_bytes(self, device: str) -> int:
        """Return what a process holds on a device before a weight is read."""
        measured = {"cpu": self.cpu_runtime_bytes, "cuda": self.cuda_context_bytes}.get(device)
        return measured or RUNTIME_BYTES.get(device, RUNTIME_BYTES["cpu"])

    def calibrated(self, device: str) -> bool:
        """Say whether that number was measured here."""
        return {"cpu": self.cpu_runtime_bytes, "cuda": self.cuda_context_bytes}.get(device) is not None

    @property
    def packed_pays(self) -> bool:
        """Whether a product of one row is faster in int4; assumed where nothing was measured."""
        return not self.products or self.products["int4@1"] < self.products["fp32@1"]

    @property
    def int8_pays(self) -> bool:
        """Whether one is no slower in int8; assumed as well."""
        return not self.products or self.products["int8@1"] <= self.products["fp32@1"]

    @property
    def unpacks_to(self) -> Literal["bf16", "fp32"]:
        """What a packed matrix is unpacked to for many rows: the faster one, or by the CPU's instructions."""
        bf16 = self.packs_nf4 or self.packs_keys
        if self.products:
            bf16 = self.products["bf16@512"] < self.products["fp32@512"]
        return "bf16" if bf16 else "fp32"

    @property
    def unpacks_from(self) -> int:
        """The fewest tokens of a forward for which unpacking a matrix costs less than its packed product."""
        if not self.products:
            return _UNPACKS_FROM
        saved = (self.products["int4@512"] - self.products[f"{self.unpacks_to}@512"]) / _MANY  # per token
        return max(2, ceil(self.products["unpack"] / saved)) if saved > 0 else NEVER


def store(machine: Machine) -> Path:
    """Write what was measured for later plans, and return the file.

    Raises:
        TrimkvError: it cannot be written.
    """
    path = _file()
    kept: dict[str, object] = {key: n for key, n in asdict(machine).items() if key.endswith("_bytes") and n is not None}
    if machine.products:
        kept |= {"products": dict(machine.products), "processor": _processor()}
    text = json.dumps({**_measured(), **kept, "versions": _versions()}, indent=2) + "\n"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _measured() -> dict[str, object]:
    """Read the stored numbers; those of other versions of torch or transformers do not count."""
    try:
        kept = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) and kept.get("versions") == _versions() else {}


def whole_products(measured: object) -> dict[str, float]:
    """Return the microseconds of all of `PRODUCTS`, or of none where some are missing."""
    found = measured if isinstance(measured, Mapping) else {}
    products = {key: us for key in PRODUCTS if isinstance(us := found.get(key), int | float) and us > 0}
    return products if len(products) == len(PRODUCTS) else {}


def _processor() -> str:
    """Name a kind of processor by what it can do."""
    said = [platform.machine(), *(sorted(_cpu_flags()) or [platform.processor()])]
    return sha256(" ".join(said).encode()).hexdigest()[:16]


def _file() -> Path:
    from platformdirs import user_state_path

    return user_state_path("trimkv") / "machine.json"


def _versions() -> dict[str, str]:
    return {name: installed_version(name) or "none" for name in ("torch", "transformers")}


def _cpu_flags() -> frozenset[str]:
    """Return the names of what an x86 CPU can do, as Linux lists them; elsewhere none of these layouts is used."""
    if not os.path.exists("/proc/cpuinfo"):  # noqa: PTH110
        return frozenset()
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        flags = next((line for line in file if line.startswith("flags")), "")
    return frozenset(flags.split())


def _usable_cores() -> int:
    """Return how many cores this process may use: no fewer than torch takes unless it is told."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes(*, root: Path = Path("/")) -> tuple[int, int]:
    """Return the memory that this process may use, and what of it is free, files that the system keeps read included.

    A container's limit is a control group's: the machine's own figures know nothing of it.
    """
    import psutil

    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    for limit, used in _group_limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def swappable_bytes(*, root: Path = Path("/")) -> int:
    """Return how much more than is free the system gives by writing other memory to a disk, or by compressing it."""
    import psutil

    if sys.platform == "darwin":  # it compresses, and makes swap files as it needs them
        return int(psutil.virtual_memory().total)
    machine = int(psutil.virtual_memory().total)
    bounded = any(limit < machine for limit, _ in _group_limits(root))
    return 0 if bounded else int(psutil.swap_memory().free)


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of each control group that this process is in, without what is cached of files."""
    for folder, limit, used, prefix in _groups(root):
        try:
            said = (folder / limit).read_text(encoding="ascii").strip()
            held = int((folder / used).read_text(encoding="ascii"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):
            continue  # none here, or not of a form that is known
        if said.isdigit():
            cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            yield int(said), held - cached


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yield the folders of this process's groups and of those around them, with the names of their files."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if number == "0":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        yield from ((mount.joinpath(*parts[:depth]), *names) for depth in range(len(parts), -1, -1))
