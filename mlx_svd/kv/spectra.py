"""Spectra of key and value activations: energy, effective rank, condition number."""

from dataclasses import dataclass

import numpy as np

from mlx_svd.kv.moments import LayerMoments
from mlx_svd.linalg.spectrum import component_energies, energies_of, energy_kept, rank_for_energy

SHARES = (0.90, 0.95, 0.99)
TOP = (16, 32)


@dataclass(frozen=True)
class Spectrum:
    """Of the matrix (tokens, dimensions) of one group of key-value heads.

    activation: "K" or "V"; rotation: "post" (as cached), "pre", or "none" (values, and keys of
    models without rotary positions); centred: the mean over tokens was subtracted; heads_per_group,
    group: which heads, side by side; singular_values, largest first; energy_at: k -> share of
    sum(sigma^2) in the k largest; effective_rank: share -> smallest k that holds it;
    condition_number: largest over smallest singular value, None if the smallest vanishes against
    rounding.
    """

    activation: str
    rotation: str
    centred: bool
    heads_per_group: int
    group: int
    singular_values: list[float]
    energy_at: dict[str, float]
    effective_rank: dict[str, int]
    condition_number: float | None


def layer_spectra(moments: LayerMoments, heads_per_group: tuple[int, ...]) -> list[Spectrum]:
    """Every activation, rotation and centring, for groups of each size that divides the heads."""
    n_kv_heads = moments.heads[1]
    activations = [("K", "post" if moments.rotary else "none", "K"), ("V", "none", "V")]
    if moments.rotary:
        activations.insert(1, ("K", "pre", "K unrotated"))
    found = []
    for activation, rotation, name in activations:
        for centred in (True, False):
            second = moments.second(name, centred)
            for size in heads_per_group:
                width = size * moments.head_dim
                for group in range(n_kv_heads // size):
                    block = slice(group * width, (group + 1) * width)
                    energies = energies_of(np.linalg.eigvalsh(second[block, block]))
                    values = spectrum_numbers(energies * moments.tokens)
                    found.append(Spectrum(activation, rotation, centred, size, group, **values))
    return found


def matrix_spectrum(rows: np.ndarray, centred: bool) -> dict:
    """``spectrum_numbers`` of a matrix (tokens, dimensions)."""
    rows = rows - rows.mean(axis=0) if centred else rows
    return spectrum_numbers(component_energies(rows))


def spectrum_numbers(energies: np.ndarray) -> dict:
    """The numbers of a ``Spectrum`` from squared singular values, largest first."""
    values = np.sqrt(energies)
    # Energies come from a Gram matrix, whose smallest ones are rounding below 1e-15 of the sum.
    smallest = float(values[-1]) if energies[-1] > 1e-15 * energies.sum() else 0.0
    return {
        "singular_values": [float(f"{v:.6g}") for v in values],
        "energy_at": {str(k): energy_kept(energies, k) for k in TOP},
        "effective_rank": {str(share): rank_for_energy(energies, share) for share in SHARES},
        "condition_number": float(values[0]) / smallest if smallest else None,
    }
