"""What was tried once: mixtures are mixtures, patches that are not mixed change nothing, and without any the pass is the tool's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders import close, images, problem_of
from experiments.fewer_tokens import SCHEDULES, reduce_mixed
from experiments.mixtures import Matching, Mean, Soft, area, matching, mixed, overlap

from toolchain.compress.choices import key_of
from toolchain.compress.sensitivity import Teacher, sensitivities
from toolchain.compress.sequential import Pass, reduce_sequentially
from toolchain.likelihood import CATEGORICAL

ALL = [
    (name, index, each)
    for table in SCHEDULES.values()
    for name, steps in table.items()
    for index, each in steps.items()
]


class Noise(torch.utils.data.Dataset):
    def __init__(self, model, count):
        self.images = images(model, count)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], -1


@pytest.mark.parametrize(("name", "index", "mixture"), ALL)
def test_rows_are_shares_and_tokens_that_stay_stay(name, index, mixture):
    torch.manual_seed(0)
    x = torch.randn(3, mixture.typical.shape[1], 8)
    path = mixture.matrix(x).expand(3, -1, -1)
    assert path.shape[1:] == mixture.typical.shape
    assert (path >= 0).all()
    assert close(path.sum(-1), torch.ones(path.shape[:2]))
    assert close((path @ x)[:, : mixture.prefix], x[:, : mixture.prefix])
    assert close(mixture(x), path @ x)
    assert mixture(x.to("meta")).shape == (3, len(mixture.typical), 8)
    if isinstance(mixture, Matching):
        assert close(path[:, 1:, 1:].count_nonzero(1).float(), torch.ones(3, x.shape[1] - 1)), (
            "each patch is in one mixture"
        )


def test_cells_share_the_area():
    shares = overlap(7, 4)
    assert shares.sum(1).tolist() == pytest.approx([1] * 4)
    assert shares.sum(0).tolist() == pytest.approx([4 / 7] * 7), "no patch counts more than another"
    assert torch.equal(area((4, 4), (4, 4), 1), torch.eye(17))


def test_two_that_are_alike_are_matched_first():
    x = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))
    x[0, 4] = x[0, 5] * 1.01  # patches 3 and 4, of which the first leaves
    path = matching(6, 5, 1).matrix(x)[0, 1:, 1:]
    (row,) = [row for row in path if row.count_nonzero() == 2]
    assert row.nonzero().flatten().tolist() == [3, 4]
    with pytest.raises(ValueError, match="leaves 3 to 6"):
        matching(6, 2, 1)


@pytest.mark.parametrize("kind", [Mean, lambda prefix, typical: Soft(prefix, typical, 1e6)])
def test_a_grid_that_is_as_fine_changes_nothing(tiny, kind):
    names, x = [block.path for block in tiny.family.blocks(tiny.module)], images(tiny)
    tokens = tiny.module.pos_embed.shape[1] - 1
    side = math.isqrt(tokens)
    same = kind(1, area((side, side), (side, side), 1))
    with torch.no_grad():
        assert close(mixed(copy.deepcopy(tiny.module), names, {1: same})(x), tiny.module(x))


def test_without_mixtures_the_pass_is_the_tools_own(tiny):
    seen, problem = Noise(tiny, 16), problem_of(tiny)
    cares = sensitivities(tiny.module, tiny.family, seen, 0, CATEGORICAL)
    teacher = Teacher(tiny.module, tiny.family, CATEGORICAL, cares)
    widths = {key_of(site): problem.choices.kept(site, 0.5 * site.total) for site in problem.sites}
    ours, theirs = copy.deepcopy(tiny.module), copy.deepcopy(tiny.module)
    head = reduce_mixed(teacher, ours, problem.sites, widths, seen, {})
    found = reduce_sequentially(teacher, theirs, problem.sites, widths, seen, Pass(0.5))
    assert torch.equal(head.weight, found.head.weight)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
