"""Folders of pictures out of Debian packages, for the suite `real`: `python benchmarks/photographs.py FOLDER`.

Three sets that share no scene and no subject, chosen once: `calibration`, `tuning`, by which a method is improved, and
`judge`, which is looked at when nothing is changed any more; beside them `drawings`, which a model calibrated on
photographs never saw the like of. The lists are fixed, nothing is drawn by chance, and the pictures never leave this
machine.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock
from PIL import Image
from resource_file import ResourceFile

from toolchain.errors import DataError, SlimvitError

PACKAGES = (
    "gcompris-qt-data",
    "tuxpaint-stamps-default",
    "mate-backgrounds",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "plasma-workspace-wallpapers",
    "palapeli-data",
)
"""Of Debian 12; releases that have them, too, give the same pictures as long as their files keep their names."""
SIDE, SMALLEST = 256, 200
"""Pixels of what is written, and of the shorter side of what is taken."""
CALIBRATION = 384
"""Crops of photographs, as many as the method may see."""
CROPS = ((1.0, 0.5, 0.5), (0.65, 0.3, 0.35), (0.5, 0.75, 0.6))
"""(side as a share of the shorter one, where it stands in the room that is left: from the left, from the top)."""

RESOURCES = "usr/share/gcompris-qt/rcc"
ACTIVITIES = "gcompris/src/activities"
SEEN = ("explore_farm_animals", "explore_monuments", "explore_world_animals", "explore_world_music", "erase")
"""Activities whose pictures are photographs of animals, buildings and people."""
UNDER_WATER = ("bottom", "sea1", "sea2", "sea3", "sea4", "sea5", "sea6")
WALLPAPERS = (
    *(
        f"usr/share/backgrounds/mate/nature/{name}.jpg"
        for name in (
            "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood YellowFlower"
        ).split()
    ),
    *(
        f"usr/share/backgrounds/{name}.jpg"
        for name in (
            "Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Kleiber_by_Lukas_Baubkus Picture_1A_by_freespace "
            "Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich friends_by_Aitzol_Berasategi "
            "greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi "
            "seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi"
        ).split()
    ),
    *(
        f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg"
        for name in (
            "BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am"
        ).split()
    ),
    *(
        f"usr/share/palapeli/collection/{name}.jpg"
        for name in "castle-maintenon cincinnati-bridge european-honey-bee panther-chameleon-female".split()
    ),
)
"""Those that are photographs; the packages' drawings, and photographs of fruit, which the judge has, are left out."""
SCIKIT = ("china", "flower")

OBJECTS = {"renewable": ("windmill", "solar", "dam"), "tools": (), "fishes": (), "others": ()}
"""Folder of the activity `categorization` → how its names begin, where its kinds are classes of their own.

Its monuments are not taken, and `numbers`, which are the same toy blocks as `alphabets`.
"""
LEFT_OUT = frozenset({"igloo"})
"""A building, as calibration has them."""

STAMPS = {
    "birds": "animals/birds",
    "mammals": "animals/mammals",
    "sea": "animals/fish",
    "insects": "animals/insects",
    "fruit": "food/fruit",
    "vegetables": "food/vegetables",
    "household": "household",
    "vehicles": "vehicles",
}
"""Class → folder of the stamps; cut-outs of photographs, but for those whose path has one of DRAWN."""
DRAWN = ("cartoon", "toys", "mirror")
SUBJECTS = frozenset(
    (
        "bee echidna hedgehog fly "  # drawn or grey
        "adelaide-rosella rainbow-lorikeet chicken_profile hen rooster drake duck gander heron_greatblue "
        "heron_greatblue_flying owl tucan chimp gorilla dolphin bison bull cow cow_white goat mountaingoat ram sheep "
        "sheep_lamb camel dromedary caribou deer doe wapiti indian_blackbuck dingo dog donkey donkey_eating horse zebra "
        "giraffe pig pig_golden pig_golden2 wildboar rhino_black squirrel tiger tiger_sumatran lion lion-2 bear "
        "european-bear sea_lion penguin little-penguin magellanic_penguin orca whale yak zebu tamarin_emperor hornet "
        "hoverfly sedan_police"
    ).split()
)
"""Stamps that are drawn or cut to pieces, and those of animals that calibration has, or of near ones."""


@dataclass(frozen=True)
class Picture:
    """One image to be written: below which set, under which name without a suffix."""

    place: str
    image: Image.Image


def write(folder: Path, root: Path = Path("/")) -> str:
    """Writes the four sets below a folder, unless they are there, and gives the digest of all that lies there.

    Args:
        folder: is made.
        root: where the packages are installed, or were unpacked.

    Raises:
        DataError: a package's file is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        done = folder / ".digest"
        if not done.exists():
            for picture in pictures(root):
                path = folder / f"{picture.place}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.image.save(path)
            done.write_text(digest(folder))
        return done.read_text()


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
    for number, (group, name, image) in enumerated(objects(root)):
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
    for name in WALLPAPERS:
        path = required(root / name)
        scene = path.parents[2].name if path.stem == "2560x1600" else path.stem.partition("_by_")[0]
        yield scene, opened(path.read_bytes())
    for name in SCIKIT:
        yield name, opened((_scikit() / f"{name}.jpg").read_bytes())
    for name in SEEN:
        for scene, image in activity(root, name):
            yield f"{name.removeprefix('explore_')}-{scene}", image
    for scene, image in activity(root, "clickgame"):
        if scene in UNDER_WATER:
            yield f"under-water-{scene}", image


def crops(scenes: Sequence[tuple[str, Image.Image]]) -> Iterator[tuple[str, Image.Image]]:
    """(scene_k, square crop): the first of all scenes, then the second of all, until there are as many as are wanted."""
    every = [(f"{scene}_{k}", image, box) for k, box in enumerate(CROPS) for scene, image in scenes]
    for name, image, box in every[:CALIBRATION]:
        yield name, square(image, *box)


def objects(root: Path) -> Iterator[tuple[str, str, Image.Image]]:
    """(class, name, photograph) of objects, none of which are buildings, but for windmills and dams."""
    for name, image in activity(root, "categorization", flat=False):
        folder, _, stem = name.rpartition("/")
        kinds = OBJECTS.get("others" if folder == "alphabets" else folder)
        if kinds is None or stem in LEFT_OUT:
            continue
        group = next((kind for kind in kinds if stem.startswith(kind)), "dam" if kinds else folder)
        yield "others" if folder == "alphabets" else group, stem, image


def stamps(root: Path) -> Iterator[tuple[str, Path]]:
    """(class, file) of cut-outs of photographs whose subject calibration does not have."""
    for group, below in STAMPS.items():
        folder = required(root / "usr/share/tuxpaint/stamps" / below)
        for path in sorted(folder.rglob("*.png")):
            if not any(word in path.relative_to(folder).as_posix() for word in DRAWN) and path.stem not in SUBJECTS:
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
            f"{' '.join(PACKAGES)}; or unpack them (dpkg-deb -x) and name the folder by SLIMVIT_PICTURES_ROOT."
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
        print(f"{name}: {len(list((options.folder / name).rglob('*.png')))} pictures")
    print(f"digest {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
