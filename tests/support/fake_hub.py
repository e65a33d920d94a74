"""A hub on the loopback: what huggingface_hub asks for a list of files, and for the files, as the real one answers."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

LARGE = 1000  # bytes; such files are stored elsewhere
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class Repository:
    """A model on the hub.

    files       the content of each file, by name
    revisions   the names of its branches and tags; all are the same commit
    is_gated    whether its licence has to be accepted
    """

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    is_gated: bool = False


@dataclass
class FakeHub:
    """The models of a hub, and how it behaves.

    breaks_after    after so many bytes a file breaks off, once; None: it does not
    lists           bytes that the list of files has for a file, in place of the right ones
    changes         whether files have other bytes than their hashes say
    asked           each request: method, path, and the first byte that it asks for
    """

    repositories: dict[str, Repository]
    breaks_after: int | None = None
    lists: dict[str, int] = field(default_factory=dict)
    changes: bool = False
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    address: str = ""


def git_hash(content: bytes) -> str:
    """Return the name that Git has for a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.hub.asked.append((self.command, path, start))
        if path.startswith("/cdn/"):
            self._send_file(path.removeprefix("/cdn"), start)
            return
        parts = path.strip("/").removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(401, headers={"X-Error-Code": "RepoNotFound"})
        elif rest and rest[1] not in (*repository.revisions, COMMIT):
            self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/"):
            self._send(200, json.dumps(self._info(name, repository)).encode(), {"Content-Type": "application/json"})
        elif repository.is_gated:
            self._send(403, headers={"X-Error-Code": "GatedRepo"})
        else:
            self._resolve(path, repository.files["/".join(rest[2:])])

    def _info(self, name: str, repository: Repository) -> dict[str, object]:
        files = []
        for file, content in repository.files.items():
            size = self.hub.lists.get(file, len(content))
            files.append({"rfilename": file, "size": size, "blobId": git_hash(content)})
            if len(content) >= LARGE:
                files[-1]["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 130}
        return {"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "tags": [], "private": False}

    def _resolve(self, path: str, content: bytes) -> None:
        """Send a small file; lead to another place for a large one, as the hub does."""
        if len(content) < LARGE:
            self._send(200, content, {"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": COMMIT})
            return
        elsewhere = self.hub.address.replace("127.0.0.1", "localhost")
        headers = {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        self._send(302, headers={**headers, "X-Repo-Commit": COMMIT, "Location": f"{elsewhere}/cdn{path}"})

    def _send_file(self, path: str, start: int) -> None:
        owner, name, _, _, file = path.strip("/").split("/", 4)
        content = self.hub.repositories[f"{owner}/{name}"].files[file]
        content = content[::-1] if self.hub.changes else content
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self._send(206 if start else 200, content[start:], {**headers, "Accept-Ranges": "bytes"})

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.breaks_after is not None and len(body) > self.hub.breaks_after:
            body, self.hub.breaks_after = body[: self.hub.breaks_after], None
            self.close_connection = True
        self.wfile.write(body)


@contextmanager
def fake_hub(repositories: dict[str, Repository]) -> Iterator[FakeHub]:
    """Return the context in which a hub with these models runs."""
    hub = FakeHub(repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
