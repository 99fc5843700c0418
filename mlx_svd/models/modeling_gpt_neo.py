"""GPT-Neo for MLX, in the shape of an mlx-lm model file (mlx-lm itself has no GPT-Neo).

Every GPT-Neo checkpoint carries a copy of this file and mlx-lm imports it by path (`model_file`),
so it imports mlx and mlx_lm only and works without an entry in `sys.modules`.

Shapes in the docstrings: B sequences, L new tokens, H heads, D = hidden_size.
Source: Black et al., GPT-Neo (2021), and the behaviour of transformers' `gpt_neo`.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import (
    BaseModelArgs,
    create_attention_mask,
    scaled_dot_product_attention,
)
from mlx_lm.models.cache import KVCache

ACTIVATIONS = {
    "gelu_new": nn.gelu_approx,
    "gelu_fast": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "gelu": nn.gelu,
    "relu": nn.relu,
}


@dataclass
class ModelArgs(BaseModelArgs):
    """The part of config.json that the computation depends on, under its Hugging Face names.

    Raises `ValueError` for layer types or an activation that this file does not implement.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int
    window_size: int = 256
    attention_types: list | None = None
    attention_layers: list | None = None
    intermediate_size: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.attention_types is not None:
            # transformers derives the layers from the types and ignores a stored list.
            expanded = [kind for kinds, n in self.attention_types for kind in list(kinds) * n]
            if self.attention_layers not in (None, expanded):
                raise ValueError("attention_layers contradicts attention_types")
            self.attention_layers = expanded
        elif self.attention_layers is None:
            self.attention_layers = ["global", "local"] * 12
        if len(self.attention_layers) != self.num_layers:
            raise ValueError(
                f"{len(self.attention_layers)} attention layers for num_layers={self.num_layers}"
            )
        if unknown := set(self.attention_layers) - {"global", "local"}:
            raise ValueError(f"unknown attention layer types {sorted(unknown)}")
        if self.hidden_size % self.num_heads:
            raise ValueError("hidden_size is not a multiple of num_heads")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(f"unsupported activation_function {self.activation_function!r}")


class SelfAttention(nn.Module):
    """Multi-head attention on *unscaled* scores: GPT-Neo has no 1/sqrt(head_dim)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        dim = args.hidden_size
        self.num_heads = args.num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=True)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """(B, L, D) -> (B, L, D)."""
        B, L, _ = x.shape

        def heads(y: mx.array) -> mx.array:
            return y.reshape(B, L, self.num_heads, -1).transpose(0, 2, 1, 3)

        queries, keys, values = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        if not hasattr(cache, "bits"):
            # Unscaled scores overflow float16 and lose digits in bfloat16; transformers computes
            # them in float32 as well. A quantized cache keeps its own type.
            queries, keys, values = (y.astype(mx.float32) for y in (queries, keys, values))
        out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=1.0, mask=mask)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(B, L, -1).astype(x.dtype))


class Attention(nn.Module):
    """Only a name: Hugging Face calls the projections `attn.attention.*`."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = SelfAttention(args)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return self.attention(x, mask, cache)


class MLP(nn.Module):
    """Two biased linear maps, D -> intermediate_size -> D."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.c_fc = nn.Linear(args.hidden_size, args.intermediate_size)
        self.c_proj = nn.Linear(args.intermediate_size, args.hidden_size)
        self.activation = ACTIVATIONS[args.activation_function]

    def __call__(self, x: mx.array) -> mx.array:
        return self.c_proj(self.activation(self.c_fc(x)))


class TransformerBlock(nn.Module):
    """Pre-norm block. `is_local` says which of the model's two masks the caller must pass."""

    def __init__(self, args: ModelArgs, is_local: bool):
        super().__init__()
        self.is_local = is_local
        self.ln_1 = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)
        self.attn = Attention(args)
        self.ln_2 = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)
        self.mlp = MLP(args)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        h = x + self.attn(self.ln_1(x), mask, cache)
        return h + self.mlp(self.ln_2(h))


class GPTNeoModel(nn.Module):
    """Token and learned position embeddings, the blocks and the final norm."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.max_positions = args.max_position_embeddings
        self.window_size = args.window_size
        self.wte = nn.Embedding(args.vocab_size, args.hidden_size)
        self.wpe = nn.Embedding(args.max_position_embeddings, args.hidden_size)
        self.h = [TransformerBlock(args, kind == "local") for kind in args.attention_layers]
        self.ln_f = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)

    def positions(self, length: int, cache: Any) -> mx.array:
        """Positions of `length` new tokens: (L,), or (B, L) for a batched cache.

        Raises `ValueError` past the last learned position, where MLX would read foreign memory.
        """
        offset = 0 if cache is None else cache.offset
        if not isinstance(offset, mx.array):
            end = offset + length
        elif getattr(cache, "_right_padding", None) is not None:
            end = 0  # A short prompt's padding may go past the end; decoding checks the rest.
        else:
            # The exact end waits for the device, so the padded length is asked first.
            end = cache.size() + length
            if end > self.max_positions:
                end = offset.max().item() + length
        if end > self.max_positions:
            raise ValueError(
                f"{end} tokens, but the model has {self.max_positions} learned positions"
            )
        # Padding can lie on either side of the table; it must not read foreign memory.
        places = mx.arange(length) + mx.array(offset)[..., None]
        return mx.clip(places, 0, self.max_positions - 1)

    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Token ids (B, L) -> hidden states (B, L, D)."""
        h = self.wte(inputs) if input_embeddings is None else input_embeddings
        if cache is None:
            cache = [None] * len(self.h)
        h = h + self.wpe(self.positions(h.shape[1], cache[0]))
        # All layers hold equally long caches, so one mask of each kind serves every layer.
        causal = create_attention_mask(h, cache[0])
        windowed = create_attention_mask(h, cache[0], window_size=self.window_size)
        for block, c in zip(self.h, cache, strict=True):
            h = block(h, windowed if block.is_local else causal, c)
        return self.ln_f(h)


class Model(nn.Module):
    """GPT-Neo with its language-model head, as mlx-lm expects it."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = GPTNeoModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Token ids (B, L) -> logits (B, L, vocab_size)."""
        h = self.model(inputs, cache, input_embeddings)
        return self.model.wte.as_linear(h) if self.args.tie_word_embeddings else self.lm_head(h)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hugging Face names -> this model's; names that already fit stay as they are."""
        renamed = {}
        for name, array in weights.items():
            if name.endswith((".attn.attention.bias", ".attn.attention.masked_bias")):
                continue
            if name.startswith("lm_head."):
                if not self.args.tie_word_embeddings:
                    renamed[name] = array
                continue
            name = name.removeprefix("transformer.")
            renamed[name if name.startswith("model.") else f"model.{name}"] = array
        return renamed

    @property
    def layers(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""
        return self.model.h

    def make_cache(self) -> list[KVCache]:
        """One growing cache per layer: a rotating one would renumber the learned positions."""
        return [KVCache() for _ in self.layers]
