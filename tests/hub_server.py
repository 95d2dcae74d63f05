"""A local server with the Hub endpoints that huggingface_hub uses to read and write repositories."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

Files = dict[str, bytes]


class HubServer:
    """Hub server with repositories in memory: maps from revision (branch, tag, commit id) to files."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Files]] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()

    def commit(self, repository: str, changes: Files, revision: str = "main") -> str:
        """Add or replace files of a revision in a new commit; return the commit id."""
        revisions = self.repositories.setdefault(repository, {})
        files = revisions.get(revision, {}) | changes
        commit = hashlib.sha1(
            repr(sorted((name, hashlib.sha1(data).digest()) for name, data in files.items())).encode()
        )
        revisions[revision] = revisions[commit.hexdigest()] = files
        return commit.hexdigest()

    def sha(self, repository: str, revision: str) -> str:
        files = self.repositories[repository][revision]
        return next(
            name for name, value in self.repositories[repository].items() if value is files and len(name) == 40
        )


def _entries(files: Files, name: str) -> list[dict[str, object]]:
    """Return a list with the tree entry of a file or folder; empty if it does not exist."""
    if name in files:
        oid = hashlib.sha1(files[name]).hexdigest()
        return [{"type": "file", "path": name, "size": len(files[name]), "oid": oid}]
    return (
        [{"type": "directory", "path": name, "oid": ""}] if any(file.startswith(f"{name}/") for file in files) else []
    )


def _tree(files: Files, folder: str, recursive: bool) -> list[dict[str, object]]:
    """Return the tree entries of a folder, or of all files below it."""
    inside = [name for name in files if not folder or name.startswith(f"{folder}/")]
    depth = folder.count("/") + 1 if folder else 0
    names = inside if recursive else dict.fromkeys("/".join(name.split("/")[: depth + 1]) for name in inside)
    return [entry for name in names for entry in _entries(files, name)]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlparse(self.path).path.split("/")[1:]]
        if parts[0] == "api" and parts[1] in ("models", "datasets"):
            repository, rest = self._repository(parts), parts[4:]
            revision = rest[1] if len(rest) > 1 else "main"
            files = self._files(repository, revision)
            if files is None:
                return
            if rest[:1] == ["tree"]:
                return self._json(_tree(files, "/".join(rest[2:]), "recursive=true" in self.path.lower()))
            siblings = [{"rfilename": name} for name in files]
            return self._json(
                {"id": repository, "sha": self.hub.sha(repository, revision), "siblings": siblings, "tags": []}
            )
        if "resolve" in parts:
            at = parts.index("resolve")
            repository, revision, name = "/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :])
            files = self._files(repository, revision)
            if files is None:
                return
            if name not in files:
                return self._error("EntryNotFound")
            headers = {
                "ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"',
                "X-Repo-Commit": self.hub.sha(repository, revision),
                "Accept-Ranges": "bytes",
            }
            if "Range" not in self.headers:
                return self._send(200, files[name], headers)
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            part = files[name][int(first) : int(last) + 1 if last else None]
            return self._send(206, part, headers | {"Content-Range": f"bytes {first}-{last}/{len(files[name])}"})
        return self._error("RepoNotFound")

    def do_DELETE(self) -> None:
        path = [unquote(part) for part in urlparse(self.path).path.split("/")[1:]]
        if self.hub.repositories[self._repository(path)].pop(path[5], None) is None:
            return self._error("RevisionNotFound")
        return self._json({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._read_chunks()
        path = [unquote(part) for part in urlparse(self.path).path.split("/")[1:]]
        if path[:3] == ["api", "repos", "create"]:
            wanted = json.loads(body)
            repository = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
            if wanted.get("type") == "dataset":
                repository = f"datasets/{repository}"
            if repository not in self.hub.repositories:
                self.hub.commit(repository, {".gitattributes": b""})
            return self._json({"url": f"{self.hub.endpoint}/{repository}"})
        if path[:2] == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        repository, kind = self._repository(path), path[4]
        if kind == "preupload":
            files = json.loads(body)["files"]
            return self._json(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        if kind == "paths-info":
            files = self._files(repository, path[5])
            wanted = parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
            return self._json([entry for name in wanted for entry in _entries(files or {}, name)])
        if kind == "tag":
            revisions = self.hub.repositories[repository]
            revisions[json.loads(body)["tag"]] = revisions[path[5]]
            return self._json({})
        if kind == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            changes = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commit = self.hub.commit(repository, changes, path[5])
            return self._json({"commitUrl": f"{self.hub.endpoint}/{repository}/commit/{commit}", "commitOid": commit})
        return self._error("RepoNotFound")

    def _repository(self, path: list[str]) -> str:
        """Return the repository key for an API path; datasets have the prefix `datasets/`, as in their URLs."""
        return "/".join(path[2:4] if path[1] == "models" else ["datasets", *path[2:4]])

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _files(self, repository: str, revision: str) -> Files | None:
        if repository not in self.hub.repositories:
            return self._error("RepoNotFound")
        if revision not in self.hub.repositories[repository]:
            return self._error("RevisionNotFound")
        return self.hub.repositories[repository][revision]

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
