"""Llama models of a few layers: what they are made of, and how many parameters that is."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama

from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix.places import check_keys
from mlx_svd.experiments.matrix.ranks import fitting_ratio
from mlx_svd.experiments.matrix.training.corpus import END_TOKEN, VOCABULARY
from mlx_svd.linalg.truncate import decompose

_KEYS = {"dim", "layers", "heads"}
_CONTEXT = 512


@dataclass(frozen=True)
class Size:
    """dim: width; layers, heads: how many; the MLP is 8/3 of the width, rounded up to 16."""

    dim: int
    layers: int = 2
    heads: int = 4

    def __post_init__(self):
        if self.dim < 8 or self.layers < 1 or self.heads < 1 or self.dim % (2 * self.heads):
            raise MlxSvdError(
                f"train: dim {self.dim} with {self.heads} heads and {self.layers} layers; give a "
                "dim of at least 8 that is a multiple of twice the heads"
            )

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the model."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.dim,
            "num_hidden_layers": self.layers,
            "intermediate_size": -(-8 * self.dim // (3 * 16)) * 16,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "rms_norm_eps": 1e-5,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": _CONTEXT,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "eos_token_id": END_TOKEN,
            "bos_token_id": END_TOKEN,
        }

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(m, n) of all projections."""
        wide = self.config["intermediate_size"]
        layer = [(self.dim, self.dim)] * 4 + [(wide, self.dim)] * 2 + [(self.dim, wide)]
        return layer * self.layers

    @property
    def other_parameters(self) -> int:
        """Of the embedding, which is the head too, and the norms."""
        return VOCABULARY * self.dim + (2 * self.layers + 1) * self.dim

    @property
    def parameters(self) -> int:
        """Of the dense model."""
        return self.other_parameters + sum(m * n for m, n in self.shapes)

    def new_model(self, seed: int) -> nn.Module:
        """Random weights by the seed."""
        mx.random.seed(seed)
        model = llama.Model(llama.ModelArgs.from_dict(self.config))
        mx.eval(model.parameters())
        return model


def size_of(entry: dict[str, Any]) -> Size:
    """From ``{dim, layers, heads}``."""
    check_keys("size", entry, _KEYS)
    return Size(**{key: int(value) for key, value in entry.items()})


class Factored(nn.Module):
    """A linear map as two trained factors: down (r, n), up (m, r)."""

    def __init__(self, up: np.ndarray, down: np.ndarray):
        super().__init__()
        self.up, self.down = mx.array(up.astype(np.float32)), mx.array(down.astype(np.float32))

    def __call__(self, x: mx.array) -> mx.array:
        return (x @ self.down.T) @ self.up.T


def factorize(model: nn.Module, size: Size, parameters: int) -> int:
    """Replace every projection by two factors, so that the model has at most ``parameters``: the
    largest common rank ratio, and the best approximation of what is there. A matrix that would
    not get smaller stays. Returns the parameters of the result."""
    ratio = fitting_ratio(size.shapes, parameters - size.other_parameters)
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        m, n = module.weight.shape
        rank = max(1, int(ratio * min(m, n)))
        if rank * (m + n) >= m * n:
            continue
        up, down = decompose(np.array(module.weight)).balanced_factors(rank)
        model.update_modules(tree_unflatten([(path, Factored(up, down))]))
    mx.eval(model.parameters())
    return sum(v.size for _, v in tree_flatten(model.parameters()))


def dense_weights(model: nn.Module) -> dict[str, mx.array]:
    """Parameters under transformers' names, factors multiplied."""
    weights = dict(tree_flatten(model.parameters()))
    for path, module in model.named_modules():
        if isinstance(module, Factored):
            del weights[f"{path}.up"], weights[f"{path}.down"]
            weights[f"{path}.weight"] = module.up @ module.down
    return weights
