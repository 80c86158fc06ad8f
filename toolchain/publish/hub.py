"""A repository of the Hugging Face hub, or of a hub with the same API, through its own client."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from toolchain.errors import RecipeError, SlimvitError, StorageError
from toolchain.places import HUB_URL
from toolchain.publish.content import Content, Digests
from toolchain.surgery.hub import reachable
from toolchain.surgery.refusals import CONFLICT, LOG_IN, refusal, status_of

MAIN = "main"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def branch_of(place: str, revision: str = "") -> tuple[str, str]:
    """("org/name", branch) that a user names as "org/name" or "org/name@branch"; no hub is asked.

    Raises:
        RecipeError: that is no name of a repository, or two branches are named.
    """
    repository, _, named = place.partition("@")
    if not REPOSITORY.fullmatch(repository):
        raise RecipeError(f"{HUB_URL}{place} names no repository: write {HUB_URL}ORG/NAME")
    if named and revision and named != revision:
        raise RecipeError(f"{HUB_URL}{place} and --revision {revision} name two branches: leave one out")
    return repository, named or revision or MAIN


class Api(Protocol):
    """The part of `huggingface_hub.HfApi` that is used here."""

    def repo_info(self, repo_id: str, *, revision: str | None = None) -> Any:
        """The description of a repository."""
        ...

    def list_repo_tree(self, repo_id: str, *, recursive: bool = False, revision: str | None = None) -> Iterable[Any]:
        """Its files and folders."""
        ...

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        """Where a file of it lies in the user's cache, once it was fetched."""
        ...

    def create_repo(self, repo_id: str, *, private: bool | None = None) -> Any:
        """Makes it; an error if it is there."""
        ...

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool = False) -> None:
        """Makes a branch of it."""
        ...

    def create_commit(
        self,
        repo_id: str,
        operations: Iterable[Any],
        *,
        commit_message: str,
        revision: str | None = None,
        parent_commit: str | None = None,
    ) -> Any:
        """Writes and removes files in one commit."""
        ...


@dataclass
class HubDestination:
    """A branch of a repository, which need not exist.

    Attributes:
        repository: "org/name".
        revision: the branch.
        private: whether nobody else may see it.
        api: the client.
    """

    repository: str
    revision: str = MAIN
    private: bool = False
    api: Api = field(default_factory=HfApi)
    _parent: str | None = field(default=None, init=False)
    _exists: bool = field(default=False, init=False)

    @staticmethod
    def of(place: str, *, revision: str = "", private: bool = False) -> HubDestination:
        """The branch that a user names as "org/name" or "org/name@branch".

        Raises:
            RecipeError: that is no name of a repository, or two branches are named.
            StorageError: there is no token, or no network.
        """
        repository, branch = branch_of(place, revision)
        if not reachable(constants.ENDPOINT):
            why = "HF_HUB_OFFLINE is set: unset it" if constants.HF_HUB_OFFLINE else "check the network"
            raise StorageError(
                f"cannot write to {HUB_URL}{repository}: the hub cannot be reached; {why}, or write to local-dir:PATH"
            )
        if get_token() is None:
            raise StorageError(refusal(LocalTokenNotFoundError(), repository, "write"))
        return HubDestination(repository, branch, private)

    @property
    def name(self) -> str:
        return f"{HUB_URL}{self.repository}" + (f"@{self.revision}" if self.revision != MAIN else "")

    def there(self) -> Mapping[str, Digests]:
        with self._told("read"):
            try:
                info = self.api.repo_info(self.repository)
            except GatedRepoError:  # which is there, whoever may read it
                raise
            except RepositoryNotFoundError:
                return {}
            self._exists = True
            if self.private and not info.private:
                raise StorageError(
                    f"{self.name} is public: make it private in its settings first, or leave --private out"
                )
            try:
                self._parent = self.api.repo_info(self.repository, revision=self.revision).sha
            except RevisionNotFoundError:  # the branch will begin where main is
                self._parent = info.sha
            entries = self.api.list_repo_tree(self.repository, recursive=True, revision=self._parent)
            return {entry.path: _digests(entry) for entry in entries if isinstance(entry, RepoFile)}

    def read(self, path: str) -> bytes:
        with self._told("read"):
            return Path(self.api.hf_hub_download(self.repository, path, revision=self._parent)).read_bytes()

    def write(self, files: Mapping[str, Content], gone: Sequence[str], message: str) -> str:
        with self._told("write"):
            if not self._exists:
                self._create()
            if self.revision != MAIN:
                self.api.create_branch(self.repository, branch=self.revision, exist_ok=True)
            if files or gone:
                self.api.create_commit(
                    self.repository,
                    [
                        *(CommitOperationAdd(path, content.data) for path, content in files.items()),
                        *(CommitOperationDelete(path) for path in gone),
                    ],
                    commit_message=message,
                    revision=self.revision,
                    parent_commit=self._parent,
                )
        return f"{constants.ENDPOINT}/{self.repository}/tree/{self.revision}"

    def _create(self) -> None:
        """Makes the repository; one that was not seen and is there holds files that nobody looked at, and is left alone."""
        try:
            self.api.create_repo(self.repository, private=self.private or None)
        except HfHubHTTPError as error:
            if status_of(error) != CONFLICT:
                raise
            raise StorageError(
                f"there is a repository {self.repository} already, which the token may not read: choose another name, or {LOG_IN} "
                "to a token that may"
            ) from error

    @contextlib.contextmanager
    def _told(self, right: str) -> Iterator[None]:
        """What a hub refuses in the block, as StorageError in one sentence."""
        try:
            yield
        except SlimvitError:
            raise
        except Exception as error:  # whatever the client and the network make of it
            raise StorageError(refusal(error, f"{self.repository}@{self.revision}", right)) from error


def _digests(entry: RepoFile) -> Digests:
    if entry.lfs is not None:
        return Digests(bytes=entry.size, sha256=entry.lfs.sha256)
    return Digests(bytes=entry.size, git=entry.blob_id)
