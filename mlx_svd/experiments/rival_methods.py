"""The quantizers of mlx-lm, called as its own programs call them, on given windows of tokens.

mlx-lm's programs take their text from the network; everything else is theirs, defaults included.
Where they compute, the model is in float32, because half precision is very slow on a CPU; what
depends on the size of scales (the threshold of dynamic_quant) is computed in the source's dtype.
"""

import contextlib
import copy
import io
import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.rival_spec import RivalSpec

# Of the windows, those that dwq keeps for its validation loss.
_VALIDATION_SHARE = 8


def quantize_rival(
    spec: RivalSpec, model: nn.Module, config: dict, windows: np.ndarray | None, seed: int
) -> tuple[nn.Module, dict, dict[str, Any]]:
    """(quantized model, its config, what the method reports about itself).

    model: dense, lazy, in the source's dtype; config: its mlx-lm config without quantization;
    windows: (N, L) int32 for calibrated methods. Raises what mlx-lm's quantizers raise.
    """
    mx.random.seed(seed)
    np.random.seed(seed)
    data = mx.array(windows) if spec.calibrated else None
    return _METHODS[spec.method](spec, model, config, data, seed)


def _affine(spec: RivalSpec, model: nn.Module, config: dict, data: None, seed: int):
    from mlx_lm.utils import quantize_model

    model, config = quantize_model(model, config, spec.group_size, spec.bits)
    return model, config, {}


def _mixed(spec: RivalSpec, model: nn.Module, config: dict, data: None, seed: int):
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    predicate = mixed_quant_predicate_builder(spec.recipe, model, spec.group_size)
    # convert passes no bits, so that its default of 4 is what config.json names.
    model, config = quantize_model(model, config, spec.group_size, None, quant_predicate=predicate)
    return model, config, {}


def _dynamic(spec: RivalSpec, model: nn.Module, config: dict, data: mx.array, seed: int):
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
    from mlx_lm.utils import quantize_model

    widths = (spec.bits, spec.group_size, spec.high_bits, spec.group_size)
    sensitivities = dict(estimate_sensitivities(in_float32(model), data, *widths))
    # Scales of float32 would count double here.
    threshold = estimate_threshold(
        model,
        sensitivities,
        spec.target_bpw,
        low_bits=spec.bits,
        low_group_size=spec.group_size,
        high_bits=spec.high_bits,
        high_group_size=spec.group_size,
    )

    def predicate(path: str, module: nn.Module) -> bool | dict:
        if not hasattr(module, "to_quantized"):
            return False
        if sensitivities[path] > threshold:
            return {"bits": spec.high_bits, "group_size": spec.group_size}
        return True

    model, config = quantize_model(
        model, config, group_size=spec.group_size, bits=spec.bits, quant_predicate=predicate
    )
    above = sum(s > threshold for s in sensitivities.values())
    return model, config, {"layers_in_high_bits": above, "layers": len(sensitivities)}


def _gptq(spec: RivalSpec, model: nn.Module, config: dict, data: mx.array, seed: int):
    from mlx_lm.quant.gptq import gptq_quantize

    fallback = {"fallback_bits": 6, "fallback_group_size": 64}  # the program's defaults
    model, quantization = gptq_quantize(
        in_float32(model), data, spec.bits, spec.group_size, **fallback
    )
    return model, config | {"quantization": quantization}, fallback


def _awq(spec: RivalSpec, model: nn.Module, config: dict, data: mx.array, seed: int):
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize, update_config

    if config["model_type"] not in AWQ_MODEL_CONFIGS:
        raise MlxSvdError(
            f"mlx-lm's awq has no rules for model type {config['model_type']} "
            f"(only for {', '.join(AWQ_MODEL_CONFIGS)})"
        )
    embedding = {"embed_bits": 4, "embed_group_size": 32}  # the program's defaults
    model = in_float32(model)
    awq_quantize(
        model,
        data,
        AWQ_MODEL_CONFIGS[config["model_type"]],
        bits=spec.bits,
        group_size=spec.group_size,
        **embedding,
    )
    return model, update_config(model, config), embedding


def _dwq(spec: RivalSpec, model: nn.Module, config: dict, data: mx.array, seed: int):
    import mlx.optimizers as optimizers
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import quantize_model

    rows = [(row, 0) for row in np.array(data).tolist()]
    held = max(spec.batch_size, len(rows) // _VALIDATION_SHARE)
    if len(rows) < held + spec.batch_size:
        raise MlxSvdError(
            f"dwq: {len(rows)} windows are too few for batches of {spec.batch_size}; give at "
            f"least {2 * spec.batch_size}"
        )
    student, config = quantize_model(
        copy.deepcopy(model), config, group_size=spec.group_size, bits=spec.bits
    )
    student, teacher = in_float32(student), in_float32(model)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        dwq_quantize(
            student,
            lambda batch, index, split: teacher(batch),
            optimizers.Adam(learning_rate=spec.learning_rate, bias_correction=True),
            rows[held:],
            rows[:held],
            batch_size=spec.batch_size,
            max_seq_length=data.shape[1],
            seed=seed,
            dtype=mx.float32,
        )
    losses = re.findall(r"Validation: it=\d+, loss=([\d.]+|nan|inf)", printed.getvalue())
    return (
        student,
        config,
        {
            "steps": (len(rows) - held) // spec.batch_size,
            "validation_windows": held,
            "validation_loss_before": float(losses[0]),
            "validation_loss_after": float(losses[-1]),
        },
    )


_METHODS: dict[str, Callable] = {
    "affine": _affine,
    "mixed": _mixed,
    "dynamic_quant": _dynamic,
    "gptq": _gptq,
    "awq": _awq,
    "dwq": _dwq,
}


def in_float32(model: nn.Module) -> nn.Module:
    """A copy with its floating-point parameters in float32."""
    model = copy.deepcopy(model)
    model.update(
        tree_map(
            lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p,
            model.parameters(),
        )
    )
    mx.eval(model.parameters())
    return model
