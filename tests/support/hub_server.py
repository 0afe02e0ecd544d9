# SPDX-License-Identifier: Apache-2.0
"""A stand-in of the Hub's HTTP interface, as far as `huggingface_hub` uses it to create, upload to and read a repository.

    with HubServer(token) as hub:
        hub.endpoint              what HF_ENDPOINT is set to
        hub.files[repo][path]     what was committed
        hub.faults.append(Fault("POST", "/commit/", 500))

It refuses writes without the token, remembers every request, and fails on demand.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

RESET = "reset"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png", ".parquet")


@dataclass
class Fault:
    """The next requests of a method whose path holds a text fail: with a status, or cut off in the middle."""

    method: str
    path: str
    kind: int | str
    times: int = 1


class HubServer:
    """The server in a thread, and what it knows."""

    def __init__(self, token: str):
        self.token = token
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, list[str]]] = []
        self.requests: list[tuple[str, str, bytes]] = []
        self.faults: list[Fault] = []
        self.failed: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def next_fault(self, method, path):
        """The fault that a request meets, used up by it."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.path in path:
                    fault.times -= 1
                    self.failed.append((method, path))
                    return fault.kind
        return None

    def commit(self, repo, lines):
        """Apply the lines of a commit; all or nothing."""
        changes, message = {}, ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.large[value["oid"]]
        with self.lock:
            self.files[repo].update(changes)
            self.commits.append((repo, message, sorted(changes)))
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *arguments):
        pass

    def _serve(self):
        path = unquote(urlsplit(self.path).path)
        kind = self.hub.next_fault(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if kind == RESET:
            self.rfile.read(length // 2)
            self._reset()
            return
        body = self._read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        self.hub.requests.append((self.command, path, body))
        if kind is not None:
            self._answer(kind, {"error": "made to fail"})
        elif self.command == "POST" and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._answer(401, {"error": "Invalid credentials"})
        else:
            self._route(path, body)

    def _reset(self):
        """Close so that the other side sees a reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _read_chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, path, body):
        for method, pattern, answer in (
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", lambda body: {"errors": [], "warnings": []}),
            ("POST", r"/api/models/(\w+/[\w.-]+)/preupload/main", self._preupload),
            ("POST", r"/api/models/(\w+/[\w.-]+)/commit/main", self._commit),
            ("POST", r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/(\w+)", self._store),
        ):
            found = re.fullmatch(pattern, path)
            if found and self.command == method:
                self._answer(200, answer(body, *found.groups()))
                return
        found = re.fullmatch(r"/api/models/(\w+/[\w.-]+?)(/(?:revision|tree)/[^/]+)?(/.+)?", path)
        if found and found.group(1) in self.hub.files and found.group(3) is None:
            self._answer(200, self._listing(found.group(1), is_tree="/tree/" in path))
            return
        found = re.fullmatch(r"/(\w+/[\w.-]+)/resolve/[^/]+/(.+)", path)
        content = self.hub.files.get(found.group(1), {}).get(found.group(2)) if found else None
        if content is None:
            known = any(f"/{repo}/" in path for repo in self.hub.files)
            self._answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})
        else:
            etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "0" * 40}
            self._answer(200, content, etag)

    def _listing(self, repo, is_tree):
        files = self.hub.files[repo]
        if is_tree:
            return [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]
        return {"id": repo, "sha": "0" * 40, "siblings": [{"rfilename": path} for path in files], "tags": []}

    def _create(self, body):
        request = json.loads(body)
        repo = f"{request.get('organization') or 'tester'}/{request['name']}"
        self.hub.files.setdefault(repo, {})
        return {"url": f"{self.hub.endpoint}/{repo}", "name": repo}

    def _preupload(self, body, repo):
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _batch(self, body, repo):
        objects = []
        for item in json.loads(body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _store(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid, "the upload is not what was announced"
        self.hub.large[oid] = body
        return {}

    def _commit(self, body, repo):
        commit = self.hub.commit(repo, [json.loads(line) for line in body.splitlines()])
        return {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}", "commitOid": commit}

    def _answer(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
