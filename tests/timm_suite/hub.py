"""A loopback stand-in for the Hugging Face Hub: the real client over real HTTP, with no network.

``HubServer`` speaks the protocol and knows nothing of models. What it serves comes from a ``Repositories`` function,
of which ``StaticTimmModels`` is one.
"""

import hashlib
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. The Hub's ETag of a large file is the SHA-256 of its content."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "HubFile":
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        return cls(path, digest.hexdigest())


class NotFound(Exception):
    """A 404. The client chooses its exception by the code, and timm tries other file names after ``EntryNotFound``."""

    def __init__(self, code: Literal["RepoNotFound", "RevisionNotFound", "EntryNotFound"], what: str) -> None:
        super().__init__(f"{code}: {what}")
        self.code = code


Repositories = Callable[[str, str], HubFile]  # (repository id, file name) -> the file on `main`, or NotFound


class Request(NamedTuple):
    method: str
    path: str
    status: int


class HubServer:
    """Serves files at ``/<owner>/<name>/resolve/main/<file>``, on a free port of the loopback, inside a ``with`` block.

    The client reads ``HF_ENDPOINT`` when it is imported: set it to ``url`` before.

    Attributes:
        url: of the server.
        requests: every request that was answered, in order.
    """

    def __init__(self, repositories: Repositories) -> None:
        self._server = _Server(repositories)
        self._thread = threading.Thread(target=self._server.serve_forever, name="hub", daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.requests = self._server.requests

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
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


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"  # the client keeps its connection open; every answer has a Content-Length

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        try:
            repo_id, file = self._find()
        except NotFound as error:
            self._refuse(404, error.code, str(error))
        except Exception as error:
            traceback.print_exc()
            self._refuse(500, "InternalError", repr(error))
        else:
            self._send(repo_id, file)

    def _find(self) -> tuple[str, HubFile]:
        parts = urlsplit(self.path).path.removeprefix("/").split("/", 4)
        match [unquote(part) for part in parts]:
            case [owner, name, "resolve", revision, filename]:
                repo_id = f"{owner}/{name}"
            case _:
                raise NotFound("RepoNotFound", f"nothing is served at {self.path}")
        file = self.server.repositories(repo_id, filename)
        if revision not in ("main", _commit(repo_id)):
            raise NotFound("RevisionNotFound", f"{repo_id} has only main, not {revision}")
        return repo_id, file

    def _send(self, repo_id: str, file: HubFile) -> None:
        size = str(file.path.stat().st_size)
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", size)
        self.send_header("ETag", f'"{file.sha256}"')
        self.send_header("X-Repo-Commit", _commit(repo_id))
        self.send_header("X-Linked-ETag", f'"{file.sha256}"')
        self.send_header("X-Linked-Size", size)
        self.end_headers()
        if self.command == "GET":
            with file.path.open("rb") as stream:
                self.connection.sendfile(stream)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message.encode("unicode_escape").decode())  # one line of ASCII
        self.end_headers()

    def log_request(self, code: object = "-", size: object = "-") -> None:
        self.server.requests.append(Request(self.command, self.path, int(str(code))))

    def log_message(self, format: str, *args: object) -> None:  # the requests are recorded; the terminal is pytest's
        pass


def _commit(repo_id: str) -> str:
    """The one commit of a repository: 40 hexadecimal digits, always the same."""
    return hashlib.sha1(repo_id.encode()).hexdigest()


class StaticTimmModels:
    """The repositories ``timm/<architecture>.<tag>``, with random weights.

    Names, shapes and number of classes are those of the static timm model with this tag, and that is all a test of
    loading can depend on. Files are made when first asked for, once for every architecture and number of classes.

    timm is imported only when a file is asked for: a process that talks to its own server sets ``HF_ENDPOINT`` first.

    Args:
        folder: where the files are kept; whoever made it deletes it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, HubFile] = {}
        self._lock = threading.Lock()

    def __call__(self, repo_id: str, filename: str) -> HubFile:
        from timm.models import get_pretrained_cfg, is_model_pretrained

        name = repo_id.removeprefix("timm/")
        cfg = get_pretrained_cfg(name) if is_model_pretrained(name) else None
        if cfg is None or cfg.hf_hub_id != repo_id:
            raise NotFound("RepoNotFound", f"timm has no weights at {repo_id}")
        if filename == "model.safetensors":
            path, write = self._folder / f"{cfg.architecture}-{cfg.num_classes}.safetensors", _write_weights
        elif filename == "config.json":
            path, write = self._folder / f"{name}.json", _write_config
        else:
            raise NotFound("EntryNotFound", f"{repo_id} has no {filename}")
        with self._lock:
            if path not in self._files:
                write(name, path)
                self._files[path] = HubFile.of(path)
            return self._files[path]


def _write_weights(name: str, path: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False)
    save_file(model.state_dict(), path, metadata={"format": "pt"})


def _write_config(name: str, path: Path) -> None:
    import timm
    from timm.models._hub import save_config_for_hf

    save_config_for_hf(timm.create_model(name, pretrained=False, device="meta"), str(path))
