"""A recipe: which projections to compress and how, from the command line or a YAML file.

The rules are tried in order and the first that matches decides. Globs are anchored at both ends
and compared name by name: ``*`` stands for one name of a path or a part of it, ``**`` for any
number of names, so ``**.h.2.**`` does not match ``model.h.23.attn.c_proj``.
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache

from mlx_svd.calibrate.scorers import SCORERS, check_scorer
from mlx_svd.checkpoint.layout import DTYPES, FORMS, Quantization, quantization
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.budget import Budget
from mlx_svd.plan.choices import UNQUANTIZED_BITS, Choices
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.source.families import ATTENTION, MLP, PROJECTIONS, Projection

_GROUPS = {"all": PROJECTIONS, "attention": ATTENTION, "mlp": MLP}
ALLOCATIONS = ("greedy", "zero-sum")


@dataclass(frozen=True)
class Rule:
    """Conditions (all must hold; none given matches everything) and what to do then.

    match: globs on the projection's path; layers: indices, negative from the end; projections:
    names; min_dim: both dimensions at least this; skip: not truncated; ranks: exact ranks, one
    for each head or one for the matrix; bits: 16 = unquantized; factor_bits: of the factors of a
    corrected form. None means: as the recipe says. exact: of a saved plan, (quantization,
    factors).
    """

    match: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    projections: tuple[str, ...] = ()
    min_dim: int = 0
    skip: bool = False
    policy: RankPolicy | None = None
    ranks: tuple[int, ...] | None = None
    form: str | None = None
    bits: int | None = None
    per_head: bool | None = None
    factor_bits: int | None = None
    exact: tuple[Quantization | None, Quantization | None] | None = None

    def matches(self, projection: Projection, n_layers: int) -> bool:
        return (
            (not self.match or any(_glob(g).fullmatch(f"{projection.path}.") for g in self.match))
            and (
                not self.layers
                or projection.layer in self.layers
                or projection.layer - n_layers in self.layers
            )
            and (not self.projections or projection.name in self.projections)
            and min(projection.shape) >= self.min_dim
        )

    def conditions(self) -> str:
        """The conditions in words, for messages."""
        given = [
            f"{name} {', '.join(map(str, value))}"
            for name in ("match", "layers", "projections")
            if (value := getattr(self, name))
        ]
        return "; ".join(given + ([f"min_dim {self.min_dim}"] if self.min_dim else [])) or "all"


@dataclass(frozen=True)
class Recipe:
    """projections: names that may be compressed at all; policy, form, per_head, min_dim: for
    those that no rule decides; quantize: of the whole model (None: not quantized); rank_multiple:
    None = 1, or the group size when quantizing; dtype: None = the source's; scorer: what orders
    the components; importance_window: of the seeds' importance; budget: decides form, rank and
    bits of every projection that no rule skips, from ``choices``; allocation: how it chooses,
    greedy or zero-sum (ranks of one unquantized form, from the gradient); modules: quantization of
    other modules where it is not ``quantize``."""

    projections: tuple[str, ...] = ("q", "k", "o")
    policy: RankPolicy | None = None
    form: str = "auto"
    per_head: bool = False
    min_dim: int = 0
    rules: tuple[Rule, ...] = ()
    quantize: Quantization | None = None
    rank_multiple: int | None = None
    dtype: str | None = None
    scorer: str = "plain"
    importance_window: int | None = None
    budget: Budget | None = None
    allocation: str = "greedy"
    choices: Choices = field(default_factory=Choices)
    modules: dict[str, Quantization | None] = field(default_factory=dict)

    def __post_init__(self):
        if self.budget and (self.policy or any(r.policy or r.ranks for r in self.rules)):
            raise MlxSvdError(
                "a budget chooses the ranks itself: leave out --rank-ratio, --rank, --energy and "
                "ranks in rules, or the budget"
            )
        decided = self.policy or self.budget
        if not decided and not any(r.policy or r.ranks or r.skip for r in self.rules):
            raise MlxSvdError(
                "say how much to keep: --keep-bytes, --target-size, --target-bpw, --rank-ratio, "
                "--rank, --energy, or --config with rules"
            )
        check_scorer(self.scorer)
        if self.allocation not in ALLOCATIONS:
            raise MlxSvdError(f"allocation {self.allocation}: use {' or '.join(ALLOCATIONS)}")
        if self.allocation == "zero-sum" and not self.budget:
            raise MlxSvdError("--allocation zero-sum: divides a budget; give --keep-bytes")
        for form in (self.form, *(r.form for r in self.rules)):
            if form not in (None, "auto", *FORMS):
                raise MlxSvdError(f"form {form}: use auto, {', '.join(FORMS)}")
        if self.rank_multiple is not None and self.rank_multiple < 1:
            raise MlxSvdError(f"rank_multiple {self.rank_multiple}: must be at least 1")
        if self.dtype not in (None, *DTYPES):
            raise MlxSvdError(f"dtype {self.dtype}: use one of {', '.join(DTYPES)}")

    def rule_for(self, projection: Projection, n_layers: int) -> int | None:
        """Index of the first rule that matches, None if none does."""
        for index, rule in enumerate(self.rules):
            if rule.matches(projection, n_layers):
                return index
        return None

    def quantization_for(self, rule: Rule | None) -> Quantization | None:
        """How the parts of a projection under this rule are quantized."""
        if rule is not None and rule.exact:
            return rule.exact[0]
        if rule is None or rule.bits is None:
            return self.quantize
        if rule.bits == UNQUANTIZED_BITS:
            return None
        if self.quantize is None:
            return quantization(rule.bits)
        return quantization(rule.bits, self.quantize.group_size, self.quantize.mode)

    @property
    def moments(self) -> tuple[str, ...]:
        """What its calibration must hold."""
        needed = SCORERS[self.scorer]
        return ("input", "output", "gradient") if self.allocation == "zero-sum" else needed

    @property
    def planning_moments(self) -> tuple[str, ...]:
        """What planning alone needs: ranks that are given count bytes without any measurement."""
        policies = [self.policy, *(rule.policy for rule in self.rules)]
        energies = any(policy and policy.energy is not None for policy in policies)
        slices = "sliced" in (self.form, *(rule.form for rule in self.rules))
        return self.moments if self.budget or energies or slices else ()

    def factors_for(self, rule: Rule | None) -> Quantization | None:
        """How the factors of a corrected form under this rule are quantized."""
        if rule is not None and rule.exact:
            return rule.exact[1]
        bits = rule.factor_bits if rule else None
        if bits in (None, UNQUANTIZED_BITS):
            return None
        return quantization(bits, self.quantize.group_size if self.quantize else None)


def check_rules(recipe: Recipe, projections: list[Projection], n_layers: int) -> None:
    """Raise MlxSvdError for a rule that can never match this model, or is always too late."""
    deciding = [recipe.rule_for(p, n_layers) for p in projections]
    for index, rule in enumerate(recipe.rules):
        if index in deciding:
            continue
        matched = [i for i, p in enumerate(projections) if rule.matches(p, n_layers)]
        name = f"rule {index + 1} ({rule.conditions()})"
        if not matched:
            raise MlxSvdError(
                f"{name} matches no {'/'.join(recipe.projections)} projection of this model, "
                f"whose paths look like {projections[0].path}; correct or remove it"
            )
        earlier = sorted({deciding[i] + 1 for i in matched})
        raise MlxSvdError(
            f"{name} never applies: rule {', '.join(map(str, earlier))} before it matches "
            "everything that it matches; move it up"
        )


@lru_cache
def _glob(pattern: str) -> re.Pattern:
    """Anchored glob -> regular expression over a dotted path that ends with a dot."""
    names = [
        r"(?:[^.]+\.)*"
        if name == "**"
        else re.escape(name).replace(r"\*", "[^.]*").replace(r"\?", "[^.]") + r"\."
        for name in pattern.split(".")
    ]
    return re.compile("".join(names))


def parse_projections(names: str | list[str]) -> tuple[str, ...]:
    """'q,k,o', 'all', 'attention' or 'mlp' -> names in canonical order."""
    names = names.split(",") if isinstance(names, str) else names
    chosen: set[str] = set()
    for name in (str(name).strip() for name in names):
        if name not in _GROUPS and name not in PROJECTIONS:
            raise MlxSvdError(
                f"projection {name!r}: use {', '.join(PROJECTIONS)}, or {', '.join(_GROUPS)}"
            )
        chosen |= set(_GROUPS.get(name, (name,)))
    return tuple(name for name in PROJECTIONS if name in chosen)
