"""A repository as a local folder: for a look before pushing, for a web server, or for a hub's own tools."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.errors import StorageError
from toolchain.files import atomic_path, files_below
from toolchain.places import LOCAL
from toolchain.publish.content import Content, Digests


class _Files(Mapping[str, Digests]):
    """Path → digests, computed on access: a folder may hold many files of others."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def __getitem__(self, path: str) -> Digests:
        return Content(self._files[path]).digests

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclass(frozen=True)
class FolderDestination:
    """A folder, which need not exist."""

    path: Path

    @property
    def name(self) -> str:
        return f"{LOCAL}:{self.path}"

    def there(self) -> Mapping[str, Digests]:
        if self.path.exists() and not self.path.is_dir():
            raise StorageError(f"{self.path} is not a folder: name another")
        files = files_below(self.path) if self.path.is_dir() else []
        return _Files({file.relative_to(self.path).as_posix(): file for file in files})

    def read(self, path: str) -> bytes:
        return (self.path / path).read_bytes()

    def write(self, files: Mapping[str, Content], gone: Sequence[str], message: str) -> str:  # noqa: ARG002 - hubs keep it
        for path in gone:
            (self.path / path).unlink(missing_ok=True)
        for path, content in files.items():
            with atomic_path(self.path / path) as temporary:
                if isinstance(content.data, bytes):
                    temporary.write_bytes(content.data)
                else:
                    shutil.copyfile(content.data, temporary)
        return str(self.path)
