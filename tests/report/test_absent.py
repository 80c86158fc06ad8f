"""What is said where no finished run is: the nearest thing that could have been meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolchain.errors import StorageError
from toolchain.publish.manifest import Manifest
from toolchain.report.absent import require_run


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current folder with a finished run, one that was interrupted, and other files."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/a/onnx", "cut/.slimvit", "other"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("runs/a/report.json", "runs/a/onnx/x.onnx", "other/note.txt"):
        (tmp_path / file).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("named", "why", "hint"),
    [
        ("runs/a/report.json", "it is a file", "it lies in a run, so give runs/a"),
        ("runs/a/onnx", "it has no report.json", "it lies in a run, so give runs/a"),
        ("runs/a/onnx/x.onnx", "it is a file", "it lies in a run, so give runs/a"),
        ("runs", "it has no report.json", "runs lie in it, so give runs/a"),
        ("cut", "it has no report.json", "was not finished, so start its command again"),
        ("other", "it has no report.json", "give the folder that the --out"),
        ("other/note.txt", "it is a file", "give the folder that the --out"),
        ("run/*", "it is not there, seen from ", "give the folder that the --out"),
        ("runs/a/gone", "it is not there, seen from ", "give the folder that the --out"),
    ],
)
def test_what_was_named_and_what_to_give(place, named, why, hint):
    with pytest.raises(StorageError) as caught:
        require_run(Path(named))
    assert str(caught.value).startswith(f"{named} is not the folder of a finished run: {why}")
    assert hint in str(caught.value)


def test_a_manifest_is_missed_in_the_same_words(place):
    with pytest.raises(
        StorageError, match=r"runs/a is not the folder of a finished run: it has no manifest.json; give"
    ):
        Manifest.load(Path("runs/a"))
