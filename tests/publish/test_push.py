"""What others wrote stays, whether the place is a folder or a hub; a hub that refuses is told in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import TOKEN, Repository, visited
from huggingface_hub import hf_hub_download

from toolchain.errors import RecipeError, StorageError
from toolchain.publish.content import Content
from toolchain.publish.folder import FolderDestination
from toolchain.publish.hub import HubDestination
from toolchain.publish.push import RECEIPT, push

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # within the hub's client
FILES = {
    "README.md": Content.of_text("---\nlicense: mit\n---\n# A model\n"),
    "config.json": Content.of_text("{}\n"),
    "onnx/model.onnx": Content(b"\0weights" * 100),
}


class Place:
    """A hub's branch or a folder, and a way to look at it and to write there as others would."""

    def __init__(self, kind, hub, tmp_path):
        self.kind, self.hub, self.path = kind, hub, tmp_path / "repository"

    @property
    def destination(self):
        return HubDestination.of("org/name") if self.kind == "hub" else FolderDestination(self.path)

    def files(self):
        if self.kind == "hub":
            return dict(self.hub.repositories["org/name"].branches["main"])
        return {p.relative_to(self.path).as_posix(): p.read_bytes() for p in self.path.rglob("*") if p.is_file()}

    def edit(self, path, content):
        if self.kind == "hub":
            self.hub.repositories.setdefault("org/name", Repository()).branches["main"][path] = content
        else:
            (self.path / path).parent.mkdir(parents=True, exist_ok=True)
            (self.path / path).write_bytes(content)

    def push(self, files=FILES, **options):
        return push(files, self.destination, tool="slimvit 0", message="A push", **options)


@pytest.fixture(params=["hub", "folder"])
def place(request, hub, tmp_path):
    return Place(request.param, hub, tmp_path)


def test_everything_arrives_once(place):
    first = place.push()
    assert first.written == ("README.md", "config.json", "onnx/model.onnx", RECEIPT)
    there = place.files()
    assert {path: there[path] for path in FILES} == {path: content.data for path, content in FILES.items()}
    assert set(json.loads(there[RECEIPT])["files"]) == set(FILES)
    again = place.push()
    assert (again.written, set(again.unchanged), again.removed) == ((), set(FILES), ())
    assert place.files() == there


def test_only_what_changed_is_written_and_what_is_gone_is_removed(place):
    place.push()
    changed = {"README.md": Content.of_text("# Another card\n"), "onnx/model.onnx": FILES["onnx/model.onnx"]}
    done = place.push(changed)
    assert (done.written, done.unchanged, done.removed) == (
        ("README.md", RECEIPT),
        ("onnx/model.onnx",),
        ("config.json",),
    )
    assert "config.json" not in place.files()
    assert place.files()["README.md"] == b"# Another card\n"


@pytest.mark.parametrize("pushed_before", [False, True])
def test_files_of_others_stay(place, pushed_before):
    """Those that were there, and those of a push that someone edited since."""
    if pushed_before:
        place.push()
    place.edit("README.md", b"# Mine\n")
    place.edit("notes.txt", b"mine")
    before = place.files()
    new = {**FILES, "README.md": Content.of_text("# Newer\n")}
    with pytest.raises(StorageError, match=r"holds README\.md, which slimvit did not write .* pass --overwrite"):
        place.push(new)
    assert place.files() == before
    place.push(new, overwrite=True)
    assert place.files()["README.md"] == b"# Newer\n"
    assert place.files()["notes.txt"] == b"mine", "what a push has no file for is nobody's business"


def test_a_file_that_someone_edited_is_not_removed(place):
    place.push()
    place.edit("config.json", b'{"mine": 1}')
    done = place.push({"README.md": FILES["README.md"]})
    assert done.removed == ("onnx/model.onnx",)
    assert place.files()["config.json"] == b'{"mine": 1}'


def test_a_file_of_someone_else_that_is_the_same_stays_theirs(place):
    """It was never written here: no receipt lists it, and no later push removes or replaces it."""
    mine = FILES["config.json"].data
    place.edit("config.json", mine)
    done = place.push()
    assert done.unchanged == ("config.json",)
    assert set(json.loads(place.files()[RECEIPT])["files"]) == set(FILES) - {"config.json"}
    with pytest.raises(StorageError, match=r"holds config\.json, which slimvit did not write"):
        place.push({**FILES, "config.json": Content.of_text('{"a": 1}\n')})
    rest = {path: content for path, content in FILES.items() if path != "config.json"}
    assert place.push(rest).removed == ()
    assert place.files()["config.json"] == mine


def test_the_receipt_is_written_where_it_says_something_else(place):
    """Here somebody wrote what a push would have: the file is theirs from then on, although nothing else is written."""
    place.push()
    new = {**FILES, "config.json": Content.of_text('{"theirs": 1}\n')}
    place.edit("config.json", new["config.json"].data)
    assert place.push(new).written == (RECEIPT,)
    assert "config.json" not in json.loads(place.files()[RECEIPT])["files"]
    assert place.push(new).written == ()


def test_a_receipt_of_someone_else_is_a_foreign_file(place):
    place.edit(RECEIPT, b'{"schema": "other"}')
    with pytest.raises(StorageError, match=r"holds slimvit\.json, which"):
        place.push()


# A hub


def test_a_repository_is_made_public_or_private(hub):
    push(FILES, HubDestination.of("org/open"), tool="t", message="m")
    push(FILES, HubDestination.of("org/closed", private=True), tool="t", message="m")
    assert [hub.repositories[name].private for name in ("org/open", "org/closed")] == [False, True]
    assert hub.repositories["org/open"].messages == ["m"], "one commit"
    with pytest.raises(StorageError, match="is public: make it private in its settings first"):
        push(FILES, HubDestination.of("org/open", private=True), tool="t", message="m")


def test_a_repository_that_cannot_be_seen_is_not_written_over(hub):
    theirs = {"README.md": b"# Theirs\n"}
    hub.repositories["org/name"] = Repository(private=True, hidden=True, branches={"main": dict(theirs)})
    with pytest.raises(
        StorageError, match=r"^there is a repository org/name already, which the token may not read: choose"
    ):
        push(FILES, HubDestination.of("org/name"), tool="t", message="m")
    assert hub.repositories["org/name"].branches == {"main": theirs}


def test_a_gated_repository_is_not_taken_for_none(hub):
    hub.repositories["org/name"] = Repository(gated=True)
    with pytest.raises(StorageError, match=r"^org/name is gated: accept its conditions"):
        push(FILES, HubDestination.of("org/name"), tool="t", message="m")
    assert "POST /api/repos/create" not in hub.requests


def test_a_branch_is_made(hub):
    push(FILES, HubDestination.of("org/name"), tool="t", message="m")
    main = dict(hub.repositories["org/name"].branches["main"])
    new = {**FILES, "config.json": Content.of_text('{"a": 1}\n')}
    for destination in (HubDestination.of("org/name@small"), HubDestination.of("org/name", revision="small")):
        assert destination.name == "hf://org/name@small"
        done = push(new, destination, tool="t", message="m")
    assert done.written == ()
    assert hub.repositories["org/name"].branches["small"]["config.json"] == b'{"a": 1}\n'
    assert hub.repositories["org/name"].branches["main"] == main


def test_what_was_pushed_can_be_fetched(hub):
    push(FILES, HubDestination.of("org/name"), tool="t", message="m")
    assert Path(hf_hub_download("org/name", "config.json")).read_bytes() == FILES["config.json"].data


@pytest.mark.parametrize("place", ["name", "a/b/c", "a b/c", "/c"])
def test_what_is_no_repository_is_told(hub, place):
    with pytest.raises(RecipeError, match="write hf://ORG/NAME"):
        HubDestination.of(place)
    with pytest.raises(RecipeError, match="name two branches: leave one out"):
        HubDestination.of("a/b@c", revision="d")


def test_without_a_token_nothing_is_asked(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        StorageError, match="no token to write org/name with: log in with `hf auth login`, or set HF_TOKEN"
    ):
        HubDestination.of("org/name")
    assert hub.requests == []


def test_a_token_that_is_refused_is_told_and_not_repeated(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(StorageError, match=r"log in|there is no repository") as told:
        push(FILES, HubDestination.of("org/name"), tool="t", message="m")
    assert "hf_wrong" not in str(told.value)


def test_a_token_without_the_right_is_told(hub):
    hub.may_write = False
    with pytest.raises(
        StorageError, match=r"the token may not write org/name: the hub says .* the rights to create .*; log in"
    ) as told:
        push(FILES, HubDestination.of("org/name"), tool="t", message="m")
    assert TOKEN not in str(told.value)
    assert hub.repositories == {}


@pytest.mark.parametrize(("status", "words"), [(429, "wait some minutes"), (500, "fails with status 500")])
def test_a_hub_that_fails_is_told(hub, status, words, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.status = status
    with pytest.raises(StorageError, match=words):
        push(FILES, HubDestination.of("org/name"), tool="t", message="m")


def test_a_push_of_someone_else_in_between_is_not_overwritten(hub):
    destination = HubDestination.of("org/name")
    push(FILES, destination, tool="t", message="m")

    class Late(HubDestination):
        def write(self, files, gone, message):
            hub.repositories["org/name"].branches["main"]["other.txt"] = b"theirs"
            return super().write(files, gone, message)

    with pytest.raises(
        StorageError, match=r"someone else wrote to org/name meanwhile: the hub says .* happened since'; push again"
    ):
        push({"a": Content(b"b")}, Late("org/name"), tool="t", message="m")


def test_no_network_is_told_at_once(hub, monkeypatch, tmp_path):
    hub.close()
    with pytest.raises(StorageError, match=r"cannot be reached; check the network, or write to local-dir:PATH"):
        HubDestination.of("org/name")
    with (
        visited(monkeypatch, tmp_path / "cache", HF_HUB_OFFLINE=True),
        pytest.raises(StorageError, match="HF_HUB_OFFLINE is set: unset it"),
    ):
        HubDestination.of("org/name")
