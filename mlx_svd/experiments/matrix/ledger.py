"""The bytes of a condition, if it were stored."""

from math import prod

from mlx_svd.experiments.matrix.steps import Changed
from mlx_svd.experiments.matrix.workbench import Workbench
from mlx_svd.plan.forms import Storage, choose_form


def byte_numbers(bench: Workbench, changed: Changed) -> dict[str, float]:
    """bytes: of the whole model as it would be stored; bytes_before: of the original;
    keep_bytes: the share that the changed projections keep of theirs (1 if none changed).

    A truncated projection takes the smallest exact form of the plan's ledger (dense, factored or
    pivot) in the source's dtype, so a truncation that saves nothing counts as dense; a quantized
    one is dense at its bits. Nothing is written.
    """
    source = bench.subject.source
    tensors = source.tensors
    before = sum(prod(shape) * dtype.size for shape, dtype in tensors.values())
    after, touched_before, touched_after = before, 0, 0
    for path, p in bench.subject.projections.items():
        if path not in changed.ranks and path not in changed.quantizers:
            continue
        dtype = tensors[f"{p.module}.weight"][1]
        storage = Storage(p, dtype, None)
        dense = storage.nbytes("dense", (0,))
        if path in changed.quantizers:
            stored = changed.quantizers[path].projection_bytes(p, dtype)
        else:
            ranks = (changed.ranks[path],)
            stored = storage.nbytes(choose_form("auto", ranks, storage).form, ranks)
        after += stored - dense
        touched_before += dense
        touched_after += stored
    for path in changed.others:
        shape, dtype = tensors[f"{path}.weight"]
        after += changed.quantizers[path].nbytes(shape) - prod(shape) * dtype.size
    share = touched_after / touched_before if touched_before else 1.0
    return {"bytes": after, "bytes_before": before, "keep_bytes": share}


def parameters_of(bench: Workbench, changed: Changed) -> int:
    """Of the whole model, a truncated matrix as two factors where these are fewer."""
    total = sum(prod(shape) for shape, _ in bench.subject.source.tensors.values())
    for path, rank in changed.ranks.items():
        m, n = bench.subject.projections[path].shape
        total += min(0, rank * (m + n) - m * n)
    return total
