"""The digests by which a hub knows a file are those of the tools that it is made of."""

from __future__ import annotations

import hashlib
import subprocess

import pytest

from toolchain.publish.content import CHUNK, Content, Digests


@pytest.mark.parametrize("size", [0, 5, CHUNK + 7])
def test_digests_are_those_of_git_and_of_sha256sum(tmp_path, size):
    data = bytes(range(256)) * (size // 256 + 1)
    path = tmp_path / "file"
    path.write_bytes(data[:size])
    digests = Content(path).digests
    assert digests == Content(data[:size]).digests
    assert digests.bytes == size
    assert digests.sha256 == hashlib.sha256(data[:size]).hexdigest()
    blob = subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True).stdout.strip()
    assert digests.git == blob


def test_files_are_the_same_by_every_digest_that_both_have():
    whole = Digests(bytes=3, sha256="a", git="b")
    assert whole.same(Digests(bytes=3, sha256="a"))
    assert whole.same(Digests(bytes=3, git="b"))
    assert not whole.same(Digests(bytes=3, sha256="x", git="b"))
    assert not whole.same(Digests(bytes=4, sha256="a"))
    assert not whole.same(Digests(bytes=3)), "nothing is known of them"
