"""Which images show one scene, that no made split stands on two sides of it, and what is said."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits

from toolchain.data import open_source, scenes
from toolchain.data.glances import SIDE, Glances, alike, glance
from toolchain.data.names import copies, neighbours
from toolchain.data.scenes import PIECES, PROBES, keep_apart, tell_apart
from toolchain.data.splits import Images, arrange
from toolchain.data.tensors import tensor_source
from toolchain.data.transforms import Wanted
from toolchain.errors import DataError

CONFIG = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}


def texture(seed, size=(240, 180)):
    """A picture of blobs of several sizes, as different from others as photographs are."""
    draw = np.random.default_rng(seed)
    layers = [(8, 6, 60.0), (16, 12, 40.0), (60, 45, 20.0)]
    pixels = sum(
        share * np.asarray(Image.fromarray(draw.normal(size=(high, wide)).astype(np.float32)).resize(size))
        for wide, high, share in layers
    )
    return Image.fromarray((128 + pixels).clip(0, 255).astype(np.uint8)).convert("RGB")


def encoded(picture, quality):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


def seen(picture):
    return glance(picture.copy, turn=False)


def told(glances, labels=None, names=(), **kinds):
    """The images of a part with scenes, and the notes."""
    labels = [-1] * len(glances) if labels is None else labels
    images = Images(lambda _: torch.zeros(1, 1, 1), labels, glances=Glances(list(glances).__getitem__, names))
    parts, notes = tell_apart({"train": images, **kinds})
    return parts["train"], notes


def open_(root, kind="images", **options):
    return open_source(f"{kind}:{root}", Wanted((3, 8, 8), CONFIG, **{"calibration_images": 0, **options}))


def scenes_of(source):
    return [set(source.split(name).scenes.tolist()) for name in ("train", "validation", "test")]


CHANGES = {
    "smaller": lambda picture: picture.resize((100, 75)),
    "squashed": lambda picture: picture.resize((120, 150)),
    "JPEG": lambda picture: encoded(picture, 30),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.3),
    "less contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(0.5),
    "grey": lambda picture: picture.convert("L"),
    "crop of 0.9": lambda picture: picture.crop((6, 5, 234, 175)),
    "corner of 0.72": lambda picture: picture.crop((36, 27, 240, 180)),
    "square": lambda picture: picture.crop((30, 0, 210, 180)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_picture_shows_the_same_scene(change):
    glances = torch.stack([seen(each) for seed in range(8) for each in (texture(seed), CHANGES[change](texture(seed)))])
    pairs = alike(glances)
    found = set(zip(pairs.one.tolist(), pairs.other.tolist(), strict=True))
    assert found == {(2 * seed, 2 * seed + 1) for seed in range(8)}


def test_different_pictures_and_flat_ones_show_scenes_of_their_own():
    textures = [seen(texture(seed)) for seed in range(60)]
    flat = [seen(Image.new("RGB", (50, 40), (level,) * 3)) for level in (0, 128, 255, 255)]
    noise = [
        seen(Image.fromarray((250 + np.random.default_rng(seed).integers(0, 3, (64, 64))).astype(np.uint8)))
        for seed in (1, 1)
    ]
    images, notes = told([*textures, *flat, *noise])
    assert len(set(images.scenes.tolist())) == len(images)
    assert notes == []


def test_pictures_of_one_kind_do_not_become_one_scene():
    """Kind: digits on a plain ground, which are all alike at the likeness that tells photographs apart."""
    digits = load_digits()
    glances = [seen(Image.fromarray((255 - 15 * pixels).astype(np.uint8))) for pixels in digits.images[:600]]
    for labels in (None, digits.target[:600].tolist()):
        images, notes = told(glances, labels)
        assert images.scenes.bincount().max() <= 24
        assert notes == []


@pytest.mark.parametrize("labelled", [False, True])
def test_made_splits_of_a_folder_share_no_scene(tmp_path, labelled):
    for seed in range(24):
        folder = tmp_path / f"{seed % 3}"
        folder.mkdir(exist_ok=True)
        for number in range(1 + seed % 4):
            crop = texture(seed).crop((4 * number, 3 * number, 240 - 4 * number, 180 - 3 * number))
            crop.save(folder / f"{hash((seed, number)) % 10**6}.jpg", quality=60 + 8 * number)
    source = open_(tmp_path, "imagefolder" if labelled else "images")
    assert sum(map(len, scenes_of(source))) == len(set.union(*scenes_of(source))) == 24
    assert sum(len(source.split(name)) for name in ("train", "validation", "test")) == 60
    assert source.notes == ()


def test_the_digest_stays_where_no_two_images_show_one_scene(tmp_path, monkeypatch):
    for seed in range(12):
        texture(seed).save(tmp_path / f"{seed}.png")
    with_scenes = open_(tmp_path, calibration_images=5)
    monkeypatch.setattr("toolchain.data.sources.tell_apart", lambda parts: (parts, []))
    assert open_(tmp_path, calibration_images=5).digest == with_scenes.digest


def test_images_of_one_scene_are_split_all_the_same_and_said():
    frame = seen(texture(0))
    images, notes = told([frame] * 50)
    splits = arrange({"train": images}, 10)
    assert [len(splits[name]) > 0 for name in splits] == [True] * 4
    assert "50 of 50 images look so much alike that no split can keep them on one side" in notes[0]
    assert notes[0].endswith("Add images of other scenes, or split them yourself.")


def test_a_class_that_is_one_film_is_on_every_side():
    glances = [
        seen(texture(label).crop((step, step, 180 + step, 135 + step))) for label in range(4) for step in range(20)
    ]
    images, notes = told(glances, [label for label in range(4) for _ in range(20)])
    splits = arrange({"train": images}, 10)
    for name in ("train", "test"):
        assert set(splits[name].labels.tolist()) == {0, 1, 2, 3}
    assert len(set(images.scenes.tolist())) <= 4 * 2 * PIECES
    assert len(notes) == 1


def test_a_numbered_film_is_one_scene_from_its_first_frame_to_its_last():
    films = [(seed, step) for seed in range(12) for step in range(30)]
    glances = [seen(texture(seed, (480, 360)).crop((6 * step, 0, 240 + 6 * step, 180))) for seed, step in films]
    first_and_last = alike(torch.stack([glances[0], glances[29]]))
    assert len(first_and_last.one) == 0
    images, notes = told(glances, names=[f"{seed}/frame_{step:03d}.jpg" for seed, step in films])
    assert images.scenes.tolist() == [images.scenes[30 * seed].item() for seed in range(12) for _ in range(30)]
    assert len(set(images.scenes.tolist())) == 12
    assert notes == []


def test_copies_across_the_users_own_splits_are_counted_and_left(tmp_path):
    for part, seeds in (("train", range(12)), ("val", range(9, 15)), ("test", range(20, 24))):
        (tmp_path / part).mkdir()
        for seed in seeds:
            encoded(texture(seed), 40).save(tmp_path / part / f"{part}{seed}.jpg")
    source = open_(tmp_path, calibration_images=1000)
    assert [len(source.split(name)) for name in ("train", "validation", "test")] == [12, 6, 4]
    said = (
        "3 of 6 images of validation look nearly the same as images of train, so results on validation are better than "
    )
    assert source.notes[0] == said + "on new images. Remove them from train or from validation."
    assert [note for note in source.notes if "test" in note] == []
    assert open_(tmp_path).notes == (), "nothing is split, and nothing calibrated"


def test_a_picture_that_cannot_be_decoded_is_a_scene_of_its_own(tmp_path):
    for seed in range(8):
        texture(seed % 7).save(tmp_path / f"{seed}.png")
    whole = (tmp_path / "0.png").read_bytes()
    for seed in (0, 7):  # copies of each other
        (tmp_path / f"{seed}.png").write_bytes(whole[:2000])
    assert glance(partial(Image.open, tmp_path / "0.png"), turn=False) is None
    assert len(set.union(*scenes_of(open_(tmp_path)))) == 8


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/x.jpg", "a/x.png", "b/x.jpg"], [(0, 1)]),
        (["x-1920x1080.png", "X.jpg", "x_640x480.png"], [(0, 1), (1, 2)]),
        (["a/images/1920x1080.png", "a/images/640x480.png", "b/images/640x480.png"], [(0, 1)]),
        (["x_crop1.jpg", "x_crop2.jpg", "x_thumb.jpg", "x@2x.jpg", "crop1.jpg"], [(0, 1), (1, 2), (2, 3)]),
        (["x_jpg.rf.0123456789abcdef0123.jpg", "x_jpg.rf.fedcba98765432100123.jpg"], [(0, 1)]),
        (["x1.jpg", "x2.jpg", "holiday (1).jpg", "holiday (2).jpg", "cat_small.jpg", "cat.jpg"], []),
        ([f"x_crop{number}.jpg" for number in range(40)], []),
        ([], []),
    ],
)
def test_copies_are_told_by_their_names_only_where_these_are_sure(names, expected):
    assert copies(names) == expected


def test_files_that_are_numbered_one_after_the_other_are_rows():
    names = ["f/a9.jpg", "f/a10.jpg", "f/a11.jpg", "f/a13.jpg", "g/a12.jpg", "f/b1.jpg", "f/b2.png", "f/c.jpg"]
    assert neighbours(names) == [[(0, 1), (1, 2)], [(5, 6)]]


def test_files_of_one_number_all_stay_in_their_row():
    names = ["a1.jpg", "a1.png", "a2.jpg", "a02.jpg", "a3.jpg", "a003.jpg", "b1.jpg", "b01.jpg"]
    (row,) = neighbours(names)
    assert {position for pair in row for position in pair} == set(range(6))
    assert {(names[one][1:].lstrip("0")[0], names[other][1:].lstrip("0")[0]) for one, other in row} == {
        ("1", "2"),
        ("2", "3"),
    }


class Looks:
    """Glances that remember what they were asked for, and how often."""

    def __init__(self, glances):
        self.glances, self.asked, self.times = glances, set(), 0

    def __call__(self, position):
        self.asked.add(position)
        self.times += 1
        return self.glances[position]


def blobs(count, seed=0):
    """So many glances of which none are alike."""
    coarse = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (255 * torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")[:, 0]).to(torch.uint8)


def test_of_many_images_few_are_looked_at_and_copies_leave_calibration():
    most = 400
    once = blobs(3000)
    plain = arrange({"train": Images(lambda _: torch.zeros(1, 1, 1), [-1] * 3000)}, 150)
    copied, held_out = plain["calibration"].positions[::3], plain["validation"].spread(100).positions
    glances = once.clone()
    glances[copied] = once[held_out[: len(copied)]]
    for pictures, gone in ((once, []), (glances, copied.tolist())):
        looks = Looks(pictures)
        images = Images(lambda _: torch.zeros(1, 1, 1), [-1] * 3000, glances=Glances(looks))
        parts, notes = tell_apart({"train": images}, most)
        splits, more = keep_apart(arrange(parts, 150), ("validation", "test"), most)
        assert len(looks.asked) <= most + 2 * PROBES
        for name in ("validation", "test"):
            assert splits[name].positions.equal(plain[name].positions)
        assert len(splits["calibration"]) == 150
        kept = splits["calibration"].positions.tolist()
        assert set(plain["calibration"].positions.tolist()) - set(kept) == set(gone)
        assert set(splits["train"].positions.tolist()) == set(plain["train"].positions.tolist()) - set(gone)
        assert set(kept) <= set(splits["train"].positions.tolist())
        said = [note.partition(", since")[0] for note in (*notes, *more)]
        assert said == [f"{len(gone)} images were left out of train"] * bool(gone)


def test_validation_and_test_of_the_same_images_are_looked_at_once():
    looks = Looks(blobs(100))
    images = Images(lambda _: torch.zeros(1, 1, 1), [-1] * 100, glances=Glances(looks))
    held_out = images.take(torch.arange(10, 20))
    train = images.take(torch.tensor([*range(10), *range(20, 100)]))
    splits = arrange({"train": train, "validation": held_out, "test": held_out}, 5)
    keep_apart(splits, ("validation", "test"), 40)
    assert looks.times == len(looks.asked) == 20 + 10
    for name in ("validation", "test"):  # own splits count positions each for itself
        splits[name] = Images(images.raw, [-1] * 10, glances=Glances(Looks(blobs(10, seed=2))))
    keep_apart(splits, (), 40)
    assert [splits[name].glances.look.times for name in ("validation", "test")] == [10, 10]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_train_of_hardly_any_images_beside_many_others_is_left(count):
    few, many = (
        Images(lambda _: None, [-1] * each, glances=Glances(blobs(30).__getitem__, [f"{at}.png" for at in range(each)]))
        for each in (count, 30)
    )
    parts, notes = tell_apart({"train": few, "test": many}, 20)
    assert (parts["train"].scenes.tolist(), notes) == (list(range(count)), [])
    with pytest.raises(DataError, match=f"there are {count} images to train on.*at least 4 are needed"):
        arrange(parts, 8)


@pytest.mark.parametrize(
    ("count", "across", "left"),
    [
        (1, "1 of 1 image of test looks nearly the same", "1 image was left out of train"),
        (2, "2 of 2 images of test look nearly the same", "2 images were left out of train"),
    ],
)
def test_one_image_is_said_in_the_singular(count, across, left):
    pictures = blobs(60)
    own = Images(lambda _: None, [-1] * count, glances=Glances(pictures.__getitem__))
    _, (note,) = told(pictures, test=own)
    assert note.startswith(across)
    assert note.endswith(f"Remove {'it' if count == 1 else 'them'} from train or from test.")
    train = Images(lambda _: None, [-1] * 60, glances=Glances(torch.cat([pictures[:50], pictures[:10]]).__getitem__))
    held_out = train.take(torch.arange(50, 50 + count))
    splits = {"train": train.take(torch.arange(50)), "validation": held_out, "test": held_out}
    _, (note,) = keep_apart({**splits, "calibration": train.take(torch.arange(10))}, ("validation", "test"), 40)
    assert note == (
        f"{left}, since validation or test has images that look nearly the same. Remove copies from the data to use the rest."
    )


def test_a_large_film_is_split_in_runs():
    film = texture(3, (1500, 200)).convert("L")
    frames = [seen(film.crop((x, 0, x + 200, 200))) for x in range(1000)]
    train = Images(lambda _: None, [-1] * 1000, glances=Glances(frames.__getitem__))
    parts, _ = tell_apart({"train": train}, 100)
    runs = parts["train"].scenes
    assert len(set(runs.tolist())) == scenes.RUNS
    assert (runs[1:] - runs[:-1]).ne(0).sum() == scenes.RUNS - 1, "each run is of frames that follow each other"
    different = Images(lambda _: None, [-1] * 1000, glances=Glances(blobs(1000).__getitem__))
    assert len(set(tell_apart({"train": different}, 100)[0]["train"].scenes.tolist())) == 1000


def test_few_images_and_images_that_are_alike_are_said(tmp_path):
    for seed in range(200):
        pixels = np.asarray(texture(seed % 20, (48, 36)))
        Image.fromarray((pixels * (1 - seed / 1000)).astype(np.uint8)).save(tmp_path / f"{seed:03d}.png")
    notes = open_(tmp_path, calibration_images=130).notes
    assert len(notes) == 1
    assert notes[0].startswith("Many of the 130 images of calibration look nearly the same, and count for about 1")
    assert notes[0].endswith("they need no labels (docs/calibration.md).")
    (few,) = open_(tmp_path, calibration_images=14).notes
    assert few.startswith("14 images are few to calibrate on")
    assert few.endswith("Set data.calibration_images above 14, best to some hundreds.")
    (one,) = open_(tmp_path, calibration_images=1).notes
    assert one.startswith("1 image is few to calibrate on")
    assert open_(tmp_path).notes == (), "nothing is calibrated"
    digits = open_source("digits", Wanted((1, 8, 8), CONFIG, calibration_images=512))
    assert digits.notes == ()


def test_tensors_of_one_scene_are_held_out_together(caplog):
    different = torch.nn.functional.interpolate(
        torch.rand(160, 3, 8, 8, generator=torch.Generator().manual_seed(0)), (32, 32)
    )
    source = tensor_source(different.repeat(2, 1, 1, 1) * torch.linspace(0.8, 1, 320).view(-1, 1, 1, 1))
    train, held_out = (set((source.split(name).positions % 160).tolist()) for name in ("train", "test"))
    assert not train & held_out
    assert len(train | held_out) == 160
    assert (source.notes, caplog.messages) == ((), [])
    alone = tensor_source(different)
    assert [len(alone.split(name)) for name in ("train", "test")] == [128, 32]
    many = tensor_source(different[:10].repeat(20, 1, 1, 1))
    assert [note[:38] for note in many.notes] == ["Many of the 160 images of calibration "]
    assert many.notes[0] in caplog.text
