import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolchain.data.splits import VALIDATION_LIMIT, Images, arrange, hold_out, varied
from toolchain.errors import DataError


def images(labels, scenes=None):
    scenes = None if scenes is None else torch.tensor(scenes)
    return Images(lambda position: torch.full((1, 1, 1), float(position)), labels, scenes=scenes)


@given(
    labels=st.lists(st.integers(-1, 4), min_size=2, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_hold_out_partitions_and_is_stratified(labels, share, seed):
    everything = images(labels)
    size = 1 + int(share * (len(labels) - 1))
    rest, held = hold_out(everything, size, seed)
    assert len(held) == size
    assert sorted([*rest.positions.tolist(), *held.positions.tolist()]) == list(range(len(labels)))
    for label in set(labels):
        expected = labels.count(label) * size / len(labels)
        assert abs((held.labels == label).sum().item() - expected) <= 1
    again = hold_out(everything, size, seed)[1]
    assert again.positions.equal(held.positions)


def of_scenes(most, least=1):
    """Images of up to four classes, of which many show a scene of others."""
    one = st.tuples(st.integers(-1, 3), st.integers(0, 12))
    return st.lists(one, min_size=least, max_size=most).map(lambda pairs: images(*map(list, zip(*pairs, strict=True))))


@given(everything=of_scenes(60), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_no_scene_is_held_out_in_part(everything, share, seed):
    size = int(share * len(everything))
    rest, held = hold_out(everything, size, seed)
    assert sorted([*rest.positions.tolist(), *held.positions.tolist()]) == list(range(len(everything)))
    assert not set(rest.scenes.tolist()) & set(held.scenes.tolist())
    counts = everything.scenes.bincount()
    assert abs(len(held) - size) <= counts.max()
    if 0 < size < len(everything) and (counts > 0).sum() > 1:
        assert min(len(rest), len(held)) > 0


@given(seed=st.integers(0, 2**31))
def test_classes_keep_their_shares_where_scenes_are_small(seed):
    labels = torch.arange(240) // 60
    everything = Images(lambda _: torch.zeros(1, 1, 1), labels, scenes=torch.arange(240) // 3)
    held = hold_out(everything, 48, seed)[1]
    assert held.labels.bincount(minlength=4).sub(12).abs().max() <= 3


@given(pairs=st.sets(st.integers(0, 199), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_a_few_copies_move_a_few_images(pairs, seed):
    scenes = [position - 1 if position in pairs and position % 2 else position for position in range(200)]
    labels = [position % 5 for position in range(200)]
    before, after = (set(hold_out(images(labels, own), 40, seed)[1].positions.tolist()) for own in (None, scenes))
    assert len(after) == 40
    assert len(before - after) <= 2 * len(pairs)


@given(everything=of_scenes(80, least=20))
def test_train_validation_and_test_share_no_scene(everything):
    if (everything.scenes.bincount() > 0).sum() < 3:
        return
    splits = arrange({"train": everything}, 8)
    scenes = [set(splits[name].scenes.tolist()) for name in ("train", "validation", "test")]
    assert sum(map(len, scenes)) == len(set.union(*scenes))
    assert set(splits["calibration"].positions.tolist()) <= set(splits["train"].positions.tolist())
    assert len(splits["calibration"]) == min(8, len(splits["train"]))


@given(everything=of_scenes(60), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_varied_sample_has_one_image_of_each_scene_before_a_second_of_any(everything, share, seed):
    size, scenes = round(share * len(everything)), int((everything.scenes.bincount() > 0).sum())
    sample = varied(everything, size, seed)
    assert len(sample) == len(set(sample.positions.tolist())) == size
    assert len(set(sample.scenes.tolist())) == min(size, scenes)


def test_splits_of_images_that_are_scenes_of_their_own_never_change():
    """Records of benchmarks name these images by their digests."""
    digest = hashlib.sha256()
    for labels in ([0, 1, 2] * 20, [-1] * 457, [*range(7)] * 11, sorted([*range(10)] * 40)):
        for count in (0, 5, 33, 512):
            for part in arrange({"train": images(labels)}, count).values():
                digest.update(part.positions.numpy().tobytes())
    assert digest.hexdigest() == "2cf0ca666d9e128b69f5a369b2f8d1b1ccf32c1f2accf318ad0347aa390641ea"


def test_another_seed_is_another_split():
    everything = images([0, 1] * 50)
    assert not hold_out(everything, 20, 0)[1].positions.equal(hold_out(everything, 20, 1)[1].positions)


def test_an_image_and_its_label_stay_together():
    everything = images(list(range(20)))
    part = everything.take(torch.tensor([7, 3, 11])).take(torch.tensor([2, 0]))
    assert [(image.item(), label) for image, label in (part[0], part[1])] == [(11.0, 11), (7.0, 7)]


def test_every_image_is_a_scene_of_its_own_unless_said_otherwise():
    assert images([0, 0, 1]).scenes.tolist() == [0, 1, 2]
    grouped = images([0] * 6, [5, 5, 7, 8, 8, 9])
    assert grouped.take(torch.tensor([4, 0, 1])).unlabelled().scenes.tolist() == [8, 5, 5]
    assert grouped.spread(3).scenes.tolist() == [5, 7, 8]


def test_a_sample_is_even_and_never_empty():
    ordered = images(sorted([*range(10)] * 4))
    assert ordered.spread(10).labels.tolist() == [*range(10)], "of every class"
    assert ordered.spread(4).positions.tolist() == [0, 10, 20, 30]
    assert len(ordered.spread(0)) == 1
    assert ordered.spread(999).positions.equal(ordered.positions)


@pytest.mark.parametrize("given_parts", [{}, {"validation": 8}, {"test": 8}, {"validation": 8, "test": 9}])
def test_every_split_has_images_and_none_is_used_twice(given_parts):
    parts = {"train": images([0, 1, 2] * 20)} | {name: images([0, 1] * size) for name, size in given_parts.items()}
    splits = arrange(parts, calibration_images=10)
    assert {name: len(split) > 0 for name, split in splits.items()} == dict.fromkeys(
        ("train", "calibration", "validation", "test"), True
    )
    train, calibration = (set(splits[name].positions.tolist()) for name in ("train", "calibration"))
    assert calibration <= train
    assert len(calibration) == 10
    from_train = [splits["train"]]
    from_train += [splits["validation"]] if {"validation", "test"} - set(given_parts) else []
    from_train += [splits["test"]] if not given_parts else []
    assert sorted(position for split in from_train for position in split.positions.tolist()) == list(range(60))


def test_a_single_held_out_part_is_the_test_set():
    held = images([0, 1] * 4)
    splits = arrange({"train": images([0, 1] * 30), "validation": held}, 5)
    assert splits["test"] is held
    assert len(splits["validation"]) == 6


def test_validation_is_limited():
    splits = arrange({"train": images(torch.zeros(60_000)), "test": images([0])}, 5)
    assert len(splits["validation"]) == VALIDATION_LIMIT


def test_calibration_takes_all_of_a_small_train():
    splits = arrange({"train": images([0, 1] * 5)}, 512)
    assert splits["calibration"].positions.equal(splits["train"].positions)


def test_too_few_images_are_refused():
    with pytest.raises(DataError, match=r"3 images .* at least 4"):
        arrange({"train": images([0, 0, 0])}, 5)
    with pytest.raises(DataError, match="test 0 images"):
        arrange({"train": images([0] * 9), "test": images([])}, 5)
