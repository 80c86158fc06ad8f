"""Class maps: folders of a subset, numbered as the model's outputs are."""

import json

import pytest
from test_folders import CONFIG, fill, hf_splits, open_
from timm.data.imagenet_info import ImageNetInfo

from toolchain.data import open_source
from toolchain.data.classes import read_classes
from toolchain.data.transforms import Wanted
from toolchain.errors import DataError, ModelError
from toolchain.places import CLASS_LISTS
from toolchain.recipe import Recipe


def labels(source):
    return sorted({int(label) for images in source.splits.values() for label in images.labels})


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_folders_are_numbered_by_the_map_and_not_by_their_order(tmp_path):
    """Kind: a subset of the model's classes, whose folders are numbered anew from 0."""
    root = fill(tmp_path / "data", "cat", "dog")
    as_json = write(tmp_path / "c.json", {"dog": 3, "eel": 9, "cat": 7})
    as_text = write(tmp_path / "c.txt", "ant\nbee\ncat\r\ndog\n\n")
    assert labels(open_(root)) == [0, 1]
    source = open_(root, classes=as_json, outputs=10)
    assert labels(source) == [3, 7]
    assert (source.num_classes, bool(source.classes)) == (2, True)
    assert source.notes == (
        "Accuracy is over 2 of the model's 10 classes, by data.classes; any class can be predicted.",
    )
    assert labels(open_(root, classes=as_text)) == [2, 3]
    assert len({open_(root, classes=classes).digest for classes in ("", as_json, as_text)}) == 3
    one = fill(tmp_path / "one", "dog")  # of one class, too
    assert labels(open_(one, classes=as_json)) == [3]


def test_the_map_must_fit_the_model(tmp_path):
    source = open_(fill(tmp_path / "data", "cat", "dog"), classes=write(tmp_path / "c.json", {"dog": 3, "cat": 7}))
    source.check_classes(8)
    source.check_classes(1000)
    with pytest.raises(ModelError, match=r"class numbers up to 7, but the model's 7 outputs are numbered from 0 to 6"):
        source.check_classes(7)


@pytest.mark.parametrize("kind", ["imagefolder", "hf"])
def test_labels_in_another_order_than_the_model_names_its_outputs_are_refused(tmp_path, kind):
    """Kind: accuracy by the labels of other classes. Folders are in the order of their names, a model need not be."""
    root = fill(tmp_path / "data", "cat", "dog") if kind == "imagefolder" else hf_splits(tmp_path, train=[0, 1] * 6)
    source = open_(root, kind)
    assert source.class_names == {"cat": 0, "dog": 1}
    for names in ((), ("cat", "dog"), ("ant", "bee"), ("CAT ", "puppy")):
        source.check_classes(2, names)
    with pytest.raises(
        ModelError, match=r"'cat' is class 0 of the data source .* and output 1 of the model.*--classes"
    ):
        source.check_classes(2, ("Dog", "Cat"))
    mapped = open_(root, kind, classes=write(tmp_path / "c.txt", "dog\ncat"))
    assert mapped.class_names == {"cat": 1, "dog": 0}
    mapped.check_classes(2, ("Dog", "Cat"))


def test_numbers_of_folders_that_a_trainer_may_have_counted_otherwise_are_told(tmp_path):
    """Kind: accuracy by the labels of other classes. Folders 1, 2 and 10 are in the order 1, 10, 2 of their names."""
    numbered = fill(tmp_path / "numbers", "1", "2", "10")
    assert open_(numbered).class_names == {"1": 0, "10": 1, "2": 2}
    assert open_(numbered).notes == open_(numbered).order_noted(("1", "10", "2")).notes == (), (
        "the model's names settle it"
    )
    (note,) = open_(numbered).order_noted(()).notes
    assert "alphabetical order, as torchvision does it: class 1 is '10'." in note
    assert "2 before 10 and without regard to case: class 1 is '2'. If it trained the model, set data.classes" in note
    mapped = open_(numbered, classes=write(tmp_path / "c.txt", "1\n2\n10"))
    assert not any("alphabetical" in note for note in mapped.order_noted(()).notes)
    assert open_(fill(tmp_path / "padded", "01", "02", "10")).order_noted(()).notes == ()


def test_every_list_is_timms(tmp_path):
    for name in CLASS_LISTS:
        numbers = read_classes(name)
        assert list(numbers) == ImageNetInfo(name).label_names()
        assert list(numbers.values()) == list(range(len(numbers)))
    assert read_classes("imagenet-1k")["n01440764"] == 0
    root = fill(tmp_path, "train/n01443537", "train/n15075141", "val/n15075141")
    source = open_(root, classes="imagenet-1k", outputs=1000)
    assert labels(source) == [1, 999]
    assert "2 of the model's 1000 classes" in source.notes[0]


def test_names_of_a_hugging_face_data_set_are_mapped_too(tmp_path):
    root = hf_splits(tmp_path, train=[0, 1] * 6)
    assert labels(open_(root, "hf", classes=write(tmp_path / "c.txt", "ant\ndog\ncat"))) == [1, 2]
    datasets = pytest.importorskip("datasets")
    plain = hf_splits(tmp_path / "plain", train=([0, 1] * 6, datasets.Value("int64")))
    with pytest.raises(DataError, match="no class names"):
        open_(plain, "hf", classes="imagenet-1k")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("c.json", {"cat": 1}, r"does not name dog, of .*data; it names cat"),
        ("c.json", '{"cat": 1, "cat": 2, "dog": 0}', "names 'cat' twice: 1 and 2"),
        ("c.json", {"cat": 1, "dog": 1}, "gives 'cat' and 'dog' the same number 1"),
        ("c.json", {"cat": 1, "dog": -1}, "not of the form"),
        ("c.json", {"cat": 1, "dog": 2.0}, "not of the form"),
        ("c.json", {"cat": 1, "dog": True}, "not of the form"),
        ("c.json", {"0": ["n01440764", "tench"]}, "not of the form"),
        ("c.json", ["cat", "dog"], "not of the form"),
        ("c.json", {}, "not of the form"),
        ("c.json", "cat", "is not JSON"),
        ("c.txt", "cat\n\ndog\n", "line 2 of"),
        ("c.txt", "cat\ndog\ncat", "names 'cat' twice: 0 and 2"),
        ("c.txt", "\n", "is empty"),
        (
            "c.txt",
            None,
            r"cannot read data\.classes .*No such file or directory; name one that is there; .*imagenet-1k, imagenet-12k",
        ),
    ],
)
def test_a_map_that_is_not_clear_is_refused_in_one_line(tmp_path, name, content, what):
    root = fill(tmp_path / "data", "cat", "dog")
    path = str(tmp_path / name) if content is None else write(tmp_path / name, content)
    with pytest.raises(DataError, match=what) as caught:
        open_(root, classes=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["digits", "none", "images"])
def test_a_source_without_class_names_takes_no_map(tmp_path, kind):
    """Kind: a key that is ignored without a word."""
    name = f"images:{fill(tmp_path, 'cat')}" if kind == "images" else kind
    with pytest.raises(DataError, match=r"data\.classes maps the names of classes"):
        open_source(name, Wanted((3, 8, 8), CONFIG), classes="imagenet-1k")


def test_the_recipe_names_a_list_or_a_file_beside_it(tmp_path):
    raw = {"model": {"name": "m"}, "compress": {"method": "none"}}
    named, file, elsewhere, none = (
        Recipe.from_dict({**raw, "data": {"source": "imagefolder:x", "classes": classes}}, base=base)
        for classes, base in (("imagenet-1k", tmp_path), ("c.txt", tmp_path), ("c.txt", tmp_path / "b"), ("", tmp_path))
    )
    assert named.data.classes == "imagenet-1k"
    assert file.data.classes == str(tmp_path / "c.txt")
    assert file.digest == elsewhere.digest  # what it holds is in the digest of the data
    assert len({named.digest, file.digest, none.digest}) == 3


def test_threads_change_no_digest(tmp_path, monkeypatch):
    raw = {"model": {"name": "m"}, "compress": {"method": "none"}}
    one, two = (Recipe.from_dict({**raw, "data": data}) for data in ({}, {"workers": 3}))
    assert one.digest == two.digest
    root = fill(tmp_path, "cat", "dog")
    sources = [open_(root, workers=workers) for workers in (None, 0, 3)]
    assert len({source.digest for source in sources}) == 1
    assert [source.split("train").workers for source in sources][1:] == [0, 3]
    assert sources[0].split("train").workers >= 1
    monkeypatch.setattr("toolchain.data.stored.usable_cores", lambda: 3)
    assert open_(root).split("train").workers == 3, "as many as the container has time for"


def test_a_list_of_another_data_set_than_the_models_is_refused(tmp_path):
    """Kind: a subset of classes. Numbers of one list are other classes of a model that was trained on another."""
    source = open_(fill(tmp_path, "n01440764", "n01443537"), classes="imagenet-1k")
    source.check_classes(1000)
    for outputs, words in ((21843, "that has imagenet-21k-goog"), (1234, "name a file with its classes")):
        with pytest.raises(DataError, match=f"'imagenet-1k' has 1000 classes and the model {outputs}.*{words}"):
            source.check_classes(outputs)
