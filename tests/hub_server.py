"""A server on this machine that speaks the model hub's protocol, as far as its library needs it.

Repositories with commits and branches, the LFS upload, downloads with ETags and a redirect to
another address for large files, tokens that may write, may only read, or are not known.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

WRITER, READER = "hf_tokenThatMayWrite", "hf_tokenThatMayRead"


class Repository:
    """Commits by their hash, branches, and who may see it."""

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}

    def commit(self, changes: dict[str, bytes]) -> str:
        """A commit on main with these files besides those that are there; its hash."""
        files = self.files() | changes
        sha = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha], self.branches["main"] = files, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits.get(self.branches.get(revision, revision), {})


class HubServer:
    """The server, as a context; `requests` are (method, path) of all that it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """Files whose content was asked for, in order."""
        return [
            path.split("/resolve/")[1].partition("/")[2] if "/resolve/" in path else path
            for method, path in self.requests
            if method == "GET" and re.search("/resolve/|/large/", path)
        ]


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: int, content: bytes | dict[str, Any] = b"", **headers: str) -> None:
        data = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str, **headers: str) -> None:
        self._answer(status, {"error": code}, X_Error_Code=code, **headers)

    def _serve(self) -> None:
        hub = self.server_hub
        self.path, _, self.query = unquote(self.path).partition("?")
        hub.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.token not in ("", WRITER, READER):
            self._answer(401, {"error": "x"}, X_Error_Message="Invalid credentials in "
                         "Authorization header")  # fmt: skip
        elif self.path.startswith("/large/"):
            self._large(self.path.removeprefix("/large/"), body)
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.path):
            self._resolve(*found.groups())
        elif self.token != WRITER:
            self._answer(403 if self.token else 401, {"error": "no"})
        elif self.path == "/api/validate-yaml":
            self._validate(json.loads(body))
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path):
            self._change(found[1], found[2], body)
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        else:
            self._refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _validate(self, asked: dict[str, Any]) -> None:
        """As the hub: front matter must be YAML with a licence."""
        try:
            values = yaml.safe_load(asked["content"].split("---\n")[1])
            assert isinstance(values["license"], str)
            self._answer(200, {"errors": [], "warnings": []})
        except (IndexError, KeyError, AssertionError, yaml.YAMLError) as error:
            self._answer(400, {"errors": [{"message": str(error)}], "warnings": []})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server_hub.address}/{name}"}
        if name in self.server_hub.repositories:
            self._answer(409, url)
            return
        self.server_hub.repositories[name] = Repository(bool(asked.get("private")))
        self._answer(200, url)

    def _change(self, name: str, what: str, body: bytes) -> None:
        hub = self.server_hub
        if name not in hub.repositories:
            self._refuse(404, "RepoNotFound")
        elif what == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png"))
                    else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            self._answer(200, {"files": files})
        else:
            changes = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    changes[value["path"]] = hub.large[value["oid"]]
            sha = hub.repositories[name].commit(changes)
            url = f"{hub.address}/{name}/commit/{sha}"
            self._answer(200, {"success": True, "commitOid": sha, "commitUrl": url})

    def _batch(self, asked: dict[str, Any]) -> None:
        hub = self.server_hub
        objects = [
            {"oid": each["oid"], "size": each["size"]}
            | ({} if each["oid"] in hub.large else
               {"actions": {"upload": {"href": f"{hub.address}/large/{each['oid']}"}}})
            for each in asked["objects"]
        ]  # fmt: skip
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _large(self, oid: str, body: bytes) -> None:
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                self._refuse(400, "BadHash")
                return
            self.server_hub.large[oid] = body
            self._answer(200)
        else:
            named = f'inline; filename="{self.query}";'
            content = self.server_hub.large[oid]
            self._answer(200, content, ETag=f'"{oid}"', Content_Disposition=named)

    def _resolve(self, name: str, revision: str, file: str) -> None:
        hub = self.server_hub
        found = hub.repositories.get(name)
        if found is None or (found.private and not self.token):
            self._refuse(404 if self.token else 401, "RepoNotFound")
            return
        sha = found.branches.get(revision, revision)
        if sha not in found.commits:
            self._refuse(404, "RevisionNotFound")
        elif file not in found.commits[sha]:
            self._refuse(404, "EntryNotFound", X_Repo_Commit=sha)
        else:
            content = found.commits[sha][file]
            oid = hashlib.sha256(content).hexdigest()
            if file.endswith(".safetensors"):
                hub.large[oid] = content
                self._answer(
                    302, X_Repo_Commit=sha, X_Linked_Etag=f'"{oid}"', ETag='"pointer"',
                    X_Linked_Size=str(len(content)), Location=f"{hub.address}/large/{oid}?{file}",
                )  # fmt: skip
            else:
                self._answer(200, content, X_Repo_Commit=sha, ETag=f'"{oid[:40]}"')
