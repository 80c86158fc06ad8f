"""Resolves the names in a recipe's [compress] section, and refuses combinations that do not work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from toolchain.compress.criteria import CRITERIA, Criterion
from toolchain.compress.factorisations import FACTORISATIONS, Factorisation
from toolchain.compress.reductions import REDUCTIONS
from toolchain.compress.solver import ALLOCATIONS, Allocator
from toolchain.cost import RANK
from toolchain.data import DataSource
from toolchain.errors import RecipeError
from toolchain.model import TimmModel
from toolchain.recipe import CompressSection

NONE = "none"
HIDDEN, HEAD_DIM = "mlp_hidden", "head_dim"
UNITS = (HIDDEN, HEAD_DIM, RANK)
"""Kinds of unit that can be physically removed."""
SWITCHES = ("refit", "sequential", "sensitivity")
"""Keys that apply only to the closed form."""
IN_PLACE_ON_NOISE = "magnitude"


@dataclass(frozen=True)
class Method:
    """A [compress] section with its names resolved.

    Attributes:
        section: the keys.
        criterion: which neurons stay; None leaves all.
        factorisation: how attention shrinks; None leaves it.
    """

    section: CompressSection
    criterion: Criterion | None
    factorisation: Factorisation | None

    @staticmethod
    def of(section: CompressSection, *, synthetic: bool = False) -> Method:
        """The method of a section; on synthetic images nothing is learned, and every layer shrinks alike.

        The closed form needs no labels and keeps its shapes on noise; what it fits there means nothing, and the plan says so.

        Raises:
            RecipeError: a name is unknown, or a key does not go with the others.
        """
        for key, known in (("attention", FACTORISATIONS), ("neurons", CRITERIA), ("allocation", ALLOCATIONS)):
            value, every = getattr(section, key), [*known, *([NONE] if key != "allocation" else [])]
            if value not in every:
                raise RecipeError(f"compress.{key} = {value!r} is not in this version; it has {', '.join(every)}")
        criterion = None if section.neurons == NONE else CRITERIA[section.neurons]
        factorisation = None if section.attention == NONE else FACTORISATIONS[section.attention]
        method = Method(section, criterion, factorisation)
        method._check()
        if not synthetic:
            return method
        if criterion is not None and not criterion.on_noise:
            criterion = CRITERIA[IN_PLACE_ON_NOISE]
        changed = {"neurons": NONE if criterion is None else criterion.name, "allocation": "uniform"}
        return Method(section.model_copy(update=changed), criterion, factorisation)

    def _check(self) -> None:
        section, names = self.section, f"{self.section.attention!r} and {self.section.neurons!r}"
        others = _either(name for name, each in ALLOCATIONS.items() if self._goes_with(each))
        attention = _either(each.name for each in FACTORISATIONS.values() if each.factorise is None)
        neurons = _either(each.name for each in CRITERIA.values() if each.score is None)
        if not self._goes_with(self.allocation) and self.weighs:
            raise RecipeError(
                f"compress.allocation = {section.allocation!r} weighs closed-form reductions: it goes with attention {attention} "
                f"or 'none' and neurons {neurons} or 'none', not with {names}; use {others}"
            )
        if not self._goes_with(self.allocation):
            raise RecipeError(
                f"compress.allocation = {section.allocation!r} compares scores of neurons over layers, which "
                f"{section.neurons!r} does not give; use {others}"
            )
        for name in () if self.closed_attention or self.closed_neurons else SWITCHES:
            if not getattr(section, name):
                raise RecipeError(
                    f"compress.{name} = false has nothing to switch off: it goes with attention {attention}, or neurons "
                    f"{neurons}, not with {names}; remove it"
                )

    def _goes_with(self, allocation: Allocator) -> bool:
        """Whether these attention and neurons give an allocator what it decides by: damage of closed forms, or scores."""
        weights_alone = self.factorisation is not None and self.factorisation.factorise is not None
        if allocation.weigh is not None:
            return not (self.scored or weights_alone)
        return self.scored or self.criterion is None or not allocation.over_layers

    @property
    def entries(self) -> tuple[object, ...]:
        """Every entry of a registry that carries it out."""
        return (self.criterion, self.factorisation, self.allocation, *REDUCTIONS.values())

    @property
    def allocation(self) -> Allocator:
        """The allocator that decides widths."""
        return ALLOCATIONS[self.section.allocation]

    @property
    def weighs(self) -> bool:
        """Whether that is by measured damage."""
        return self.allocation.weigh is not None

    @property
    def scored(self) -> bool:
        """Whether neurons stay by scores."""
        return self.criterion is not None and self.criterion.score is not None

    @property
    def closed_neurons(self) -> bool:
        """Whether the closed form reduces neurons."""
        return self.criterion is not None and self.criterion.score is None

    @property
    def closed_attention(self) -> bool:
        """Whether the closed form reduces attention."""
        return self.factorisation is not None and self.factorisation.factorise is None

    @property
    def rotates(self) -> bool:
        """Whether head dims shrink where they can be rotated."""
        return self.factorisation is not None and self.factorisation.rotates and self.closed_attention

    @property
    def floor(self) -> float:
        """The least share of its neurons that a layer keeps."""
        return 0.0 if self.criterion is None else self.criterion.least_kept(self.section)

    @property
    def reads_labels(self) -> bool:
        """Whether labels decide anything."""
        return self.criterion is not None and self.criterion.needs.reads_labels

    def require(self, source: DataSource, dense: TimmModel) -> None:
        """Raises RecipeError, DataError or ModelError if the method cannot be carried out on these images and this model."""
        for key, entry in (("neurons", self.criterion), ("attention", self.factorisation)):
            if entry is not None:
                entry.needs.require(f"compress.{key} = {entry.name!r}", source, dense)


def _either(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in names)
