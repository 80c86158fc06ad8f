import pytest

from toolchain.job import prepare
from toolchain.recipe import Recipe

DIGITS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


@pytest.mark.parametrize("source", ["digits", "none"])
def test_every_seed_sees_the_same_splits(source):
    jobs = [
        prepare(
            Recipe.from_dict(
                {
                    "model": {"name": "vit_tiny_patch16_224", "kwargs": DIGITS, "pretrained": False},
                    "data": {"source": source},
                    "train": {},
                    "compress": {"method": "hybrid", "seed": seed},
                    "budget": {"params": 0.6},
                }
            )
        )
        for seed in (0, 1)
    ]
    first, second = (job.source for job in jobs)
    assert first.digest == second.digest
    for name in first.splits:
        assert first.split(name).positions.equal(second.split(name).positions)
        assert first.split(name)[0][0].equal(second.split(name)[0][0])
