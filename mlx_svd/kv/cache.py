"""mlx-lm prompt caches that store latents of keys and values in place of them.

Allocation, growth by 256 tokens, trimming, masks and state are mlx-lm's own: only what enters is
encoded first. The attention that reads them must project its queries, see ``attach``.
"""

from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.basis import LayerBasis


class LatentKVCache(KVCache):
    """Latents of keys (B, G, T, rk) and values (B, G, T, rv), unquantized."""

    def __init__(self, basis: LayerBasis):
        super().__init__()
        self.basis = basis

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(*self.basis.encode(keys, values))

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "QuantizedLatentKVCache":
        """As mlx-lm's ``--kv-bits`` does on the way."""
        check_groups(self.basis, group_size)
        plain = super().to_quantized(group_size, bits)
        cache = QuantizedLatentKVCache(self.basis, group_size, bits)
        cache.keys, cache.values, cache.offset = plain.keys, plain.values, plain.offset
        return cache

    @classmethod
    def merge(cls, caches):
        """One batch of sequences of any lengths, for mlx-lm's BatchGenerator."""
        return LatentBatchKVCache.merge(caches)


class QuantizedLatentKVCache(QuantizedKVCache):
    """The same latents in 8 or 4 bits (mlx-lm's affine groups). Sequences of a batch must have
    equal lengths, as in mlx-lm's own quantized cache."""

    def __init__(self, basis: LayerBasis, group_size: int = 64, bits: int = 8):
        check_groups(basis, group_size)
        super().__init__(group_size, bits)
        self.basis = basis

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(*self.basis.encode(keys, values))


class LatentBatchKVCache(BatchKVCache):
    """Unquantized latents of sequences of different lengths, padded on the left."""

    def __init__(self, basis: LayerBasis, left_padding: list[int]):
        super().__init__(left_padding)
        self.basis = basis

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(*self.basis.encode(keys, values))

    def extract(self, idx):
        cache = LatentKVCache(self.basis)
        cache.state = super().extract(idx).state
        return cache

    @classmethod
    def merge(cls, caches):
        # BatchKVCache.merge makes its own class when all caches are empty.
        plain = BatchKVCache.merge(caches)
        merged = cls(caches[0].basis, plain.left_padding.tolist())
        merged.state = plain.state
        return merged


def check_groups(basis: LayerBasis, group_size: int) -> None:
    """Raise MlxSvdError if latents cannot be cut into quantization groups."""
    if bad := [rank for rank in basis.ranks if rank % group_size]:
        raise MlxSvdError(
            f"--kv-bits: a latent of {bad[0]} numbers is no multiple of the group size "
            f"{group_size}; give --kv-group-size 32 or ranks that are multiples"
        )
