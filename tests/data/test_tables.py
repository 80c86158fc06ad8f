"""Which data set, configuration, revision and columns of the `datasets` library are read, and what is said where that is not clear."""

import json

import numpy as np
import pytest
from PIL import Image

from toolchain.data import open_source
from toolchain.data.tables import Place
from toolchain.data.transforms import Wanted
from toolchain.errors import DataError
from toolchain.export.preparation import resized_source
from toolchain.gate.config import DataSection
from toolchain.model import Preprocess

datasets = pytest.importorskip("datasets")
CONFIG = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}


def open_(name, **options):
    return open_source(f"hf:{name}", Wanted((3, 8, 8), CONFIG, calibration_images=0, **options))


def labels(source):
    """Row → label, over all splits, which are drawn class by class."""
    parts = [source.split(name) for name in ("train", "validation", "test")]
    return {
        row: label for part in parts for row, label in zip(part.positions.tolist(), part.labels.tolist(), strict=True)
    }


def pictures(root, count=12):
    """Files that all differ."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    return [str(root / f"{number}.png") for number in range(count)]


def saved(root, **columns):
    """A folder as `save_to_disk` writes it: two columns of images, and labels by name → (labels, classes)."""
    paths = pictures(root / "raw")
    rows, features = {"img": paths}, {"img": datasets.Image()}
    for name, (values, feature) in columns.items():
        rows[name], features[name] = values, feature
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(str(root / "saved"))
    return root / "saved"


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """As CIFAR-100 is: fine and coarse classes, and here a second column of images."""
    root = tmp_path_factory.mktemp("cifar")
    fine = [index % 4 for index in range(12)]
    return saved(
        root,
        fine_label=(fine, datasets.ClassLabel(names=["ant", "bee", "cat", "dog"])),
        coarse_label=([each // 2 for each in fine], datasets.ClassLabel(names=["insect", "pet"])),
        count=(list(range(12)), datasets.Value("int64")),
    )


def test_fine_and_coarse_classes_are_told_apart_by_the_recipe(cifar):
    """Kind: CIFAR-100 cannot be read at all, because it has two columns of classes."""
    with pytest.raises(
        DataError, match=r"set data\.label_column \(--label-column\) to one of fine_label, coarse_label, or to '' to"
    ):
        open_(cifar)
    sources = {column: open_(cifar, label_column=column) for column in ("fine_label", "coarse_label", "")}
    assert [source.num_classes for source in sources.values()] == [4, 2, None]
    assert len({source.digest for source in sources.values()}) == 3
    assert len({source.content for source in sources.values()}) == 1, "they are the same pictures"
    fine, coarse = (labels(sources[name]) for name in ("fine_label", "coarse_label"))
    assert {position: label // 2 for position, label in fine.items()} == coarse
    assert not sources[""].labelled


def test_a_column_of_whole_numbers_may_be_the_labels(cifar):
    assert open_(cifar, label_column="count").num_classes == 12


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"label_column": "fine"},
            r"no column 'fine' of labels; set data\.label_column .* to one of fine_label, coarse_label",
        ),
        ({"label_column": "img"}, "no column 'img' of labels"),
        (
            {"label_column": "", "image_column": "count"},
            r"no column 'count' of images; set data\.image_column .* to one of img",
        ),
    ],
)
def test_a_column_that_is_not_there_is_refused_with_those_that_are(cifar, asked, words):
    with pytest.raises(DataError, match=words):
        open_(cifar, **asked)


def test_one_of_two_columns_of_images_is_named(tmp_path):
    other = pictures(tmp_path / "other")[::-1]
    root = saved(tmp_path, depth=(other, datasets.Image()))
    with pytest.raises(DataError, match=r"set data\.image_column \(--image-column\) to one of img, depth$"):
        open_(root)
    img, depth = (open_(root, image_column=name) for name in ("img", "depth"))
    assert img.digest != depth.digest
    position = int(img.split("train").positions[0])
    twin = depth.split("train").positions.tolist().index(position)
    assert not img.split("train")[0][0].equal(depth.split("train")[twin][0])


def test_columns_that_may_be_labels_are_told_where_none_is_read(tmp_path):
    """Kind: data that is dropped without a word."""
    root = saved(
        tmp_path, species=(list(range(12)), datasets.Value("int64")), weight=([0.5] * 12, datasets.Value("float32"))
    )
    source = open_(root)
    assert not source.labelled
    assert "data.label_column (--label-column) names one, if it is among species." in source.notes[0]
    assert not any("No labels" in note for asked in ("", "species") for note in open_(root, label_column=asked).notes)


def test_what_judges_a_file_names_columns_too(cifar):
    """Kind: a recipe can read CIFAR-100, and the gate of what it made cannot."""
    how = Preprocess((3, 8, 8), (0.5,) * 3, (0.25,) * 3, "bicubic", 1.0, "center")
    data = DataSection(source=f"hf:{cifar}", label_column="coarse_label")
    assert resized_source(data.source, how, data.preparation).num_classes == 2
    assert data.preparation.asked == {}, "a column is nothing that an artifact says otherwise"


def test_columns_of_what_is_no_table_are_refused():
    with pytest.raises(DataError, match="name columns of hf:, and 'digits' has none"):
        open_source("digits", Wanted((1, 8, 8), CONFIG, label_column="fine"))


# Configurations and revisions


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """A folder of two configurations, as a repository of the hub has them, which is read without a network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root, configs = tmp_path / "signs", []
    for name, classes in (("small", 2), ("full", 3)):
        for index, path in enumerate(pictures(root / name, 12)):
            folder = root / name / f"class{index % classes}"
            folder.mkdir(exist_ok=True)
            (root / name / f"{index}.png").rename(folder / f"{index}.png")
            assert path
        configs.append({"config_name": name, "data_dir": name})
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return root


def test_a_configuration_is_named_and_a_missing_one_lists_them(configured):
    """Kind: a data set that cannot be read without a configuration, which no recipe can name."""
    with pytest.raises(DataError, match=r"has several configurations: name one of small, full as hf:.*signs:CONFIG$"):
        open_(configured)
    with pytest.raises(DataError, match=r"has no configuration 'large': name one of small, full"):
        open_(f"{configured}:large")
    assert [open_(f"{configured}:{name}").num_classes for name in ("small", "full")] == [2, 3]


@pytest.mark.parametrize(
    ("argument", "asked"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name:full", ("org/name", "full", None)),
        ("org/name@refs/pr/1", ("org/name", None, "refs/pr/1")),
        ("org/name:full@v1.0", ("org/name", "full", "v1.0")),
    ],
)
def test_the_library_is_asked_for_what_the_name_says(monkeypatch, argument, asked):
    class Asked(Exception):
        pass

    def load_dataset(name, config, *, revision):
        raise Asked((name, config, revision))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="cannot load hf:") as told:
        open_(argument)
    assert told.value.__cause__.args == (asked,)


@pytest.mark.parametrize("argument", ["org/name:", "org/name@", ":full", "org/name:@v1", "@v1"])
def test_a_name_that_is_cut_off_is_refused(argument):
    with pytest.raises(DataError, match=r"is written hf:NAME\[:CONFIG\]\[@REVISION\]"):
        open_(argument)


def test_a_folder_has_no_revisions_and_may_be_called_anything(tmp_path, cifar):
    for name in ("a@b", "a:b", "a:b@c"):
        (tmp_path / name).mkdir()
        assert Place.of(str(tmp_path / name)) == Place(str(tmp_path / name))
    assert Place.of(f"{tmp_path}/a@b:full") == Place(f"{tmp_path}/a@b", "full")
    with pytest.raises(DataError, match="no revisions: leave out @v1"):
        open_(f"{cifar}@v1")
    with pytest.raises(DataError, match="no configurations: leave out :full"):
        open_(f"{cifar}:full")
