"""How keys and values are projected and stored: what ``generate`` and ``sweep-kv`` are told."""

import hashlib
import json
from dataclasses import asdict, dataclass

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.components import KEY_KINDS, VALUE_KINDS


@dataclass(frozen=True)
class KVSettings:
    """keys, values: kinds of basis (see ``components``); heads_per_group: heads that share a basis
    and a latent, None: all of the layer; rank (numbers per key-value head), energy or
    bytes_per_token: at most one, none: full rank; bits: 8, 4 or None; group_size: of quantization;
    fold: put the values' basis into the weights; part: "keys" or "values" cuts only those."""

    keys: str = "kq"
    values: str = "output"
    heads_per_group: int | None = 1
    rank: int | None = None
    energy: float | None = None
    bytes_per_token: float | None = None
    bits: int | None = None
    group_size: int = 64
    fold: bool = False
    part: str = "both"

    def __post_init__(self):
        if self.keys not in KEY_KINDS:
            raise MlxSvdError(f"--kv-keys {self.keys}: use {', '.join(KEY_KINDS)}")
        if self.values not in VALUE_KINDS:
            raise MlxSvdError(f"--kv-values {self.values}: use {', '.join(VALUE_KINDS)}")
        if self.part not in ("both", "keys", "values"):
            raise MlxSvdError(f"--kv-part {self.part}: use both, keys or values")
        if self.bits not in (None, 8, 4):
            raise MlxSvdError(f"--kv-bits {self.bits}: use 8 or 4")
        if self.group_size not in (32, 64, 128):
            raise MlxSvdError(f"--kv-group-size {self.group_size}: use 32, 64 or 128")
        if self.rank is not None and self.rank < 1:
            raise MlxSvdError(f"--kv-rank {self.rank}: keep at least one number")
        if self.fold and self.heads_per_group != 1:
            raise MlxSvdError("--kv-fold: needs a basis for each head; leave --kv-group at 1")

    @property
    def digest(self) -> str:
        """Identifies the settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
