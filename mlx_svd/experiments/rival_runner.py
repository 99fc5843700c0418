"""The process that makes one rival: python -m mlx_svd.experiments.rival_runner REQUEST.

REQUEST is JSON with spec, model, windows (an .npy file or null), out, result (a file to write)
and seed. A process of its own, so that memory and CPU time are those of this one rival and a
crash cannot take the caller along.
"""

import json
import platform
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_svd.checkpoint.loader import load_model
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.rival_methods import quantize_rival
from mlx_svd.experiments.rival_spec import RivalSpec
from mlx_svd.source.source import all_finite


def main() -> None:
    """Run the request in argv and write its result, which is JSON too."""
    request = json.loads(sys.argv[1])
    request["spec"] = RivalSpec(**request["spec"])
    result = Path(request.pop("result"))
    result.write_text(json.dumps(run(**request)))


def run(spec: RivalSpec, model: str, windows: str | None, out: str, seed: int) -> dict[str, Any]:
    """Load, quantize, save; seconds, CPU seconds and bytes of the whole, without the imports."""
    import mlx_lm.quant.awq
    import mlx_lm.quant.dwq
    import mlx_lm.quant.dynamic_quant
    import mlx_lm.quant.gptq  # noqa: F401  (imported before the clock starts)
    from mlx_lm.utils import get_total_parameters, save

    seconds, cpu_seconds = time.perf_counter(), time.process_time()
    tokens = None if windows is None else np.load(windows)
    dense, config, tokenizer = _load_dense(Path(model))
    _check_tokens(tokens, config)
    if not spec.calibrated:
        _cast_as_convert(dense, config)
    parameters = get_total_parameters(dense)
    dtypes = {name: p.dtype for name, p in tree_flatten(dense.parameters())}
    if mx.default_device() == mx.Device(mx.cpu):
        multiply_written_out()
    quantized, config, details = quantize_rival(spec, dense, config, tokens, seed)
    as_stored(quantized, dtypes)
    save(out, model, quantized, tokenizer, config)
    return {
        "parameters": parameters,
        "seconds": time.perf_counter() - seconds,
        "cpu_seconds": time.process_time() - cpu_seconds,
        "peak_memory_bytes": _peak_memory(),
        "settings": {k: v for k, v in asdict(spec).items() if v is not None} | details,
    }


def _load_dense(folder: Path) -> tuple[nn.Module, dict, Any]:
    """(lazy model in the stored dtype, config that mlx-lm can read, tokenizer)."""
    from mlx_lm.utils import load_tokenizer

    model, config = load_model(folder, lazy=True)
    config.pop("model_file", None)
    return model, config, load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))


def _cast_as_convert(model: nn.Module, config: dict) -> None:
    """mlx_lm convert stores everything in the config's torch_dtype, if it names one; mlx-lm's
    other quantizers keep the dtype of the files."""
    from mlx_lm.convert import MODEL_CONVERSION_DTYPES

    dtype = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    if dtype not in MODEL_CONVERSION_DTYPES:
        return
    may_cast = getattr(model, "cast_predicate", lambda name: True)
    cast = [
        (name, p.astype(getattr(mx, dtype)))
        for name, p in tree_flatten(model.parameters())
        if may_cast(name) and mx.issubdtype(p.dtype, mx.floating)
    ]
    model.update(tree_unflatten(cast))


def _check_tokens(tokens: np.ndarray | None, config: dict) -> None:
    """MLX reads past the end of the embedding for an id that is not in it."""
    size = config.get("vocab_size")
    if tokens is not None and size is not None and tokens.max() >= size:
        raise MlxSvdError(
            f"windows: token id {tokens.max()} is beyond the model's vocabulary of {size}; "
            "tokenizer and model do not belong together"
        )


def as_stored(model: nn.Module, dtypes: dict[str, mx.Dtype]) -> None:
    """Cast parameters back to the dtypes of the dense model's (by name); the scales and biases of
    a quantized layer to that of the weight that they replace. This is what mlx-lm stores when it
    computes in the source's dtype. Raises MlxSvdError naming a tensor that is not finite."""
    stored = []
    for name, parameter in tree_flatten(model.parameters()):
        path, _, kind = name.rpartition(".")
        origin = f"{path}.weight" if kind in ("scales", "biases") else name
        if mx.issubdtype(parameter.dtype, mx.floating):
            parameter = parameter.astype(dtypes[origin])
        stored.append((name, parameter))
        # Some method diverged, for example dwq at too large a learning rate.
        mx.eval(parameter)
        if mx.issubdtype(parameter.dtype, mx.floating) and not all_finite(parameter):
            raise MlxSvdError(f"{name}: is NaN or infinite after quantization")
    model.update(tree_unflatten(stored))


def multiply_written_out() -> None:
    """Let this process multiply by packed weights by dequantizing them first.

    The same product to float32 rounding, gradients included, and about 16 times faster on a CPU,
    where MLX has no fast kernel for packed weights. Layers look the function up at every call.
    """

    def quantized_matmul(
        x, w, /, scales, biases=None, transpose=True, group_size=None, bits=None, mode="affine"
    ):
        dense = mx.dequantize(w, scales, biases, group_size, bits, mode)
        return x @ (dense.swapaxes(-1, -2) if transpose else dense)

    mx.quantized_matmul = quantized_matmul


def _peak_memory() -> int:
    """Bytes: resident memory at its peak, or what MLX had allocated (on a GPU) if that is more."""
    if platform.system() == "Linux":
        # ru_maxrss would include the parent process before exec.
        status = Path("/proc/self/status").read_text()
        resident = int(status.split("VmHWM:")[1].split()[0]) * 1024
    else:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(resident, mx.get_peak_memory())


if __name__ == "__main__":
    main()
