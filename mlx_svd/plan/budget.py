"""The best choice for every projection within a number of bytes.

Each projection has candidates (bytes, expected loss). At a price per byte every projection takes
the candidate with the least loss + price * bytes, on its own; the price is raised until the total
fits (Lagrangian relaxation of the multiple-choice knapsack, the greedy over the convex hulls).
Projections that can be sliced together take the best slice where its loss + price * bytes is below
the sum of their own. What is left over is spent on the upgrades that gain most.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.candidates import Candidate

_STEPS = 100
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Budget:
    """Exactly one of: keep_bytes: share of the touched matrices' bytes; target_size: bytes of the
    whole checkpoint's tensors; target_bpw: bits per weight of the whole checkpoint."""

    keep_bytes: float | None = None
    target_size: int | None = None
    target_bpw: float | None = None

    def __post_init__(self):
        given = [name for name, value in vars(self).items() if value is not None]
        options = [f"--{name.replace('_', '-')}" for name in given]
        if len(given) != 1:
            raise MlxSvdError(
                f"{' and '.join(options)}: contradictory limits; give one"
                if given
                else "a budget needs --keep-bytes, --target-size or --target-bpw"
            )
        if getattr(self, given[0]) <= 0:
            raise MlxSvdError(f"{options[0]} {getattr(self, given[0])}: must be above 0")
        if self.keep_bytes is not None and self.keep_bytes > 1:
            raise MlxSvdError(f"--keep-bytes {self.keep_bytes}: is a share, at most 1")


def parse_budget(
    keep_bytes: float | None = None,
    target_size: str | int | None = None,
    target_bpw: float | None = None,
) -> Budget:
    """A budget from numbers as users write them: target_size may be "3.2GB" (10^9 bytes)."""
    for name, value in (("keep_bytes", keep_bytes), ("target_bpw", target_bpw)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise MlxSvdError(f"{name}: {value!r} is not a number")
    return Budget(keep_bytes, None if target_size is None else _bytes(target_size), target_bpw)


def _bytes(text: str | int) -> int:
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)B?\s*", str(text))
    try:
        return int(float(match[1]) * _UNITS[match[2].upper()])
    except (TypeError, ValueError) as error:
        raise MlxSvdError(f"--target-size {text}: give bytes, or 800MB, 3.2GB") from error


def choose(
    candidates: dict[str, list[Candidate]],
    limit: int,
    what: str = "the budget",
    joint: Sequence[Sequence[dict[str, Candidate]]] = (),
    rest: int = 0,
) -> dict[str, Candidate]:
    """Path -> the candidate to take, at most ``limit`` bytes in all.

    joint: for each group of projections the choices that they make together, path -> candidate of
    each; no projection is in two groups. rest: bytes of what is not chosen here, for messages.
    Raises MlxSvdError that says the smallest reachable size when the limit is below it.
    """
    items = _items(candidates, joint)
    smallest = sum(item.smallest for item in items)
    if smallest > limit:
        raise MlxSvdError(
            f"{what}: {limit + rest:,} bytes is below the {int(smallest) + rest:,} that can "
            "be reached; raise it, allow fewer bits with --bits, or touch more with --projections"
        )

    def at(price: float) -> list[_State]:
        return [item.best(price) for item in items]

    def total(states: list[_State]) -> float:
        return sum(item.cost(state)[0] for item, state in zip(items, states, strict=True))

    cheap, dear = 0.0, 2 * max([1e-30, *(item.highest_price() for item in items)])
    if total(at(cheap)) <= limit:
        dear = cheap
    for _ in range(_STEPS):
        if dear <= cheap:
            break
        middle = (cheap * dear) ** 0.5 if cheap > 0 else dear * 1e-3
        if total(at(middle)) > limit:
            cheap = middle
        else:
            dear = middle
    states = at(dear)
    if total(states) > limit:  # equal losses hide the smallest sizes from any price
        states = [item.smallest_state() for item in items]
    _spend(items, states, limit - total(states))
    chosen = {}
    for item, state in zip(items, states, strict=True):
        chosen |= item.taken(state)
    return {path: chosen[path] for path in candidates}


# What an item takes: an index of its slices, or one index for each of its members.
_State = int | tuple[int, ...]


class _Item:
    """A group of projections that may be sliced together, or one projection alone."""

    def __init__(self, members: dict[str, list[Candidate]], slices: Sequence[dict[str, Candidate]]):
        self.members, self.slices = members, slices
        self.tables = [_table([(c.nbytes, c.loss) for c in own]) for own in members.values()]
        sums = [[(c.nbytes, c.loss) for c in option.values()] for option in slices]
        self.joint = _table([tuple(map(sum, zip(*parts, strict=True))) for parts in sums])

    def best(self, price: float) -> _State:
        """The state with the least loss + price * bytes; slices only where they are better."""
        values = [loss + price * size for size, loss in self.tables]
        alone = tuple(int(np.argmin(value)) for value in values)
        if not self.slices:
            return alone
        together = self.joint[1] + price * self.joint[0]
        index = int(np.argmin(together))
        least = sum(value[i] for value, i in zip(values, alone, strict=True))
        return index if together[index] < least else alone

    def cost(self, state: _State) -> tuple[float, float]:
        """Bytes and loss."""
        if isinstance(state, int):
            return self.joint[0][state], self.joint[1][state]
        parts = [(t[0][i], t[1][i]) for t, i in zip(self.tables, state, strict=True)]
        return sum(size for size, _ in parts), sum(loss for _, loss in parts)

    def smallest_state(self) -> _State:
        alone = tuple(int(np.argmin(size)) for size, _ in self.tables)
        if self.slices and self.joint[0].min() < self.cost(alone)[0]:
            return int(np.argmin(self.joint[0]))
        return alone

    @property
    def smallest(self) -> float:
        return self.cost(self.smallest_state())[0]

    def highest_price(self) -> float:
        """A price at which every member, and the group, takes its smallest state."""
        prices = [_highest_price(*table) for table in self.tables]
        if self.slices:
            size, loss = self.cost(tuple(int(np.argmin(size)) for size, _ in self.tables))
            prices.append(
                _highest_price(np.append(self.joint[0], size), np.append(self.joint[1], loss))
            )
        return max(prices)

    def upgrade(self, state: _State, left: float) -> tuple[float, float, _State] | None:
        """(gain, bytes, new state) of the change of one member, or of the slice of the group,
        that gains most within ``left`` bytes; None if nothing gains."""
        found = []
        size, loss = self.cost(state)
        if self.slices:
            move = _best_move(*self.joint, size, loss, left)
            found += [(move[0], move[1], move[2])] if move else []
        if not isinstance(state, int):
            for member, (sizes, losses) in enumerate(self.tables):
                now = state[member]
                if move := _best_move(sizes, losses, sizes[now], losses[now], left):
                    new = (*state[:member], move[2], *state[member + 1 :])
                    found.append((move[0], move[1], new))
        return max(found, key=lambda move: move[0]) if found else None

    def taken(self, state: _State) -> dict[str, Candidate]:
        if isinstance(state, int):
            return dict(self.slices[state])
        options = zip(self.members.items(), state, strict=True)
        return {path: own[index] for (path, own), index in options}


def _items(candidates: dict[str, list[Candidate]], joint) -> list[_Item]:
    groups = [(list(options[0]), options) for options in joint if options]
    grouped = {path for paths, _ in groups for path in paths}
    found = [
        _Item({path: candidates[path] for path in paths}, options) for paths, options in groups
    ]
    return found + [_Item({p: own}, ()) for p, own in candidates.items() if p not in grouped]


def _table(pairs: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and losses."""
    values = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _highest_price(size: np.ndarray, loss: np.ndarray) -> float:
    """A price at which the smallest candidate is taken."""
    smallest = int(np.argmin(size))
    more = size > size[smallest]
    if not more.any():
        return 0.0
    return float(((loss[smallest] - loss[more]) / (size[more] - size[smallest])).max())


def _best_move(sizes, losses, size, loss, left) -> tuple[float, float, int] | None:
    """(gain, bytes, index) of the candidate that gains most within ``left`` more bytes."""
    gain = np.where(sizes - size <= left, loss - losses, -np.inf)
    index = int(np.argmax(gain))
    return (float(gain[index]), float(sizes[index] - size), index) if gain[index] > 0 else None


def _spend(items: list[_Item], states: list[_State], left: float) -> None:
    """Upgrade, the largest gain first, while it fits into ``left`` bytes."""
    while True:
        moves = [item.upgrade(state, left) for item, state in zip(items, states, strict=True)]
        found = [(move[0], -at) for at, move in enumerate(moves) if move]
        if not found:
            return
        at = -max(found)[1]
        _, size, states[at] = moves[at]
        left -= size
