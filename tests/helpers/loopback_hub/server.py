"""The Hub's protocol, as far as huggingface_hub uses it for models.

Create, preupload, LFS batch and upload, commit (also as a pull request), resolve with ETag, ranges and the redirect of
large files to another host, tree, revision, refs, branches, model info, whoami, validate-yaml.
"""

import base64
import json
import re
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Optional
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.helpers.loopback_hub.faults import Fault
from tests.helpers.loopback_hub.repositories import (
    DiskRepositories,
    HubFile,
    Refusal,
    Repositories,
    is_large,
    not_found,
)


class Request(NamedTuple):
    method: str
    path: str
    status: int
    token: Optional[str] = None  # that the client sent


class HubServer:
    """Answers on a free port of the loopback, inside a ``with`` block.

    Args:
        repositories: what it serves; replace the attribute to serve others. Writing needs ``DiskRepositories``.

    Attributes:
        url: of the server. Large files are served from another host name of it, as by the Hub's CDN.
        requests: every request that was answered, in order.
        faults: to come; each takes the first that matches.
    """

    def __init__(self, repositories: Repositories) -> None:
        self._server = _Server(repositories)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="hub", daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.requests = self._server.requests
        self.faults = self._server.faults

    @property
    def repositories(self) -> Repositories:
        return self._server.repositories

    @repositories.setter
    def repositories(self, repositories: Repositories) -> None:
        self._server.repositories = repositories

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, repositories: Repositories) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.granted: dict[str, HubFile] = {}  # that the CDN may give out

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"  # the client keeps its connection open; every answer has a Content-Length
    routes: ClassVar[list[tuple[str, re.Pattern[str], Callable[..., None]]]] = []

    def do_HEAD(self) -> None:
        self._dispatch()

    do_GET = do_POST = do_PUT = do_HEAD

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.fault = next((f for f in self.server.faults if f.takes(self.command, url.path)), Fault())
        time.sleep(self.fault.stall)
        self.body = self._read_body() if self.command in ("POST", "PUT") else None
        if self.fault.status is not None:
            return self._send_bytes(self.fault.status, b"", **self.fault.headers)
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for wanted, pattern, answer in self.routes:
                found = pattern.fullmatch(url.path) if wanted == method else None
                if found:
                    return answer(self, **{key: unquote(value) for key, value in found.groupdict().items()})
            raise Refusal(404, "", f"nothing is served at {method} {url.path}")
        except Refusal as error:
            self._refuse(error)
        except OSError:
            raise
        except Exception as error:
            traceback.print_exc()
            self._refuse(Refusal(500, "InternalError", repr(error)))
        finally:
            if self.body is not None:
                self.body.unlink(missing_ok=True)

    @property
    def token(self) -> Optional[str]:
        header = self.headers.get("Authorization")
        return header.removeprefix("Bearer ") if header else None

    @property
    def disk(self) -> DiskRepositories:
        if not isinstance(self.server.repositories, DiskRepositories):
            raise Refusal(405, "", "these repositories can only be downloaded from")
        return self.server.repositories

    def _json(self) -> Any:
        assert self.body is not None
        return json.loads(self.body.read_text(encoding="utf-8") or "null")

    # -- downloads ---------------------------------------------------------------------------------------------------

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        file, commit = self.server.repositories.file(repo_id, revision, name, self.token)
        linked = {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(file.size)} if file.lfs else {}
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"', **linked}
        if file.lfs:  # to another host, as the Hub does, with no need of a token there
            self.server.granted[file.sha256] = file
            location = f"http://localhost:{self.server.server_port}/cdn/{file.sha256}/{name.rpartition('/')[2]}"
            self._send_bytes(302, b"", Location=location, **headers)
        else:
            self._send_file(file, headers)

    def cdn(self, sha256: str, name: str) -> None:
        if sha256 not in self.server.granted:
            raise not_found("EntryNotFound", sha256)
        self._send_file(self.server.granted[sha256], {"ETag": f'"{sha256}"'})

    def _send_file(self, file: HubFile, headers: dict[str, str]) -> None:
        content = file.path.read_bytes() if self.fault.content is None else self.fault.content
        status, start = 200, 0
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span:
            start, end = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
            if start >= len(content):
                return self._send_bytes(416, b"", **{"Content-Range": f"bytes */{len(content)}"})
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}
            content = content[start : end + 1]
        self._send_bytes(status, content, **{"Accept-Ranges": "bytes", **headers})

    # -- the API -----------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        user = self.disk.user(self.token)
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        self._send_json({"type": "user", "name": user.name, "orgs": [{"name": name} for name in user.organisations]})

    def create(self) -> None:
        asked = self._json()
        user = self.disk.user(self.token)
        repo_id = f"{asked.get('organization') or (user.name if user else '')}/{asked['name']}"
        self.disk.create(repo_id, asked.get("visibility") == "private" or bool(asked.get("private")), self.token)
        self._send_json({"url": f"http://127.0.0.1:{self.server.server_port}/{repo_id}", "name": repo_id})

    def info(self, repo_id: str, revision: str = "main") -> None:
        commit, files = self.disk.tree(repo_id, revision, self.token)
        private = self.disk.info(repo_id, self.token)["private"]
        siblings = [{"rfilename": name} for name in files]
        self._send_json({"id": repo_id, "modelId": repo_id, "sha": commit, "private": private, "siblings": siblings})

    def tree(self, repo_id: str, revision: str, under: str = "") -> None:
        _, files = self.disk.tree(repo_id, revision, self.token)
        entries = [self._entry(name, file) for name, file in files.items() if name.startswith(under)]
        self._send_json(entries)

    @staticmethod
    def _entry(name: str, file: HubFile) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": file.size, "oid": file.etag[:40]}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
        return entry

    def refs(self, repo_id: str) -> None:
        named = self.disk.info(repo_id, self.token)["refs"]
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in named.items()
            if not name.startswith("refs/")
        ]
        self._send_json({"branches": branches, "tags": [], "converts": []})

    def branch(self, repo_id: str, name: str) -> None:
        self.disk.create_branch(repo_id, name, self.token)
        self._send_json({})

    def validate_yaml(self) -> None:
        text = self._json()["content"]
        errors = []
        try:
            front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
            if not isinstance(front, dict):
                errors.append("the front matter is no mapping")
            else:
                errors += wrong_fields(front)
        except yaml.YAMLError as error:
            errors.append(str(error))
        if errors:
            reply = {"errors": [{"message": message} for message in errors], "warnings": []}
            return self._send_json(reply, status=400)
        self._send_json({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        _, files = self.disk.tree(repo_id, revision, self.token)
        reply = []
        for asked in self._json()["files"]:
            name = asked["path"]
            mode = "lfs" if is_large(name) else "regular"
            oid = files[name].etag if name in files else None
            reply.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": reply})

    def lfs_batch(self, repo_id: str) -> None:
        self.disk.info(repo_id, self.token)
        objects = []
        for asked in self._json()["objects"]:
            entry: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if not self.disk.object(asked["oid"]).exists():
                href = f"http://127.0.0.1:{self.server.server_port}/lfs/{asked['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, sha256: str) -> None:
        assert self.body is not None
        self.disk.put_object(sha256, self.body)
        self._send_bytes(200, b"")

    def commit(self, repo_id: str, revision: str) -> None:
        assert self.body is not None
        message, changes = "", dict[str, Optional[HubFile]]()
        for line in self.body.read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                content = base64.b64decode(value["content"])
                scratch = Path(tempfile.mkstemp(dir=self.disk.folder)[1])
                scratch.write_bytes(content)
                sha256 = HubFile.of(scratch).sha256
                self.disk.put_object(sha256, scratch)
                changes[value["path"]] = HubFile(self.disk.object(sha256), sha256, lfs=False)
            elif item["key"] == "lfsFile":
                if not self.disk.object(value["oid"]).exists():
                    raise Refusal(400, "", f"{value['path']} was not uploaded")
                changes[value["path"]] = HubFile(self.disk.object(value["oid"]), value["oid"])
            elif item["key"] == "deletedFile":
                changes[value["path"]] = None
            else:
                raise Refusal(400, "", f"unknown operation {item['key']}")
        request = self.query.get("create_pr") == ["1"]
        commit, number = self.disk.commit(repo_id, revision, message, changes, self.token, pull_request=request)
        url = f"http://127.0.0.1:{self.server.server_port}/{repo_id}"
        reply = {"success": True, "commitOid": commit, "commitUrl": f"{url}/commit/{commit}", "hookOutput": ""}
        if number is not None:
            reply["pullRequestUrl"] = f"{url}/discussions/{number}"
        self._send_json(reply)

    # -- HTTP --------------------------------------------------------------------------------------------------------

    def _read_body(self) -> Path:
        """The body, in a file: it may be the weights of a network."""
        handle, name = tempfile.mkstemp(prefix="loopback-hub-")
        with open(handle, "wb") as stream:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    stream.write(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
            else:
                left = int(self.headers.get("Content-Length", 0))
                while left and (chunk := self.rfile.read(min(left, 1 << 20))):
                    stream.write(chunk)
                    left -= len(chunk)
        return Path(name)

    def _send_json(self, content: Any, status: int = 200) -> None:
        self._send_bytes(status, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def _send_bytes(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if self.fault.cut_after is None else content[: self.fault.cut_after])
        if self.fault.cut_after is not None:
            self.close_connection = True

    def _refuse(self, error: Refusal) -> None:
        message = str(error).encode("unicode_escape").decode()  # one line of ASCII
        codes = {"X-Error-Code": error.code} if error.code else {}
        content = b"" if self.command == "HEAD" else json.dumps({"error": message}).encode()
        self._send_bytes(error.status, content, **codes, **{"X-Error-Message": message})

    def log_request(self, code: object = "-", size: object = "-") -> None:
        self.server.requests.append(Request(self.command, self.path, int(str(code)), self.token))

    def log_message(self, format: str, *args: object) -> None:  # the requests are recorded; the terminal is pytest's
        pass


def wrong_fields(front: dict[str, Any]) -> list[str]:
    """What the Hub refuses in the front matter of a model card, as far as a card of ours could have it."""

    def texts(value: object) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))

    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "license": (lambda v: isinstance(v, str) and bool(re.fullmatch(r"[a-z0-9.-]+", v)), "one of the list"),
        "library_name": (lambda v: isinstance(v, str), "a string"),
        "pipeline_tag": (lambda v: v == "image-classification", "one of the list"),
        "tags": (lambda v: isinstance(v, list) and texts(v), "an array of strings"),
        "datasets": (texts, "an array of strings"),
        "metrics": (texts, "an array of strings"),
        "base_model": (texts, "a string or an array of strings"),
        "model-index": (is_model_index, "an array of models with results"),
    }
    return [f'"{key}" must be {what}' for key, (right, what) in rules.items() if key in front and not right(front[key])]


def is_model_index(value: object) -> bool:
    try:
        return all(
            isinstance(entry["name"], str)
            and all(
                {"type", "name"} <= set(result["dataset"])
                and isinstance(result["task"]["type"], str)
                and all(isinstance(metric["value"], (int, float)) and metric["type"] for metric in result["metrics"])
                for result in entry["results"]
            )
            for entry in value  # type: ignore[attr-defined]
        )
    except (TypeError, KeyError, AttributeError):
        return False


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_Handler.routes = [
    (method, re.compile(pattern), answer)
    for method, pattern, answer in (
        ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<name>.+)", _Handler.resolve),
        ("GET", r"/cdn/(?P<sha256>[0-9a-f]{64})/(?P<name>[^/]+)", _Handler.cdn),
        ("GET", r"/api/whoami-v2", _Handler.whoami),
        ("POST", r"/api/repos/create", _Handler.create),
        ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
        ("GET", rf"/api/models/{_REPO}", _Handler.info),
        ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", _Handler.info),
        ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}", _Handler.tree),
        ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}/(?P<under>.+)", _Handler.tree),
        ("GET", rf"/api/models/{_REPO}/refs", _Handler.refs),
        ("POST", rf"/api/models/{_REPO}/branch/(?P<name>[^/]+)", _Handler.branch),
        ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
        ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
        ("POST", rf"/{_REPO}.git/info/lfs/objects/batch", _Handler.lfs_batch),
        ("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})", _Handler.lfs_put),
    )
]
