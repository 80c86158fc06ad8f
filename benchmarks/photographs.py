"""Folders of pictures out of Debian packages, for the suite `real`: `python benchmarks/photographs.py FOLDER`.

Four sets, chosen once: `calibration`; `tuning`, by which a method is improved; `judge`, which is looked at when nothing is changed
any more; and `drawings`, which a model calibrated on photographs never saw the like of. No picture is in two of them.
Calibration shares no subject with tuning and judge, but for a wallpaper of cups and one of brushes. The photographs of tuning and
judge are of the same kinds of subject: those of a class go to the two in turn. Drawings are of anything. photographs.toml has
the lists. The pictures never leave this machine.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image
from resource_file import ResourceFile

from toolchain.errors import DataError, SlimvitError
from toolchain.files import digest_of

LISTS: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
"""The fixed lists."""
SIDE, SMALLEST = 256, 200
"""Pixels of what is written, and of the shorter side of what is taken."""
CALIBRATION = 384
"""Crops of photographs, as many as the method may see."""
CROPS = ((1.0, 0.5, 0.5), (0.65, 0.3, 0.35), (0.5, 0.75, 0.6))
"""(side as a share of the shorter one, where it stands in the room that is left: from the left, from the top)."""

RESOURCES = "usr/share/gcompris-qt/rcc"
ACTIVITIES = "gcompris/src/activities"


@dataclass(frozen=True)
class Picture:
    """One image to be written: below which set, under which name without a suffix."""

    place: str
    image: Image.Image


def write(folder: Path, root: Path = Path("/"), read: Callable[[Path], Iterator[Picture]] | None = None) -> Path:
    """The folder of the four sets, whose name is a digest of the lists and sizes; written now, whole, unless it is there.

    Args:
        folder: where that folder lies; is made.
        root: where the packages are installed, or were unpacked.
        read: the pictures below a root; those of the packages, unless others are given.

    Raises:
        DataError: a package's file is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        done = folder / digest_of(LISTS, SIDE, SMALLEST, CALIBRATION, CROPS)[:24]
        if not done.exists():
            part = done.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            for picture in (read or pictures)(root):
                path = part / f"{picture.place}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.image.save(path)
            part.rename(done)
    return done


def digest(folder: Path) -> str:
    """SHA-256 over the names and pixels of every picture of the sets."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.png")):
        total.update(path.relative_to(folder).as_posix().encode())
        with Image.open(path) as image:
            total.update(image.tobytes())
    return total.hexdigest()


def pictures(root: Path) -> Iterator[Picture]:
    """Every picture of every set."""
    for name, crop in crops(list(photographs(root))):
        yield Picture(f"calibration/{name}", crop)
    for number, (group, name, image) in enumerated(objects(activity(root, "categorization", flat=False))):
        yield Picture(f"{('tuning', 'judge')[number % 2]}/objects_{group}/{name}", square(image))
    for group, path in stamps(root):
        yield Picture(f"judge/stamps_{group}/{path.stem}", framed(opened(path.read_bytes())))
    for name, image in activity(root, "lang"):
        yield Picture(f"drawings/{name}", square(image))


def enumerated(named: Iterable[tuple[str, str, Image.Image]]) -> Iterator[tuple[int, tuple[str, str, Image.Image]]]:
    """Each with its number in its group, by name."""
    counts: dict[str, int] = {}
    for each in sorted(named, key=lambda each: each[:2]):
        number = counts.get(each[0], 0)
        counts[each[0]] = number + 1
        yield number, each


def photographs(root: Path) -> Iterator[tuple[str, Image.Image]]:
    """(scene, photograph) of what a method is calibrated on, the large ones first."""
    for group in LISTS["wallpapers"]:
        for name in group["names"]:
            path = required(root / group["path"].format(name))
            yield name.partition("_by_")[0], opened(path.read_bytes())
    seen = LISTS["seen"]
    for name in seen["scikit"]:
        yield name, opened((_scikit() / f"{name}.jpg").read_bytes())
    for name in seen["activities"]:
        for scene, image in activity(root, name):
            yield f"{name.removeprefix('explore_')}-{scene}", image
    for scene, image in activity(root, "clickgame"):
        if scene in seen["clickgame"]:
            yield f"under-water-{scene}", image


def crops(scenes: Sequence[tuple[str, Image.Image]]) -> Iterator[tuple[str, Image.Image]]:
    """(scene_k, square crop): the first of all scenes, then the second of all, until there are as many as are wanted."""
    every = [(f"{scene}_{k}", image, box) for k, box in enumerate(CROPS) for scene, image in scenes]
    for name, image, box in every[:CALIBRATION]:
        yield name, square(image, *box)


def objects(found: Iterable[tuple[str, Image.Image]]) -> Iterator[tuple[str, str, Image.Image]]:
    """(class, name, photograph) of those of a game's (name, photograph) that are objects, and no buildings but windmills and dams."""
    wanted, left_out = LISTS["objects"]["classes"], LISTS["objects"]["left_out"]
    for name, image in found:
        folder, _, stem = name.rpartition("/")
        folder = "others" if folder == "alphabets" else folder
        if folder in wanted and stem not in left_out:
            kinds = wanted[folder] or [folder]
            yield next((kind for kind in kinds if stem.startswith(kind)), kinds[-1]), stem, image


def stamps(root: Path) -> Iterator[tuple[str, Path]]:
    """(class, file) of cut-outs of photographs whose subject calibration does not have."""
    wanted = LISTS["stamps"]
    for group, below in wanted["classes"].items():
        folder = required(root / "usr/share/tuxpaint/stamps" / below)
        for path in sorted(folder.rglob("*.png")):
            place = path.relative_to(folder).as_posix()
            if not any(word in place for word in wanted["drawn"]) and path.stem not in wanted["left_out"]:
                yield group, path


def activity(root: Path, name: str, *, flat: bool = True) -> Iterator[tuple[str, Image.Image]]:
    """(name, image) of the pictures of an activity of GCompris that are large enough, by name."""
    resources = ResourceFile(required(root / RESOURCES / f"{name}.rcc"))
    start = f"{ACTIVITIES}/{name}/resource/"
    for path in resources:
        if path.startswith(start) and path.endswith(".webp"):
            image = opened(resources.read(path))
            if min(image.size) >= SMALLEST:
                below = path.removeprefix(start).removeprefix("images/").removesuffix(".webp")
                yield below.rpartition("/")[2] if flat else below, image


def opened(raw: bytes) -> Image.Image:
    """RGB, on white where the picture is transparent."""
    image = Image.open(io.BytesIO(raw))
    if image.mode in ("RGB", "L"):
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def square(image: Image.Image, share: float = 1.0, across: float = 0.5, down: float = 0.5) -> Image.Image:
    """A square crop of SIDE pixels, its side a share of the image's shorter one."""
    side = round(share * min(image.size))
    left, top = round(across * (image.width - side)), round(down * (image.height - side))
    box = (left, top, left + side, top + side)
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)


def framed(image: Image.Image) -> Image.Image:
    """The whole image on a white square of SIDE pixels."""
    scale = 0.95 * SIDE / max(image.size)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    white = Image.new("RGB", (SIDE, SIDE), "white")
    white.paste(image.resize(size, Image.Resampling.BICUBIC), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return white


def required(path: Path) -> Path:
    """A path of a package; raises DataError if it is not there."""
    if not path.exists():
        raise DataError(
            f"{path} is missing. The pictures of the suite real come out of Debian packages: apt-get install "
            f"{' '.join(LISTS['packages'])}; or unpack them (dpkg-deb -x) and name the folder by SLIMVIT_PICTURES_ROOT."
        )
    return path


def _scikit() -> Path:
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError("two photographs come out of scikit-learn, which is not installed: pip install scikit-learn")
    return required(Path(spec.origin).parent / "datasets" / "images")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 after the sets were written and counted; 2 if a package is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the packages are installed or unpacked")
    options = parser.parse_args(arguments)
    try:
        found = write(options.folder, options.root)
    except SlimvitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in ("calibration", "tuning", "judge", "drawings"):
        print(f"{name}: {len(list((found / name).rglob('*.png')))} pictures")
    print(f"{found}, digest {digest(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
