"""OpenAI's files API over one private folder: each file under a random id, beside what is known of it."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from trimkv_cli.errors import TrimkvError, UsageError
from trimkv_cli.files import sync, whole_file
from trimkv_cli.serve.completions import Gone
from trimkv_cli.serve.errors import ApiError
from trimkv_cli.serve.uploads import Upload, boundary_of

_ID = re.compile(r"file-[0-9a-f]{32}")
_MOST_LISTED = 10_000
_PART_S = 60.0  # for the next part of an upload to arrive
_UPLOAD_S = 3600.0  # for all of it
_FORM_BYTES = 1 << 16  # of an upload beside its file
_MOST_NAME = 255
_STALE_S = 24 * 3600.0  # what a kill left of an upload


def new_id(kind: str) -> str:
    """Return an id that nobody guesses; later ones sort after earlier ones."""
    return f"{kind}{time.time_ns():016x}{secrets.token_hex(8)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """What is known of a file."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's file object."""
        return {**asdict(self), "object": "file", "status": "processed", "status_details": None, "expires_at": None}


class Draft:
    """A file that is being written; it becomes one of the store when it is kept."""

    def __init__(self, folder: Path, id: str) -> None:
        self.id = id
        self._folder = folder
        self._partial = folder / f".{id}.partial"
        self.stream = os.fdopen(os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")

    def keep(self, *, filename: str, purpose: str) -> StoredFile:
        """Put what was written into the store.

        Raises:
            TrimkvError: the disk is full.
        """
        self.stream.close()
        size = self._partial.stat().st_size
        stored = StoredFile(
            id=self.id,
            bytes=size,
            created_at=int(time.time()),
            filename=filename[:_MOST_NAME],
            purpose=purpose,
        )
        sync(self._partial)
        self._partial.replace(self._folder / self.id)
        with whole_file(self._folder / f"{self.id}.json", private=True) as partial:
            partial.write_bytes(orjson.dumps(asdict(stored)))
        return stored

    def drop(self) -> None:
        """Leave nothing, unless it was kept."""
        with suppress(OSError):
            self.stream.close()  # what it still held may not fit on the disk
        self._partial.unlink(missing_ok=True)


class FileStore:
    """A folder of files, made when the first one comes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def writing(self, id: str | None = None) -> Iterator[Draft]:
        """Give a file to write, of which nothing is left unless it is kept.

        Raises:
            TrimkvError: it cannot be written.
        """
        try:
            make_private(self.folder)
            draft = Draft(self.folder, id or new_id("file-"))
            try:
                yield draft
            finally:
                draft.drop()
        except (OSError, UsageError) as error:  # where the folder lies is no client's business
            reason = error.strerror if isinstance(error, OSError) else "its folder does not take it"
            raise TrimkvError(f"the file cannot be stored: {reason}", hint="make room on the server's disk") from error

    def path(self, id: str) -> Path:
        """Return where a file's content lies.

        Raises:
            ApiError: there is none of this id.
        """
        self.find(id)
        return self.folder / id

    def find(self, id: str) -> StoredFile:
        """Return what is known of a file.

        Raises:
            ApiError: there is none of this id.
        """
        if _ID.fullmatch(id):
            with suppress(OSError, ValueError, TypeError):
                return StoredFile(**orjson.loads((self.folder / f"{id}.json").read_bytes()))
        raise ApiError(404, f"there is no file {id[:64]!r}", param="id", code="file_not_found")

    def all(self) -> Iterator[StoredFile]:
        """Yield all files, the oldest first."""
        for path in sorted(self.folder.glob("file-*.json")):
            with suppress(ApiError):  # deleted in the meantime
                yield self.find(path.stem)

    def delete(self, id: str) -> None:
        """Delete a file.

        Raises:
            ApiError: there is none of this id, or it is in use where the system does not let go of such.
        """
        path = self.path(id)
        try:
            path.unlink(missing_ok=True)
            path.with_name(f"{id}.json").unlink(missing_ok=True)
        except PermissionError:
            raise ApiError(409, f"{id} is in use", param="id", code="file_in_use") from None

    def sweep(self) -> None:
        """Remove what kills left behind, long ago: another server may be writing to the folder now."""
        for path in (*self.folder.glob(".file-*.partial"), *self.folder.glob("file-*")):
            with suppress(OSError):
                is_whole = path.suffix != ".partial" and path.with_name(f"{path.stem}.json").exists()
                if not is_whole and time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()


def make_private(folder: Path) -> None:
    """Make a folder that nobody else may look into."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Answer requests about files."""

    store: FileStore
    most_bytes: int

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v1/files", self.create, methods=["POST"]),
            Route("/v1/files", self.all, methods=["GET"]),
            Route("/v1/files/{id}", self.one, methods=["GET"]),
            Route("/v1/files/{id}", self.delete, methods=["DELETE"]),
            Route("/v1/files/{id}/content", self.content, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Response:
        """Take an upload."""
        boundary = boundary_of(request.headers.get("content-type", ""))
        said = request.headers.get("content-length", "")
        if said.isdigit() and int(said) > self.most_bytes + _FORM_BYTES:
            raise self._too_large()
        with self.store.writing() as draft:
            upload = Upload(boundary, draft.stream, most_bytes=self.most_bytes, most_form_bytes=_FORM_BYTES)
            await self._receive(request, upload)
            stored = await asyncio.to_thread(draft.keep, filename=upload.filename(), purpose=upload.purpose())
        return json_response(stored.to_json())

    async def all(self, request: Request) -> Response:
        """List files, page by page."""
        query = request.query_params
        purpose, order = query.get("purpose"), query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise ApiError(400, "order: asc or desc", param="order")
        found = await asyncio.to_thread(lambda: list(self.store.all()))
        found = [each for each in found if purpose in (None, each.purpose)]
        if order == "desc":
            found.reverse()
        return page(request, [each.to_json() for each in found], limit=_MOST_LISTED, most=_MOST_LISTED)

    async def one(self, request: Request) -> Response:
        """Tell what is known of a file."""
        return json_response(self.store.find(request.path_params["id"]).to_json())

    async def content(self, request: Request) -> Response:
        """Send a file."""
        stored = self.store.find(request.path_params["id"])
        return FileResponse(
            self.store.path(stored.id),
            media_type="application/octet-stream",
            filename=stored.filename,
            headers={"x-content-type-options": "nosniff"},
        )

    async def delete(self, request: Request) -> Response:
        """Delete a file."""
        id = request.path_params["id"]
        self.store.delete(id)
        return json_response({"id": id, "object": "file", "deleted": True})

    async def _receive(self, request: Request, upload: Upload) -> None:
        parts = request.stream()
        try:
            async with asyncio.timeout(_UPLOAD_S):
                while True:
                    async with asyncio.timeout(_PART_S):
                        part = await anext(parts, None)
                    if part is None:
                        break
                    upload.feed(part)
                    if upload.too_large:
                        raise self._too_large()
        except TimeoutError:
            message = f"nothing of the file arrived for {_PART_S:g} s, or not all within {_UPLOAD_S:g} s"
            raise ApiError(408, message) from None
        except ClientDisconnect:
            raise Gone from None
        upload.finish()

    def _too_large(self) -> ApiError:
        headers = {"connection": "close"}
        message = f"the file is larger than {self.most_bytes:,} bytes"
        return ApiError(413, message, param="file", code="file_too_large", headers=headers)


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return an object as JSON."""
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


def page(request: Request, found: Sequence[dict[str, Any]], *, limit: int, most: int) -> Response:
    """Return the objects after `after`, as many as `limit` says in the request, else here.

    Raises:
        ApiError: no such number, or no such object.
    """
    said = request.query_params.get("limit", str(limit))
    if not (said.isascii() and said.isdigit() and len(said) < 9 and 1 <= int(said) <= most):
        raise ApiError(400, f"limit: 1 to {most}", param="limit")
    after = request.query_params.get("after")
    ids = [each["id"] for each in found]
    if after is not None and after not in ids:
        raise ApiError(404, f"after: there is no {after[:64]!r}", param="after")
    start = 0 if after is None else ids.index(after) + 1
    shown = found[start : start + int(said)]
    return json_response(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": start + len(shown) < len(found),
        }
    )
