"""A local server that implements the part of the Hugging Face Hub API that huggingface_hub uses for models."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(BaseHTTPRequestHandler):
    """Repositories with commits; a token may read, or read and write, all of them.

    Subclasses define `repositories` (owner/name -> a list of commits, each path -> content), `private` names,
    `failures` (owner/name -> status and headers of each response), `tokens` (token -> "read" or "write"), uploaded
    `objects` (sha256 -> content) and `asked` (method and path of each request).
    """

    protocol_version = "HTTP/1.1"
    repositories: dict[str, list[dict[str, bytes]]]
    private: set[str]
    failures: dict[str, tuple[int, dict[str, str]]]
    tokens: dict[str, str]
    objects: dict[str, bytes]
    asked: list[str]

    def answer(self, code: int, body: bytes | dict[str, Any] | list[Any] = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path.startswith("/objects/"):  # a signed URL, which needs no token
            self.objects[path.removeprefix("/objects/")] = body
            return self.answer(200)
        right = self.tokens.get(token, "")
        if token and not right:
            return self.answer(401, {"error": "Invalid credentials in Authorization header"},
                               X_Error_Message="Invalid credentials in Authorization header")  # fmt: skip
        if path == "/api/validate-yaml":
            errors = [{"message": '"license" must be one of ["mit"]'}] if b"license: L" in body else []
            return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body), right)
        for pattern, method in (
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.info),
            (r"/api/models/([^/]+/[^/]+)/tree/(.+)", self.tree),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch)", self.batch),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(?:.+)", self.resolve),
        ):
            if match := re.fullmatch(pattern, path):
                name, revision = match[1], match[2] or "main"
                if name in self.failures:
                    status, headers = self.failures[name]
                    return self.answer(status, **headers)
                if name not in self.repositories or (name in self.private and not right):
                    return self.answer(404 if right else 401, X_Error_Code="RepoNotFound")
                if self.command in ("POST", "PUT") and right != "write":
                    return self.answer(403, {"error": "You don't have the rights"})
                return method(name, revision, body)
        return self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, wanted: dict[str, Any], right: str) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if right != "write":
            return self.answer(403 if right else 401, {"error": "You don't have the rights"})
        if name in self.repositories:
            return self.answer(409, {"url": f"http://{self.headers['Host']}/{name}"})
        self.repositories[name] = [{}]
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.private.add(name)
        return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}"})

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        modes = [{"path": file["path"], "shouldIgnore": False,
                  "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                 for file in json.loads(body)["files"]]  # fmt: skip
        return self.answer(200, {"files": modes})

    def batch(self, name: str, _: str, body: bytes) -> None:
        address = f"http://{self.headers['Host']}/objects/"
        objects = [{**wanted, "actions": {"upload": {"href": address + wanted["oid"]}}}
                   for wanted in json.loads(body)["objects"]]  # fmt: skip
        return self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def commit(self, name: str, revision: str, body: bytes) -> None:
        files = dict(self.repositories[name][-1])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        self.repositories[name].append(files)
        oid = commit_id(len(self.repositories[name]) - 1)
        url = f"http://{self.headers['Host']}/{name}/commit/{oid}"
        return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories[name]
        ids = {commit_id(i): i for i in range(len(commits))} | {
            "main": len(commits) - 1,
            "v1": min(1, len(commits) - 1),
        }
        return (commit_id(ids[revision]), commits[ids[revision]]) if revision in ids else None

    def info(self, name: str, revision: str, _: bytes) -> None:
        if (snapshot := self.files(name, revision)) is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": path, "size": len(content)} for path, content in snapshot[1].items()]
        about = {"id": name, "sha": snapshot[0], "siblings": siblings, "private": name in self.private, "tags": []}
        return self.answer(200, about)

    def tree(self, name: str, revision: str, _: bytes) -> None:
        if (snapshot := self.files(name, revision)) is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        return self.answer(200, [{"type": "file", "path": path, "size": len(content), "oid": f"{i:040x}"}
                                 for i, (path, content) in enumerate(snapshot[1].items())])  # fmt: skip

    def resolve(self, name: str, revision: str, _: bytes) -> None:
        if (snapshot := self.files(name, revision)) is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        content = snapshot[1].get(unquote(self.path).rpartition("/")[2])
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=snapshot[0])
        tag = hashlib.sha256(content).hexdigest()
        return self.answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=snapshot[0])

    def log_message(self, *args: object) -> None:
        pass


def commit_id(number: int) -> str:
    """Return the id of a repository's commit: 40 hexadecimal digits."""
    return f"{number:040x}"
