"""Which folders are splits, which are classes, and what is no data at all."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import DataError
from toolchain.pipeline.draft import pictures_of

CONFIG = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}


def fill(root, *folders, each=4, suffix=".png"):
    """Pictures in each of the folders; returns the root."""
    for folder in folders:
        for number in range(each):
            path = Path(root, folder, f"{number}{suffix}")
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([number, *folder.encode()]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return root


def splits(train, held_out, *classes):
    return [f"{split}/{name}" for split in (train, held_out) for name in classes or ("cat", "dog")]


def open_(root, kind="imagefolder", **options):
    options = {"calibration_images": 0, **options}
    beside = {name: options.pop(name) for name in ("classes", "outputs") if name in options}
    return open_source(f"{kind}:{root}", Wanted((3, 8, 8), CONFIG, **options), **beside)


def sizes(source):
    return {name: len(source.split(name)) for name in ("train", "validation", "test")}


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training", "Training"])
@pytest.mark.parametrize(
    "held_out", ["val", "Val", "valid", "validation", "VALIDATION", "dev", "eval", "test", "Testing"]
)
def test_split_folders_are_known_by_their_usual_names_in_any_case(tmp_path, train, held_out):
    """Kind: split folders that are taken for classes."""
    source = open_(fill(tmp_path, *splits(train, held_out, "cat", "dog", "eel")))
    assert source.num_classes == 3
    assert sizes(source)["test"] == 12  # the only held-out part is the test set
    assert source.notes == ()


def test_folders_of_the_same_names_in_class_folders_are_told(tmp_path):
    """Kind: places, days or folds that are taken for classes, one level above the classes."""
    inner = [
        f"{split}/{site}/{name}" for split in ("train", "val") for site in ("east", "west") for name in ("cat", "dog")
    ]
    notes = open_(fill(tmp_path / "sites", *inner)).notes
    assert len(notes) == 2
    assert "The class folders east, west of train/ hold folders of the same names (cat, dog)" in notes[0]
    assert "if the inner folders are the classes, move them up into val/." in notes[1]
    for beside in (("train/cat/images", "train/dog/images"), ("train/cat/day", "train/dog/night")):
        assert open_(fill(tmp_path / beside[0][-3:], *beside)).notes == ()


def test_three_split_folders_are_three_splits(tmp_path):
    source = open_(fill(tmp_path, *splits("Training", "Validation"), "Test/cat", "Test/dog"))
    assert sizes(source) == {"train": 8, "validation": 8, "test": 8}


@pytest.mark.parametrize(("one", "other"), [("learn", "check"), ("train_set", "val_set"), ("fold1", "fold2")])
def test_splits_of_unknown_names_are_refused_with_the_names_that_are_read(tmp_path, one, other):
    """Kind: split folders that are taken for classes, whose names nobody knows."""
    with pytest.raises(DataError, match=r"same names.*train or training; val, valid.*in any case") as caught:
        open_(fill(tmp_path, *splits(one, other)))
    assert one in str(caught.value)
    assert "num_classes" not in str(caught.value)


def test_a_held_out_part_of_an_unknown_name_is_refused_where_it_is_the_only_one(tmp_path):
    with pytest.raises(DataError, match=r"holdout, with folders of the same names.*val, valid"):
        open_(fill(tmp_path, *splits("train", "holdout")))


@pytest.mark.parametrize(
    ("folders", "what"),
    [
        (
            [*splits("train", "val"), "validation/cat", "validation/dog"],
            "val, validation, which all stand for validation",
        ),
        ([*splits("train", "Train"), "val/cat", "val/dog"], "Train, train, which all stand for train"),
        ([*splits("val", "test")], "has the splits test, val, but train/ is missing"),
        (["train", "val"], "train/ holds no class folders.*images:PATH"),
        (["train", "test"], "train/ holds no class folders.*images:PATH"),
        (["archive/cat", "archive/dog"], r"one folder, 'archive', with 2 folders.*imagefolder:.*archive'"),
        (["archive/train/cat", "archive/val/cat"], r"one folder, 'archive'.*imagefolder:.*archive'"),
        ([*splits("train", "val"), "val/eel"], "val has class folders that train/ lacks: eel"),
        ([*splits("train", "val"), "val/Cat"], "lacks: Cat. 'Cat' differs from 'cat' only in case"),
        ([*splits("train", "test"), "test/eel"], "test has class folders that train/ lacks: eel"),
        (["train/cat", "train/dog", "val"], "val has no class folders; sort its images"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_an_unclear_layout_is_refused(tmp_path, folders, what):
    """Kind: split folders that are taken for classes, or silently picked from."""
    with pytest.raises(DataError, match=what):
        open_(fill(tmp_path, *folders))


@pytest.mark.parametrize(
    "folders",
    [
        ("bus", "car", "train"),  # a class may be called so
        ("valid", "invalid"),
        ("test", "control"),
        ("dev", "val", "other"),
        ("cat/images", "dog/images"),  # as Tiny ImageNet has it
        ("cat/a", "dog/b"),
        ("cat", "cat/young", "cat/old", "dog", "dog/young", "dog/old"),
    ],
)
def test_classes_that_look_a_little_like_splits_are_classes(tmp_path, folders):
    classes = {folder.partition("/")[0] for folder in folders}
    source = open_(fill(tmp_path, *folders))
    assert source.num_classes == len(classes)
    assert sum(sizes(source).values()) == 4 * len(folders)


def test_classes_with_folders_of_the_same_names_are_read_below_train(tmp_path):
    """The way out that the message names."""
    folders = [f"{name}/{age}" for name in ("cat", "dog") for age in ("old", "young")]
    with pytest.raises(DataError, match=r"move them into a folder train/"):
        open_(fill(tmp_path / "plain", *folders))
    assert open_(fill(tmp_path / "moved", *(f"train/{each}" for each in folders))).num_classes == 2


JUNK = [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".cache"]


@pytest.mark.parametrize("kind", ["imagefolder", "images"])
def test_hidden_and_system_files_and_folders_are_no_data(tmp_path, kind):
    """Kind: hidden files and folders that are taken for classes or images."""
    plain = fill(tmp_path / "plain", *splits("train", "val"))
    fill(tmp_path / "junk", *splits("train", "val"))
    for name in JUNK:
        for where in (".", "train", "val", "train/cat"):
            fill(tmp_path / "junk", f"{where}/{name}")
    for where in ("train/cat", "val/dog"):
        (tmp_path / "junk" / where / "._0.png").write_bytes(b"\0\5\x16\7")
        (tmp_path / "junk" / where / "Thumbs.db").write_bytes(b"x")
        (tmp_path / "junk" / where / ".DS_Store").write_bytes(b"x")
    clean, source = (open_(root, kind) for root in (plain, tmp_path / "junk"))
    assert source.digest == clean.digest
    assert source.notes == ()
    assert sizes(source) == sizes(clean)


def test_a_data_set_in_a_hidden_place_is_read(tmp_path):
    assert open_(fill(tmp_path / ".cache" / "x", *splits("train", "val"))).num_classes == 2


@pytest.mark.parametrize("test_folder", ["test", "test/images", "Test/unknown"])
def test_an_unlabelled_test_folder_is_left_out_with_a_note(tmp_path, test_folder):
    """Kind: a folder of pictures without classes beside labelled splits."""
    root = fill(tmp_path, *splits("train", "val"), test_folder)
    source = open_(root)
    assert sizes(source)["test"] == 8  # val, the only held-out part that is labelled
    assert source.notes == (
        f"{test_folder.partition('/')[0]}/ has no class folders, so it was left out; accuracy is counted without it.",
    )


def test_a_test_folder_whose_one_class_is_unknown_is_not_taken_for_an_unlabelled_one(tmp_path):
    """Kind: a folder of pictures without classes. A labelled test set with a typo must not make val the test set."""
    with pytest.raises(DataError, match="class folders that train/ lacks: kat"):
        open_(fill(tmp_path, *splits("train", "val"), "test/kat"))


@pytest.mark.parametrize(
    "folders",
    [
        ("train_images/a", "train_images/b", "test_images"),
        ("seg_train/seg_train/a", "seg_train/seg_train/b", "seg_test/seg_test/a", "seg_test/seg_test/b"),
        ("trainset/a", "trainset/b", "valset/a"),
        ("trn/cat", "tst/cat"),
        ("train2017", "val2017"),
        ("train_images", "test_images"),
    ],
)
def test_folders_that_are_called_or_filled_like_splits_are_no_classes(tmp_path, folders):
    """Kind: split folders taken for classes."""
    with pytest.raises(DataError, match=r"look like splits and not like classes.*Names of splits that are read"):
        open_(fill(tmp_path, *folders))


@pytest.mark.parametrize(
    ("pictures", "beside"),
    [("images", "masks"), ("JPEGImages", "SegmentationClass"), ("leftImg8bit", "gtFine"), ("rgb", "depth")],
)
@pytest.mark.parametrize("below", ["", "train/"])
def test_masks_beside_pictures_are_neither_classes_nor_pictures(tmp_path, pictures, beside, below):
    """Kind: folders that are taken for classes, and what is no picture of the model's taken for one."""
    root = fill(
        tmp_path, *(f"{part}{name}" for part in {below, below.replace("train", "val")} for name in (pictures, beside))
    )
    note = f"Left out, since they hold masks or labels of the pictures beside them: {beside}."
    with pytest.raises(DataError, match=f"one class folder, '{pictures}'.*images:PATH. {note}"):
        open_(root)
    source = open_(root, "images")
    assert note in source.notes
    assert sum(sizes(source).values()) == (8 if below else 4)
    assert pictures_of(str(root), 2).source == pictures_of(str(root), 0).source == f"images:{root}"


def test_a_class_may_be_called_mask_where_no_pictures_lie_beside_it(tmp_path):
    assert open_(fill(tmp_path / "faces", "mask", "no_mask")).num_classes == 2
    assert open_(fill(tmp_path / "leaves", "photo", "depth")).num_classes == 2


def test_masks_within_classes_are_left_out_with_a_note(tmp_path):
    """Kind: what is no picture of the model's taken for one."""
    source = open_(fill(tmp_path, *(f"{name}/{kind}" for name in ("cat", "dog") for kind in ("images", "masks"))))
    assert (source.num_classes, sum(sizes(source).values())) == (2, 8)
    assert source.notes == ("Left out, since they hold masks or labels of the pictures beside them: masks.",)


def test_dev_and_eval_give_way_to_val_with_a_note(tmp_path):
    """Kind: split folders. A third held-out part is left out and said, where it is clear which one is validation."""
    source = open_(fill(tmp_path, *splits("train", "val"), "dev/cat", "dev/dog"))
    assert source.notes == ("Beside the splits, these folders were left out: dev.",)


def test_classes_may_be_called_like_splits(tmp_path):
    assert open_(fill(tmp_path, "bus", "dev", "eval", "train")).num_classes == 4


def test_what_else_is_left_out_is_said(tmp_path):
    """Kind: data that is dropped without a word."""
    root = fill(tmp_path, *splits("train", "val"), "extra/cat", "train", each=5)
    fill(root, "train/cat", each=3, suffix=".gif")
    (root / "train" / "dog" / "scan.HEIC").write_bytes(b"x")
    (root / "train" / "dog" / "notes.txt").write_text("x")
    notes = " ".join(open_(root).notes)
    assert "Left out, since in no class folder: 5 images in train/." in notes
    assert "left out: extra." in notes
    assert ".gif (3), .heic (1); read are .jpg" in notes
    assert ".txt" not in notes
    assert ".gif (3)" in " ".join(open_(root / "train", "images").notes)


def test_class_folders_that_differ_only_in_case_are_told(tmp_path):
    source = open_(fill(tmp_path, "a", "A", "b"))
    assert source.num_classes == 3
    assert source.notes == ("The class folders A, a differ only in case, and are classes of their own.",)


def test_images_below_split_folders_stay_in_their_splits(tmp_path):
    """Kind: split folders that are pooled: what is held out must not be calibrated on."""
    root = fill(tmp_path, *splits("Train", "Val"), "extra", each=5)
    Image.new("RGB", (8, 8)).save(root / "stray.png")
    source = open_(root, "images", calibration_images=512)
    assert sizes(source) == {"train": 9, "validation": 1, "test": 10}
    assert len(source.split("calibration")) == 9
    assert "folders were left out: extra." in source.notes[0]
    assert "in no split: 1 images" in source.notes[1]
    with pytest.raises(DataError, match="Val, valid, which all stand for validation"):
        open_(fill(root, "valid"), "images")
    assert sum(sizes(open_(fill(tmp_path / "other", "cat", "train"), "images")).values()) == 8


@pytest.mark.parametrize(
    "folders", [splits("archive/train", "archive/val"), ["images/train", "images/val", "labels/train"]]
)
def test_images_below_split_folders_stay_in_their_splits_where_one_folder_holds_them_all(tmp_path, folders):
    """Kind: split folders that are pooled, in a data set of detection or in an archive."""
    source = open_(fill(tmp_path, *folders), "images")
    assert sizes(source)["test"] == 4 * sum("val" in name for name in folders)
    assert any("masks or labels" in note for note in source.notes) == ("labels/train" in folders)


def test_linked_folders_are_followed_and_rings_end(tmp_path):
    fill(tmp_path / "store", "cat", "dog")
    (tmp_path / "data").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "store" / "cat" / "ring").symlink_to(tmp_path / "store" / "cat")
    for kind in ("imagefolder", "images"):
        assert sum(sizes(open_(tmp_path / "data", kind)).values()) == 8
    (tmp_path / "data" / "cat" / "gone.png").symlink_to(tmp_path / "nothing.png")
    for kind in ("imagefolder", "images"):
        with pytest.raises(DataError, match=r"cat/gone\.png"):
            open_(tmp_path / "data", kind)


def hf_splits(root, **columns):
    datasets = pytest.importorskip("datasets")
    fill(root / "raw", "all", each=12)
    pictures = [str(root / "raw" / "all" / f"{number}.png") for number in range(12)]
    tables = {}
    classes = datasets.ClassLabel(names=["cat", "dog"])
    for name, each in columns.items():
        labels, feature = each if isinstance(each, tuple) else (each, classes)
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        rows = {"image": pictures[: len(labels)], "label": labels}
        tables[name] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(tables).save_to_disk(str(root / "saved"))
    return root / "saved"


def test_splits_of_a_hugging_face_data_set_go_by_the_same_names(tmp_path):
    """Kind: split folders, in another kind of source."""
    root = hf_splits(tmp_path, Training=[0, 1] * 6, valid=[0, 1] * 4, test=[-1] * 5, extra=[0] * 3)
    source = open_(root, "hf")
    assert sizes(source)["test"] == 8
    assert source.notes[:2] == (
        "Beside the splits that are read, these were left out: extra.",
        "The split test has no labels in 'label', so it was left out.",
    )
    assert source.notes[2].startswith("8 of 8 images of validation look nearly the same as images of train")


@pytest.mark.parametrize("case", ["two", "no train", "partly", "float", "text", "other classes", "negative"])
def test_unclear_tables_are_refused(tmp_path, case):
    """Kind: labels that are cast or dropped. A half is no class, and −1 is none either."""
    datasets = pytest.importorskip("datasets")
    labels = [0, 1] * 6
    columns, what = {
        "two": ({"train": labels, "val": labels, "valid": labels}, "val, valid, which all stand for validation"),
        "no train": ({"a": labels, "b": labels}, "splits a, b; expected 'train'.*train or training"),
        "partly": ({"train": labels, "test": [-1, 0, 1]}, "rows without a label"),
        "float": ({"train": ([0.5, 1.5] * 6, datasets.Value("float32"))}, "expected ClassLabel or whole numbers"),
        "text": ({"train": (["x", "y"] * 6, datasets.Value("string"))}, "expected ClassLabel or whole numbers"),
        "other classes": (
            {"train": labels, "test": ([0, 1], datasets.ClassLabel(names=["dog", "cat"]))},
            "other classes in 'label' of one split",
        ),
        "negative": ({"train": ([0, -7] * 6, datasets.Value("int64"))}, "the label -7"),
    }[case]
    with pytest.raises(DataError, match=what):
        open_(hf_splits(tmp_path, **columns), "hf")


def test_a_link_that_leads_back_up_mixes_no_classes(tmp_path):
    """Kind: pictures that count for a class that is not theirs."""
    root = fill(tmp_path, *splits("train", "val"))
    (root / "train" / "cat" / "all").symlink_to(root / "train")
    assert sizes(open_(root)) == sizes(open_(fill(tmp_path / "plain", *splits("train", "val"))))


def test_names_that_are_not_utf8_and_pipes(tmp_path):
    """Kind: what unpacked archives and systems leave. A name of another encoding is a name; a pipe is no picture."""
    root = fill(tmp_path, *splits("train", "val"))
    before = open_(root)
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    assert open_(root).digest == before.digest
    picture = next((root / "train" / "cat").glob("[0-9]*.png"))
    picture.rename(picture.with_name(os.fsdecode(b"caf\xe9.png")))
    renamed = open_(root)
    assert sizes(renamed) == sizes(before)
    assert renamed.digest != before.digest


def test_a_split_that_is_empty_says_what_was_left_out_of_it(tmp_path):
    """Kind: data that is dropped without a word."""
    root = fill(tmp_path, "train/cat", "train/dog")
    fill(root, "val/cat", "val/dog", suffix=".gif")
    with pytest.raises(DataError, match=r"test 0 images.*left out: \.gif"):
        open_(root)
