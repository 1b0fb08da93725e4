"""A stand-in for the Hugging Face Hub that the real client speaks with, over HTTP on this machine.

It knows what `huggingface_hub` asks for when it makes a dataset repository, lists it, reads from it
and commits to it, with large files by LFS.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_of_the_test"


@dataclass
class FakeHub:
    """What the Hub holds, and what it was asked.

    After `fail_after` uploads it breaks every connection of another.
    """

    endpoint: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    uploads: int = 0
    commits: list[list[str]] = field(default_factory=list)
    fail_after: int | None = None


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_large(path: str) -> bool:
    return path.endswith((".tar", ".parquet", ".png"))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def _serve(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if "Transfer-Encoding" in self.headers else self.rfile.read(size)
        path = self.path.partition("?")[0]
        is_upload = self.command == "PUT"
        if is_upload and self.hub.uploads == self.hub.fail_after:
            self.close_connection = True
            return
        if not is_upload and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
            return
        for pattern, serve in _ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                if _REPO in pattern and match[1] not in self.hub.repos:
                    self._answer(404, {"error": "Repository not found"}, _NO_REPO)
                else:
                    serve(self, body, *match.groups())
                return
        self._answer(400, {"error": f"the stand-in knows no {self.command} {path}"})

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name.startswith("closed/"):
            self._answer(403, {"error": f"You don't have the rights to create {name}"})
            return
        is_new = name not in self.hub.repos
        if is_new and (wanted.get("private") or wanted.get("visibility") == "private"):
            self.hub.private.add(name)
        self.hub.repos.setdefault(name, {".gitattributes": b"*.tar filter=lfs\n"})
        content = {"url": f"{self.hub.endpoint}/datasets/{name}", "id": name, "name": name}
        self._answer(200 if is_new else 409, content)

    def tree(self, body: bytes, repo: str) -> None:
        entries = []
        for path, data in sorted(self.hub.repos[repo].items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
            entry["oid"] = _git_oid(data)
            if _is_large(path):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self._answer(200, entries)

    def preupload(self, body: bytes, repo: str) -> None:
        files = []
        for file in json.loads(body)["files"]:
            path, there = file["path"], self.hub.repos[repo].get(file["path"])
            mode = "lfs" if _is_large(path) else "regular"
            oid = None
            if there is not None:
                oid = hashlib.sha256(there).hexdigest() if _is_large(path) else _git_oid(there)
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.blobs:
                href = f"{self.hub.endpoint}/lfs/{entry['oid']}"
                entry["actions"] = {"upload": {"href": href}}
        self._answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.uploads += 1
        self.hub.blobs[oid] = body
        self._answer(200, {})

    def commit(self, body: bytes, repo: str) -> None:
        paths = []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.blobs[value["oid"]]
            else:
                continue
            paths.append(value["path"])
        self.hub.commits.append(paths)
        oid = f"{len(self.hub.commits):040x}"
        url = f"{self.hub.endpoint}/datasets/{repo}/commit/{oid}"
        self._answer(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def resolve(self, body: bytes, repo: str, path: str) -> None:
        data = self.hub.repos[repo].get(path)
        if data is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        self._send(200, data, {"ETag": f'"{_git_oid(data)}"', "X-Repo-Commit": "0" * 40})

    def info(self, body: bytes, repo: str) -> None:
        self._answer(200, {"id": repo, "sha": "0" * 40})

    def valid(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), headers or {})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        named = {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, *_: object) -> None:
        pass


_NO_REPO = {"X-Error-Code": "RepoNotFound"}
_REPO = r"(\w+/\w+)"
_ROUTES = {
    r"POST /api/repos/create": _Handler.create,
    r"POST /api/validate-yaml": _Handler.valid,
    rf"GET /api/datasets/{_REPO}/tree/main": _Handler.tree,
    rf"GET /api/datasets/{_REPO}(?:/revision/main)?": _Handler.info,
    rf"POST /api/datasets/{_REPO}/preupload/main": _Handler.preupload,
    rf"POST /datasets/{_REPO}\.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /lfs/(\w+)": _Handler.upload,
    rf"POST /api/datasets/{_REPO}/commit/main": _Handler.commit,
    rf"(?:GET|HEAD) /datasets/{_REPO}/resolve/\w+/(.+)": _Handler.resolve,
}


@contextlib.contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A Hub without repositories, until the end of the block."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
