"""Decompose all q, k and o of a random model shaped like Qwen2.5-0.5B: mlx-svd against full SVDs.

Contenders take float32 matrices and give the float32 result of rank 0.7 min(m, n). All of them
multiply the factors back, as the original tool does; mlx-svd's other forms are timed beside that.
"""

from collections.abc import Callable
from dataclasses import fields

import mlx.core as mx
import numpy as np
import scipy.linalg
from threadpoolctl import threadpool_limits

from benchmarks.common import (
    blas_libraries,
    conditions,
    interleaved,
    parse_options,
    print_conditions,
    print_table,
    save,
    spread,
)
from mlx_svd.compress.decompose import decompose_projection
from mlx_svd.parallel import default_workers, ordered_map
from mlx_svd.plan.plan import ProjectionPlan
from mlx_svd.source.families import Projection

try:
    import torch
except ImportError:
    torch = None

RANK_RATIO = 0.7
EXCESS_LIMIT = 1e-5
Weights = list[np.ndarray]


def shapes(hidden: int, kv: int) -> list[tuple[int, int]]:
    """q, k and o of one layer."""
    return [(hidden, hidden), (kv, hidden), (hidden, hidden)]


def random_weights(layers: int, hidden: int, kv: int) -> Weights:
    """Gaussian float32 matrices that bfloat16 holds exactly."""
    mx.random.seed(0)
    return [
        np.array((mx.random.normal(shape) * 0.02).astype(mx.bfloat16).astype(mx.float32))
        for _ in range(layers)
        for shape in shapes(hidden, kv)
    ]


def rank_of(weight: np.ndarray) -> int:
    return int(RANK_RATIO * min(weight.shape))


def ours(weight: np.ndarray, form: str) -> dict[str, np.ndarray]:
    """What ``compress`` calls for one projection."""
    rank = rank_of(weight)
    projection = Projection("w", "w", "q", 0, weight.shape, heads=0, bias=False)
    given = {"projection": projection, "form": form, "ranks": (rank,), "quantization": None}
    unused = {field.name: 0 for field in fields(ProjectionPlan)}  # limits and bytes
    plan = ProjectionPlan(**(unused | given))
    return decompose_projection(weight, plan)[0].parts


def ours_dense(form: str, weight: np.ndarray) -> np.ndarray:
    """Our result multiplied out, for the comparison of errors."""
    parts = ours(weight, form)
    if form == "dense":
        return parts["weight"]
    product = parts["up"] @ parts["down"]
    if form == "factored":
        return product
    return np.concatenate([parts["down"], product])[parts["order"]]


def by_numpy(weight: np.ndarray) -> np.ndarray:
    """numpy's LAPACK call is in float64 for float32 input."""
    rank = rank_of(weight)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def by_scipy(weight: np.ndarray) -> np.ndarray:
    """The LAPACK call of mx.linalg.svd (float32 gesdd, all of U and V), in scipy's BLAS."""
    rank = rank_of(weight)
    u, s, vt = scipy.linalg.svd(weight, full_matrices=True, check_finite=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def by_torch(weight: np.ndarray) -> np.ndarray:
    rank = rank_of(weight)
    u, s, vt = torch.linalg.svd(torch.from_numpy(weight), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).numpy()


def by_mlx(weight: np.ndarray) -> np.ndarray:
    rank = rank_of(weight)
    u, s, vt = mx.linalg.svd(mx.array(weight), stream=mx.cpu)
    return np.array((u[:, :rank] * s[:rank]) @ vt[:rank], copy=False)


FORMS = ("dense", "factored", "pivot")
OTHERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "numpy svd": by_numpy,
    "mx.linalg.svd": by_mlx,
    "scipy svd (as mx)": by_scipy,
    **({"torch svd": by_torch} if torch else {}),
}


def contenders(weights: Weights) -> dict[str, Callable[[], None]]:
    """Name -> a function that does all the matrices. Ours side by side with one BLAS thread each;
    the others one after another with all BLAS threads, as their users run them."""

    def side_by_side(form: str) -> None:
        for _ in ordered_map(lambda w: ours(w, form), weights, default_workers()):
            pass

    def one_by_one(function: Callable[[np.ndarray], np.ndarray]) -> None:
        for weight in weights:
            function(weight)

    calls = {f"mlx-svd, {form}": lambda form=form: side_by_side(form) for form in FORMS}
    return calls | {name: lambda f=f: one_by_one(f) for name, f in OTHERS.items()}


def single_contenders(weights: Weights) -> dict[str, Callable[[], None]]:
    """The same with one worker and one BLAS thread: the algorithms without parallelism."""

    def single(function: Callable[[np.ndarray], object]) -> None:
        for weight in weights:
            function(weight)

    calls = {f"mlx-svd, {f}": lambda f=f: single(lambda w: ours(w, f)) for f in FORMS}
    return calls | {name: lambda f=f: single(f) for name, f in OTHERS.items()}


def excess_errors(weights: Weights) -> dict[str, float]:
    """Largest excess of each contender's error over the optimum, on one layer."""
    functions = {f"mlx-svd, {f}": lambda w, f=f: ours_dense(f, w) for f in FORMS} | OTHERS
    return {name: max(_excess(f, w) for w in weights) for name, f in functions.items()}


def _excess(function: Callable[[np.ndarray], np.ndarray], weight: np.ndarray) -> float:
    values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    optimum = np.sqrt(np.square(values[rank_of(weight) :]).sum())
    error = np.linalg.norm(weight.astype(np.float64) - function(weight))
    return float(error / optimum - 1)


def measure(weights: Weights, single: Weights, runs: int) -> dict:
    """Both tables: all matrices with all threads, some of them with one."""
    for call in contenders(weights[:3]).values():
        call()  # first calls load code and make thread pools
    pools = blas_libraries()
    everything = interleaved(contenders(weights), runs)
    torch_threads = torch.get_num_threads() if torch else None
    with threadpool_limits(1):
        if torch:
            torch.set_num_threads(1)
        alone = interleaved(single_contenders(single), runs)
        if torch:
            torch.set_num_threads(torch_threads)
    return {
        "conditions": conditions(runs, pools) | {"torch_threads": torch_threads},
        "rank_ratio": RANK_RATIO,
        "workers": default_workers(),
        "excess_error": excess_errors(weights[:3]),
        "all_threads": {"matrices": len(weights)} | _seconds(everything),
        "one_thread": {"matrices": len(single)} | _seconds(alone),
    }


def _seconds(times: dict[str, list[float]]) -> dict:
    return {"seconds": {name: spread(values) for name, values in times.items()}}


def report(result: dict, description: str) -> None:
    """Print both tables: seconds, and how many times faster mlx-svd's dense form is."""
    print(f"\n# decompose: {description}, rank {RANK_RATIO:g} min(m, n)")
    print_conditions(result["conditions"])
    for key, how in (
        ("all_threads", f"mlx-svd with {result['workers']} workers, others with all BLAS threads"),
        ("one_thread", "everything with one worker and one BLAS thread"),
    ):
        part = result[key]
        print(f"\n{how}; {part['matrices']} matrices")
        _table(part["seconds"], result["excess_error"])
    if torch is None:
        print("torch: not installed")
    print(_same_blas())


def _table(seconds: dict[str, dict], excess: dict[str, float]) -> None:
    reference = {form: seconds[f"mlx-svd, {form}"]["median"] for form in FORMS}
    header = ["", "seconds", "min-max", "excess error", *(f"/ {form}" for form in FORMS)]
    rows = [
        [
            name,
            f"{s['median']:.2f}",
            f"{s['min']:.2f}-{s['max']:.2f}",
            f"{excess[name]:.0e}" + ("" if excess[name] <= EXCESS_LIMIT else " !"),
            *(f"{s['median'] / reference[form]:.1f}x" for form in FORMS),
        ]
        for name, s in seconds.items()
    ]
    print_table(header, rows)


def _same_blas() -> str:
    return (
        "BLAS: numpy svd runs in numpy's own library, as mlx-svd's products do. scipy svd (as mx)\n"
        "is the LAPACK call of mx.linalg.svd in scipy's own library. mx.linalg.svd runs in the\n"
        "BLAS that is loaded ahead of MLX's, if one is; torch svd too, because its wheel's LAPACK\n"
        "symbols give way to it (otherwise MKL). On a Mac all but torch use Accelerate, if their\n"
        "wheels do. Last columns: seconds over those of each mlx-svd form (wanted: >= 4x)."
    )


def main() -> None:
    """Measure, print and save."""
    options = parse_options(__doc__, runs=3, quick_runs=2)
    layers, hidden, kv, single = (2, 128, 32, 2) if options.quick else (24, 896, 128, 3)
    weights = random_weights(layers, hidden, kv)
    result = measure(weights, weights[: 3 * single], options.runs)
    result["shapes"] = {"layers": layers, "q, o": [hidden, hidden], "k": [kv, hidden]}
    report(result, f"{layers} layers of q, o {hidden}x{hidden} and k {kv}x{hidden}")
    save("decompose-quick" if options.quick else "decompose", result)


if __name__ == "__main__":
    main()
