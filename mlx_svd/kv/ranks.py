"""Ranks of keys and values, layer by layer: fixed, by energy, or within a budget of bytes.

All groups of one layer have the same rank, since they share one array. A rank is counted per
group; ``latent_bytes`` says what a token then takes.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.linalg.spectrum import rank_for_energy


@dataclass(frozen=True)
class Storage:
    """How latents are stored. itemsize: bytes of an unquantized number; bits: None for those;
    group_size: numbers that share a scale and an offset, each of ``itemsize`` bytes."""

    itemsize: int
    bits: int | None = None
    group_size: int = 64

    @property
    def multiple(self) -> int:
        """Ranks must be a multiple of this."""
        return self.group_size if self.bits else 1

    @property
    def bytes_per_number(self) -> float:
        if self.bits is None:
            return self.itemsize
        return self.bits / 8 + 2 * self.itemsize / self.group_size


def latent_bytes(ranks: list[tuple[int, int]], groups: list[int], storage: Storage) -> float:
    """Bytes per token of all layers: ranks of (keys, values) and number of groups, by layer."""
    numbers = sum(g * (k + v) for (k, v), g in zip(ranks, groups, strict=True))
    return numbers * storage.bytes_per_number


def choose_ranks(
    energies: list[tuple[np.ndarray, np.ndarray]],
    storage: Storage,
    *,
    rank: int | None = None,
    energy: float | None = None,
    bytes_per_token: float | None = None,
    heads_per_group: list[int] | None = None,
    part: str = "both",
) -> list[tuple[int, int]]:
    """(rank of keys, rank of values) of each layer; none of the three: full rank.

    energies: (G, n) of keys and of values, layer by layer. rank: numbers kept per key-value head,
    heads_per_group: how many heads a group has, by layer. energy: smallest ranks that keep this
    share of the energy, of keys and of values separately. bytes_per_token: of all layers, shared
    evenly. part: "keys" or "values" leaves the others at full rank. Raises MlxSvdError for a
    policy that is out of reach, and where quantized groups do not fit a head.
    """
    if sum(policy is not None for policy in (rank, energy, bytes_per_token)) > 1:
        raise MlxSvdError("give one of --kv-rank, --kv-energy and --kv-bytes-per-token")
    limits = [e.shape[1] for pair in energies for e in pair]
    if unfit := [n for n in limits if n % storage.multiple]:
        raise MlxSvdError(
            f"--kv-group-size {storage.group_size}: does not divide the {unfit[0]} numbers of a "
            "group of heads; give 32 or 64 or group more heads (--kv-group)"
        )
    flat = [e for pair in energies for e in pair]
    if rank is not None:
        heads = [h for h in heads_per_group or [1] * len(energies) for _ in (0, 1)]
        wanted = [rank * h for h in heads]
    elif energy is not None:
        if not 0 < energy <= 1:
            raise MlxSvdError(f"--kv-energy {energy}: give a share above 0 and at most 1")
        # Sorted sums: the energies of one rank in all groups are added.
        wanted = [rank_for_energy(e.sum(axis=0), energy) for e in flat]
    elif bytes_per_token is not None:
        wanted = _within(flat, storage, bytes_per_token)
    else:
        wanted = limits
    if min(wanted) < 1:
        raise MlxSvdError(f"--kv-rank {rank}: keep at least one number")
    if part != "both":
        if bytes_per_token is not None:
            raise MlxSvdError("--kv-bytes-per-token: cuts keys and values; leave --kv-part out")
        wanted[part == "keys" :: 2] = limits[part == "keys" :: 2]
    ranks = [
        min(limit, -(-r // storage.multiple) * storage.multiple)
        for r, limit in zip(wanted, limits, strict=True)
    ]
    return list(zip(ranks[::2], ranks[1::2], strict=True))


def _within(flat: list[np.ndarray], storage: Storage, budget: float) -> list[int]:
    """The same share of the ranks everywhere. Shares bought by energy were tried and lost on every
    model (docs/kv-cache.md): a layer whose energy lies in few components still needs the others."""
    step = storage.multiple
    cost = [len(e) * step * storage.bytes_per_number for e in flat]
    ranks, left = [step] * len(flat), budget - sum(cost)
    if left < 0:
        raise MlxSvdError(
            f"--kv-bytes-per-token {budget:g}: the smallest latents take {sum(cost):g} bytes; "
            "give more"
        )
    queue = [(r / e.shape[1], i) for i, (r, e) in enumerate(zip(ranks, flat, strict=True))]
    heapq.heapify(queue)
    while queue:
        share, index = heapq.heappop(queue)
        if share >= 1 or cost[index] > left:
            continue
        left -= cost[index]
        ranks[index] += step
        heapq.heappush(queue, (ranks[index] / flat[index].shape[1], index))
    return ranks
