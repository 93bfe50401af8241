"""The report of a run while it trains, served by HTTP on this machine only.

The page polls ``/data.json``; the server reads the files of the run again only after they have changed.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError
from evenstep.telemetry.page import page, payload
from evenstep.telemetry.runlog import load_run

HOSTS = ("localhost", "127.0.0.1")


class Pages:
    """The data of the page, cached until a file of a run changes. Used by several threads."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self.runs = [Path(run) for run in runs]
        self._version = ""
        self._data: dict[str, Any] = {}
        self._lock = threading.Lock()
        self.data()  # raises EvenstepError for a path that is no run, before anything is served

    def data(self) -> tuple[str, dict[str, Any]]:
        """An ETag, and the payload."""
        with self._lock:
            version = self._stamp()
            if version != self._version:
                self._data = payload([load_run(run) for run in self.runs], live=True)
                self._version = version
            return version, self._data

    def _stamp(self) -> str:
        names = ("metrics.jsonl", "config.toml", "summary.json")
        files = [path for run in self.runs for path in ([run / n for n in names] if run.is_dir() else [run])]
        facts = [path.stat() for path in files if path.exists()]
        return '"' + "-".join(f"{fact.st_mtime_ns:x}.{fact.st_size:x}" for fact in facts) + '"'


class Handler(BaseHTTPRequestHandler):
    """Answers ``/`` and ``/data.json``."""

    pages: Pages
    timeout = 10.0
    """Seconds after which a silent connection is closed, so that idle ones do not accumulate."""

    def do_GET(self) -> None:
        # DNS rebinding: a page of another site, whose host name resolves to 127.0.0.1, must not read the run.
        if self.headers.get("Host", "").rpartition(":")[0] not in HOSTS:
            return self._answer(403, "text/plain", b"only from this machine\n")
        try:
            version, data = self.pages.data()
        except (EvenstepError, OSError) as problem:  # the run was moved or deleted
            return self._answer(503, "text/plain; charset=utf-8", f"{problem}\n".encode())
        if self.path == "/data.json":
            if self.headers.get("If-None-Match") == version:
                return self._answer(304, "application/json", b"")
            return self._answer(200, "application/json", json.dumps(data, allow_nan=False).encode(), version)
        if self.path == "/":
            title = ", ".join(run["name"] for run in data["runs"])
            return self._answer(200, "text/html; charset=utf-8", page(data, title).encode())
        return self._answer(404, "text/plain", b"nothing here\n")

    def _answer(self, status: int, kind: str, body: bytes, version: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        headers |= {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
        for name, value in (headers | ({"ETag": version} if version else {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log no requests."""


class Server(ThreadingHTTPServer):
    """An HTTP server that ignores broken connections."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error, unless the browser closed the connection."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def make_server(runs: Sequence[Path], port: int = 0) -> ThreadingHTTPServer:
    """A server of the page on 127.0.0.1, not started yet. ``port`` 0 is any free port. EvenstepError if a path is no
    run or the port cannot be used."""
    handler = type("RunHandler", (Handler,), {"pages": Pages(runs)})
    try:
        return Server((HOSTS[1], port), handler)
    except (OSError, OverflowError) as problem:
        raise EvenstepError(f"--port {port} cannot be used ({problem}); give another, or 0 for any free one") from None


def watch(runs: Sequence[Path], port: int) -> None:
    """Serve the page of ``runs`` until Ctrl-C."""
    with make_server(runs, port) as server:
        print(f"http://localhost:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
