"""`slimvit push`: what it lists, writes and refuses, with the exit codes that docs/commands.md promises."""

from __future__ import annotations

import json

import pytest
from hub_server import TOKEN, visited


def test_a_dry_run_lists_and_writes_nothing(command, finished, tmp_path):
    to = tmp_path / "repository"
    outcome = command("push", finished.folder, f"local-dir:{to}", "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "onnx/model.onnx" in outcome.out
    assert "Nothing was written." in outcome.out
    assert not to.exists()
    asked = command("push", finished.folder, "hf://org/name@small", "--dry-run", "--private", "--json")
    assert [file["path"] for file in json.loads(asked.out)["files"]] == [
        "README.md",
        "config.json",
        "onnx/model.onnx",
        "plan.json",
        "preprocessor_config.json",
    ]


def test_a_folder_is_written_once_and_foreign_files_stay(command, finished, tmp_path):
    to, labels = tmp_path / "repository", tmp_path / "labels.txt"
    labels.write_text("".join(f"digit {index}\n" for index in range(10)))
    push = ("push", finished.folder, f"local-dir:{to}", "--labels", labels, "--license", "mit")
    outcome = command(*push)
    assert (outcome.code, outcome.out) == (0, f"6 files written, 0 unchanged: {to}\n")
    assert json.loads((to / "config.json").read_text())["id2label"]["3"] == "digit 3"
    assert "license: mit" in (to / "README.md").read_text()
    assert json.loads(command(*push, "--json").out)["written"] == []
    (to / "README.md").write_text("mine")
    refused = command(*push)
    assert refused.code == 74
    assert "README.md, which slimvit did not write or which was changed since" in refused.err
    assert (to / "README.md").read_text() == "mine"
    dry = command(*push, "--dry-run")
    assert (dry.code, dry.out, dry.err) == (74, "", refused.err)
    assert command(*push, "--dry-run", "--overwrite").code == 0
    assert (to / "README.md").read_text() == "mine"
    assert command(*push, "--overwrite").code == 0
    assert (to / "README.md").read_text() != "mine"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # within the hub's client
def test_a_hub_is_written_and_no_token_is_printed(command, finished, tmp_path, monkeypatch):
    with visited(monkeypatch, tmp_path / "hub") as hub:
        outcome = command("push", finished.folder, "hf://org/name", "--revision", "small", "--private")
        assert outcome.code == 0, outcome.err
        assert outcome.out == f"6 files written, 0 unchanged: {hub.url}/org/name/tree/small\n"
        repository = hub.repositories["org/name"]
        assert repository.private
        assert "onnx/model.onnx" in repository.branches["small"]
        hub.may_write = False
        refused = command("push", finished.folder, "hf://org/other")
        assert refused.code == 74
        assert refused.err.startswith("slimvit: error: the token may not write org/other: ")
        monkeypatch.delenv("HF_TOKEN")
        nameless = command("push", finished.folder, "hf://org/other")
        assert nameless.code == 74
        assert "there is no token to write org/other with: log in with `hf auth login`, or set HF_TOKEN" in nameless.err
    for each in (outcome, refused, nameless):
        assert TOKEN not in each.out + each.err


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (2, ["org/name"], "write hf://ORG/NAME, or local-dir:PATH"),
        (2, ["hf://org"], "write hf://ORG/NAME"),
        (2, ["local-dir:there", "--private"], "leave them out for a folder"),
        (2, ["hf://org/name@a", "--revision", "b"], "name two branches"),
        (74, ["local-dir:there", "--labels", "none.txt"], "cannot read none.txt"),
    ],
)
def test_what_cannot_be_pushed_is_told(command, finished, code, arguments, words):
    outcome = command("push", finished.folder, *arguments)
    assert (outcome.code, outcome.out) == (code, "")
    assert len(outcome.err.splitlines()) == 1
    assert words in outcome.err


@pytest.mark.parametrize("below", ["", "/onnx", "/new/folder"])
def test_a_run_is_not_pushed_into_its_own_folder(command, finished, below):
    outcome = command("push", finished.folder, f"local-dir:{finished.folder}{below}")
    assert (outcome.code, outcome.out) == (2, "")
    assert "the run's own folder, or lies in it: name a folder elsewhere" in outcome.err


def test_a_folder_that_is_no_run_is_told(command, tmp_path):
    outcome = command("push", tmp_path, "hf://org/name")
    assert outcome.code == 74
    assert "is not the folder of a finished run" in outcome.err
