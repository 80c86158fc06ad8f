"""Groups images that look nearly the same into scenes; splits keep each scene on one side.

Up to `LOOKED_AT` images are all compared with each other. Of more, only names are compared before the split, and after it those
that calibration and the judges see. Images of an own kind, as digits or clothes on a plain ground, all resemble each other: a
scene that grows large is looked at again, more strictly.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from toolchain.data.glances import ALIKE, Look, Pairs, alike, glances_at, likenesses
from toolchain.data.names import copies, folder_of, neighbours
from toolchain.data.splits import SPLIT_SEED, Images, counted, varied

LOOKED_AT = 2000
"""So many images of a source are looked at: a JPEG file of two megapixels takes about 5 ms of one core."""
STRICTER = (0.85, 0.9, 0.95, 0.97, 0.98)
"""The likeness at which scenes that are large are looked at again."""
LARGE_SHARE, LARGE = 0.02, 8
"""A scene is large that holds more than a fiftieth of all images and more than eight, or more than `MOST_SHARE` of a class."""
MOST_SHARE = 0.6
"""Largest scene, as a share of all images or of a class, that can stay in train and leave enough to hold out."""
LEAST = 3
"""Train, validation and test need a scene each."""
PIECES = 8
"""Number of pieces that a scene is cut into if no split could keep it on one side."""
CLASS_TO_KEEP = 8
"""A class of at least this many images must be on both sides of a split, even if it is one scene."""
NEARLY = 0.9
"""Least likeness of two images in different splits of the user's that is reported as a copy."""
SEQUENCE = 0.9
"""Of images that are numbered one after the other half the neighbours are this alike where they are frames of one film."""
PROBES, RUNS = 100, 200
"""Of large sources so many pairs of neighbours are looked at; if they are a film's, runs of neighbours are scenes."""


def tell_apart(parts: Mapping[str, Images], most: int = LOOKED_AT) -> tuple[dict[str, Images], list[str]]:
    """The parts of a source with the scenes of their images, numbered over all parts, and what to say of them.

    Parts without glances are left as they are, and of more than `most` images only names are compared.
    """
    seen = {name: images for name, images in parts.items() if images.glances is not None}
    if not seen:
        return dict(parts), []
    if sum(map(len, seen.values())) > most:
        return {name: _told_by_order(images) if name == "train" else images for name, images in parts.items()}, []
    pairs = _pairs(list(seen.values()))
    labels = torch.cat([images.labels for images in seen.values()])
    scenes, cut = grouped(labels, pairs)
    told = zip(seen.items(), torch.split(scenes, [len(images) for images in seen.values()]), strict=True)
    notes = _copies_across(seen, pairs, set(seen) - {"train"})
    if cut:
        notes.append(
            f"{cut} of {len(scenes)} images look so much alike that no split can keep them on one side: what is measured on "
            "validation and test holds for images like these alone. Add images of other scenes, or split them yourself."
        )
    return {**parts, **{name: images.of_scenes(numbers) for (name, images), numbers in told}}, notes


def keep_apart(
    splits: Mapping[str, Images], made: Collection[str], most: int = LOOKED_AT
) -> tuple[dict[str, Images], list[str]]:
    """The splits of a source of more than `most` images without copies of held-out ones in calibration, and what to say.

    Of calibration, and of validation and test together, up to half of `most` images are looked at. Copies leave train;
    others of train that were looked at replace them in calibration.

    Args:
        splits: as `arrange` made them.
        made: which of "validation" and "test" were taken from train; of those that the user made copies are only counted.
        most: how many images are looked at.
    """
    train, calibration = splits["train"], splits["calibration"]
    held_out = {name: splits[name] for name in ("validation", "test") if splits[name].glances is not None}
    if len(made) == 2 and splits["validation"].positions.equal(splits["test"].positions):
        held_out.pop("validation", None)  # both are the same images of train: of own splits, positions count in each
    total = len(train) + sum(map(len, held_out.values()))
    if train.glances is None or not held_out or not len(calibration) or total <= most:
        return dict(splits), []
    used = calibration.spread(most // 2)
    others = train.take(_outside(train, calibration.positions))
    spare = varied(others, min(len(others), most // 2 - len(used)) if made else 0, SPLIT_SEED + 3)
    looked = train.take(torch.isin(train.positions, torch.cat([used.positions, spare.positions])).nonzero().flatten())
    judges = {name: images.spread(most // 2 // len(held_out)) for name, images in held_out.items()}
    sequences = {"train": looked, **judges}
    pairs = _pairs(list(sequences.values()))
    numbers, _ = grouped(torch.cat([images.labels for images in sequences.values()]), pairs)
    scenes = dict(zip(sequences, torch.split(numbers, list(map(len, sequences.values()))), strict=True))
    notes = _copies_across(sequences, pairs, set(judges) - set(made), "a sample of ")
    judged = torch.cat([numbers[:0], *(scenes[name] for name in judges if name in made)])
    copied = looked.positions[torch.isin(scenes["train"], judged)]
    left = calibration.positions[_outside(calibration, copied)]
    clean, gone = spare.positions[_outside(spare, copied)], len(calibration) - len(left)
    fresh = clean[torch.arange(min(gone, len(clean))) * len(clean) // max(gone, 1)]
    if len(copied):
        were = "was" if len(copied) == 1 else "were"
        notes.append(
            f"{counted(len(copied))} {were} left out of train, since validation or test has images that look nearly the same. Remove "
            "copies from the data to use the rest."
        )
    train = train.take(_outside(train, copied)).of_scenes(_merged(train.all_scenes, looked.positions, scenes["train"]))
    calibration = train.take(torch.isin(train.positions, torch.cat([left, fresh])).nonzero().flatten())
    return {**splits, "train": train, "calibration": calibration}, notes


def _outside(images: Images, positions: Tensor) -> Tensor:
    """The indices [n] of the images that are at none of the positions."""
    return (~torch.isin(images.positions, positions)).nonzero().flatten()


def grouped(labels: Tensor, pairs: Pairs) -> tuple[Tensor, int]:
    """(the scene of each image, int64 [N], how many images are in scenes that had to be cut).

    Args:
        labels: int64 [N], −1 where there is none.
        pairs: of images that are alike; all that are linked are one scene, as long as it does not grow large.
    """
    kept = torch.ones(len(pairs.one), dtype=torch.bool)
    scenes = _linked(len(labels), pairs.one, pairs.other)
    for strictness in STRICTER:
        large = _too_many(scenes, labels, max(LARGE, LARGE_SHARE * len(labels)), least=2)
        if not large.any():
            break
        kept &= (pairs.likeness >= strictness) | ~large[pairs.one]
        scenes = _linked(len(labels), pairs.one[kept], pairs.other[kept])
    cut = _too_many(scenes, labels, MOST_SHARE * len(labels), least=CLASS_TO_KEEP)
    if len(torch.unique(scenes)) < LEAST:
        cut = scenes.bincount()[scenes] > 1
    pieces = scenes.clone()
    for scene in torch.unique(scenes[cut]):
        for label in torch.unique(labels[scenes == scene]):
            inside = ((scenes == scene) & (labels == label)).nonzero().flatten()
            size = max(1, int((labels == label).sum()) // PIECES)
            pieces[inside] = pieces.max() + 1 + torch.arange(len(inside)) // size
    return pieces, int(cut.sum())


def _too_many(scenes: Tensor, labels: Tensor, most: float, least: int) -> Tensor:
    """Whether an image's scene has more than `most` images, or than `MOST_SHARE` of a class of `least` or more, bool [N]."""
    sizes = scenes.bincount()
    large = sizes > most
    for label in torch.unique(labels):
        of_class = labels == label
        if least <= (count := int(of_class.sum())) < len(labels):
            large |= scenes[of_class].bincount(minlength=len(sizes)) > max(1, MOST_SHARE * count)
    return large[scenes]


def _pairs(sequences: Sequence[Images]) -> Pairs:
    """The pairs of images, numbered over all sequences, that look alike, are copies by their names, or follow each other in a film."""
    looks: list[tuple[Look, int]] = []
    same, films = list[tuple[int, int]](), list[list[tuple[int, int]]]()
    for images in sequences:
        if images.glances is None:
            raise ValueError("images without glances cannot be told apart")
        start, positions = len(looks), images.positions.tolist()
        looks += [(images.glances.look, position) for position in positions]
        names = [images.glances.names[position] for position in positions] if images.glances.names else []
        same += _shifted(copies(names), start)
        films += [_shifted(numbered, start) for numbered in neighbours(names)]
    glances = glances_at(looks, max(images.workers for images in sequences))
    for numbered in films:
        likeness = likenesses(glances, *_ends(numbered))
        if _is_film(likeness):
            same += [pair for pair, near in zip(numbered, ((1 + likeness) / 2 >= ALIKE).tolist(), strict=True) if near]
    return alike(glances) + Pairs(*_ends(same), torch.ones(len(same)))


def _is_film(likeness: Tensor) -> bool:
    """Whether images with neighbours so much alike [P] are a film."""
    return len(likeness) >= LEAST and bool(likeness.median() >= SEQUENCE)


def _shifted(pairs: Sequence[tuple[int, int]], start: int) -> list[tuple[int, int]]:
    return [(start + one, start + other) for one, other in pairs]


def _ends(pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """(the first, the second) of each pair, int64 [P]."""
    one, other = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
    return one, other


def _linked(count: int, one: Tensor, other: Tensor) -> Tensor:
    """The number of the connected part that each of `count` images is in, int64 [count]."""
    links = coo_array((torch.ones(len(one)).numpy(), (one.numpy(), other.numpy())), shape=(count, count))
    return torch.from_numpy(connected_components(links, directed=False)[1]).long()


def _copies_across(sequences: Mapping[str, Images], pairs: Pairs, others: Collection[str], of: str = "") -> list[str]:
    """What to say of images in `others` that look nearly the same as images of "train".

    Args:
        sequences: of images that `pairs` numbers over all, by the names of their parts.
        pairs: of those that are alike.
        others: the parts to say it of.
        of: stands before a number of images, where these are not all of a part.
    """
    names = list(sequences)
    owners = torch.arange(len(names)).repeat_interleave(torch.tensor([len(images) for images in sequences.values()]))
    train = names.index("train")
    one, other = (end[pairs.likeness >= NEARLY] for end in (pairs.one, pairs.other))
    copied = torch.unique(torch.cat([other[owners[one] == train], one[owners[other] == train]]))
    counts = owners[copied].bincount(minlength=len(names)).tolist()
    return [
        f"{count} of {of}{counted(len(sequences[name]))} of {name} {'looks' if count == 1 else 'look'} nearly the same as images "
        f"of train, so results on {name} are better than on new images. Remove {'it' if count == 1 else 'them'} from train or "
        f"from {name}."
        for name, count in zip(names, counts, strict=True)
        if name in others and count
    ]


def _told_by_order(images: Images) -> Images:
    """A part too large to be looked at, with scenes by names and, where neighbours are alike, of runs of neighbours."""
    count, glances = len(images), images.glances
    if glances is None or count < 2:
        return images
    folders = [folder_of(name) for name in glances.names] or [""] * count
    pairs = copies(glances.names)
    first = torch.arange(PROBES) * (count - 1) // PROBES
    first = first[[folders[at] == folders[at + 1] for at in first.tolist()]]
    seen = glances_at([(glances.look, at + step) for at in first.tolist() for step in (0, 1)], images.workers)
    ends = torch.arange(0, len(seen), 2)
    if _is_film(likenesses(seen, ends, ends + 1)):
        size = -(-count // RUNS)
        pairs += [(at, at + 1) for at in range(count - 1) if (at + 1) % size and folders[at] == folders[at + 1]]
    return images.of_scenes(_linked(count, *_ends(pairs)))


def _merged(scenes: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    """Scenes [M] of all positions, with those made one whose images at `positions` [n] have one number [n]."""
    merged = scenes.clone()
    for number in torch.unique(numbers):
        several = torch.unique(merged[positions[numbers == number]])
        if len(several) > 1:
            merged[torch.isin(merged, several)] = several[0]
    return merged
