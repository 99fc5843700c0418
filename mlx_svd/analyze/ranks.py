"""Which ranks an analysis looks at."""

from collections.abc import Sequence

import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.policy import RankPolicy


def policies(
    ratios: Sequence[float] = (), ranks: Sequence[int] = (), energies: Sequence[float] = ()
) -> dict[str, RankPolicy]:
    """Label -> policy, in the order given: shares of the singular values, ranks, energy shares.

    Raises MlxSvdError for a value out of range, one given twice, or none at all.
    """
    found = (
        [(f"ratio {r:g}", RankPolicy(rank_ratio=r)) for r in ratios]
        + [(f"rank {r}", RankPolicy(rank=r)) for r in ranks]
        + [(f"energy {e:g}", RankPolicy(energy=e)) for e in energies]
    )
    if not found:
        raise MlxSvdError("no rank to look at: give --ratios, --ranks or --energies")
    if len(dict(found)) < len(found):
        raise MlxSvdError("a rank was given twice; leave one out")
    return dict(found)


def break_even(rows: int, columns: int) -> int:
    """The largest rank at which two factors hold fewer numbers than the (rows, columns) matrix; 0
    if there is none. Bytes are those of unquantized tensors of one dtype."""
    return (rows * columns - 1) // (rows + columns)


def parse_numbers(text: str | None, option: str, kind: type = float) -> tuple:
    """'0.5,0.25', or 'start:stop:step' (both ends included) -> numbers; None -> ()."""
    if text is None:
        return ()
    numbers: list = []
    try:
        for part in text.split(","):
            if ":" not in part:
                numbers.append(kind(part))
                continue
            start, stop, step = (float(piece) for piece in part.split(":"))
            count = int(round((stop - start) / step, 9)) + 1
            if count < 1:
                raise ValueError
            numbers += [kind(round(x, 12)) for x in start + step * np.arange(count)]
    except (ValueError, ZeroDivisionError) as error:
        raise MlxSvdError(
            f"{option} {text}: give numbers such as 0.9,0.5 or start:stop:step, 1:0.5:-0.05"
        ) from error
    return tuple(numbers)
