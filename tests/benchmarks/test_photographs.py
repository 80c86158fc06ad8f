"""Pictures out of packages: collections of resources, crops, and sets that share no picture."""

from __future__ import annotations

import struct

import photographs
import pytest
from PIL import Image
from resource_file import ResourceFile

from toolchain.errors import DataError


def collection(files: dict[str, bytes], compressed: str = "") -> bytes:
    """A Qt resource collection of files in one folder `top`."""
    names, data, at = b"", b"", {}
    for name in ("", "top", *files):
        at[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    nodes = [struct.pack(">IHIIQ", at[""], 2, 1, 1, 0), struct.pack(">IHIIQ", at["top"], 2, len(files), 2, 0)]
    for name, content in files.items():
        nodes.append(struct.pack(">IHHHIQ", at[name], int(name == compressed), 0, 0, len(data), 0))
        data += struct.pack(">I", len(content)) + content
    tree = b"".join(nodes)
    head = b"qres" + struct.pack(">4i", 2, 20, 20 + len(tree), 20 + len(tree) + len(data))
    return head + tree + data + names


def test_a_collection_gives_its_files_by_path(tmp_path):
    (tmp_path / "a.rcc").write_bytes(
        collection({"b.webp": b"two", "a.webp": b"one", "c.svg": b"zz"}, compressed="c.svg")
    )
    found = ResourceFile(tmp_path / "a.rcc")
    assert list(found) == ["top/a.webp", "top/b.webp"], "what is compressed is left out"
    assert found.read("top/a.webp") == b"one"
    with pytest.raises(DataError, match=r"c\.svg"):
        found.read("top/c.svg")


def test_what_is_no_collection_is_refused(tmp_path):
    (tmp_path / "a.rcc").write_bytes(b"RIFF" + bytes(40))
    with pytest.raises(DataError, match="no Qt resource collection"):
        ResourceFile(tmp_path / "a.rcc")


def test_crops_are_as_many_as_wanted_the_first_of_every_scene_among_them():
    scenes = [(f"scene{n}", Image.new("RGB", (300, 220), (n, 0, 0))) for n in range(200)]
    made = dict(photographs.crops(scenes))
    assert len(made) == photographs.CALIBRATION
    assert {f"scene{n}_0" for n in range(200)} <= set(made)
    assert all(image.size == (photographs.SIDE, photographs.SIDE) for image in made.values())


def test_a_crop_lies_where_it_is_said_to():
    image = Image.new("RGB", (400, 200))
    image.paste((255, 0, 0), (300, 0, 400, 200))
    right = photographs.square(image, 0.5, 1.0, 0.5)
    left = photographs.square(image, 0.5, 0.0, 0.5)
    assert right.getpixel((128, 128)) == (255, 0, 0)
    assert left.getpixel((128, 128)) == (0, 0, 0)


def test_what_is_transparent_becomes_white_and_a_stamp_keeps_its_whole_height(tmp_path):
    image = Image.new("RGBA", (20, 80), (0, 0, 255, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 40))
    image.save(tmp_path / "stamp.png")
    framed = photographs.framed(photographs.opened((tmp_path / "stamp.png").read_bytes()))
    assert framed.size == (photographs.SIDE, photographs.SIDE)
    middle = photographs.SIDE // 2
    assert framed.getpixel((middle, 20)) == (255, 255, 255)
    assert framed.getpixel((middle, photographs.SIDE - 20)) == (0, 0, 255)
    assert framed.getpixel((5, middle)) == (255, 255, 255)


def test_each_class_is_dealt_out_to_both_sets_in_turn():
    image = Image.new("RGB", (1, 1))
    named = [("b", name, image) for name in "zyx"] + [("a", name, image) for name in "qp"]
    dealt = [(number % 2, group, name) for number, (group, name, _) in photographs.enumerated(named)]
    assert dealt == [(0, "a", "p"), (1, "a", "q"), (0, "b", "x"), (1, "b", "y"), (0, "b", "z")]


def test_classes_of_objects_leave_monuments_and_what_is_twice_out():
    names = ["renewable/dam1", "renewable/geothermal", "renewable/windmill2", "monuments/tower", "numbers/numbers"]
    names += ["alphabets/alphabets", "others/igloo", "others/cup", "tools/saw"]
    found = {(group, name) for group, name, _ in photographs.objects((name, None) for name in names)}
    dams = {("dam", "dam1"), ("dam", "geothermal")}
    rest = {("windmill", "windmill2"), ("others", "alphabets"), ("others", "cup"), ("tools", "saw")}
    assert found == dams | rest


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(DataError, match="apt-get install gcompris-qt-data"):
        photographs.write(tmp_path / "made", tmp_path / "nowhere")


class Reader:
    """One picture of every root; keeps those that it was asked for."""

    def __init__(self):
        self.roots = []

    def __call__(self, root):
        self.roots.append(root)
        yield photographs.Picture("judge/a/one", Image.new("RGB", (8, 8), (1, 2, 3)))


def test_what_is_written_is_not_written_again(tmp_path):
    read = Reader()
    first = photographs.write(tmp_path, read=read)
    assert photographs.write(tmp_path, read=read) == first
    assert len(read.roots) == 1
    before = photographs.digest(first)
    Image.new("RGB", (8, 8), (1, 2, 4)).save(first / "judge/a/one.png")
    assert photographs.digest(first) != before


@pytest.mark.parametrize("change", [("CALIBRATION", 12), ("LISTS", {**photographs.LISTS, "seen": {}})])
def test_other_lists_and_sizes_are_written_elsewhere(tmp_path, monkeypatch, change):
    read = Reader()
    first = photographs.write(tmp_path, read=read)
    monkeypatch.setattr(photographs, *change)
    assert photographs.write(tmp_path, read=read) != first
    assert len(read.roots) == 2


def test_what_was_interrupted_is_written_anew(tmp_path):
    def torn(root):
        yield photographs.Picture("judge/a/left", Image.new("RGB", (8, 8)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        photographs.write(tmp_path, read=torn)
    written = photographs.write(tmp_path, read=Reader())
    assert [path.name for path in written.rglob("*.png")] == ["one.png"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [written.name]
