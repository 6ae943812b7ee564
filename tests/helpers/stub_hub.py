"""A hub on loopback: repositories of files, as huggingface_hub asks for them, with the faults that a network has."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the hub holds, and how it misbehaves."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut_once: set[str] = field(default_factory=set)  # files of which the first request gets a half
    damaged: set[str] = field(default_factory=set)  # files that arrive with other bytes than their checksum says
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    endpoint: str = ""

    def add(self, id: str, folder: Path) -> None:
        """Put the files of a folder, or one file, into a repository."""
        files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
        root = folder.parent if folder.is_file() else folder
        kept = self.repositories.setdefault(id, {})
        kept.update({path.relative_to(root).as_posix(): path.read_bytes() for path in files})


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the hub until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.asked.append((self.command, path, self.headers.get("Range")))
            parts = path.split("/")
            if parts[:2] == ["api", "models"]:
                self._describe("/".join(parts[2:4]), parts[4:], with_body=with_body)
            elif len(parts) > 4 and parts[2] == "resolve":
                self._send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body=with_body)
            else:
                self._send(404, b"", with_body=with_body)

        def _describe(self, id: str, rest: list[str], *, with_body: bool) -> None:
            files = self._files(id, rest[1] if len(rest) > 1 else "main")
            if files is None:
                return
            if rest[:1] == ["tree"]:
                listed: Any = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324
                    for name, data in files.items()
                ]
            else:
                listed = {"id": id, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self._send(
                200, json.dumps(listed).encode(), with_body=with_body, headers={"Content-Type": "application/json"}
            )

        def _files(self, id: str, revision: str) -> dict[str, bytes] | None:
            """Return a repository's files, or answer why not."""
            if id not in hub.repositories:
                self._send(404, b"", with_body=False, headers={"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", COMMIT):
                self._send(404, b"", with_body=False, headers={"X-Error-Code": "RevisionNotFound"})
            else:
                return hub.repositories[id]
            return None

        def _send_file(self, id: str, revision: str, name: str, *, with_body: bool) -> None:
            files = self._files(id, revision)
            if files is None:
                return
            if id in hub.gated:
                self._send(403, b"", with_body=False, headers={"X-Error-Code": "GatedRepo"})
                return
            if name not in files:
                self._send(404, b"", with_body=False, headers={"X-Error-Code": "EntryNotFound"})
                return
            data = files[name]
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            sent = data[start:]
            if name in hub.damaged:
                sent = bytes(byte ^ 1 for byte in sent)
            self._send(206 if start else 200, sent, with_body=with_body, headers=headers, cut=name in hub.cut_once)
            if with_body:
                hub.cut_once.discard(name)

        def _send(
            self, status: int, data: bytes, *, with_body: bool, headers: dict[str, str] | None = None, cut: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body and cut:
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif with_body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
