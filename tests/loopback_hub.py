"""A Hub on the loopback interface: the part of the HTTP surface that the real clients use here, kept in memory.

Repositories of three kinds with commits, branches, tags and pull requests; LFS objects; Xet tokens for a local store;
Spaces' variables, secrets and runtime; collections; and faults on request. `Hub.start` serves it from a thread.

    hub = Hub().start()
    os.environ["HF_ENDPOINT"] = hub.endpoint  # before the clients are imported
    hub.fail("POST", r"/commit/", 503, times=2)
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import itertools
import json
import re
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import yaml

KINDS = ("models", "datasets", "spaces")
LFS_ENDINGS = (".parquet", ".safetensors", ".bin", ".npz", ".png", ".gif", ".jpg")
LARGE = 10_000_000
PAGE = b"<!DOCTYPE html><html><body>Please log in to the network.</body></html>"
TOKENS = {
    "hf_alice": ("alice", "write"),
    "hf_alice_reads": ("alice", "read"),
    "hf_bob": ("bob", "write"),
}
ORGS = {"acme": {"alice": "write", "bob": "read"}}


class HubError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, text: str, code: str | None = None, **more: Any) -> None:
        super().__init__(text)
        self.status, self.text, self.code, self.more = status, text, code, more


@dataclass(frozen=True)
class Blob:
    """A file at one commit: its bytes, or the SHA-256 of an LFS object."""

    data: bytes
    lfs: str | None = None
    in_xet: int | None = None  # bytes of a file that only the Xet store holds

    @property
    def size(self) -> int:
        return len(self.data) if self.in_xet is None else self.in_xet

    @property
    def oid(self) -> str:
        text = self.data
        if self.lfs is not None:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.lfs}\nsize {self.size}\n"
            text = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A tree of files and where it came from."""

    sha: str
    files: dict[str, Blob]
    title: str
    message: str
    author: str
    parent: str | None
    date: str


@dataclass
class Repo:
    """One repository."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    sdk: str | None = None
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    stages: list[str] = field(default_factory=lambda: ["RUNNING"])  # of a Space, one for each question; the last stays
    hardware: str = "cpu-basic"
    running: str | None = None  # the commit that a Space runs, or tried to
    runtime: dict[str, Any] = field(default_factory=dict)  # said besides

    def at(self, revision: str) -> Commit:
        """The commit of a branch, tag, ref or (short) sha."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found[0]]

    def branch(self, revision: str) -> str:
        """The full name of a ref that can be committed to."""
        for ref in (f"refs/heads/{revision}", revision):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def put(self, ref: str, files: dict[str, Blob], title: str, message: str = "", author: str = "system") -> Commit:
        """Make a commit of these files on a ref."""
        parent = self.refs.get(ref)
        seed = json.dumps(
            [self.kind, self.name, title, parent, sorted((k, v.oid) for k, v in files.items()), len(self.commits)]
        )
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), files, title, message, author, parent, now())
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit


class Held:
    """Requests that the Hub has taken and does not answer until it is told to."""

    def __init__(self) -> None:
        self._came, self._go = threading.Semaphore(0), threading.Event()

    def wait(self, requests: int = 1) -> None:
        """Wait until so many requests have come."""
        for _ in range(requests):
            assert self._came.acquire(timeout=100), "no such request has come"

    def let_go(self) -> None:
        """Go on with all of them."""
        self._go.set()

    def stay(self) -> None:
        """What the Hub does with such a request."""
        self._came.release()
        self._go.wait(100)


@dataclass
class Fault:
    """What the next `times` requests of a method and path get instead of an answer; status 0 cuts the connection.

    A fault that is held waits until it is let go; with status None the request is then answered as any other.
    """

    method: str
    path: re.Pattern[str]
    status: int | None
    times: int
    headers: dict[str, str]
    error: str
    after: bool  # the request is carried out first, and only its answer is lost
    held: Held | None = None
    page: bytes = b""  # the answer is this, as from a proxy
    spoil: bool = False  # the answer is the usual one, with its last bit turned over on the way


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


class Hub:
    """The state of the server; tests may read and change it directly.

    Attributes:
        endpoint: address, once started.
        repos: by (kind, "owner/name").
        objects: LFS objects by SHA-256.
        log: (method, raw path, token or None, user agent) of every request.
        builds: stages that a Space goes through after a commit or a restart.
        pays: whether accounts may have hardware that must be paid, and Gradio Spaces.
        page: entries of one page of a tree.
        cdn: address that LFS downloads are sent to, of another origin; None serves them directly.
        xet: folder of the local Xet store; None without.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.endpoint = ""
        self.cdn: str | None = None
        self.xet: Path | None = None
        self.page = 1000
        self.reset()

    def reset(self) -> None:
        """Forget everything but the settings."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, str | None, str]] = []
        self.ids = itertools.count(1)
        self.builds = ["BUILDING", "APP_STARTING", "RUNNING"]
        self.pays: bool | None = False  # None: not even for a Gradio Space on free hardware

    def start(self) -> Hub:
        """Serve from a thread that ends with the process."""
        handler = type("Handler", (_Handler,), {"hub": self})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        return self

    def fail(
        self, method: str, path: str, status: int, times: int = 1, *, error: str = "injected fault",
        headers: dict[str, str] | None = None, after: bool = False, page: bytes = b"",
    ) -> None:  # fmt: skip
        """Answer the next requests that match with an error or `page`, or (status 0) by cutting the connection."""
        self.faults.append(Fault(method, re.compile(path), status, times, headers or {}, error, after, page=page))

    def spoil(self, method: str, path: str, times: int = 1) -> None:
        """Change one bit of the next answers that match."""
        self.faults.append(Fault(method, re.compile(path), None, times, {}, "", False, spoil=True))

    def hold(self, method: str, path: str, *, after: bool = False) -> Held:
        """Take the next request that matches and say nothing, before it is carried out or after; then cut it."""
        self.faults.append(Fault(method, re.compile(path), 0, 1, {}, "", after, Held()))
        return self.faults[-1].held  # type: ignore[return-value]

    def delay(self, method: str, path: str, times: int) -> Held:
        """Take the next requests that match, and answer them as any other once they are let go."""
        self.faults.append(Fault(method, re.compile(path), None, times, {}, "", False, Held()))
        return self.faults[-1].held  # type: ignore[return-value]

    def add(self, kind: str, name: str, folder: Path | dict[str, bytes], **facts: Any) -> Repo:
        """Make a repository of the files of a folder."""
        repo = self.repos.setdefault((kind, name), Repo(kind, name, **facts))
        if isinstance(folder, Path):
            folder = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        repo.put("refs/heads/main", {path: self.blob(path, data) for path, data in folder.items()}, "files")
        return repo

    def blob(self, path: str, data: bytes) -> Blob:
        """A file, in LFS where its name or size asks for it."""
        if not path.endswith(LFS_ENDINGS) and len(data) <= LARGE:
            return Blob(data)
        oid = hashlib.sha256(data).hexdigest()
        self.objects[oid] = data
        return Blob(data, oid)

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        """Path to content at a revision."""
        blobs = self.repos[kind, name].at(revision).files
        return {
            path: blob.data if blob.in_xet is None else self._from_xet(str(self.xet_hash(str(blob.lfs))), blob.in_xet)
            for path, blob in blobs.items()
        }

    def url(self, repo: Repo) -> str:
        """Web address of a repository."""
        return f"{self.endpoint}/{'' if repo.kind == 'models' else repo.kind + '/'}{repo.name}"

    def xet_hash(self, oid: str) -> str | None:
        """The Xet file hash of a SHA-256, from the shards of the local store."""
        shards = [] if self.xet is None else (self.xet / "xet" / "xorbs" / "shards").glob("*.mdb")
        return next((names[oid] for names in map(_read_shard, shards) if oid in names), None)

    def _from_xet(self, name: str, size: int) -> bytes:
        """Rebuild a file; the store is one process's at a time, so the client that filled it must have ended."""
        import hf_xet

        target = Path(str(self.xet)) / "rebuilt"
        info = hf_xet.PyXetDownloadInfo(str(target), name, size)
        hf_xet.download_files([info], f"local://{self.xet}", ("xet", int(time.time()) + 3600), None, None)
        return target.read_bytes()


def _read_shard(path: Path) -> dict[str, str]:
    """SHA-256 to Xet hash of the files in a shard."""
    data, at, names = path.read_bytes(), 48, {}

    def text(raw: bytes) -> str:
        return "".join(f"{n:016x}" for n in struct.unpack("<4Q", raw))

    while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
        file_hash, (flags, count) = data[at : at + 32], struct.unpack("<II", data[at + 32 : at + 40])
        at += 48 + 48 * count * (2 if flags >> 31 & 1 else 1)
        if flags >> 30 & 1:
            names[text(data[at : at + 32])] = text(file_hash)
            at += 48
    return names


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    spoilt = False
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body of an answer waits 40 ms for the client to confirm its head
    wbufsize = -1

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET  # noqa: N815

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.parts = [unquote(part) for part in split.path.strip("/").split("/")]
        self.query = {key: values[0] for key, values in parse_qs(split.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if len(self.body) < length:  # the client has gone in the middle of it
            self.close_connection = True
            return
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.log.append((self.command, split.path, token, self.headers.get("User-Agent", "")))
        with self.hub.lock:
            fault = next((f for f in self.hub.faults if f.method == self.command and f.path.search(self.path)), None)
            if fault is None:
                return self._respond(token, send=True)
            fault.times -= 1
            self.hub.faults = [f for f in self.hub.faults if f.times > 0]
            if fault.after:
                self._respond(token, send=False)
        if fault.held is not None:  # others are served in the meantime
            fault.held.stay()
        if fault.status is not None:
            return self._break(fault)
        self.spoilt = fault.spoil
        with self.hub.lock:
            self._respond(token, send=True)
        self.spoilt = False

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _break(self, fault: Fault) -> None:
        if not fault.status:
            self.close_connection = True
            self.connection.close()
            return
        if fault.page:
            return self._send(fault.status, fault.page, {"Content-Type": "text/html"})
        self._send(fault.status, {"error": fault.error}, {"X-Error-Message": fault.error, **fault.headers})

    def _respond(self, token: str | None, *, send: bool) -> None:
        try:
            self.user, self.role = self._who(token)
            answer = self._route()
            status, content, headers = answer if isinstance(answer, tuple) else (200, answer, {})
        except HubError as error:
            status, content = error.status, {"error": error.text, **error.more}
            headers = {"X-Error-Message": error.text} | ({"X-Error-Code": error.code} if error.code else {})
            headers |= getattr(error, "headers", {})
        if send:
            self._send(status, content, headers)

    def _send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for key, value in {
            "Content-Type": kind,
            "Content-Length": str(len(raw)),
            "X-Request-Id": "r",
            **headers,
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw[:-1] + bytes([raw[-1] ^ 1]) if self.spoilt and raw else raw)

    def _who(self, token: str | None) -> tuple[str | None, str]:
        if self.parts[0] == "_lfs" and self.command != "POST":
            return None, "none"
        if token is None:
            return None, "none"
        if token not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    # --- routes ---

    def _route(self) -> Any:
        parts, method = self.parts, self.command
        if parts[0] == "_lfs":
            return self._object(parts[1:])
        if parts[0] == "api":
            if parts[1:] == ["whoami-v2"]:
                return self._whoami()
            if parts[1:] == ["validate-yaml"]:
                return self._validate()
            if parts[1:] == ["repos", "create"]:
                return self._create()
            if parts[1:] == ["repos", "delete"]:
                asked = json.loads(self.body)
                kind = asked.get("type", "model") + "s"
                self._writable(kind, f"{asked.get('organization') or self.user}/{asked['name']}")
                del self.hub.repos[kind, f"{asked.get('organization') or self.user}/{asked['name']}"]
                return {}
            if parts[1] == "collections":
                return self._collection(parts[2:])
            if parts[1] in KINDS and len(parts) >= 4:
                return self._repository(parts[1], "/".join(parts[2:4]), parts[4:])
        kind, rest = (parts[0], parts[1:]) if parts[0] in KINDS else ("models", parts)
        if len(rest) >= 2 and rest[1].endswith(".git") and rest[2:] == ["info", "lfs", "objects", "batch"]:
            return self._batch(self._readable(kind, f"{rest[0]}/{rest[1].removesuffix('.git')}"))
        if len(rest) >= 5 and rest[2] in ("resolve", "raw") and method in ("GET", "HEAD"):
            return self._resolve(self._readable(kind, "/".join(rest[:2]), gate=True), rest[3], "/".join(rest[4:]))
        raise HubError(404, f"loopback hub: no such endpoint {method} {self.path}")

    def _whoami(self) -> Any:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [
            {
                "type": "org",
                "id": f"o-{o}",
                "name": o,
                "fullname": o,
                "roleInOrg": roles[self.user],
                "isEnterprise": False,
            }
            for o, roles in ORGS.items()
            if self.user in roles
        ]
        access = {"displayName": "t", "role": self.role, "createdAt": now()}
        return {
            "type": "user", "id": f"u-{self.user}", "name": self.user, "fullname": self.user.title(), "email": "a@b.c",
            "emailVerified": True, "avatarUrl": f"{self.hub.endpoint}/avatar.svg", "isPro": False, "canPay": False,
            "periodEnd": None, "orgs": orgs, "auth": {"type": "access_token", "accessToken": access},
        }  # fmt: skip

    def _validate(self) -> Any:
        asked = json.loads(self.body)
        errors = []
        found = re.match(r"\A---\n(.*?)\n---", asked["content"], re.DOTALL)
        try:
            facts = yaml.safe_load(found.group(1)) if found else {}
            if not isinstance(facts, dict):
                errors.append({"message": "the metadata is no mapping"})
            elif asked["repoType"] == "space" and "sdk" not in facts:
                errors.append({"message": '"sdk" is required'})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

    def _may_write(self, name: str) -> bool:
        owner = name.split("/")[0]
        return self.role == "write" and (owner == self.user or ORGS.get(owner, {}).get(str(self.user)) == "write")

    def _may_read(self, repo: Repo) -> bool:
        owner = repo.name.split("/")[0]
        return not repo.private or owner == self.user or str(self.user) in ORGS.get(owner, {})

    def _readable(self, kind: str, name: str, *, gate: bool = False) -> Repo:
        repo = self.hub.repos.get((kind, name))
        if repo is None or not self._may_read(repo):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if gate and repo.gated and name.split("/")[0] != self.user:
            raise HubError(403 if self.user else 401, f"Access to {kind[:-1]} {name} is restricted.", "GatedRepo")
        return repo

    def _writable(self, kind: str, name: str) -> Repo:
        repo = self._readable(kind, name)
        if not self._may_write(name):
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    def _create(self) -> Any:
        asked = json.loads(self.body)
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        kind, name = asked.get("type", "model") + "s", f"{asked.get('organization') or self.user}/{asked['name']}"
        if not self._may_write(name):
            raise HubError(
                403, f"You don't have the rights to create a {kind[:-1]} under the namespace {name.split('/')[0]!r}"
            )
        repo = self.hub.repos.get((kind, name))
        if repo is not None:
            raise HubError(409, f"You already created this {kind[:-1]} repo", url=self.hub.url(repo))
        repo = Repo(kind, name, asked.get("visibility") == "private", sdk=asked.get("sdk"))
        if kind == "spaces":
            self._ask_hardware(repo, asked.get("hardware", "cpu-basic"))
            repo.stages = ["NO_APP_FILE"]
        first = {".gitattributes": Blob(b"*.parquet filter=lfs diff=lfs merge=lfs -text\n")}
        if kind == "spaces":
            first["README.md"] = Blob(f"---\nsdk: {asked['sdk']}\n---\n".encode())
            repo.variables = {item["key"]: item["value"] for item in asked.get("variables", [])}
            repo.secrets = {item["key"]: item["value"] for item in asked.get("secrets", [])}
        repo.put("refs/heads/main", first, "initial commit", author=str(self.user))
        self.hub.repos[kind, name] = repo
        return {"url": self.hub.url(repo), "name": name, "id": f"r{next(self.hub.ids)}"}

    def _repository(self, kind: str, name: str, rest: list[str]) -> Any:
        verb, more, method = (rest[0] if rest else "info"), rest[1:], self.command
        if verb in ("commit", "preupload") and self.query.get("create_pr") != "1":
            repo = self._writable(kind, name)
        else:
            repo = self._readable(kind, name, gate=verb not in ("info", "revision"))
        if method == "GET" and verb in ("info", "revision"):
            return self._info(repo, more[0] if more else "main")
        if method == "GET" and verb == "tree":
            return self._tree(repo, more[0], more[1] if len(more) > 1 else "")
        if method == "POST" and verb == "paths-info":
            return self._paths(repo, more[0])
        if method == "GET" and verb == "refs":
            return self._refs(repo)
        if method == "GET" and verb == "commits":
            return self._commits(repo, more[0])
        if verb in ("branch", "tag"):
            return self._name_ref(self._writable(kind, name), verb, more[0])
        if method == "POST" and verb == "preupload":
            return self._preupload(repo, more[0])
        if method == "POST" and verb == "commit":
            return self._commit(repo, more[0])
        if verb == "discussions":
            return self._discussions(repo, more)
        if verb in ("xet-write-token", "xet-read-token") and self.hub.xet is not None:
            url, expires = f"local://{self.hub.xet}", str(int(time.time()) + 3600)
            headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expires}
            return 200, {"accessToken": "xet", "exp": int(expires), "casUrl": url}, headers
        if verb == "auth-check":
            return self._writable(kind, name) and {} if more == ["write"] else {}
        if method == "PUT" and verb == "settings":
            asked = json.loads(self.body)
            repo = self._writable(kind, name)
            repo.private = asked.get("visibility", "private" if repo.private else "public") == "private"
            return {}
        if kind == "spaces" and verb in ("variables", "secrets", "runtime", "restart", "hardware"):
            return self._space(repo, verb)
        raise HubError(404, f"loopback hub: no such endpoint {method} {self.path}")

    # --- reading ---

    def _info(self, repo: Repo, revision: str) -> Any:
        commit = repo.at(revision)
        readme = commit.files.get("README.md", Blob(b"")).data.decode(errors="replace")
        found = re.match(r"\A---\n(.*?)\n---", readme, re.DOTALL)
        try:
            card = json.loads(json.dumps(yaml.safe_load(found.group(1)) if found else {}, default=str)) or {}
        except yaml.YAMLError:
            card = {}  # a broken card is no reason to hide the repository
        siblings = [
            {"rfilename": path, "size": blob.size, "blobId": blob.oid}
            | ({"lfs": {"sha256": blob.lfs, "size": blob.size, "pointerSize": 129}} if blob.lfs else {})
            for path, blob in sorted(commit.files.items())
        ]
        facts = {
            "_id": repo.name, "id": repo.name, "author": repo.name.split("/")[0], "sha": commit.sha,
            "lastModified": commit.date, "createdAt": commit.date, "private": repo.private,
            "gated": "auto" if repo.gated else False, "disabled": False, "downloads": 0, "likes": 0,
            "tags": card.get("tags", []), "cardData": card, "siblings": siblings,
        }  # fmt: skip
        if repo.kind == "spaces":
            facts |= {"sdk": repo.sdk, "runtime": self._runtime(repo, repo.stages[0])}
        return facts

    def _entry(self, path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        if blob.lfs is not None:
            entry["lfs"] = {"oid": blob.lfs, "size": blob.size, "pointerSize": 129}
            if (name := self.hub.xet_hash(blob.lfs)) is not None:
                entry["xetHash"] = name
        return entry

    def _tree(self, repo: Repo, revision: str, folder: str) -> Any:
        files = repo.at(revision).files
        inside = {path: blob for path, blob in files.items() if not folder or path.startswith(folder + "/")}
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        deep = self.query.get("recursive", "").lower() == "true"
        entries, base = {}, len(folder) + 1 if folder else 0
        for path, blob in inside.items():
            steps = path[base:].split("/")
            for depth in range(1, len(steps)):
                name = path[:base] + "/".join(steps[:depth])
                if deep or depth == 1:
                    entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            if deep or len(steps) == 1:
                entries[path] = self._entry(path, blob)
        listed, start = [entries[name] for name in sorted(entries)], int(self.query.get("cursor", 0))
        headers = {}
        if start + self.hub.page < len(listed):
            following = urlencode(self.query | {"cursor": start + self.hub.page})
            headers["Link"] = f'<{self.hub.endpoint}{urlsplit(self.path).path}?{following}>; rel="next"'
        return 200, listed[start : start + self.hub.page], headers

    def _paths(self, repo: Repo, revision: str) -> Any:
        files = repo.at(revision).files
        form = "form" in self.headers.get("Content-Type", "")
        asked = parse_qs(self.body.decode()).get("paths", []) if form else json.loads(self.body)["paths"]
        return [self._entry(path, files[path]) for path in asked if path in files]

    def _refs(self, repo: Repo) -> Any:
        def listed(start: str, short: Callable[[str], str]) -> list[dict[str, str]]:
            named = ((r, sha) for r, sha in repo.refs.items() if r.startswith(start))
            return [{"name": short(r), "ref": r, "targetCommit": sha} for r, sha in named]

        found: dict[str, Any] = {"converts": []}
        found["branches"] = listed("refs/heads/", lambda r: r.removeprefix("refs/heads/"))
        found["tags"] = listed("refs/tags/", lambda r: r.removeprefix("refs/tags/"))
        if self.query.get("include_prs"):
            found["pullRequests"] = listed("refs/pr/", lambda r: r.removeprefix("refs/"))
        return found

    def _commits(self, repo: Repo, revision: str) -> Any:
        found, at = [], repo.at(revision)
        while True:
            authors = [{"user": at.author}]
            found.append({"id": at.sha, "title": at.title, "message": at.message, "date": at.date, "authors": authors})
            if at.parent is None:
                return found
            at = repo.commits[at.parent]

    def _resolve(self, repo: Repo, revision: str, path: str) -> Any:
        commit = repo.at(revision)
        blob = commit.files.get(path)
        if blob is None:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.headers = {"X-Repo-Commit": commit.sha}  # type: ignore[attr-defined]
            raise error
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.lfs or blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs is not None:
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.lfs}"'}
            if (name := self.hub.xet_hash(blob.lfs)) is not None:
                route = f"{self.hub.endpoint}/api/{repo.kind}/{repo.name}/xet-read-token/{commit.sha}"
                headers |= {"X-Xet-Hash": name, "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}
            if self.hub.cdn is not None:
                return 302, b"", headers | {"Location": f"{self.hub.cdn}/_lfs/{blob.lfs}"}
        return self._ranged(blob.data, headers)

    def _ranged(self, data: bytes, headers: dict[str, str]) -> Any:
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return 200, data, headers
        first, last = wanted.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        end = min(int(last), len(data) - 1) if first and last else len(data) - 1
        if start >= len(data):
            return 416, b"", {"Content-Range": f"bytes */{len(data)}"}
        return 206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}

    # --- writing ---

    def _name_ref(self, repo: Repo, verb: str, name: str) -> Any:
        asked = json.loads(self.body) if self.body else {}
        if verb == "branch":
            ref, start = f"refs/heads/{name}", asked.get("startingPoint", "main")
        else:
            ref, start = f"refs/tags/{asked.get('tag', name)}", name
        if self.command == "DELETE":
            repo.refs.pop(ref, None)
            return {}
        if ref in repo.refs:
            raise HubError(409, f"Reference {ref} already exists")
        repo.refs[ref] = repo.at(start).sha
        return {}

    def _preupload(self, repo: Repo, revision: str) -> Any:
        try:
            there = repo.at(revision).files
        except HubError:
            if self.query.get("create_pr") != "1":
                raise
            there = {}
        answers = []
        for asked in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(asked.get("sample", ""))
            large = asked["path"].endswith(LFS_ENDINGS) or asked["size"] > LARGE or binary
            answer = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if (blob := there.get(asked["path"])) is not None:
                answer["oid"] = blob.lfs or blob.oid
            answers.append(answer)
        return {"files": answers}

    def _commit(self, repo: Repo, revision: str) -> Any:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        open_pr = self.query.get("create_pr") == "1"
        base = repo.at(header.get("parentCommit") or revision) if open_pr else repo.at(repo.branch(revision))
        parent = header.get("parentCommit")
        if parent is not None and not base.sha.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                data = self.hub.objects.get(value["oid"])
                if data is not None:
                    files[value["path"]] = Blob(data, value["oid"])
                elif self.hub.xet_hash(value["oid"]) is not None:
                    files[value["path"]] = Blob(b"", value["oid"], value["size"])
                else:
                    raise HubError(400, "LFS pointer pointed to a file that does not exist")
            elif line["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, f"{value['path']} does not exist", "EntryNotFound")
            elif line["key"] == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
        title, more = header["summary"], header.get("description", "")
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        if open_pr:
            number = self._open(repo, title, more, base.sha)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url(repo)}/discussions/{number}"
        else:
            ref = repo.branch(revision)
        commit = repo.put(ref, files, title, more, str(self.user))
        if repo.kind == "spaces" and ref == "refs/heads/main" and "PAUSED" not in repo.stages:
            repo.stages = list(self.hub.builds)
        return answer | {"commitOid": commit.sha, "commitUrl": f"{self.hub.url(repo)}/commit/{commit.sha}"}

    def _batch(self, repo: Repo) -> Any:
        asked = json.loads(self.body)
        objects = []
        for item in asked["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                place = f"{self.hub.endpoint}/_lfs/{item['oid']}"
                answer["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "hash_algo": "sha256", "objects": objects}

    def _object(self, rest: list[str]) -> Any:
        oid = rest[0]
        if rest[1:] == ["verify"]:
            sizes = {len(self.hub.objects[oid])} if oid in self.hub.objects else set()
            return (200 if sizes == {json.loads(self.body)["size"]} else 422), {}, {}
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise HubError(400, "the content is not that of the oid")
            self.hub.objects[oid] = self.body
            return 200, b"", {}
        if oid not in self.hub.objects:
            raise HubError(404, "no such object")
        return self._ranged(self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    # --- pull requests, Spaces, collections ---

    def _open(self, repo: Repo, title: str, text: str, base: str) -> int:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        number = len(repo.discussions) + 1
        comment = {
            "id": f"c{number}", "type": "comment", "createdAt": now(), "author": {"name": self.user},
            "data": {"edited": False, "hidden": False, "latest": {"raw": text}},
        }  # fmt: skip
        repo.discussions.append(
            {
                "num": number, "title": title, "author": {"name": self.user}, "createdAt": now(), "status": "open",
                "repo": {"name": repo.name, "type": repo.kind[:-1]}, "isPullRequest": True, "events": [comment],
                "changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": "",
            }
        )  # fmt: skip
        repo.refs[f"refs/pr/{number}"] = base
        return number

    def _discussions(self, repo: Repo, more: list[str]) -> Any:
        if self.command == "GET":
            return repo.discussions[int(more[0]) - 1] if more else {
                "discussions": repo.discussions, "count": len(repo.discussions), "start": 0,
            }  # fmt: skip
        asked = json.loads(self.body) if self.body else {}
        if not more:
            return {"num": self._open(repo, asked["title"], asked.get("description", ""), repo.at("main").sha)}
        found = repo.discussions[int(more[0]) - 1]
        if more[1] == "merge":
            self._writable(repo.kind, repo.name)
            repo.refs["refs/heads/main"], found["status"] = repo.refs[f"refs/pr/{more[0]}"], "merged"
            return {}
        if more[1] == "status":
            found["status"] = asked["status"]
        return {
            "newStatus": {
                "id": "s", "type": "status-change", "createdAt": now(), "author": {"name": self.user},
                "data": {"status": found["status"]},
            }
        }  # fmt: skip

    def _runtime(self, repo: Repo, stage: str) -> Any:
        hardware = {"current": repo.hardware, "requested": repo.hardware}
        if len(repo.stages) == 1:
            repo.running = repo.at("main").sha
        facts = {"stage": stage, "hardware": hardware, "gcTimeout": 172800, "sha": repo.running}
        return facts | {"replicas": {"current": 1, "requested": 1}} | repo.runtime

    def _ask_hardware(self, repo: Repo, flavor: str) -> None:
        if self.hub.pays is None or (flavor != "cpu-basic" and not self.hub.pays):
            raise HubError(402, "Payment required: add a payment method or subscribe to PRO.")
        repo.hardware = flavor

    def _space(self, repo: Repo, verb: str) -> Any:
        if verb == "runtime":
            stage = repo.stages.pop(0) if len(repo.stages) > 1 else repo.stages[0]
            return self._runtime(repo, stage)
        if verb in ("restart", "hardware"):
            repo = self._writable(repo.kind, repo.name)
            if verb == "hardware":
                self._ask_hardware(repo, json.loads(self.body)["flavor"])
            repo.stages = list(self.hub.builds)
            return self._runtime(repo, repo.stages[0])
        repo = self._writable(repo.kind, repo.name)
        values = repo.variables if verb == "variables" else repo.secrets
        if self.command == "POST":
            asked = json.loads(self.body)
            values[asked["key"]] = asked["value"]
        if self.command == "DELETE":
            values.pop(json.loads(self.body)["key"], None)
        shown = {key: {"key": key, "description": None, "updatedAt": now()} for key in values}
        return {k: v | ({"value": values[k]} if verb == "variables" else {}) for k, v in shown.items()}

    def _collection(self, rest: list[str]) -> Any:
        known = self.hub.collections
        asked = json.loads(self.body) if self.body else {}
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if not rest:
            words = re.sub(r"[^a-z0-9]+", "-", asked["title"].lower()).strip("-")
            slug = f"{asked['namespace']}/{words}-{hashlib.sha1(asked['title'].encode()).hexdigest()[:24]}"
            if slug in known:
                raise HubError(409, "a collection of this title exists", slug=slug)
            known[slug] = {
                "slug": slug, "title": asked["title"], "description": asked.get("description"), "items": [],
                "owner": {"name": asked["namespace"], "type": "user"}, "lastUpdated": now(), "position": 0,
                "private": asked.get("private", False), "theme": "blue", "upvotes": 0,
            }  # fmt: skip
            return known[slug]
        found = known.get("/".join(rest[:2]))
        if found is None:
            raise HubError(404, "no such collection")
        if self.command == "GET":
            return found
        if self.command == "DELETE":
            return known.pop(found["slug"]) and {}
        if rest[2:] == ["items"]:
            item = asked["item"]
            if any(there["id"] == item["id"] for there in found["items"]):
                raise HubError(409, "already in the collection")
            place = {"_id": f"{next(self.hub.ids):024x}", "position": len(found["items"])}
            found["items"].append(item | place | ({"note": {"text": asked["note"]}} if asked.get("note") else {}))
        return found
