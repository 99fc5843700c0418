"""Source and recipe -> plan."""

from collections.abc import Callable
from math import prod

import numpy as np

from mlx_svd.calibrate.scorers import Scoring
from mlx_svd.calibrate.statistics import Calibration
from mlx_svd.checkpoint.layout import Quantization
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.allocate import allocate, chosen_plan
from mlx_svd.plan.forms import FormChoice, Storage, choose_form
from mlx_svd.plan.notes import plan_notes
from mlx_svd.plan.plan import Plan, ProjectionPlan, target_dtype
from mlx_svd.plan.policy import round_rank
from mlx_svd.plan.recipe import Recipe, Rule, check_rules
from mlx_svd.plan.slicing import (
    cache_note,
    check_slices,
    size_multiple,
    sliced_choice,
    sliced_storage,
)
from mlx_svd.plan.spectra import measure_spectra
from mlx_svd.plan.units import make_units
from mlx_svd.source.families import Projection
from mlx_svd.source.slices import slice_groups
from mlx_svd.source.source import Source


def make_plan(
    source: Source,
    recipe: Recipe,
    advance: Callable[[str], None] = lambda path: None,
    calibration: Calibration | None = None,
) -> Plan:
    """Decide form, ranks and bits of every projection and count the bytes.

    Reads weights only if an energy policy or a budget needs their spectra; ``advance`` is told
    each path whose spectrum is done. calibration: of this model; a plan of given ranks can be made
    without, but only be compressed with the calibration that it was made with. Raises MlxSvdError
    for a rank over the limit, a rule that can never apply, a budget out of reach, a calibration of
    another model, and everything that the source refuses.
    """
    if calibration is not None:
        calibration.check(source, recipe.moments)
    elif recipe.planning_moments:
        raise MlxSvdError(
            f"--scorer {recipe.scorer}: needs a calibration; make one with mlx-svd calibrate"
        )
    return _Planner(source, recipe, calibration).plan(advance)


class _Planner:
    def __init__(self, source: Source, recipe: Recipe, calibration: Calibration | None):
        self.source, self.recipe, self.calibration = source, recipe, calibration
        self.scoring = Scoring(recipe.scorer, recipe.importance_window, calibration)
        self.n_layers = 1 + max(linear.projections[0].layer for linear in source.linears)
        self.universe = [
            p for m in source.linears for p in m.projections if p.name in recipe.projections
        ]
        if not self.universe:
            raise MlxSvdError(
                f"a {source.config['model_type']} model has no "
                f"{', '.join(recipe.projections)} projection; change --projections"
            )
        check_rules(recipe, self.universe, self.n_layers)
        self.groups = slice_groups(source.linears)
        self.spectra: dict[str, list[np.ndarray]] = {}

    def plan(self, advance: Callable[[str], None]) -> Plan:
        source, recipe = self.source, self.recipe
        tensors = source.tensors
        wanted = {p.path: self._heads(p) for p in self.universe if self._needs_spectrum(p)}
        if wanted:
            self.spectra = measure_spectra(source, wanted, self.scoring, advance)
        plans = {p.path: self._projection(p) for m in source.linears for p in m.projections}
        modules = dict(recipe.modules)
        remarks: tuple[str, ...] = ()
        if recipe.budget:
            free = [p for p in self.universe if not self._left_alone(p)]
            allocation = allocate(source, recipe, self.scoring, free, plans, self.groups, advance)
            remarks = allocation.remarks
            for path, candidate in allocation.chosen.items():
                if path in plans:
                    plans[path] = chosen_plan(
                        source, recipe, plans[path], candidate, self.groups.get(path)
                    )
                else:
                    modules[path] = candidate.quantization
        check_slices(source, self.groups, plans, self.calibration)
        units = make_units(source, recipe, plans, modules)
        return Plan(
            base_model=source.name,
            revision=source.revision,
            model_type=source.config["model_type"],
            compressible=recipe.projections,
            quantize=recipe.quantize,
            rank_multiple=recipe.rank_multiple,
            dtype=recipe.dtype,
            scorer=recipe.scorer,
            calibration=self._calibration_record(),
            importance_window=recipe.importance_window,
            modules=modules,
            projections=tuple(plans.values()),
            units=units,
            dropped=tuple(source.dropped),
            notes=(*self._notes(plans), *remarks),
            bytes_before=sum(prod(shape) * dtype.size for shape, dtype in tensors.values()),
        )

    def _notes(self, plans: dict[str, ProjectionPlan]) -> tuple[str, ...]:
        sliced = cache_note(self.groups, plans)
        return plan_notes(self.source, self.recipe, plans) + ((sliced,) if sliced else ())

    def _calibration_record(self) -> dict | None:
        """What the plan's result depends on, None if on no calibration."""
        if self.calibration is None:
            return None
        info = self.calibration.info
        return {
            "digest": info.digest,
            "origin": info.origin,
            "windows": info.windows,
            "length": info.length,
            "tokens": info.tokens,
        }

    # -- one projection -------------------------------------------------------------------

    def _rule(self, projection: Projection) -> Rule | None:
        index = self.recipe.rule_for(projection, self.n_layers)
        return None if index is None else self.recipe.rules[index]

    def _heads(self, projection: Projection) -> int:
        """How many matrices the projection is cut into: its heads, or 1."""
        rule = self._rule(projection)
        if rule and rule.ranks:
            return len(rule.ranks)
        per_head = self.recipe.per_head if rule is None or rule.per_head is None else rule.per_head
        return projection.heads if per_head and projection.heads else 1

    def _left_alone(self, projection: Projection) -> str:
        """Why a projection is not truncated, '' if it is."""
        rule = self._rule(projection)
        if projection.name not in self.recipe.projections:
            return "not asked for"
        if rule and rule.skip:
            return f"skipped by rule {self.recipe.rules.index(rule) + 1}"
        if min(projection.shape) < self.recipe.min_dim:
            return f"a dimension below min_dim {self.recipe.min_dim}"
        decided = self.recipe.policy or self.recipe.budget
        if not (rule and (rule.policy or rule.ranks)) and decided is None:
            return "no rule matches"
        return ""

    def _needs_spectrum(self, projection: Projection) -> bool:
        rule = self._rule(projection)
        policy = rule.policy if rule and rule.policy else self.recipe.policy
        exact = rule is not None and rule.ranks is not None
        exact = exact or self._form(rule) == "sliced"
        left_alone = exact or self._left_alone(projection) or policy is None
        return not left_alone and policy.energy is not None

    def _projection(self, p: Projection) -> ProjectionPlan:
        rule = self._rule(p) if p.name in self.recipe.projections else None
        quantize = self.recipe.quantization_for(rule)
        dtype = self.source.tensors[f"{p.module}.weight"][1]
        factors = self.recipe.factors_for(rule)
        storage = Storage(p, target_dtype(dtype, self.recipe.dtype), quantize, factors)
        heads = self._heads(p)
        if not self._left_alone(p):
            self.scoring.check(p)
        limit, after, shape = min(p.shape[0] // heads, p.shape[1]), storage, None
        if reason := self._left_alone(p) or (self.recipe.budget and "as the budget says"):
            choice = FormChoice("dense", None, reason)
        elif self._form(rule) == "sliced":
            choice = self._slice(p, rule)
            limit = self.groups[p.path].limit
            if choice.ranks:
                after = sliced_storage(storage, self.groups[p.path], choice.ranks[0])
                shape = after.projection.shape
        else:
            choice = self._choose(p, rule, heads, storage)
        before = Storage(p, dtype, None).nbytes("dense", (0,))
        return ProjectionPlan(
            projection=p,
            form=choice.form,
            ranks=choice.ranks,
            limit=limit,
            break_even=storage.break_even_rank(heads, self._multiple(rule, quantize)),
            quantization=quantize,
            reason=choice.reason,
            bytes_before=before,
            bytes_dense=storage.nbytes("dense", (0,)),
            bytes_after=after.nbytes(choice.form, choice.ranks or (0,)),
            factors=factors if choice.form == "corrected" else None,
            stored_shape=shape,
        )

    def _form(self, rule: Rule | None) -> str:
        return (rule and rule.form) or self.recipe.form

    def _slice(self, p: Projection, rule: Rule | None) -> FormChoice:
        if p.path not in self.groups:
            raise MlxSvdError(f"{p.path}: form sliced: its layer has no partner to slice with it")
        group = self.groups[p.path]
        quantize = self.recipe.quantization_for(self._rule(group.reader))
        multiple = size_multiple(group, quantize, self.recipe.rank_multiple)
        policy = rule.policy if rule and rule.policy else self.recipe.policy
        return sliced_choice(group, p, policy, rule.ranks if rule else None, multiple)

    def _choose(self, p: Projection, rule: Rule | None, heads: int, storage: Storage) -> FormChoice:
        limit = min(p.shape[0] // heads, p.shape[1])
        form = self._form(rule)
        # The rank of a correction is the input dimension of its own second factor.
        cut = storage.factors if form == "corrected" else storage.quantize
        multiple = 1 if form == "dense" else self._multiple(rule, cut)
        asked, up = self._asked_ranks(p, rule, heads, limit)
        rounded = [round_rank(rank, multiple, limit, up) for rank in asked]
        if None in rounded:
            return FormChoice("dense", None, f"min(m, n) = {limit} is below a rank of {multiple}")
        choice = choose_form(form, tuple(rounded), storage)
        if choice.form == "dense" and rounded != asked:
            reason = choice.reason if choice.ranks else f"rounded to {multiple} the rank is full"
            return FormChoice("dense", tuple(asked), reason)
        if rounded != asked and len(asked) == 1:
            note = f"rank {asked[0]} rounded to a multiple of {multiple}"
            return FormChoice(
                choice.form, choice.ranks, "; ".join(filter(None, [note, choice.reason]))
            )
        return choice

    def _multiple(self, rule: Rule | None, quantize: Quantization | None) -> int:
        """Ranks are rounded to this, so that second factors can be cut into groups."""
        group = quantize.group_size if quantize else 1
        if rule and rule.ranks:
            return group
        multiple = self.recipe.rank_multiple or group
        if multiple % group:
            raise MlxSvdError(
                f"--rank-multiple {multiple}: must be a multiple of the group size {group}, "
                "or the second factor could not be quantized"
            )
        return multiple

    def _asked_ranks(
        self, p: Projection, rule: Rule | None, heads: int, limit: int
    ) -> tuple[list[int], bool]:
        """Ranks before rounding, and whether to round upwards (an energy is a promise)."""
        if rule and rule.ranks:
            if p.shape[0] % heads or max(rule.ranks) > limit or min(rule.ranks) < 1:
                raise MlxSvdError(
                    f"{p.path}: ranks {list(rule.ranks)} do not fit its shape {p.shape}; give one "
                    f"rank from 1 to min(m, n), or one for each of its {p.heads} heads"
                )
            return list(rule.ranks), False
        policy = rule.policy if rule and rule.policy else self.recipe.policy
        depth = p.layer / max(1, self.n_layers - 1)
        try:
            ranks = [
                policy.choose(limit, depth, lambda head=head: self.spectra[p.path][head])
                for head in range(heads)
            ]
        except MlxSvdError as error:
            raise MlxSvdError(f"{p.path}: {error}") from error
        return ranks, policy.energy is not None
