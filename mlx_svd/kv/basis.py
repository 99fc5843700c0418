"""The arrays by which one layer's cache encodes and its attention reads latents."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_svd.kv.components import Components
from mlx_svd.linalg.rotate import random_orthogonal


@dataclass(frozen=True)
class LayerBasis:
    """Of a layer with Hq query and Hkv key-value heads of d dimensions in G groups of g heads.

    encode_keys (G, g d, rk), key_shift (G, 1, rk): z = k encode - shift; project_queries (Hq, d,
    rk): the dual basis, q·k = (q project)·z up to a constant of the query; encode_values (G, g d,
    rv), value_shift (G, 1, rv); expand (Hq, rv, d), constant (Hq, 1, d): latent output -> output.
    None: folded into the model's weights.
    """

    groups: int
    encode_keys: mx.array
    key_shift: mx.array
    project_queries: mx.array
    encode_values: mx.array | None
    value_shift: mx.array | None
    expand: mx.array | None
    constant: mx.array | None

    def __deepcopy__(self, memo) -> "LayerBasis":
        # Caches are copied, for branches of a text; their bases never change.
        return self

    @property
    def ranks(self) -> tuple[int, int]:
        """(rk, rv) of a group."""
        return self.key_shift.shape[-1], self.value_shift.shape[-1]

    def encode(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values (B, Hkv, L, d) -> latents (B, G, L, rk) and (B, G, L, rv)."""
        keys = _encode(self._grouped(keys), self.encode_keys, self.key_shift)
        if self.encode_values is not None:
            values = _encode(self._grouped(values), self.encode_values, self.value_shift)
        return keys, values

    def project(self, queries: mx.array) -> mx.array:
        """Queries (B, Hq, L, d) -> (B, Hq, L, rk)."""
        return queries @ self.project_queries.astype(queries.dtype)

    def expanded(self, output: mx.array) -> mx.array:
        """Weighted sums of latents (B, Hq, L, rv) -> of values (B, Hq, L, d)."""
        if self.expand is None:
            return output
        return output @ self.expand.astype(output.dtype) + self.constant.astype(output.dtype)

    def _grouped(self, x: mx.array) -> mx.array:
        batch, heads, length, dim = x.shape
        if heads == self.groups:
            return x
        x = x.reshape(batch, self.groups, -1, length, dim).transpose(0, 1, 3, 2, 4)
        return x.reshape(batch, self.groups, length, -1)


def _encode(x: mx.array, encode: mx.array, shift: mx.array) -> mx.array:
    return x @ encode.astype(x.dtype) - shift.astype(x.dtype)


def layer_basis(
    keys: Components,
    values: Components,
    ranks: tuple[int, int],
    heads: tuple[int, int],
    *,
    rotate: int | None = None,
    dtype: mx.Dtype = mx.float32,
) -> LayerBasis:
    """The basis of ranks (of keys, of values) in each group; heads: (Hq, Hkv).

    rotate: seed of a random orthogonal gauge of the latents, which spreads the large components
    over all numbers before they are quantized and changes nothing else.
    """
    encode_keys, decode_keys = _cut(keys, ranks[0], rotate)
    encode_values, decode_values = _cut(values, ranks[1], None if rotate is None else rotate + 1)
    lost = values.mean - np.einsum("gn,gnr,grm->gm", values.mean, encode_values, decode_values)
    arrays = {
        "encode_keys": encode_keys,
        "key_shift": np.einsum("gn,gnr->gr", keys.mean, encode_keys)[:, None],
        "project_queries": _by_query_head(decode_keys, heads).transpose(0, 2, 1),
        "encode_values": encode_values,
        "value_shift": np.zeros((len(lost), 1, ranks[1])),
        "expand": _by_query_head(decode_values, heads),
        # What the basis loses of the mean; the weights of softmax add up to 1.
        "constant": _by_query_head(lost[:, None], heads),
    }
    return LayerBasis(
        groups=len(keys.mean),
        **{
            name: mx.array(array.astype(np.float32)).astype(dtype) for name, array in arrays.items()
        },
    )


def _cut(components: Components, rank: int, rotate: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(encode (G, n, r), decode (G, r, n))."""
    encode, decode = components.encode[:, :, :rank], components.decode[:, :rank]
    if rotate is None:
        return encode, decode
    energies = components.energies[:, :rank] if components.weighted else [None] * len(encode)
    parts = [gauge(*part, rotate) for part in zip(energies, encode, decode, strict=True)]
    return np.stack([e for e, _ in parts]), np.stack([d for _, d in parts])


def gauge(
    energies: np.ndarray | None, encode: np.ndarray, decode: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """encode (n, r) and decode (r, n) such that one rounding step for all r numbers costs least.

    Of all gauges M of a latent with covariance C and error weight L, tr(M C Mᵀ) tr(M⁻ᵀ L M⁻¹) is
    least where both moments are equal: with L = 1 and C = diag(energies), variances sqrt(energy).
    A random rotation then spreads them over all numbers. energies (r,); None: the weight is not
    known, so rotate only.
    """
    if energies is not None:
        scale = np.maximum(energies, max(float(energies[0]) * 1e-8, 1e-300)) ** 0.25
        encode, decode = encode / scale, decode * scale[:, None]
    turn = random_orthogonal(encode.shape[1], seed)
    return encode @ turn, turn.T @ decode


def _by_query_head(decode: np.ndarray, heads: tuple[int, int]) -> np.ndarray:
    """(G, r, g d) of groups -> (Hq, r, d): the part that each query head reads."""
    n_heads, n_kv_heads = heads
    groups, rank, _ = decode.shape
    per_head = decode.reshape(groups, rank, n_kv_heads // groups, -1).transpose(0, 2, 1, 3)
    per_head = per_head.reshape(n_kv_heads, rank, -1)
    return np.repeat(per_head, n_heads // n_kv_heads, axis=0)


def folded(basis: LayerBasis, encoded: bool) -> LayerBasis:
    """The basis of a layer whose weights expand the output themselves; encoded: and encode the
    values, too."""
    basis = replace(basis, expand=None, constant=None)
    return replace(basis, encode_values=None) if encoded else basis
