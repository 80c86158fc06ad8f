"""The form that ships: stock modules only, and nothing that another module can take over.

Each factorised linear becomes two linears, or one where that holds fewer parameters; each LayerScale disappears into
the linear before it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

from torch import nn

from toolchain.cost import pair_pays
from toolchain.errors import ArtifactError, PlanError
from toolchain.families import Family
from toolchain.model import DeployModel, Made, SlicedModel
from toolchain.surgery.factorised import FactorisedLinear, replace_module
from toolchain.surgery.scales import fold_scale, remove_scale


def split_module(module: nn.Module, family: Family) -> None:
    """Replaces every `FactorisedLinear` and every LayerScale by stock modules, in place; names of kept factors stay."""
    for name, child in list(module.named_modules()):
        if isinstance(child, FactorisedLinear):
            pays = pair_pays(child.down.out_features, child.up.out_features, child.down.in_features)
            pair = nn.Sequential(OrderedDict(down=child.down, up=child.up))
            replace_module(module, name, pair if pays else child.merged())
    for branch in family.branches(module):
        if fold_scale(module, branch):
            remove_scale(module, branch)


class Split:
    """SlicedModel → DeployModel."""

    def requires(self, given: SlicedModel) -> None:
        """Raises PlanError if a linear of the plan's low ranks is not factorised."""
        for low in given.plan.low_ranks:
            if not isinstance(given.module.get_submodule(low.module), FactorisedLinear):
                raise PlanError(f"{low.module} has rank {low.rank} in the plan but is not factorised in the model")

    def __call__(self, given: SlicedModel) -> Made[DeployModel, None]:
        """The model of stock modules only."""
        module = copy.deepcopy(given.module)
        split_module(module, given.family)
        form = given.ref, module, given.family, given.groups, given.preprocess, given.provenance
        return Made(DeployModel(*form, plan=given.plan), None)

    def ensures(self, given: SlicedModel, made: DeployModel) -> None:
        """Raises ArtifactError if a factorised linear is left, or parameters were added."""
        left = [name for name, child in made.module.named_modules() if isinstance(child, FactorisedLinear)]
        if left:
            raise ArtifactError(f"{left[0]} is still factorised after the split")
        before = sum(p.numel() for p in given.module.parameters())
        after = sum(p.numel() for p in made.module.parameters())
        if after > before:
            raise ArtifactError(f"the split model has {after} parameters, more than the sliced one's {before}")
