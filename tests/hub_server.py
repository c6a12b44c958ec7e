"""A small server with the protocol of the Hugging Face Hub, for tests of the real client.

It has repositories, commits, LFS and private files, checks the requests of the client, and keeps
everything in memory. To start it by hand:

python tests/hub_server.py --port 8080
"""

import argparse
import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


# Files with other suffixes are uploaded through LFS.
REGULAR_SUFFIXES = (".json", ".py", ".md", ".yaml", ".txt", ".gitattributes")


@dataclass
class Commit:
    """A commit of a repository: the content of every file, and the names of LFS files."""

    oid: str
    parent: str | None
    title: str
    files: dict[str, bytes]
    lfs: frozenset[str]


@dataclass
class Repository:
    private: bool = False
    commits: list[Commit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.add("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}, frozenset())

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.head
        return next((commit for commit in self.commits if commit.oid.startswith(revision)), None)

    def add(self, title: str, files: dict[str, bytes], lfs: frozenset[str]) -> Commit:
        parent = self.commits[-1].oid if self.commits else None
        content = {name: hashlib.sha1(data).hexdigest() for name, data in sorted(files.items())}
        oid = hashlib.sha1(json.dumps([parent, title, content, len(self.commits)]).encode()).hexdigest()
        self.commits.append(Commit(oid, parent, title, files, lfs))
        return self.head


class Refusal(Exception):
    """An error response, with the code from which the client determines the error."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: str):
        super().__init__(message)
        self.status, self.code, self.content = status, code, content


class Hub:
    """The data of the server: users by token, repositories by "owner/name", LFS objects by SHA-256.

    Args:
        tokens: The user of each token. A user may write, and may read their own private
            repositories.
    """

    def __init__(self, tokens: dict[str, str] | None = None):
        self.tokens = tokens or {"hf_test": "you"}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()
        # The number of LFS uploads, from the next one, that fail halfway.
        self.broken_uploads = 0

    def repository(self, name: str, user: str | None, write: bool = False) -> Repository:
        repository = self.repositories.get(name)
        allowed = user == name.partition("/")[0]
        # Because the Hub gives the same answer for a private repository and a missing one, we do so
        # too.
        if repository is None or (repository.private and not allowed):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not allowed:
            raise Refusal(403 if user else 401, f"You don't have the rights to write to {name}")
        return repository

    def create(self, body: dict[str, Any], user: str | None, endpoint: str = "") -> str:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if body.get("type", "model") != "model":
            raise Refusal(400, "this server holds models")
        name = f"{body.get('organization') or user}/{body['name']}"
        if not name.startswith(f"{user}/"):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {name.partition('/')[0]!r}")
        if name in self.repositories:
            raise Refusal(409, "You already created this model repo", url=f"{endpoint}/{name}")
        private = body.get("visibility") == "private" or bool(body.get("private"))
        self.repositories[name] = Repository(private)
        return name

    def commit(self, repository: Repository, lines: list[dict[str, Any]]) -> Commit:
        """Apply all operations of a commit, or none."""
        with self.lock:
            header = next(line["value"] for line in lines if line["key"] == "header")
            parent = header.get("parentCommit")
            if parent and parent != repository.head.oid:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files, lfs = dict(repository.head.files), set(repository.head.lfs)
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                    lfs.discard(value["path"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.objects:
                        raise Refusal(400, f"LFS object {value['oid']} was not uploaded")
                    files[value["path"]] = self.objects[value["oid"]]
                    lfs.add(value["path"])
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
                elif line["key"] == "deletedFolder":
                    files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
            if "README.md" in files and _front_matter_errors(files["README.md"].decode()):
                raise Refusal(400, "Invalid metadata in README.md")
            return repository.add(header["summary"], files, frozenset(lfs & files.keys()))


def _front_matter_errors(text: str) -> list[dict[str, str]]:
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        content = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [{"message": str(error)}]
    return [] if isinstance(content, dict) else [{"message": "the front matter is not a mapping"}]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Otherwise the content of an answer waits up to 40 ms for the client to acknowledge the headers.
    disable_nagle_algorithm = True
    hub: Hub
    port: int

    def log_message(self, *args: Any) -> None:
        """Print no log."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        authorization = self.headers.get("Authorization", "")
        user = self.hub.tokens.get(authorization.removeprefix("Bearer "))
        if body is None:
            self.close_connection = True
            return
        try:
            if authorization and user is None and not path.startswith("/objects/"):
                raise Refusal(401, "Invalid username or password.")
            for pattern, answer in ROUTES:
                match = re.fullmatch(pattern, f"{method} {path}")
                if match is not None:
                    answer(self, user, body, *match.groups())
                    return
            raise Refusal(404, f"no such page: {method} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), **({"X-Error-Code": refusal.code} if refusal.code else {})}
            self._send(refusal.status, json.dumps({"error": str(refusal), **refusal.content}).encode(), headers)

    def _body(self) -> bytes | None:
        """The content of a request; nothing if this upload is to fail."""
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        if self.command == "PUT" and self.hub.broken_uploads > 0:
            self.hub.broken_uploads -= 1
            self.rfile.read(length // 2)
            return None
        return self.rfile.read(length)

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def whoami(self, user: str | None, body: bytes) -> None:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        self._send_json({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, user: str | None, body: bytes) -> None:
        self._send_json({"url": f"{self.endpoint}/{self.hub.create(json.loads(body), user, self.endpoint)}"})

    def validate_yaml(self, user: str | None, body: bytes) -> None:
        self._send_json({"errors": _front_matter_errors(json.loads(body)["content"]), "warnings": []})

    def information(self, user: str | None, body: bytes, name: str, revision: str | None) -> None:
        repository = self.hub.repository(name, user)
        commit = self._commit(repository, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self._send_json({"id": name, "sha": commit.oid, "private": repository.private, "tags": [], "siblings": siblings})

    def commits(self, user: str | None, body: bytes, name: str, revision: str) -> None:
        entries = [
            {"id": commit.oid, "title": commit.title, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
            for commit in reversed(self.hub.repository(name, user).commits)
        ]
        self._send_json(entries)

    def tree(self, user: str | None, body: bytes, name: str, revision: str) -> None:
        commit = self._commit(self.hub.repository(name, user), revision)
        self._send_json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in sorted(commit.files.items())
            ]
        )

    def preupload(self, user: str | None, body: bytes, name: str, revision: str) -> None:
        self.hub.repository(name, user, write=True)
        modes = {entry["path"]: "regular" if entry["path"].endswith(REGULAR_SUFFIXES) else "lfs" for entry in json.loads(body)["files"]}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None} for path, mode in modes.items()]
        self._send_json({"files": files})

    def lfs_batch(self, user: str | None, body: bytes, name: str) -> None:
        self.hub.repository(name, user, write=True)
        objects = []
        for entry in json.loads(body)["objects"]:
            known = entry["oid"] in self.hub.objects
            upload = {"href": f"{self.endpoint}/objects/{entry['oid']}"}
            verify = {"href": f"{self.endpoint}/objects/{entry['oid']}/verify"}
            objects.append({**entry, **({} if known else {"actions": {"upload": upload, "verify": verify}})})
        self._send_json({"transfer": "basic", "objects": objects})

    def upload(self, user: str | None, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content does not have the digest it was announced with")
        self.hub.objects[oid] = body
        self._send(200)

    def verify(self, user: str | None, body: bytes, oid: str) -> None:
        if len(self.hub.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise Refusal(404, "no such object of that size")
        self._send(200)

    def commit(self, user: str | None, body: bytes, name: str, revision: str) -> None:
        repository = self.hub.repository(name, user, write=True)
        commit = self.hub.commit(repository, [json.loads(line) for line in body.splitlines() if line.strip()])
        url = f"{self.endpoint}/{name}/commit/{commit.oid}"
        self._send_json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, user: str | None, body: bytes, name: str, revision: str, path: str) -> None:
        commit = self._commit(self.hub.repository(name, user), revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if path not in commit.lfs:
            self._send(200, data, headers)
            return
        oid = hashlib.sha256(data).hexdigest()
        # As with a content delivery network, the host differs, and the client must use the headers
        # of this response.
        location = f"http://localhost:{self.port}/objects/{oid}"
        self._send(302, b"", {**headers, "Location": location, "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))})

    def download(self, user: str | None, body: bytes, oid: str) -> None:
        data = self.hub.objects[oid]
        start, end = 0, len(data)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is not None:
            start, end = int(match[1]), int(match[2]) + 1 if match[2] else end
        headers = {"ETag": f'"{oid}"', **({"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"} if match else {})}
        self._send(206 if match else 200, data[start:end], headers)

    def _commit(self, repository: Repository, revision: str) -> Commit:
        commit = repository.at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"GET /api/models/{NAME}(?:/revision/([\w.-]+))?", Handler.information),
    (rf"GET /api/models/{NAME}/commits/([\w.-]+)", Handler.commits),
    (rf"GET /api/models/{NAME}/tree/([\w.-]+)/?", Handler.tree),
    (rf"POST /api/models/{NAME}/preupload/([\w.-]+)", Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /objects/(\w+)", Handler.upload),
    (r"POST /objects/(\w+)/verify", Handler.verify),
    (r"(?:GET|HEAD) /objects/(\w+)", Handler.download),
    (rf"POST /api/models/{NAME}/commit/([\w.-]+)", Handler.commit),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([\w.-]+)/(.+)", Handler.resolve),
)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def environment(port: int, home: str, token: str | None = "hf_test") -> dict[str, str]:
    """Environment variables with which the client uses this server and keeps its cache in
    `home`."""
    variables = {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": home,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    return variables if token is None else {**variables, "HF_TOKEN": token}


@contextmanager
def serving(hub: Hub, port: int = 0) -> Iterator[int]:
    """Serve a hub on a local port (by default any free one)."""

    class BoundHandler(Handler):
        pass

    server = Server(("127.0.0.1", port), BoundHandler)
    BoundHandler.hub, BoundHandler.port = hub, server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--home", default="hub_home", help="folder for the client's cache")
    args = parser.parse_args()
    with serving(Hub(), args.port) as port:
        print("In the shell that shall talk to this server (its user is `you`):\n")
        for name, value in environment(port, args.home).items():
            print(f"export {name}={value}")
        print("\nStop it with Ctrl-C.", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
