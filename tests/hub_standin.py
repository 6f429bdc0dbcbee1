# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A local HTTP server that stands in for the Hugging Face Hub, for tests that push and pull without a network.

It speaks the part of the hub's HTTP interface that `push_to_hub`, `from_pretrained` and `snapshot_download` use, of
huggingface_hub 0.3x (requests) and of 1.x and later alike: creating a repository, the pre-upload question, git-LFS
batches with the basic transfer, commits, file metadata, downloads, listings. Repositories live in memory, on one
branch, `main`; every commit is kept. Writing needs a bearer token. Xet storage is not spoken: clients run with
`HF_HUB_DISABLE_XET=1`, which `HubStandIn.environment` sets along with the endpoint.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER = "someone"
LARGE_FILES = (".safetensors", ".bin", ".model")


def _git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubStandIn:
    """Context manager: a hub on a free port of 127.0.0.1.

    `repositories` maps "user/name" to its commits, oldest first, each a pair of commit id (40 hex digits) and
    {path: bytes}. `files(repo_id)` is the newest commit's. `requests` lists "METHOD path" as they came in.
    """

    def __init__(self):
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.large_objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home) -> dict[str, str]:
        """The variables under which a process talks to this hub alone, with its cache in the folder `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_dummy",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def files(self, repo_id: str) -> dict[str, bytes]:
        return self.repositories[repo_id][-1][1]

    def create(self, repo_id: str) -> bool:
        """False where the repository is already there."""
        if repo_id in self.repositories:
            return False
        self.repositories[repo_id] = []
        self.commit(repo_id, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return True

    def commit(self, repo_id: str, files: dict[str, bytes]) -> str:
        commits = self.repositories[repo_id]
        oid = hashlib.sha1(f"{repo_id} {len(commits)}".encode()).hexdigest()
        commits.append((oid, files))
        return oid


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self):
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self._read_body()
        writes = self.command in ("POST", "PUT") and not path.startswith("/_large/") and path != "/api/validate-yaml"
        if writes and not self.headers.get("Authorization", "").startswith("Bearer "):
            return self._error(401, "Unauthorized", "a token is needed to write")
        repo = r"(?P<repo>[\w.-]+/[\w.-]+)"
        for method, pattern, answer in (
            ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/repos/create", self._create),
            ("POST", "/api/validate-yaml", self._validate_card),
            ("POST", f"/api/models/{repo}/preupload/main", self._preupload),
            ("POST", f"/{repo}\\.git/info/lfs/objects/batch", self._large_batch),
            ("PUT", "/_large/(?P<oid>[0-9a-f]{64})", self._large_upload),
            ("POST", f"/api/models/{repo}/commit/main", self._commit),
            ("GET", f"/api/models/{repo}(/revision/(?P<revision>[^/]+))?", self._info),
            ("GET", f"/api/models/{repo}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", self._tree),
            ("GET", f"/{repo}/(resolve|raw)/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
        ):
            match = re.fullmatch(pattern, path)
            if match and (method == self.command or (method, self.command) == ("GET", "HEAD")):
                return answer(**{name: value for name, value in match.groupdict().items() if value is not None})
        self._error(501, "NotImplemented", f"this stand-in has no {self.command} {path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status: int = 200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str):
        headers = {"Content-Type": "application/json", "X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _snapshot(self, repo: str, revision: str = "main"):
        """(commit id, files), or None once the fitting error has been sent."""
        commits = self.hub.repositories.get(repo)
        if not commits:
            return self._error(404, "RepoNotFound", f"no repository {repo}")
        if revision == "main":
            return commits[-1]
        for commit in commits:
            if commit[0] == revision:
                return commit
        return self._error(404, "RevisionNotFound", f"no revision {revision} in {repo}")

    def _whoami(self):
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def _create(self):
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo}
        if self.hub.create(repo):
            return self._json(answer)
        self._json(answer | {"error": "You already created this model repo"}, 409)

    def _validate_card(self):
        content = json.loads(self.body)["content"]
        front = re.match(r"---\r?\n(.*?)\r?\n---", content, re.S)
        try:
            mapping = yaml.safe_load(front.group(1)) if front else {}
            errors = [] if isinstance(mapping, dict) else [{"message": "the metadata is not a mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, repo):
        if not self._snapshot(repo):
            return
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE_FILES) else "regular" for path in paths}
        answer = [{"path": path, "uploadMode": modes[path], "shouldIgnore": False, "oid": None} for path in paths]
        self._json({"files": answer})

    def _large_batch(self, repo):
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.large_objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/_large/{item['oid']}", "header": {}}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _large_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "BadRequest", f"the bytes received do not hash to {oid}")
        self.hub.large_objects[oid] = self.body
        self._send(200, b"", {"ETag": f'"{oid}"'})

    def _commit(self, repo):
        if not (snapshot := self._snapshot(repo)):
            return
        files = dict(snapshot[1])
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large_objects:
                    return self._error(400, "BadRequest", f"{value['path']} was committed before it was uploaded")
                files[value["path"]] = self.hub.large_objects[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"])
        oid = self.hub.commit(repo, files)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"})

    def _info(self, repo, revision="main"):
        if not (snapshot := self._snapshot(repo, revision)):
            return
        oid, files = snapshot
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._json(
            {"_id": repo, "id": repo, "modelId": repo, "sha": oid, "private": False, "tags": [], "siblings": siblings}
        )

    def _tree(self, repo, revision, folder=""):
        if not (snapshot := self._snapshot(repo, revision)):
            return
        prefix = folder.rstrip("/") + "/" if folder else ""
        entries, folders = [], set()
        for path, data in sorted(snapshot[1].items()):
            if not path.startswith(prefix):
                continue
            below = path[len(prefix) :]
            if "/" in below and self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
                folders.add(prefix + below.split("/")[0])
                continue
            entry = {"type": "file", "path": path, "size": len(data), "oid": _git_blob_id(data)}
            if path.endswith(LARGE_FILES):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        if folder and not entries:
            return self._error(404, "EntryNotFound", f"no folder {folder} in {repo}")
        self._json(entries)

    def _resolve(self, repo, revision, file):
        if not (snapshot := self._snapshot(repo, revision)):
            return
        oid, files = snapshot
        if file not in files:
            return self._error(404, "EntryNotFound", f"no file {file} in {repo}")
        data = files[file]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{_git_blob_id(data)}"', "Content-Type": "application/octet-stream"}
        if file.endswith(LARGE_FILES):
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        self._send(200, data, headers)
