"""Packed matrices that took long to make, kept in the cache folder: a safetensors file for each model and form."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

from filelock import FileLock, Timeout

from trimkv_cli.errors import BrokenModel, TrimkvError
from trimkv_cli.files import whole_file, writing
from trimkv_cli.model.folders import StoredTensor, read_header
from trimkv_cli.model.gguf import gguf_files
from trimkv_cli.units import format_size

if TYPE_CHECKING:
    from torch import Tensor

    from trimkv_cli.model.packing import Packed

SLOW_S = 1.0  # what packing takes before its outcome is worth the disk
_VERSION = 1  # of the files, and of how blocks and numbers are read before they are packed
_FIRST_BYTES = 1 << 20  # of a file
_SAMPLES, _SAMPLE_BYTES = 512, 4096  # spread evenly over it
_KNOWN = re.compile(r"(sha256-)?(?P<sum>[0-9a-f]{64})")  # what the hub's cache and Ollama call a file by


class Matrix(NamedTuple):
    """A packed matrix, as a module holds it."""

    weight: Tensor
    scales: Tensor
    columns: Tensor | None

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Yield its tensors with their names."""
        yield from {"weight": self.weight, "scales": self.scales}.items()
        if self.columns is not None:
            yield "columns", self.columns


class PackedForm:
    """Keep the packed matrices of one model, a folder or a GGUF file, where packing them takes over `slow_s` seconds.

    A kept file is named by what it was made of, `identity`, and by how: the form of each matrix, and what packing makes
    of a known one on this processor. Every matrix has a checksum (CRC-32): what is cut or damaged is made anew.
    """

    def __init__(self, place: Path, *, folder: Path | None = None, slow_s: float = SLOW_S) -> None:
        self.place = place.absolute()
        self.seconds = 0.0  # that packing took, without waiting for disks
        self.note: str | None = None  # why nothing could be kept
        self._folder = folder or packed_folder()
        self._slow_s = slow_s
        self._forms: Mapping[str, Packed] = {}
        self._tensors: Mapping[str, StoredTensor] = {}
        self._checks: Mapping[str, int] = {}
        self._renews = False  # a file is there that is of no use

    def open(self, forms: Mapping[str, Packed]) -> None:
        """Find what is kept of matrices that are to have these forms, by the name of each weight."""
        self._forms = forms
        if not any(self._folder.glob("*.safetensors")):
            return
        try:
            tensors, described = _read_description(self._path())
        except FileNotFoundError:
            return
        except (OSError, BrokenModel):
            self._renews = True
            return
        if described.holds_for(self.place, _files(self.place)):
            self._tensors, self._checks = tensors, described.checks
        else:
            self._renews = True

    def read(self, name: str) -> Matrix | None:
        """Read the matrix of a weight into memory of its own; None where none is kept, or one that is damaged."""
        from trimkv_cli.loading.quantise import LazyTensor

        if not self._tensors:
            return None
        columns = self._tensors.get(f"{name}.columns")
        try:
            weight, scales = (LazyTensor(self._tensors[f"{name}.{kind}"])[...] for kind in ("weight", "scales"))
            matrix = Matrix(weight, scales, LazyTensor(columns)[...] if columns is not None else None)
            whole = _checksum(matrix) == self._checks[name]
        except (OSError, BrokenModel, LookupError):
            whole = False
        if whole:
            return matrix
        self._tensors, self._renews = {}, True  # nothing else of this file is trusted
        return None

    def keep(self, matrices: Mapping[str, Matrix]) -> None:
        """Write all matrices, by the names of their weights, if packing was slow; if that fails, `note` says so."""
        if not (self._renews or self.seconds > self._slow_s) or matrices.keys() != self._forms.keys():
            return
        size = sum(tensor.nbytes for matrix in matrices.values() for _, tensor in matrix.parts())
        try:
            self._write(matrices, size)
        except Timeout:
            return  # another process writes
        except (OSError, TrimkvError, NotImplementedError) as error:  # the last of disks that know no locks
            self.note = f"the packed form ({format_size(size)}) is not kept, so that it is made again: {error}"

    def _write(self, matrices: Mapping[str, Matrix], size: int) -> None:
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self._folder).free < 2 * size:
            raise TrimkvError(f"the disk of {self._folder} is nearly full", hint="make room there")
        with FileLock(self._folder / ".lock", timeout=0):
            for leftover in self._folder.glob(".*.partial"):  # of a process that was killed
                leftover.unlink()
            for form in kept_forms(self._folder):
                if form.place == self.place and not form.path.name.startswith(identity(self.place)):
                    form.remove()  # of a file that is no longer there
            with whole_file(self._path()) as partial:
                _write_matrices(partial, matrices, self.place)

    def _path(self) -> Path:
        how = json.dumps([_VERSION, _packs_as(), sorted(self._forms.items())])
        return self._folder / f"{identity(self.place)}-{sha256(how.encode()).hexdigest()[:16]}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptForm:
    """A file with packed matrices, and what it was made of."""

    path: Path
    size_bytes: int
    place: Path | None  # None where the file is damaged

    def remove(self) -> None:
        """Delete it; raises TrimkvError where it cannot be."""
        with writing(self.path):
            self.path.unlink(missing_ok=True)


def packed_folder() -> Path:
    """Return the folder of all packed forms."""
    from platformdirs import user_cache_path

    return user_cache_path("trimkv") / "packed"


def kept_forms(folder: Path | None = None) -> list[KeptForm]:
    """List what is kept."""
    return [
        KeptForm(path=path, size_bytes=path.stat().st_size, place=_place_of(path))
        for path in sorted((folder or packed_folder()).glob("*.safetensors"))
    ]


def forms_of(place: Path, folder: Path | None = None) -> list[KeptForm]:
    """List what is kept of a model's folder or GGUF file, which may have been moved since, or be gone."""
    place = place.absolute()
    try:
        name: str | None = identity(place)
    except (OSError, TrimkvError):
        name = None
    forms = kept_forms(folder)
    return [form for form in forms if form.place == place or (name and form.path.name.startswith(name))]


def identity(place: Path) -> str:
    """Name the contents of a GGUF file with its parts, or of a folder's safetensors files, in 32 hexadecimal digits.

    Of a file that the hub's cache or Ollama names by its SHA-256 that is taken, of another one its size, its first MiB,
    which describes the model, and 512 pieces of 4 KiB spread evenly over it. So files of one size are told apart where
    they differ in any stretch of a 512th of them, as after any training, merging or rounding anew; weights that were
    edited by hand between the pieces are not seen. (A file that changed where it lies shows by its time as well.)
    """
    digest = sha256()
    for path in _weight_files(place):
        known = _KNOWN.fullmatch(path.resolve().name)
        digest.update(known["sum"].encode() if known else _sampled(path))
    return digest.hexdigest()[:32]


def _weight_files(place: Path) -> list[Path]:
    return gguf_files(place) if place.is_file() else sorted(place.glob("*.safetensors"))


def _sampled(path: Path) -> bytes:
    size = path.stat().st_size
    digest = sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_FIRST_BYTES))
        for number in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest().encode()


_Files = Mapping[str, list[int]]  # size and time of change in nanoseconds


def _files(place: Path) -> _Files:
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in _weight_files(place)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Description:
    place: Path
    files: _Files
    checks: Mapping[str, int]  # by the name of a weight

    def holds_for(self, place: Path, files: _Files) -> bool:
        """Say whether files that lie where those did are the same; elsewhere their contents have to do."""
        return self.place != place or self.files == files


def _place_of(path: Path) -> Path | None:
    try:
        return _read_description(path)[1].place
    except (OSError, BrokenModel):
        return None


def _read_description(path: Path) -> tuple[dict[str, StoredTensor], _Description]:
    """Read what a file holds and what it says of itself.

    Raises:
        BrokenModel: it is cut off, or its header is not as it was written.
    """
    tensors, said = read_header(path)
    try:
        files, checks = json.loads(said["files"]), json.loads(said["checks"])
        whole = int(said["header"]) == _header_check(tensors, said)
        described = _Description(place=Path(said["place"]), files=files, checks=checks)
    except (LookupError, TypeError, ValueError):
        whole = False
    if not whole:
        raise BrokenModel(f"{path} is damaged", hint="trimkv models remove --packed")
    return tensors, described


def _header_check(tensors: Mapping[str, StoredTensor], said: Mapping[str, str]) -> int:
    start = min(tensor.offset for tensor in tensors.values())
    places = [(name, each.offset - start, each.dtype, each.shape) for name, each in sorted(tensors.items())]
    return crc32(json.dumps([places, said["place"], said["files"], said["checks"]]).encode())


def _write_matrices(path: Path, matrices: Mapping[str, Matrix], place: Path) -> None:
    from trimkv_cli.loading.quantise import DTYPES

    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    checks = {name: _checksum(matrix) for name, matrix in matrices.items()}
    said = {"place": str(place), "files": json.dumps(_files(place)), "checks": json.dumps(checks)}
    stored, end = {}, 0
    for name, tensor in _tensors(matrices):
        stored[name] = StoredTensor(path, end, dtypes[tensor.dtype], tuple(tensor.shape))
        end += tensor.nbytes
    ends = [*(tensor.offset for tensor in stored.values()), end][1:]
    header: dict[str, Any] = {"__metadata__": {**said, "header": str(_header_check(stored, said))}}
    for (name, each), after in zip(stored.items(), ends, strict=True):
        header[name] = {"dtype": each.dtype, "shape": each.shape, "data_offsets": [each.offset, after]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in _tensors(matrices):
            file.write(_bytes(tensor))


def _tensors(matrices: Mapping[str, Matrix]) -> Iterable[tuple[str, Tensor]]:
    return ((f"{name}.{kind}", tensor) for name, matrix in matrices.items() for kind, tensor in matrix.parts())


def _checksum(matrix: Matrix) -> int:
    check = 0
    for kind, tensor in matrix.parts():
        check = crc32(_bytes(tensor), crc32(f"{kind} {tensor.dtype} {list(tensor.shape)}".encode(), check))
    return check


def _bytes(tensor: Tensor) -> Any:
    import torch

    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


@cache
def _packs_as() -> str:
    """Return a checksum of what packing makes of a known matrix: processors have orders of their own for four bits."""
    import torch

    from trimkv_cli.engine.cpu import pack, pack_vocabulary

    full = torch.arange(64.0 * 64).mul_(0.7).sin_().view(64, 64)
    made = [Matrix(*pack([full], "int4"), None), Matrix(*pack([full], "int8"), None)]
    made.append(Matrix(*pack_vocabulary([full], len(full))))
    return " ".join(f"{_checksum(matrix):08x}" for matrix in made)
