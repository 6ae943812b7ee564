"""OpenAI's batches API: what is known of each batch on the disk, and their work, one after the other."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trimkv_cli.errors import TrimkvError, UsageError
from trimkv_cli.files import whole_file
from trimkv_cli.jobs.bodies import explain
from trimkv_cli.jobs.progress import Stop, Summary
from trimkv_cli.jobs.resuming import locked
from trimkv_cli.jobs.selection import Earlier
from trimkv_cli.serve.batch_work import KINDS, BatchFault, BatchWork, count_lines, forget, split
from trimkv_cli.serve.bodies import Bodies
from trimkv_cli.serve.errors import ApiError
from trimkv_cli.serve.files import FileStore, json_response, make_private, new_id, page
from trimkv_cli.serve.worker import Closing

Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled"]

_ID = re.compile(r"batch_[0-9a-f]{32}")
_DAY_S = 24 * 3600
_OVER = ("completed", "failed", "cancelled")
_LISTED = 20
_MOST_LISTED = 100
_TIMES = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "cancelling_at", "cancelled_at")

Name = Annotated[str, Field(max_length=64)]
Text = Annotated[str, Field(max_length=512)]


class NewBatch(BaseModel):
    """What a client says of a batch."""

    model_config = ConfigDict(strict=True, extra="forbid")

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: Annotated[dict[Name, Text], Field(max_length=16)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What is known of a batch, as it lies on the disk; the ids of its results are chosen before these are written."""

    id: str
    endpoint: str
    input_file_id: str
    created_at: int
    run_seed: int
    model: str
    fingerprint: Mapping[str, str] | None = None  # of what it was taken with
    metadata: Mapping[str, str] | None = None
    status: Status = "validating"
    error: Mapping[str, Any] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def is_over(self) -> bool:
        return self.status in _OVER

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's batch object."""
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": None if self.error is None else {"object": "list", "data": [dict(self.error)]},
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "model": self.model,
            "status": self.status,
            "output_file_id": self.output_file_id if self.is_over else None,
            "error_file_id": self.error_file_id if self.is_over else None,
            "created_at": self.created_at,
            "expires_at": self.created_at + _DAY_S,  # which says nothing here: a batch goes on until it is done
            "expired_at": None,
            **{name: getattr(self, name) for name in _TIMES},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
            "trimkv": {"seed": self.run_seed},
        }


@dataclass(slots=True, eq=False, kw_only=True)
class _Held:
    """A batch that is this server's to run."""

    batch: Batch
    lock: ExitStack  # against other servers with the same folder
    stop: Stop = field(default_factory=Stop)
    running: bool = False
    ending: bool = False


class Batches:
    """Take batches, and run them one after the other; what is not over goes on when the next server starts."""

    def __init__(self, folder: Path, files: FileStore, work: BatchWork, *, bodies: Bodies) -> None:
        self.folder = folder
        self._files = files
        self._work = work
        self._bodies = bodies
        self._held: dict[str, _Held] = {}
        self._lock = threading.RLock()
        self._closing = False
        self._checks = ThreadPoolExecutor(1, "trimkv-batch-check")
        self._runs = ThreadPoolExecutor(1, "trimkv-batch")
        self.routes = [
            Route("/v1/batches", self.create, methods=["POST"]),
            Route("/v1/batches", self.all, methods=["GET"]),
            Route("/v1/batches/{id}", self.one, methods=["GET"]),
            Route("/v1/batches/{id}/cancel", self.cancel, methods=["POST"]),
        ]

    def start(self) -> None:
        """Go on with what an earlier server left, but for what another one runs now."""
        self._files.sweep()
        for batch in self._stored():
            if not batch.is_over:
                with suppress(UsageError):
                    self._queue(self._hold(batch))

    def close(self) -> None:
        """Stop at a point from which the next server goes on."""
        with self._lock:
            self._closing = True
            for held in self._held.values():
                held.stop.ask("signal")
        for pool in (self._checks, self._runs):
            pool.shutdown(cancel_futures=True)
        for held in self._held.values():
            held.lock.close()

    async def create(self, request: Request) -> Response:
        """Take a batch."""
        async with self._bodies.json(request) as data:
            said = _read(data)
        try:
            source = self._files.find(said.input_file_id)
        except ApiError as error:
            raise ApiError(404, error.message, param="input_file_id", code=error.code) from None
        if source.purpose != "batch":
            raise ApiError(400, f"input_file_id: a file for batch, not {source.purpose}", param="input_file_id")
        batch = Batch(
            id=new_id("batch_"),
            endpoint=said.endpoint,
            input_file_id=source.id,
            created_at=int(time.time()),
            run_seed=self._work.run_seed,
            model=self._work.recorder.model,
            metadata=said.metadata,
        )
        with self._lock:
            if self._closing:
                raise ApiError(503, "the server is ending", code="server_closing")
            self._take(batch)
        return json_response(batch.to_json())

    async def all(self, request: Request) -> Response:
        """List batches, the newest first, page by page."""
        found = await asyncio.to_thread(self._stored)
        shown = [self._as_now(batch).to_json() for batch in reversed(found)]
        return page(request, shown, limit=_LISTED, most=_MOST_LISTED)

    async def one(self, request: Request) -> Response:
        """Tell how a batch goes."""
        return json_response(self._find(request.path_params["id"]).to_json())

    async def cancel(self, request: Request) -> Response:
        """End a batch; what was answered stays."""
        batch = self._find(request.path_params["id"])
        if batch.status == "cancelling":
            return json_response(batch.to_json())
        if batch.status not in ("validating", "in_progress"):
            raise ApiError(409, f"a batch that is {batch.status} cannot be cancelled", param="id")
        with self._lock:
            held = self._held.get(batch.id)
            if held is None:
                raise ApiError(409, "another server runs this batch: ask that one", param="id")
            batch = self._change(held, status="cancelling", cancelling_at=int(time.time()))
            held.stop.ask("signal")
            if not held.running:
                self._checks.submit(self._guarded, held, self._end)
        return json_response(batch.to_json())

    def _take(self, batch: Batch) -> None:
        """Put a new batch on the disk, and run it when its turn comes.

        Raises:
            TrimkvError: it cannot be stored; nothing is left of it.
        """
        try:
            make_private(self.folder)
            held = self._hold(batch)
            self._save(batch)
        except (OSError, TrimkvError) as error:
            left = self._held.pop(batch.id, None)
            if left is not None:
                left.lock.close()
            raise TrimkvError("the batch cannot be stored", hint="make room on the server's disk") from error
        self._queue(held)

    def _hold(self, batch: Batch) -> _Held:
        """Keep other servers from running a batch.

        Raises:
            UsageError: one does.
        """
        lock = ExitStack()
        lock.enter_context(locked(self._records(batch.id)))
        newest = _load(self._path(batch.id)) or batch  # the one who held it may have ended it just now
        held = self._held[batch.id] = _Held(batch=newest, lock=lock)
        return held

    def _queue(self, held: _Held) -> None:
        if held.batch.status == "validating":
            self._checks.submit(self._guarded, held, self._validate)
        else:
            self._runs.submit(self._guarded, held, self._run)

    def _guarded(self, held: _Held, do: Callable[[_Held], None]) -> None:
        """Do something for a batch; whatever goes wrong ends this batch alone."""
        if self._closing or held.batch.is_over:
            return
        try:
            try:
                do(held)
            except Closing:
                return  # the next server goes on with it
            except Exception as error:  # it is said in the batch
                if held.ending or self._closing:
                    raise
                self._end(held, error)
        except Exception as error:  # noqa: BLE001  nothing can be written: the next server goes on with it
            nothing: dict[str, Any] = {"output_file_id": None, "error_file_id": None}
            with self._lock:
                at = int(time.time())
                held.batch = replace(held.batch, status="failed", failed_at=at, error=_fault(error), **nothing)

    def _validate(self, held: _Held) -> None:
        source = self._files.path(held.batch.input_file_id)
        total = count_lines(source, stopped=lambda: self._closing)
        if total == 0:
            raise BatchFault("the file holds no lines", code="empty_file")
        fingerprint = self._work.fingerprint(held.batch.run_seed)
        with self._lock:
            if self._closing or held.batch.status != "validating":
                return
            now = int(time.time())
            self._change(held, status="in_progress", in_progress_at=now, total=total, fingerprint=fingerprint)
            self._runs.submit(self._guarded, held, self._run)

    def _run(self, held: _Held) -> None:
        with self._lock:
            held.running = held.batch.status == "in_progress"
        if held.running:
            batch, gauge = held.batch, self._work.worker.gauge
            done, failed = gauge.batch_done, gauge.batch_failed

            def told(earlier: Earlier, now: Summary) -> None:
                completed = earlier.records - earlier.failures + now.done
                with self._lock:
                    held.batch = replace(held.batch, completed=completed, failed=earlier.failures + now.errors)
                gauge.batch_done, gauge.batch_failed = done + now.done, failed + now.errors

            summary = self._work.answer(
                self._files.path(batch.input_file_id),
                self._records(batch.id),
                name=batch.id,
                endpoint=batch.endpoint,
                run_seed=batch.run_seed,
                fingerprint=batch.fingerprint or {},
                stop=held.stop,
                told=told,
            )
            if summary.stopped is not None and held.batch.status == "in_progress":
                return  # the server is ending
        self._end(held)

    def _end(self, held: _Held, fault: Exception | None = None) -> None:
        """Turn the records into files, and say that the batch is over."""
        now = int(time.time())
        with self._lock:
            if held.ending or held.batch.is_over:
                return
            held.ending = True
            chosen = {
                name: getattr(held.batch, name) or new_id("file-") for name in ("output_file_id", "error_file_id")
            }
            error = held.batch.error if fault is None else _fault(fault)
            status = "cancelling" if held.batch.cancelling_at and error is None else "finalizing"
            batch = self._change(held, status=status, finalizing_at=now, error=error, **chosen)
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        records, whole = self._records(batch.id), True
        try:
            ids = (batch.output_file_id, batch.error_file_id)
            results = split(records, self._files, ids=ids, name=batch.id)
        except (OSError, TrimkvError, ValueError) as failed:
            results, whole, error = {"output_file_id": None, "error_file_id": None}, False, _fault(failed)
        status = "failed" if error is not None else "cancelled" if batch.cancelling_at else "completed"
        at = {f"{status}_at": int(time.time())}
        with self._lock:
            self._change(held, status=status, error=error, **results, **at)
            del self._held[batch.id]
        if whole:
            forget(records)
        held.lock.close()

    def _change(self, held: _Held, **changes: Any) -> Batch:
        with self._lock:
            held.batch = replace(held.batch, **changes)
            self._save(held.batch)
            return held.batch

    def _save(self, batch: Batch) -> None:
        with whole_file(self._path(batch.id), private=True) as partial:
            partial.write_bytes(orjson.dumps(asdict(batch)))

    def _find(self, id: str) -> Batch:
        if _ID.fullmatch(id):
            with self._lock:
                if (held := self._held.get(id)) is not None:
                    return held.batch
            if (stored := _load(self._path(id))) is not None:
                return stored
        raise ApiError(404, f"there is no batch {id[:64]!r}", param="id", code="batch_not_found")

    def _stored(self) -> list[Batch]:
        """Return all batches as they lie on the disk, the oldest first."""
        paths = sorted(path for path in self.folder.glob("batch_*.json") if _ID.fullmatch(path.stem))
        return [batch for path in paths if (batch := _load(path)) is not None]

    def _as_now(self, batch: Batch) -> Batch:
        held = self._held.get(batch.id)
        return batch if held is None else held.batch

    def _path(self, id: str) -> Path:
        return self.folder / f"{id}.json"

    def _records(self, id: str) -> Path:
        return self.folder / f"{id}.jsonl"


def _read(data: Any) -> NewBatch:
    """Read what a client says of a batch."""
    if not isinstance(data, dict):
        raise ApiError(400, "the body is no JSON object")
    try:
        said = NewBatch.model_validate(data)
    except ValidationError as error:
        (param, message), *_ = explain(error)
        raise ApiError(400, message, param=param) from None
    if said.endpoint not in KINDS:
        raise ApiError(400, f"endpoint: one of {', '.join(KINDS)}", param="endpoint")
    return said


def _load(path: Path) -> Batch | None:
    """Read a batch; None for a file that is none."""
    known = {each.name for each in fields(Batch)}
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return Batch(**{name: value for name, value in orjson.loads(path.read_bytes()).items() if name in known})
    return None


def _fault(error: Exception) -> dict[str, Any]:
    """Return why a batch failed, as one of OpenAI's errors of a batch."""
    code = error.code if isinstance(error, BatchFault | ApiError) else None
    message = error.message if isinstance(error, TrimkvError | ApiError) else f"{type(error).__name__}: {error}"
    return {"code": code or "server_error", "message": message, "param": None, "line": None}
