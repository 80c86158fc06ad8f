"""From files of every mode to 8 bits: scaled, or refused by name; and what headers tell."""

import io
import os
import re
import warnings

import modes
import numpy as np
import pytest
import torch
from builders import input_of
from modes import COLOUR, FILES, GREY
from PIL import Image
from timm.data.transforms_factory import create_transform

from toolchain.data import open_source
from toolchain.data.pictures import eight_bit
from toolchain.data.stored import HEADERS_CHECKED
from toolchain.data.transforms import CROP_MODES, INTERPOLATIONS, Wanted
from toolchain.errors import DataError

CONFIG = {
    "mean": (0.5, 0.4, 0.3),
    "std": (0.25, 0.2, 0.3),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def names(outcome):
    return [name for name, (_, each) in FILES.items() if each == outcome]


def read(path, mode, **options):
    with Image.open(path) as picture:
        return np.asarray(eight_bit(picture, mode, **options))


@pytest.mark.parametrize("name", names("scaled"))
def test_grey_of_any_depth_keeps_its_scale(tmp_path, name):
    """Kind: a picture whose pixels lose their scale. Integers are scaled by their range, floats by 1."""
    path = modes.write(tmp_path / name)
    assert np.array_equal(read(path, "L"), GREY)
    assert np.array_equal(read(path, "RGB"), GREY[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("name", names("refused"))
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_what_has_no_known_scale_is_refused_with_its_mode(tmp_path, name, mode):
    """Kind: a picture whose pixels lose their scale, where nothing says what white is."""
    with pytest.raises(ValueError, match=r"mode (F|I|LAB|L\b|I;16)"):
        read(modes.write(tmp_path / name), mode)


@pytest.mark.parametrize("name", names("read"))
def test_what_pillow_converts_is_what_pillow_makes_of_it(tmp_path, name):
    with warnings.catch_warnings(action="ignore"), Image.open(modes.write(tmp_path / name)) as picture:
        expected = np.asarray(picture.convert("RGB"))
    if name == "turned_16.png":
        expected = GREY[..., None].repeat(3, axis=2)
    assert np.array_equal(read(tmp_path / name, "RGB"), expected)
    if name in ("colour_16.png", "colour_alpha.png", "turned.png"):
        assert np.array_equal(expected, COLOUR)


@pytest.mark.parametrize("name", ["turned.png", "turned_16.png"])
def test_a_picture_is_turned_where_that_is_asked_for(tmp_path, name):
    """Kind: EXIF orientation, which trainers treat in two ways."""
    path = modes.write(tmp_path / name)
    assert np.array_equal(read(path, "RGB", turn=True), np.rot90(read(path, "RGB"), -1))


def test_every_mode_that_pillow_knows_is_judged():
    """Kind: a mode of a later Pillow. It is read or refused, and never an error of another type."""
    seen = set()
    for mode in sorted(Image.MODES):
        for wanted in ("L", "RGB"):
            try:
                assert eight_bit(Image.new(mode, (4, 4)), wanted).mode == wanted
                seen.add(mode)
            except ValueError as error:
                assert mode in str(error)  # noqa: PT017
    assert set(Image.MODES) - seen == {"I", "LAB"}


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("size", [(3, 16, 16), (1, 12, 20), (3, 9, 14)])
def test_a_picture_is_bit_for_bit_what_timms_own_transform_makes_of_it(crop_mode, size):
    """Also in batches, where many are normalised at once."""
    for interpolation in INTERPOLATIONS:
        used = Wanted(
            size, {**CONFIG, "crop_pct": 0.9, "crop_mode": crop_mode, "interpolation": interpolation}
        ).natural()
        theirs = create_transform(
            size, interpolation=interpolation, mean=used.mean, std=used.std, crop_pct=0.9, crop_mode=crop_mode
        )
        pictures = [Image.fromarray(COLOUR).convert("L" if size[0] == 1 else "RGB").resize((n, 31)) for n in (17, 50)]
        expected = torch.stack([theirs(picture) for picture in pictures])
        assert torch.stack([input_of(used, picture) for picture in pictures]).equal(expected)
        assert used.of_pixels(torch.stack([used.pixels_of(picture) for picture in pictures])).equal(expected)


@pytest.mark.parametrize(("key", "value"), [("interpolation", "random"), ("crop_mode", "centre")])
def test_what_timm_would_draw_or_replace_by_something_else_is_refused(key, value):
    """Kind: a default in place of what was asked for. timm takes an unknown crop mode for a centre crop."""
    with pytest.raises(DataError, match=rf"'{value}'; expected one of .*Set data.{key}"):
        Wanted((3, 8, 8), CONFIG | {key: value}).natural()


def labelled(root, name, suffix):
    """Two class folders of five PNGs each, one of which is the file of that name."""
    for index in range(10):
        path = root / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(COLOUR, index, axis=0)).save(path)
    path.unlink()
    odd = path.with_suffix(suffix)
    modes.write(path.parent / name).rename(odd)
    return odd


def sources(kind, root):
    if kind != "hf":
        return f"{kind}:{root}"
    datasets = pytest.importorskip("datasets")
    pictures = [str(path) for path in sorted(root.rglob("*.*"))]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": pictures}, features=features).save_to_disk(str(root / "saved"))
    return f"hf:{root / 'saved'}"


@pytest.mark.parametrize("kind", ["imagefolder", "images", "hf"])
@pytest.mark.parametrize("name", names("refused"))
def test_every_source_refuses_it_before_any_work_and_names_the_file(tmp_path, kind, name):
    """Kind: a picture whose pixels lose their scale, beside others whose pixels do not."""
    odd = labelled(tmp_path, name, ".tif")
    where = "in row 9 of hf:" if kind == "hf" else str(odd)
    with pytest.raises(DataError, match=r"mode|TIFF") as caught:
        open_source(sources(kind, tmp_path), Wanted((3, 8, 8), CONFIG))
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["imagefolder", "images", "hf"])
@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("grey_16.png", "1 of 10 images has more than 8 bits; they are scaled to 8 bits."),
        ("float_1.tif", "1 of 10 images has more than 8 bits; they are scaled to 8 bits."),
        ("colour_16.png", "1 of 10 images has more than 8 bits; they are scaled to 8 bits."),
        ("colour_alpha.png", "1 of 10 images has transparency; it is left out"),
        ("palette_half_transparent.png", "1 of 10 images has transparency; it is left out"),
        ("palette_transparent.png", "1 of 10 images has transparency; it is left out"),
        ("turned.jpg", "1 of 10 images is stored turned (EXIF orientation) and "),
        ("turned.png", "1 of 10 images is stored turned (EXIF orientation) and "),
        ("colour.png", ""),
        ("turned.tif", ""),
    ],
)
def test_what_headers_tell_is_counted_once(tmp_path, kind, name, note):
    """Kind: a picture that is not read as it looks in a viewer."""
    labelled(tmp_path, name, "." + name.rpartition(".")[2])
    source = open_source(sources(kind, tmp_path), Wanted((3, 8, 8), CONFIG, calibration_images=0))
    assert [each.startswith(note) for each in source.notes] == [True] * bool(note)


@pytest.mark.parametrize(("bits", "share"), [(12, "6 %"), (14, "25 %"), (16, "")])
@pytest.mark.parametrize("form", ["grey.png", "grey.tif", "colour.png", "float.tif"])
def test_pictures_that_use_a_part_of_their_formats_range_are_told_to_be_dark(tmp_path, bits, share, form):
    """Kind: a picture whose pixels lose their scale, because fewer bits are stored than the format has."""
    for index in range(4):
        values = np.roll(COLOUR, index, axis=0).astype(np.uint16) * 257 >> 16 - bits
        path = tmp_path / f"{index}{form}"
        if form == "colour.png":
            modes.png_16(values)(path)
        else:
            grey = values[..., 0]
            Image.fromarray((grey / 65535).astype(np.float32) if form == "float.tif" else grey).save(path)
    notes = open_source(f"images:{tmp_path}", Wanted((3, 8, 8), CONFIG, calibration_images=0)).notes
    told = [note for note in notes if f"4 of 4 images have more than 8 bits and no pixel above {share} of" in note]
    assert len(told) == bool(share)
    assert len(notes) == 1 + bool(share)


def test_dark_pictures_beside_bright_ones_of_the_same_depth_are_only_dark(tmp_path):
    """Kind: a note that is wrong, and that hides what was asked for."""
    for index, most in enumerate((20_000, 60_000, 20_001, 20_002)):
        Image.fromarray(np.linspace(0, most, 64).reshape(8, 8).astype(np.uint16)).save(tmp_path / f"{index}.png")
    notes = open_source(f"images:{tmp_path}", Wanted((3, 8, 8), CONFIG, calibration_images=0)).notes
    assert "4 of 4 images have more than 8 bits; they are scaled to 8 bits." in notes
    assert not any("of the range" in note for note in notes)


@pytest.mark.parametrize("kind", ["imagefolder", "images", "hf"])
def test_colours_that_become_grey_are_counted(tmp_path, kind):
    """Kind: a conversion that was not asked for."""
    labelled(tmp_path, "grey.png", ".png")
    source = open_source(sources(kind, tmp_path), Wanted((1, 8, 8), CONFIG, calibration_images=0))
    assert source.notes == ("9 of 10 images are in colour; what the model reads is grey.",)


def test_counts_of_a_sample_say_that_they_are(tmp_path):
    """Kind: a number that says too much. Of many pictures only some headers are read."""
    labelled(tmp_path, "grey.png", ".png")
    for index in range(HEADERS_CHECKED):
        os.link(tmp_path / "a" / "0.png", tmp_path / "a" / f"again{index}.png")
    notes = open_source(sources("images", tmp_path), Wanted((1, 8, 8), CONFIG, calibration_images=0)).notes
    words = r"\d+ of 505 images that were looked at are in colour; what the model reads is grey\."
    assert [note for note in notes if re.fullmatch(words, note)]


@pytest.mark.parametrize("kind", ["imagefolder", "images", "hf"])
@pytest.mark.parametrize("asked", [None, False, True])
def test_orientation_is_as_the_key_says_or_as_the_kind_of_source_has_it(tmp_path, kind, asked):
    """Kind: EXIF orientation. torchvision reads pictures as stored, `datasets` turns them: without the key, so do we."""
    odd = labelled(tmp_path, "turned.png", ".png")
    source = open_source(
        sources(kind, tmp_path), Wanted((3, 8, 8), CONFIG, calibration_images=0, exif_orientation=asked)
    )
    expects = kind == "hf" if asked is None else asked
    with Image.open(odd) as picture:
        pixels = Image.fromarray(np.asarray(picture.convert("RGB")))
    upright = pixels.transpose(Image.Transpose.ROTATE_270) if expects else pixels
    expected = create_transform(**CONFIG, input_size=(3, 8, 8))(upright)
    everything = [
        source.split(name)[i][0] for name in ("train", "validation", "test") for i in range(len(source.split(name)))
    ]
    assert any(image.equal(expected) for image in everything)
    assert source.preprocessing.exif_orientation == expects
    note = (
        ""
        if asked is not None
        else "were turned upright; data.exif_orientation = false"
        if expects
        else "read as stored; data.exif_orientation = true"
    )
    assert note in " ".join(source.notes)
    assert bool(source.notes) == bool(note)


def test_orientation_is_part_of_the_digest(tmp_path):
    labelled(tmp_path, "turned.png", ".png")
    one, other = (
        open_source(f"images:{tmp_path}", Wanted((3, 8, 8), CONFIG, exif_orientation=turn)).digest
        for turn in (False, True)
    )
    assert one != other


def test_damaged_exif_does_not_stop_what_does_not_ask_for_it(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(COLOUR).save(buffer, "png", exif=b"Exif\0\0MM\0\x2a\0\0\xff\xff")
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(buffer.getvalue())
    notes = open_source(f"images:{tmp_path}", Wanted((3, 8, 8), CONFIG, calibration_images=0)).notes
    assert not [note for note in notes if "orientation" in note]
