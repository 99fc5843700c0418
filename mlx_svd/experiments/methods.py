"""Names of methods -> recipes that keep a given share of the bytes of chosen projections.

| method | what it shows |
|---|---|
| a scorer: plain, activation, ... | factors of the same share everywhere |
| pivot+SCORER | the same scorer, stored as pivot rows and coefficients |
| greedy+SCORER | factors, the shares chosen by expected loss per byte |
| zero-sum+SCORER | factors, the shares chosen from the gradient |
| budget | two-sided scorer; form, rank and bits chosen by expected loss per byte |
| budget-dense | the same with the dense form only: mixed-bit quantization, no low rank |
| nearest | dense, quantized to the nearest code as mlx-lm does, at the most bits that fit |
| compensated | dense at the same bits, rounding errors compensated |
| corrected | one bit less, and a low-rank correction that fills the bytes |
"""

import re
from collections.abc import Callable

from mlx_svd.calibrate.scorers import SCORERS
from mlx_svd.checkpoint.layout import quantization
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.budget import Budget
from mlx_svd.plan.choices import DEFAULT_BITS, UNQUANTIZED_BITS, Choices, parse_choices
from mlx_svd.plan.forms import Storage
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.source.families import Projection
from mlx_svd.source.source import Source

_SINGLE = ("budget", "budget-dense", "nearest", "compensated", "corrected")
_FAMILIES = ("pivot", "greedy", "zero-sum")
# A share such as 0.281 stands for 4.5 / 16 = 0.28125 bits.
_ROUNDED = 1e-3
_BITS = tuple(b for b in DEFAULT_BITS if b != UNQUANTIZED_BITS)
_CORRECTION_MULTIPLE = 8


def method_recipe(
    method: str, source: Source, projections: tuple[str, ...], keep: float, bits: str | None
) -> Recipe:
    """The recipe of a method that keeps ``keep`` of the bytes of ``projections``.

    bits: what a budget may use, as "16" or "16,8,4"; None: everything. Raises MlxSvdError for an
    unknown method or a share that it cannot reach.
    """
    check_method(method)
    family, _, scorer = method.rpartition("+")
    choices = parse_choices(bits=bits)
    budget = Budget(keep_bytes=keep)
    if method == "budget":
        return Recipe(projections, scorer="two-sided", budget=budget, choices=choices)
    if method == "budget-dense":
        dense = Choices((), choices.bits, choices.group_size)
        return Recipe(projections, scorer="two-sided", budget=budget, choices=dense)
    if method in _SINGLE:
        return _quantized(method, source, projections, keep)
    if family in ("greedy", "zero-sum"):
        return Recipe(
            projections,
            scorer=scorer,
            budget=budget,
            choices=Choices(("factored",), (UNQUANTIZED_BITS,)),
            allocation=family,
        )
    form = family or "factored"
    rules = _rules(
        source,
        projections,
        lambda p, storage: {
            "form": form,
            "ranks": (_largest_rank(p, storage, form, keep * storage.nbytes("dense", (0,)), 1),),
        },
    )
    return Recipe(projections, rules=rules, scorer=scorer)


def check_method(method: str) -> None:
    """Raise MlxSvdError for a name that is no method."""
    family, plus, scorer = method.rpartition("+")
    known = method in _SINGLE or (scorer in SCORERS and (not plus or family in _FAMILIES))
    if not known:
        raise MlxSvdError(
            f"method {method!r}: use {', '.join(_SINGLE)}, a scorer ({', '.join(SCORERS)}), or "
            f"{'/'.join(_FAMILIES)}+SCORER"
        )


def _quantized(method: str, source: Source, projections: tuple[str, ...], keep: float) -> Recipe:
    """Every projection at the same bits."""
    allowed = [b for b in _BITS if (b + 0.5) / UNQUANTIZED_BITS <= keep + _ROUNDED]
    if not allowed:
        raise MlxSvdError(f"method {method}: {keep} of the bytes is below 2 bits a weight")
    bits = allowed[0]
    if method != "corrected":
        rules = (Rule(projections=projections, skip=True, bits=bits),)
        return Recipe(
            projections, rules=rules, scorer="plain" if method == "nearest" else "whitened"
        )
    lower = next((b for b in _BITS if b < bits), None)
    if lower is None:
        raise MlxSvdError(f"method corrected: no bits are left below {bits} to be corrected")

    def correction(p: Projection, storage: Storage) -> dict:
        base = Storage(p, storage.dtype, quantization(lower))
        limit = (keep + _ROUNDED) * storage.nbytes("dense", (0,))
        rank = _largest_rank(p, base, "corrected", limit, _CORRECTION_MULTIPLE)
        return {"form": "corrected", "ranks": (rank,), "exact": (quantization(lower), None)}

    return Recipe(
        projections,
        rules=_rules(source, projections, correction),
        quantize=None,
        scorer="two-sided",
    )


def _rules(
    source: Source,
    projections: tuple[str, ...],
    settings: Callable[[Projection, Storage], dict],
) -> tuple[Rule, ...]:
    """One rule for each projection."""
    return tuple(
        Rule(
            match=(p.path,),
            **settings(p, Storage(p, source.tensors[f"{p.module}.weight"][1], None)),
        )
        for linear in source.linears
        for p in linear.projections
        if p.name in projections
    )


def _largest_rank(p: Projection, storage: Storage, form: str, limit: float, multiple: int) -> int:
    """The largest rank, a multiple of ``multiple``, whose form fits into ``limit`` bytes."""
    low, high = 0, min(p.shape) // multiple
    while low < high:
        middle = (low + high + 1) // 2
        if storage.nbytes(form, (middle * multiple,)) <= limit:
            low = middle
        else:
            high = middle - 1
    return max(low, 1) * multiple


def slug(text: str) -> str:
    """A file name for a row's name."""
    return re.sub(r"[^A-Za-z0-9.@+-]+", "_", text)
