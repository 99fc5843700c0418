"""What quantizing the embedding or the head costs, measured by running the model."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.losses import kl_div_loss

from mlx_svd.calibrate.text import Windows
from mlx_svd.source.source import Source

BITS = (8, 6, 5, 4, 3, 2)
GROUP_SIZE = 64
# Windows that are run: a divergence over every token is precise with few.
_WINDOWS = 4


def module_losses(
    model: nn.Module, source: Source, windows: Windows
) -> dict[str, dict[str, float]]:
    """Module path -> bits -> mean KL(original || quantized) in nats a token, of every module that
    mlx-lm would quantize and that holds no projection. The model is left as it was."""
    held = {linear.path for linear in source.linears}
    modules = {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized")
        and path not in held
        and module.weight.shape[-1] % GROUP_SIZE == 0
    }
    chosen = np.linspace(0, len(windows) - 1, min(_WINDOWS, len(windows))).round().astype(int)
    batches = [mx.array(windows.tokens[i])[None] for i in chosen]
    losses: dict[str, dict[str, float]] = {path: {} for path in modules}
    for tokens in batches:
        original = model(tokens).astype(mx.float32)
        mx.eval(original)
        for path, module in modules.items():
            weight = module.weight
            for bits in BITS:
                packed = mx.quantize(weight, GROUP_SIZE, bits)
                module.weight = mx.dequantize(*packed, group_size=GROUP_SIZE, bits=bits)
                loss = kl_div_loss(model(tokens).astype(mx.float32), original).mean().item()
                losses[path][str(bits)] = losses[path].get(str(bits), 0.0) + loss / len(batches)
            module.weight = weight
    return losses
