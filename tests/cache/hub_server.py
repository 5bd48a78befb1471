"""A stand-in for the Hugging Face hub on this machine: the endpoints that huggingface_hub calls for data sets and models, kept in memory.

It answers as the hub does: 401 where a repository is missing or private and there is no token, `X-Error-Code`, `X-Repo-Commit`, ETags,
ranges. Tests damage what it serves, take files away, cut connections, and count requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_token_of_me"
ME = "me"


@dataclass
class Repo:
    """A repository: commits, each with all its files, and branches; `folder` is where its pages lie, "datasets/" or "" for a model."""

    private: bool = False
    folder: str = "datasets/"
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        text = f"{len(self.commits)} {branch} {message} {sorted(files)}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or next((sha for sha in self.commits if sha.startswith(revision) and len(revision) >= 7), None)


@dataclass
class HubServer:
    """The server, and what tests do to it.

    Attributes:
        repos: by USER/NAME.
        requests: "METHOD path" of each request, in order.
        cut: for files whose path ends so, how many bytes of the file are sent before the connection is closed; each time.
        stalling: the answers with these files wait, half sent, until `go_on` is set; `stalled` is set when one does.
        failing: the status of every answer.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    stalling: str | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    failing: int | None = None

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return found.commits[found.branches[branch]]

    def downloads(self) -> list[str]:
        """Names of the files that were asked for, in order."""
        return [line.rsplit("/", 1)[1] for line in self.requests if line.startswith("GET") and "/resolve/" in line]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return None

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    # --- answers ---

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any, status: int = 200, **headers: str) -> None:
        self._answer(status, json.dumps(content).encode(), Content_Type="application/json", **headers)

    def _refuse(self, status: int, code: str, words: str = "") -> None:
        self._json({"error": words or code}, status, X_Error_Code=code, X_Error_Message=words or code)

    # --- routes ---

    def _route(self) -> None:
        split = urlsplit(self.path)
        path, query = split.path, parse_qs(split.query)
        body = self._body()
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.failing is not None:
            return self._answer(self.hub.failing)
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {TOKEN}"):
            return self._answer(401, X_Error_Message="Invalid credentials in Authorization header")
        self._known = authorization is not None
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.hub.uploaded[found[1]] = body
            return self._answer(200)
        found = re.fullmatch(
            r"(?:/api/models|(?:/api)?/datasets)?/(?P<repo>[^/]+/[^/]+?)(?:\.git)?(?:/(?P<what>revision|tree|preupload|commit|branch|resolve|info)(?:/(?P<rest>.*))?)?",
            path,
        )
        if found is None:
            return self._answer(404)
        repo = self.hub.repos.get(found["repo"])
        if repo is None or (repo.private and not self._known):
            return self._refuse(404, "RepoNotFound") if self._known else self._refuse(401, "RepoNotFound")
        if self.command in ("POST", "PUT") and not self._known:
            return self._refuse(401, "", "Unauthorized")
        if self.command in ("POST", "PUT") and not found["repo"].startswith(f"{ME}/"):
            return self._refuse(403, "", "You don't have the rights to write here")
        name, what, rest = found["repo"], found["what"] or "revision", found["rest"] or "main"
        revision, _, inner = rest.partition("/")
        if what == "branch":
            return self._branch(repo, unquote(rest))
        if what == "info":
            return self._batch(json.loads(body))
        sha = repo.resolve(unquote(revision))
        if sha is None:
            return self._refuse(404, "RevisionNotFound")
        files = repo.commits[sha]
        if what == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self._json({"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []})
        if what == "tree":
            return self._json([_entry(file, data) for file, data in sorted(files.items()) if query.get("recursive")])
        if what == "preupload":
            return self._json({"files": [_mode(files, file["path"]) for file in json.loads(body)["files"]]})
        if what == "commit":
            return self._commit(name, repo, unquote(revision), dict(files), body)
        return self._file(files, unquote(inner), sha)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._known:
            return self._refuse(401, "", "Unauthorized")
        owner = asked["organization"] or ME
        name = f"{owner}/{asked['name']}"
        if owner != ME:
            return self._refuse(403, "", f"You don't have the rights to create a dataset under the namespace {owner}")
        folder = "datasets/" if asked.get("type") == "dataset" else ""
        status = 409 if name in self.hub.repos else 200
        if status == 200:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repos[name] = Repo(private=bool(private), folder=folder)
            self.hub.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self._json({"url": f"{self.hub.url}/{folder}{name}"}, status)

    def _branch(self, repo: Repo, branch: str) -> None:
        if branch in repo.branches:
            return self._refuse(409, "", "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self._answer(201)

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(item if item["oid"] in self.hub.uploaded else {**item, "actions": upload})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repo, branch: str, files: dict[str, bytes], body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        sha = repo.commit(branch, files, message)
        self._json({"commitUrl": f"{self.hub.url}/{repo.folder}{name}/commit/{sha}", "commitOid": sha, "success": True})

    def _file(self, files: dict[str, bytes], path: str, sha: str) -> None:
        if path not in files:
            return self._json({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        data = files[path]
        headers = {"ETag": f'"{_etag(path, data)}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        start, status = 0, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, status = int(wanted[1]), 206
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        sent = data[start:]
        stop = next((size for end, size in self.hub.cut.items() if path.endswith(end)), None)
        if stop is not None and self.command == "GET":
            self.close_connection = True
            return self._answer(status, sent[: max(0, stop - start)], Content_Length=str(len(sent)), **headers)
        if self.command == "GET" and self.hub.stalling is not None and path.endswith(self.hub.stalling):
            self._answer(status, sent[: len(sent) // 2], Content_Length=str(len(sent)), **headers)
            self.hub.stalled.set()
            self.hub.go_on.wait()
            self.close_connection = True
            return None
        self._answer(status, sent, **({"Content_Length": str(len(sent))} if self.command == "HEAD" else {}), **headers)


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _etag(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _is_large(path) else _blob(data)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    large = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}} if _is_large(path) else {}
    return {"type": "file", "path": path, "size": len(data), "oid": _blob(data), **large}


def _mode(files: dict[str, bytes], path: str) -> dict[str, Any]:
    there = {"oid": _etag(path, files[path])} if path in files else {}
    return {"path": path, "uploadMode": "lfs" if _is_large(path) else "regular", "shouldIgnore": False, **there}


@contextmanager
def serving() -> Iterator[HubServer]:
    """Serve until the block is left."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
