"""A compression problem: choices, sites, costs and budget of one dense model, each computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from toolchain.compress.choices import UNREACHABLE, Budget, Choices, Costs, Key, Site, key_of
from toolchain.compress.method import HEAD_DIM, HIDDEN, Method
from toolchain.compress.solver import solve_uniform
from toolchain.cost import FileCost, LatencyTable, ModelShape, Widths, trace
from toolchain.errors import BudgetError, RecipeError
from toolchain.model import TimmModel
from toolchain.recipe import ANY, BudgetSection, CompressSection


@dataclass(frozen=True)
class Problem:
    """One dense model to be made smaller by one method within one budget.

    Attributes:
        dense: the model; nothing but `dense` depends on its weights.
        method: what is reduced, and how.
        request: the recipe's [budget].
        choices: what may be reduced, and how far.
        sites: what of it the closed form reduces, in forward order of units, then of linears.
        costs: of any widths.
        budget: what `request` means for this model.
        uniform: the widest widths within the budget at which all layers shrink alike.
        file: the precision whose file the budget speaks of, where the recipe leaves that open and this is one of `options`.
    """

    dense: TimmModel
    method: Method
    request: BudgetSection
    choices: Choices
    sites: tuple[Site, ...]
    costs: Costs
    budget: Budget
    uniform: Widths
    file: str = ""

    @staticmethod
    def of(
        dense: TimmModel,
        section: CompressSection,
        request: BudgetSection,
        multiples: Mapping[str, int],
        *,
        files: Sequence[FileCost] = (),
        synthetic: bool = False,
    ) -> Problem:
        """The problem, from shapes alone: nothing is read from the weights.

        Latency is left out until `timed` says what it is.

        Args:
            dense: the model.
            section, request: [compress] and [budget].
            multiples: unit name, or "rank" → multiple that kept counts are rounded down to.
            files: of the precisions that the budget speaks of.
            synthetic: whether the images are noise, of which nothing is learned.

        Raises:
            RecipeError: a method is unknown, or nothing may be reduced.
            BudgetError: out of reach; the message names the reachable range.
        """
        method = Method.of(section, synthetic=synthetic)
        choices = choices_for(dense, method, multiples)
        if (method.criterion or method.factorisation) and not (choices.groups or choices.linears):
            why = "; ".join(dense.family.restrictions(dense.module))
            raise RecipeError(f"nothing of {dense.ref.name} can be reduced by this method{': ' + why if why else ''}")
        costs = Costs(trace(dense.module, dense.family, dense.preprocess.input_size), dense.groups, files=tuple(files))
        budget = Budget.of(request, costs)
        try:
            uniform = solve_uniform(choices, costs, budget)
        except BudgetError as error:
            if (align := max(multiples.values(), default=1)) == 1:
                raise
            raise BudgetError(
                f"{error}. Kept counts are multiples of {align}; compress.align = 1 allows any."
            ) from None
        sites = _closed_sites(dense, method, choices)
        problem = Problem(dense, method, request, choices, sites, costs, budget, uniform)
        _ = problem.options  # one of them can be met
        return problem

    def timed(self, tables: Sequence[LatencyTable]) -> Problem:
        """The same problem with measured latency; raises BudgetError as `of`."""
        return self.at(replace(self.costs, tables=tuple(tables))) if tables else self

    def sized(self, files: Sequence[FileCost]) -> Problem:
        """The same problem with what files cost, measured on the dense model's; raises BudgetError as `of`."""
        return self.at(replace(self.costs, files=tuple(files))) if files else self

    def at(self, costs: Costs) -> Problem:
        """The same problem by other costs; raises BudgetError as `of`."""
        budget = Budget.of(self.request, costs)
        return replace(self, costs=costs, budget=budget, uniform=solve_uniform(self.choices, costs, budget))

    @property
    def options(self) -> tuple[Problem, ...]:
        """The problem itself; one for each precision that can meet it where the budget leaves open which file it speaks of.

        Raises:
            BudgetError: none can; the message names the range of the one that becomes smallest.
            RecipeError: it is not known what any file costs.
        """
        if ANY not in self.request.files:
            return (self,)
        if not self.costs.files:
            raise RecipeError(
                f"budget.size.{ANY} needs what files of some precisions cost (toolchain.pipeline.job.prepare)"
            )
        options, errors = list[Problem](), dict[float, BudgetError]()
        for file in self.costs.files:
            request = self.request.model_copy(update={"size": {file.precision: self.request.files[ANY]}})
            try:
                options.append(replace(self, request=request, file=file.precision).at(self.costs))
            except BudgetError as error:
                errors[file.bytes_of(self.costs.shape(self.narrowest))] = error
        if not options:
            smallest = str(errors[min(errors)]).removeprefix(f"{UNREACHABLE}: ")
            raise BudgetError(f"no file of export.precisions keeps budget.size.{ANY}; the smallest: {smallest}")
        return tuple(options)

    def require_latency(self) -> None:
        """Raises RecipeError if the budget names a target that has no table."""
        if missing := self.request.latency.keys() - {table.target for table in self.costs.tables}:
            raise RecipeError(
                f"budget.latency.{min(missing)} needs a latency table of that target, measured on the dense model; "
                "`slimvit run`, `plan` and `compress` measure it (toolchain.pipeline.latency_budget)"
            )

    def require_files(self) -> None:
        """Raises RecipeError if the budget speaks of files that were not measured."""
        files = self.costs.files
        if self.request.files and (not files or any(file.rest is None for file in files)):
            raise RecipeError(
                f"budget.size.{next(iter(self.request.files))} needs the files of the dense model, which say what a graph takes; `slimvit "
                "run`, `plan` and `compress` make them (toolchain.pipeline.stages.rounding)"
            )

    def uniform_at(self, costs: Costs) -> Widths:
        """The uniform widths by these costs, which may have corrected latency tables; raises BudgetError."""
        return self.uniform if costs == self.costs else solve_uniform(self.choices, costs, self.budget)

    @property
    def narrowest(self) -> Widths:
        """The narrowest allowed widths of all sites."""
        return self.choices.uniform(0.0)

    @property
    def shape(self) -> ModelShape:
        """The dense shape."""
        return self.costs.dense

    @property
    def by_global_scores(self) -> bool:
        """Whether widths follow from scores over all layers."""
        return self.method.allocation.over_layers and any(group.unit == HIDDEN for group in self.choices.groups)

    def sites_of(self, widths: Mapping[Key, int]) -> list[Site]:
        """The sites that the closed form cuts to some widths."""
        return [site for site in self.sites if key_of(site) in widths]


def choices_for(dense: TimmModel, method: Method, multiples: Mapping[str, int]) -> Choices:
    """What a method reduces on a model: neurons; head dims that can be rotated; or the linears of attention.

    The linears are all of them, or where head dims shrink those of an attention whose head dims cannot be rotated, for
    which a pair of matmuls is what is left.
    """
    units = [HEAD_DIM] * method.rotates + [HIDDEN] * (method.criterion is not None)
    groups = [group for group in dense.groups if group.unit in units and (group.mixable or group.unit != HEAD_DIM)]
    rotated = tuple(f"{group.module}." for group in groups if group.unit == HEAD_DIM)
    linears: dict[str, tuple[int, int]] = {}
    for item in dense.family.factorizable(dense.module) if method.factorisation is not None else ():
        if item.kind == "attention" and not item.linear.startswith(rotated):
            out, into = dense.module.get_submodule(item.linear).weight.shape  # type: ignore[misc]
            linears[item.linear] = (int(out), int(into))
    return Choices(groups, linears, multiples, method.floor, method.section.attention_share)


def _closed_sites(dense: TimmModel, method: Method, choices: Choices) -> tuple[Site, ...]:
    """What the closed form reduces: head dims, the neurons of "obs", low ranks that are made from images."""
    units = [HEAD_DIM] * method.rotates + [HIDDEN] * method.closed_neurons
    groups = [group for group in choices.groups if group.unit in units]
    if not method.closed_attention:
        return (*groups,)
    return (*groups, *(item for item in dense.family.factorizable(dense.module) if item.linear in choices.linears))
