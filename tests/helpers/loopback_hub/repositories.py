"""Repositories on disk: content by its SHA-256, commits as JSON, and who may read and write what."""

import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Protocol


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. The Hub's ETag of a large file is the SHA-256 of its content."""

    path: Path
    sha256: str
    lfs: bool = True

    @classmethod
    def of(cls, path: Path, lfs: bool = True) -> "HubFile":
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        return cls(path, digest.hexdigest(), lfs)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def etag(self) -> str:
        """SHA-256 of a large file; of a small one, what git calls it."""
        return self.sha256 if self.lfs else git_hash(self.path.read_bytes())


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refusal(Exception):
    """An answer that is an error. The client chooses its exception by the code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def not_found(code: Literal["RepoNotFound", "RevisionNotFound", "EntryNotFound"], what: str) -> Refusal:
    """A 404. timm tries other file names after ``EntryNotFound``."""
    return Refusal(404, code, f"{code}: {what}")


class Repositories(Protocol):
    """What a server needs to answer downloads."""

    def file(self, repo_id: str, revision: str, name: str, token: Optional[str]) -> tuple[HubFile, str]:
        """The file and the commit (40 hexadecimal digits) that it was found in; Refusal otherwise."""
        ...


@dataclass(frozen=True)
class User:
    """Whom a token stands for."""

    name: str
    organisations: tuple[str, ...] = ()
    may_write: bool = True


class DiskRepositories:
    """Repositories under a folder, as the Hub keeps them: LFS objects, commits, branches, pull requests, privacy.

    Args:
        folder: ``objects/<sha256>`` holds the contents, ``<owner>/<name>.json`` a repository.
        users: by their token. Anyone may read what is public.
        others: repositories that can be downloaded from besides.
    """

    def __init__(self, folder: Path, users: Mapping[str, User], others: Optional[Repositories] = None) -> None:
        self.folder, self.users, self.others = folder, dict(users), others
        self._lock = threading.RLock()
        (folder / "objects").mkdir(parents=True, exist_ok=True)

    # -- access ------------------------------------------------------------------------------------------------------

    def user(self, token: Optional[str]) -> Optional[User]:
        if token is None:
            return None
        if token not in self.users:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.users[token]

    def _open(self, repo_id: str, token: Optional[str]) -> dict[str, Any]:
        user = self.user(token)
        path = self._path(repo_id)
        if not path.is_file():
            raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        repo: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if repo["private"] and (user is None or not self._owns(user, repo_id)):
            raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def _writable(self, repo_id: str, token: Optional[str], by_pull_request: bool = False) -> dict[str, Any]:
        repo = self._open(repo_id, token)
        user = self.user(token)
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        if not user.may_write or not (by_pull_request or self._owns(user, repo_id)):
            raise Refusal(403, "", f"you don't have the rights to write to {repo_id}")
        return repo

    @staticmethod
    def _owns(user: User, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in (user.name, *user.organisations)

    def _path(self, repo_id: str) -> Path:
        owner, slash, name = repo_id.partition("/")
        if not slash or not all(part and part.strip(".") and "/" not in part for part in (owner, name)):
            raise Refusal(400, "", f"invalid repository id {repo_id!r}")
        return self.folder / owner / f"{name}.json"

    def _store(self, repo_id: str, repo: Mapping[str, Any]) -> None:
        path = self._path(repo_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{uuid.uuid4().hex}")
        beside.write_text(json.dumps(repo), encoding="utf-8")
        os.replace(beside, path)

    # -- reading -----------------------------------------------------------------------------------------------------

    def file(self, repo_id: str, revision: str, name: str, token: Optional[str]) -> tuple[HubFile, str]:
        if self.others is not None and not self._path(repo_id).exists():
            return self.others.file(repo_id, revision, name, token)
        commit, files = self.tree(repo_id, revision, token)
        if name not in files:
            raise not_found("EntryNotFound", f"{repo_id} has no {name} at {revision}")
        return files[name], commit

    def tree(self, repo_id: str, revision: str, token: Optional[str]) -> tuple[str, dict[str, HubFile]]:
        repo = self._open(repo_id, token)
        commit = repo["refs"].get(revision, revision)
        if commit not in repo["commits"]:
            raise not_found("RevisionNotFound", f"{repo_id} has no {revision}")
        files = repo["commits"][commit]["files"]
        return commit, {
            name: HubFile(self.object(file["sha256"]), file["sha256"], file["lfs"]) for name, file in files.items()
        }

    def info(self, repo_id: str, token: Optional[str]) -> dict[str, Any]:
        return self._open(repo_id, token)

    def log(self, repo_id: str, revision: str = "main") -> list[str]:
        """Messages of the commits of a branch, the newest first, for a test to look at."""
        repo = json.loads(self._path(repo_id).read_text(encoding="utf-8"))
        commit, messages = repo["refs"][revision], []
        while commit:
            messages.append(repo["commits"][commit]["message"])
            commit = repo["commits"][commit]["parent"]
        return messages

    # -- writing -----------------------------------------------------------------------------------------------------

    def create(self, repo_id: str, private: bool, token: Optional[str]) -> None:
        user = self.user(token)
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        if not user.may_write or not self._owns(user, repo_id):
            raise Refusal(403, "", f"you don't have the rights to create a model under {repo_id.partition('/')[0]!r}")
        with self._lock:
            if self._path(repo_id).exists():
                raise Refusal(409, "", "You already created this model repo")
            first = uuid.uuid4().hex + "0" * 8
            commits = {first: {"parent": None, "message": "initial commit", "files": {}}}
            self._store(repo_id, {"private": private, "refs": {"main": first}, "commits": commits})

    def create_branch(self, repo_id: str, branch: str, token: Optional[str]) -> None:
        with self._lock:
            repo = self._writable(repo_id, token)
            if branch in repo["refs"]:
                raise Refusal(409, "", f"Reference {branch} already exists")
            repo["refs"][branch] = repo["refs"]["main"]
            self._store(repo_id, repo)

    def object(self, sha256: str) -> Path:
        return self.folder / "objects" / sha256

    def put_object(self, sha256: str, content: Path) -> None:
        if HubFile.of(content).sha256 != sha256:
            raise Refusal(400, "", "the content does not have the hash that was announced")
        shutil.move(content, self.object(sha256))

    def commit(
        self,
        repo_id: str,
        revision: str,
        message: str,
        changes: Mapping[str, Optional[HubFile]],  # None deletes
        token: Optional[str],
        pull_request: bool = False,
    ) -> tuple[str, Optional[int]]:
        """The new commit, and the number of its pull request."""
        with self._lock:
            repo = self._writable(repo_id, token, by_pull_request=pull_request)
            if revision not in repo["refs"]:
                raise not_found("RevisionNotFound", f"{repo_id} has no branch {revision}")
            parent = repo["refs"][revision]
            files = dict(repo["commits"][parent]["files"])
            for name, file in changes.items():
                if file is None:
                    if name not in files:
                        raise not_found("EntryNotFound", f"A file with this name doesn't exist: {name}")
                    del files[name]
                else:
                    files[name] = {"sha256": file.sha256, "lfs": file.lfs}
            entry = {"parent": parent, "message": message, "files": files}
            seed = json.dumps([repo_id, entry, time.time_ns()])
            commit = hashlib.sha1(seed.encode()).hexdigest()
            repo["commits"][commit] = entry
            number = None
            if pull_request:
                number = 1 + sum(ref.startswith("refs/pr/") for ref in repo["refs"])
                revision = f"refs/pr/{number}"
            repo["refs"][revision] = commit
            self._store(repo_id, repo)
            return commit, number

    def put(self, repo_id: str, files: Mapping[str, bytes], message: str = "by hand") -> str:
        """Commit contents without a client: what somebody else's tool may have uploaded. The repository is made."""
        owner = User(repo_id.partition("/")[0])
        token = f"hand-{owner.name}"
        self.users.setdefault(token, owner)
        if not self._path(repo_id).exists():
            self.create(repo_id, private=False, token=token)
        changes: dict[str, Optional[HubFile]] = {}
        for name, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            self.object(sha256).write_bytes(content)
            changes[name] = HubFile(self.object(sha256), sha256, lfs=is_large(name))
        return self.commit(repo_id, "main", message, changes, token)[0]


def is_large(name: str) -> bool:
    """What the Hub's .gitattributes of a new model repository sends to LFS, as far as we meet it."""
    return name.endswith((".safetensors", ".bin", ".pth", ".pt", ".png"))
