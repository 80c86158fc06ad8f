import gzip
import io
import json
import pickle
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from toolchain.data import SOURCES, open_source
from toolchain.data.memory import Digits, FashionMnist, images_of
from toolchain.data.stored import DIGESTED_BYTES, digested
from toolchain.data.transforms import Wanted
from toolchain.errors import DataError, ModelError

CONFIG = {
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def open_(name, size=(3, 8, 8), **options):
    beside = {name: options.pop(name) for name in ("classes", "outputs") if name in options}
    return open_source(name, Wanted(size, CONFIG, **options), **beside)


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def class_folders(root, classes=("ant", "bee", "cat"), each=6):
    for index, name in enumerate(classes):
        for number in range(each):
            write_image(root / name / f"{number}.png", 100 * index + number)
    return root


def write_idx(path, array):
    body = struct.pack(f">{array.ndim + 1}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)


def fashion_folder(root, suffix=".gz", train=60, test=20):
    draw = np.random.default_rng(0)
    for prefix, size in (("train", train), ("t10k", test)):
        write_idx(root / f"{prefix}-images-idx3-ubyte{suffix}", draw.integers(0, 256, (size, 28, 28), dtype=np.uint8))
        write_idx(root / f"{prefix}-labels-idx1-ubyte{suffix}", (np.arange(size) % 10).astype(np.uint8))
    return root


def hf_folder(root, labelled=True, split=False):
    datasets = pytest.importorskip("datasets")
    pictures = [str(write_image(root / "raw" / f"{number}.png", number)) for number in range(20)]
    columns, features = {"picture": pictures}, {"picture": datasets.Image()}
    if labelled:
        columns["label"], features["label"] = [0, 1] * 10, datasets.ClassLabel(names=["ant", "bee"])
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    if split:
        table = datasets.DatasetDict({"train": table.select(range(12)), "test": table.select(range(12, 20))})
    table.save_to_disk(str(root / "saved"))
    return root / "saved"


@pytest.fixture(scope="module")
def every_source(tmp_path_factory):
    """One working name for each kind of source; a new kind must be added here to be tested."""
    tmp_path = tmp_path_factory.mktemp("sources")
    names = {
        "digits": "digits",
        "fashion-mnist": f"fashion-mnist:{fashion_folder(tmp_path / 'fashion')}",
        "imagefolder": f"imagefolder:{class_folders(tmp_path / 'folder')}",
        "images": f"images:{class_folders(tmp_path / 'images')}",
        "hf": f"hf:{hf_folder(tmp_path / 'hf')}",
        "none": "none",
    }
    assert set(names) == set(SOURCES)
    return names


@pytest.mark.parametrize("kind", list(SOURCES))
@pytest.mark.parametrize("size", [(3, 8, 8), (1, 16, 12)])
def test_every_source_keeps_its_promises(every_source, kind, size):
    source = open_(every_source[kind], size, calibration_images=7)
    positions = {name: set(source.split(name).positions.tolist()) for name in source.splits}
    assert len(source.split("calibration")) == 7
    assert positions["calibration"] <= positions["train"]
    seen = []
    for name in ("train", "calibration", "validation", "test"):
        images = source.split(name)
        for index in range(0, len(images), 1 + len(images) // 12):
            image, label = images[index]
            assert image.shape == size
            assert image.dtype == torch.float32
            assert image.isfinite().all()
            assert label in (range(source.num_classes) if source.labelled else [-1])
            assert isinstance(label, int)
            seen += [image.numpy().tobytes()] if name != "calibration" else []
    assert len(set(seen)) == len(seen), "two splits share an image"
    again = open_(every_source[kind], size, calibration_images=7)
    assert again.digest == source.digest
    assert again.split("calibration")[3][0].equal(source.split("calibration")[3][0])
    restored = pickle.loads(pickle.dumps(source.split("test")))
    assert restored[0][0].equal(source.split("test")[0][0])
    assert len(source.preprocessing.mean) == len(source.preprocessing.std) == size[0]


@pytest.mark.parametrize("kind", list(SOURCES))
def test_the_digest_depends_on_splits_and_preprocessing(every_source, kind):
    name = every_source[kind]
    variants = [{}, {"mean": (0.1,)}, {"std": (0.9,)}, {"calibration_images": 7}, {"size": (1, 8, 8)}]
    digests = [open_(name, **variant).digest for variant in variants]
    # A calibration of 512 is all of train in the small sources, and 7 never is, so all five differ.
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("kind", list(SOURCES))
def test_the_recipe_says_whether_images_are_mirrored(every_source, kind):
    """Kind: a traffic sign is mirrored in training, keeps its label, and no key turns that off."""
    name = every_source[kind]
    usual, on, off = open_(name), open_(name, mirror=True), open_(name, mirror=False)
    assert usual.flip == (kind not in ("digits", "none"))
    assert (on.flip, off.flip) == (True, False)
    same, other = (on, off) if usual.flip else (off, on)
    assert same.digest == usual.digest, "what is done as ever leaves no trace"
    assert other.digest != usual.digest, "what is trained otherwise is not taken up from before"


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "none"])
def test_which_pictures_are_in_a_split_is_known_whatever_they_are_prepared_as(every_source, kind):
    name = every_source[kind]
    variants = [{}, {"mean": (0.1,)}, {"calibration_images": 7}, {"calibration_images": 0}, {"size": (1, 8, 8)}]
    sources = [open_(name, **variant) for variant in variants]
    assert len({source.content for source in sources}) == 1
    for split in ("validation", "test"):
        (pictures,) = {source.pictures(split) for source in sources}
        assert sources[0].unlabelled("").pictures(split) == pictures
    assert len({sources[0].pictures(split) for split in sources[0].splits}) >= 3, "calibration may be all of train"
    split = sources[0].split("test")
    moved = replace(sources[0], splits={"test": split.take(torch.arange(len(split) - 1))})
    assert moved.pictures("test") != sources[0].pictures("test")
    turned = replace(sources[0], splits={"test": split.take(torch.arange(len(split)).flip(0))})
    assert turned.pictures("test") == sources[0].pictures("test"), "their order does not count"


def test_digits_declare_their_own_statistics():
    pixels = load_digits().images / 16
    assert pytest.approx(pixels.mean(), abs=5e-5) == Digits.mean
    assert pytest.approx(pixels.std(), abs=5e-5) == Digits.std
    source = open_("digits", (1, 8, 8))
    assert {name: len(split) for name, split in source.splits.items()} == {
        "train": 1258,
        "calibration": 512,
        "validation": 180,
        "test": 359,
    }
    used = source.preprocessing
    assert (used.mean, used.std, used.crop_pct) == ((Digits.mean,), (Digits.std,), None)
    assert (source.num_classes, source.flip, source.synthetic) == (10, False, False)
    position = int(source.split("test").positions[5])
    image, label = source.split("test")[5]
    expected = torch.tensor((pixels[position] - Digits.mean) / Digits.std, dtype=torch.float32)
    torch.testing.assert_close(image[0], expected)
    assert label == load_digits().target[position]


@pytest.mark.skipif(
    not Path(FashionMnist.folders[-1]).is_dir(),
    reason="the package dataset-fashion-mnist is not installed",
)
def test_the_installed_fashion_mnist_has_the_declared_statistics():
    source = open_("fashion-mnist", (1, 28, 28))
    sizes = [len(source.split(name)) for name in ("train", "validation", "test")]
    assert sizes == [55_000, 5_000, 10_000]
    assert source.split("validation").labels.bincount().tolist() == [500] * 10
    images = torch.stack([source.split("train")[index][0] for index in range(0, 55_000, 20)])
    assert abs(images.mean().item()) < 0.02
    assert abs(images.std().item() - 1) < 0.02


@pytest.mark.parametrize(("below", "suffix"), [("", ".gz"), ("FashionMNIST/raw", ""), ("raw", "")])
def test_fashion_mnist_is_found_in_both_layouts(tmp_path, below, suffix):
    fashion_folder(tmp_path / below, suffix)
    source = open_(f"fashion-mnist:{tmp_path}", (1, 28, 28))
    raw = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    position = int(source.split("train").positions[4])
    image, label = source.split("train")[4]
    expected = (torch.from_numpy(raw[position]) / 255 - FashionMnist.mean) / FashionMnist.std
    torch.testing.assert_close(image[0], expected)
    assert label == position % 10


def test_large_inputs_are_computed_at_access():
    preprocessing, labels = Wanted((3, 32, 32), {}).declared(0.3, 0.4), torch.arange(6)
    pixels = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    early, late = (
        images_of(pixels, labels, preprocessing),
        images_of(pixels, labels, preprocessing, 6 * 4 * 3 * 32**2 - 1),
    )
    before = early[2][0].clone()
    torch.testing.assert_close(late[2][0], before)
    assert pickle.loads(pickle.dumps(late))[2][1] == late[2][1] == 2
    pixels.zero_()
    torch.testing.assert_close(early[2][0], before)
    assert not torch.allclose(late[2][0], before)


def test_missing_fashion_mnist_names_the_package(tmp_path):
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        open_(f"fashion-mnist:{tmp_path}", (1, 28, 28))


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "not gzip", "wrong rank", "wrong count"])
def test_damaged_idx_files_are_refused(tmp_path, damage):
    path = fashion_folder(tmp_path) / "train-labels-idx1-ubyte.gz"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "corrupted":
        path.write_bytes(path.read_bytes()[:10] + b"\xff" * 40)
    elif damage == "not gzip":
        path.write_bytes(b"no gzip at all")
    elif damage == "wrong rank":
        write_idx(path, np.zeros((2, 2), np.uint8))
    else:
        write_idx(path, np.zeros(59, np.uint8))
    with pytest.raises(DataError, match="train"):
        open_(f"fashion-mnist:{tmp_path}", (1, 28, 28))


def test_image_folder_labels_follow_the_sorted_folder_names(tmp_path):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "val", classes=("cat", "ant"), each=2)
    source = open_(f"imagefolder:{tmp_path}")
    assert source.num_classes == 3
    assert source.flip
    assert source.split("test").labels.tolist() == [0, 0, 2, 2]  # the only held-out folder is the test set
    assert len(source.split("train")) + len(source.split("validation")) == 18
    picture = np.asarray(Image.open(tmp_path / "val" / "cat" / "1.png").resize((8, 8), Image.Resampling.BICUBIC))
    assert abs(source.split("test")[3][0].mean().item() - ((picture / 255 - 0.5) / 0.25).mean()) < 0.1


def test_image_folder_with_three_folders_uses_them_as_they_are(tmp_path):
    for part, each in (("train", 6), ("valid", 2), ("test", 3)):
        class_folders(tmp_path / part, each=each)
    source = open_(f"imagefolder:{tmp_path}")
    assert [len(source.split(name)) for name in ("train", "validation", "test")] == [18, 6, 9]


def test_folder_digests_see_names_but_neither_place_nor_time(tmp_path):
    class_folders(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    first = open_(f"imagefolder:{tmp_path / 'a'}").digest
    copied = open_(f"imagefolder:{tmp_path / 'b'}")
    assert copied.digest == first
    assert copied.identity == {"source": "imagefolder", "digest": first}
    (tmp_path / "b" / "ant" / "0.png").rename(tmp_path / "b" / "ant" / "00.png")
    assert open_(f"imagefolder:{tmp_path / 'b'}").digest != first


@pytest.mark.parametrize("kind", ["imagefolder", "images"])
@pytest.mark.parametrize("pixel", [(0, 0), (50, 50), (-1, -1)])
@pytest.mark.parametrize("ending", [".bmp", ".ppm", ".tif"])
def test_folder_digests_see_changed_pixels_of_the_same_size(tmp_path, kind, pixel, ending):
    class_folders(tmp_path)
    path = tmp_path / "ant" / f"0{ending}"  # uncompressed
    pixels = np.zeros((100, 100, 3), np.uint8)
    digests, sizes = [], []
    for value in (0, 1):
        pixels[pixel] = value
        Image.fromarray(pixels).save(path)
        digests.append(open_(f"{kind}:{tmp_path}").digest)
        sizes.append(path.stat().st_size)
    assert sizes[0] == sizes[1] > 2 * DIGESTED_BYTES
    assert digests[0] != digests[1]


@pytest.mark.parametrize("head", [b"II+\0", b"MM\0+", b"MM\0*", b"P7\n", b"Pf\n", b"PyRGBA\n"])
def test_digests_see_the_middle_of_files_whose_size_does_not_change_with_it(head):
    digests = {digested(io.BytesIO(head + bytes(5000) + pixel + bytes(5000))) for pixel in (b"0", b"1")}
    assert len(digests) == 2


def test_the_digest_of_a_table_is_that_of_its_pictures_and_not_of_where_they_came_from(tmp_path):
    """Kind: what was made of other pictures taken for these. The library's own fingerprint can be that of their paths."""
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"picture": [str(write_image(tmp_path / f"{number}.png", number)) for number in range(8)]},
        features=datasets.Features({"picture": datasets.Image()}),
    )
    table.save_to_disk(str(tmp_path / "one"))
    table.select(range(8)).save_to_disk(str(tmp_path / "same"))
    write_image(tmp_path / "5.png", 99)
    table.save_to_disk(str(tmp_path / "other"))
    one, same, other = (open_(f"hf:{tmp_path / name}").digest for name in ("one", "same", "other"))
    assert one == same
    assert one != other


@pytest.mark.parametrize(
    "case", ["missing", "empty", "no image", "one class", "empty class", "broken", "unknown class"]
)
def test_a_bad_image_folder_is_named(tmp_path, case):
    root = tmp_path / "data"
    expected = str(root)
    if case == "empty":
        root.mkdir()
    elif case == "no image":
        (root / "ant").mkdir(parents=True)
        (root / "ant" / "notes.txt").write_text("no image")
    elif case == "one class":
        class_folders(root, classes=("ant",))
        expected = "one class folder, 'ant'"
    elif case == "empty class":
        (class_folders(root) / "dog").mkdir()
        expected = "dog"
    elif case == "broken":
        (class_folders(root) / "bee" / "3.png").write_bytes(b"not a png")
        expected = "3.png"
    elif case == "unknown class":
        class_folders(root / "train")
        class_folders(root / "val", classes=("dog",))
        expected = "dog"
    with pytest.raises(DataError, match=expected):
        open_(f"imagefolder:{root}")


def test_files_are_decoded_by_workers_and_arrays_are_not(every_source):
    decoded = {kind: open_(name).split("calibration").workers for kind, name in every_source.items()}
    assert {kind for kind, workers in decoded.items() if workers} == {"imagefolder", "images", "hf"}


def test_an_image_that_breaks_inside_is_named_when_it_is_read(tmp_path):
    class_folders(tmp_path)
    path = tmp_path / "ant" / "2.png"
    path.write_bytes(path.read_bytes()[:150])  # the header is whole
    source = open_(f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match=r"ant/2\.png"):
        [source.split(name)[index] for name in source.splits for index in range(len(source.split(name)))]


@pytest.mark.parametrize(
    ("name", "message"), [("a.png", r"a\.png is a file; set data"), ("b", "there is no folder .*b; set data")]
)
@pytest.mark.parametrize("kind", ["images", "imagefolder"])
def test_what_is_no_folder_is_told_from_what_is_not_there(tmp_path, kind, name, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=message):
        open_source(f"{kind}:{tmp_path / name}", Wanted((3, 8, 8), {"mean": (0.5,) * 3, "std": (0.5,) * 3}))


def test_unlabelled_images_are_found_at_any_depth(tmp_path):
    for number, path in enumerate(["a.png", "b/c.png", "b/d/e.JPEG", "f.bmp", "g.webp"]):
        write_image(tmp_path / path, number)
    source = open_(f"images:{tmp_path}")
    assert (source.labelled, source.num_classes) == (False, None)
    assert sum(len(source.split(name)) for name in ("train", "validation", "test")) == 5
    with pytest.raises(DataError, match="holds no image"):
        open_(f"images:{(tmp_path / 'empty').mkdir() or tmp_path / 'empty'}")


@pytest.mark.parametrize("split", [False, True])
def test_a_saved_hugging_face_data_set(tmp_path, split):
    source = open_(f"hf:{hf_folder(tmp_path, split=split)}")
    assert (source.num_classes, len(source.split("test"))) == (2, 8 if split else 4)
    position = int(source.split("train").positions[1])
    assert source.split("train")[1][1] == position % 2


def test_a_hugging_face_data_set_without_labels_or_pictures(tmp_path):
    assert not open_(f"hf:{hf_folder(tmp_path / 'plain', labelled=False)}").labelled
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(DataError, match=r"text \(Value\); expected one Image"):
        open_(f"hf:{tmp_path / 'text'}")


def test_synthetic_images_are_normal_and_never_repeat():
    source = open_("none", (3, 32, 32), calibration_images=20)
    assert source.synthetic
    assert len(source.split("calibration")) == len(source.split("train")) == 20
    images = torch.stack(
        [image for name in ("train", "test") for image, _ in (source.split(name)[i] for i in range(20))]
    )
    assert abs(images.mean().item()) < 0.02
    assert abs(images.std().item() - 1) < 0.02
    assert open_("none", (5, 8, 8)).split("test")[0][0].shape == (5, 8, 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("imagenet", "known: digits, .*imagefolder:PATH"),
        ("digits:x", "is written digits"),
        ("imagefolder", "is written imagefolder:PATH"),
        ("images:", "is written images:PATH"),
    ],
)
def test_a_wrong_name_gets_the_right_one(name, message):
    with pytest.raises(DataError, match=message):
        open_(name)


def test_the_class_count_must_fit():
    source = open_("digits", (1, 8, 8))
    source.check_classes(10)
    with pytest.raises(ModelError, match=r"1000 classes.*has 10.*num_classes = 10"):
        source.check_classes(1000)
    open_("none").check_classes(1000)
    with pytest.raises(DataError, match="no split 'dev'"):
        source.split("dev")


def test_a_calibration_that_is_too_small_is_said(caplog):
    source = open_("digits", calibration_images=5000)
    assert source.notes[-1] == "Calibration has 1258 images, all of train; 5000 were asked for."
    assert "Calibration has 1258 images" in caplog.text
    assert json.dumps(caplog.messages).count("5000") == 1


def plain_images(root, colours):
    root.mkdir(exist_ok=True)
    for number, colour in enumerate(colours):
        Image.new("RGB", (8, 8), (colour,) * 3).save(root / f"{number}.png")
    return f"images:{root}"


def test_few_images_are_compared_on_what_there_is(tmp_path):
    """Kind: few images. Validation has one of the eight, and three that differ are needed."""
    source = open_(plain_images(tmp_path, range(0, 240, 30)))
    assert len(source.split("validation")) == 1
    for asked, got in ((1, 3), (3, 3), (5, 5), (256, 8)):
        images = source.to_compare(asked)
        assert len(images) == got
        assert len({image.numpy().tobytes() for image in images}) == got
    assert images[0].equal(source.split("validation")[0][0])
    assert images[1].equal(source.split("test")[0][0])


def test_copies_do_not_count_as_images_to_compare_on(tmp_path):
    """Kind: few images, of which most are copies of each other."""
    source = open_(plain_images(tmp_path, [9] * 20 + [50, 90]))
    images = source.to_compare(10)
    assert len(images) == 10
    assert len({image.numpy().tobytes() for image in images[:3]}) == 3
    with pytest.raises(DataError, match=r"show 2 different pictures in all; at least 3"):
        open_(plain_images(tmp_path / "two", [9] * 19 + [50])).to_compare()


def test_many_images_are_compared_on_the_first_of_validation():
    source = open_("digits", (1, 8, 8))
    images = source.to_compare(5)
    assert all(image.equal(source.split("validation")[index][0]) for index, image in enumerate(images))


def test_pictures_that_are_made_to_fit_are_told():
    """Kind: a conversion that was not asked for. A source of one size and channel is resized and repeated, and says so."""
    assert open_("digits", (1, 8, 8)).notes == ()
    resized = "Images of 8×8 pixels are resized to the model's 16×32."
    assert open_("digits", (1, 16, 32)).notes == (resized,)
    assert open_("digits", (3, 16, 32)).notes == (resized, "Grey images are repeated over the model's 3 channels.")
