"""What fit returns, stored and read back by MLX's own layers, and what fitting gains."""

import zlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_svd.calibrate.fit import Form, LowRank, dense, fit, rounding_to
from mlx_svd.calibrate.scorers import Score, score
from mlx_svd.calibrate.statistics import Statistics
from mlx_svd.checkpoint.layout import Quantization, low_rank_tensors
from mlx_svd.compress.store import store_low_rank
from mlx_svd.linalg.rotate import rotate
from mlx_svd.linalg.rounding import Rounded, round_compensated
from mlx_svd.models.modeling_mlx_svd import build_projection

M, N, RANK = 96, 128, 64
Q4, Q8 = Quantization(32, 4), Quantization(32, 8)
FORMS = {
    "dense": Form("dense", None, None, None, None),
    "dense, 4 bits": Form("dense", None, Q4, None, None),
    "truncated": Form("dense", RANK, None, None, None),
    "truncated, 3 bits": Form("dense", RANK, Quantization(64, 3), None, None),
    "factored": Form("factored", 17, None, None, None),
    "factored, 4 bits": Form("factored", RANK, Q4, None, None),
    "factored, 5 bits": Form("factored", RANK, Quantization(64, 5), None, None),
    "pivot": Form("pivot", 17, None, None, None),
    "pivot above half": Form("pivot", 61, None, None, None),
    "pivot, 8 bits": Form("pivot", RANK, Q8, None, None),
    "pivot, all rows": Form("pivot", M, Q8, None, None),
    "corrected": Form("corrected", 5, Q4, None, None),
    "corrected, 8 bits": Form("corrected", 32, Quantization(64, 3), Q8, None),
}


def second_moment(n: int = N) -> np.ndarray:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((500, n)) @ rng.standard_normal((n, n)) * np.logspace(-0.5, 0.5, n)
    return x.T @ x / 500


def weight_of(m: int = M, n: int = N) -> np.ndarray:
    """float32, with a decaying spectrum."""
    u, s, v = np.linalg.svd(np.random.default_rng(2).standard_normal((m, n)), full_matrices=False)
    return ((u * s * np.arange(1, len(s) + 1) ** -0.5) @ v).astype(np.float32)


def whitened(weight: np.ndarray) -> Score:
    second = second_moment(weight.shape[1])
    return score("whitened", weight, Statistics(second, second[0], second[0]))


def fitted(name: str, calibrated: bool, dtype=mx.float32) -> tuple[Form, LowRank]:
    weight, form = weight_of(), FORMS[name]
    form = Form(form.name, form.rank, form.quantization, form.factors, rounding_to(dtype))
    return form, fit(weight, form, whitened(weight) if calibrated else Score("plain"), "a.b.c")


def read_by_mlx(form: Form, low: LowRank, dtype: mx.Dtype) -> np.ndarray:
    """The matrix that the checkpoint's own module applies, after a round trip through the names
    of the stored tensors."""
    bias = mx.arange(M).astype(dtype)
    q, factors = form.quantization, form.factors
    specs = low_rank_tensors("p", form.name, (M, N), form.rank or 0, True, dtype, q, factors)
    tensors, _ = store_low_rank(low, bias, dtype, q, factors)
    assert [(t.shape, t.dtype) for t in tensors] == [(s.shape, s.dtype) for s in specs]
    ranks = form.rank and [form.rank]
    module = build_projection({"form": form.name, "shape": (M, N), "ranks": ranks, "bias": True})
    holder = nn.Sequential(module)
    names = {s.name.replace("p.", "layers.0.", 1): t for s, t in zip(specs, tensors, strict=True)}

    def how(path, child):
        if f"{path}.scales" not in names:
            return False
        own = factors if form.name == "corrected" and "base" not in path else q
        return own.config()

    nn.quantize(holder, class_predicate=how)
    holder.load_weights(list(names.items()))
    inputs = mx.concatenate([mx.eye(N), mx.zeros((1, N))]).astype(dtype)
    outputs = np.array(holder(inputs).astype(mx.float32), dtype=np.float64)
    np.testing.assert_allclose(outputs[-1], np.arange(M), rtol=1e-2)
    return (outputs[:-1] - outputs[-1]).T if dtype == mx.float32 else outputs[:-1].T


@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "plain"])
@pytest.mark.parametrize("name", FORMS)
def test_what_fit_returns_is_what_mlx_reads_back(name, calibrated):
    form, low = fitted(name, calibrated)
    read, expected = read_by_mlx(form, low, mx.float32), dense(low)
    quantized = form.quantization is not None
    if quantized and not calibrated:  # MLX's own rounding comes on top, with the noise it has
        if isinstance(low.parts.get("base"), Rounded):
            expected = low.parts["base"].dense()
        assert 1e-4 < np.linalg.norm(read - expected) / np.linalg.norm(expected) < 0.4
    else:
        np.testing.assert_allclose(read, expected, atol=3e-5)
    stored = store_low_rank(low, None, mx.float32, form.quantization, form.factors)[1]
    np.testing.assert_allclose(np.array(stored), read, atol=3e-5)


@pytest.mark.parametrize("name", ["dense, 4 bits", "factored, 4 bits", "pivot, 8 bits",
                                  "corrected, 8 bits"])  # fmt: skip
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_scales_are_chosen_as_they_are_stored_in_half_precision(name, dtype):
    form, low = fitted(name, True, dtype)
    for part in low.parts.values():
        if isinstance(part, Rounded):
            for values in (part.scales, part.biases):
                exact = np.array(mx.array(values).astype(dtype).astype(mx.float32))
                np.testing.assert_array_equal(exact, values)
    bias = np.arange(M)[:, None]
    read = read_by_mlx(form, low, dtype) - bias
    # Outputs are rounded to half precision beside a bias of up to 95.
    np.testing.assert_allclose(read, dense(low), atol=96 * float(mx.finfo(dtype).eps))


@pytest.mark.parametrize("name", FORMS)
def test_the_kept_share_is_one_minus_the_loss_in_the_metric(name):
    form, low = fitted(name, True)
    weight = weight_of()
    scored = whitened(weight)
    share = low.kept / low.energy
    if form.rank is None or (form.name == "pivot" and form.rank == M):
        assert share == 1
        return
    if form.quantization and form.name != "corrected":
        truncated = scored.decompose(weight.astype(np.float64)).truncated(form.rank)
    elif form.factors:
        error = weight - low.parts["base"].dense()
        truncated = weight - error + scored.decompose(error).truncated(form.rank)
    else:
        truncated = dense(low)
    lost = scored.loss(weight - truncated) / scored.loss(weight.astype(np.float64))
    assert share == pytest.approx(1 - lost, abs=1e-6)
    assert 0 < share < 1


def nearest(matrix: np.ndarray, q: Quantization) -> np.ndarray:
    packed = mx.quantize(mx.array(matrix.astype(np.float32)), q.group_size, q.bits)
    return np.array(mx.dequantize(*packed, group_size=q.group_size, bits=q.bits), dtype=np.float64)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_fitted_factors_lose_less_than_those_rounded_to_the_nearest_code(bits):
    weight, q = weight_of(), Quantization(32, bits)
    scored = whitened(weight)
    form = Form("factored", RANK, q, None, rounding_to(mx.float32))
    ours = scored.loss(weight - dense(fit(weight, form, scored, "a")))
    plain = Form("factored", RANK, None, None, rounding_to(mx.float32))
    factors = fit(weight, plain, scored, "a").parts
    unfitted = nearest(factors["up"], q) @ nearest(factors["down"], q)
    best = scored.loss(weight - dense(fit(weight, plain, scored, "a")))
    assert best < ours < best + 0.5 * (scored.loss(weight - unfitted) - best)


def test_the_second_factor_undoes_what_rounding_the_first_has_done():
    """Against the same factors, each rounded with compensation but not fitted to each other."""
    weight, q = weight_of(), Quantization(32, 3)
    scored = whitened(weight)
    form = Form("factored", RANK, q, None, rounding_to(mx.float32))
    low = fit(weight, form, scored, "a")
    factors = scored.decompose(weight).balanced_factors(RANK)
    up, _ = rotate(*factors, zlib.crc32(b"a"))
    read = low.parts["down"].dense()
    alone = round_compensated(up, read @ scored.second @ read.T, 3, 32, form.stored).dense()
    assert scored.loss(weight - dense(low)) < 0.95 * scored.loss(weight - alone @ read)


def test_refitted_coefficients_of_a_pivot_form_lose_less_too():
    weight = weight_of()
    scored = whitened(weight)
    form = Form("pivot", RANK, Q8, None, rounding_to(mx.float32))
    ours = scored.loss(weight - dense(fit(weight, form, scored, "a")))
    parts = fit(weight, Form("pivot", RANK, None, None, None), scored, "a").parts
    down, up = nearest(parts["down"], Q8), nearest(parts["up"], Q8)
    unfitted = np.concatenate([down, up @ down])[parts["order"]]
    assert ours < scored.loss(weight - unfitted)


def test_a_correction_is_the_best_one_of_what_the_base_lost():
    weight = weight_of()
    scored = whitened(weight)
    form = Form("corrected", 5, Q4, None, rounding_to(mx.float32))
    low = fit(weight, form, scored, "a")
    error = weight - low.parts["base"].dense()
    root = np.linalg.cholesky(second_moment())
    u, s, v = np.linalg.svd(error @ root, full_matrices=False)
    best = (u[:, :5] * s[:5]) @ v[:5] @ np.linalg.inv(root)
    np.testing.assert_allclose(low.parts["up"] @ low.parts["down"], best, atol=1e-4)
    assert scored.loss(weight - dense(low)) < 0.9 * scored.loss(error)


def test_without_a_rank_the_matrix_is_kept():
    weight = weight_of()
    for scored in (whitened(weight), Score("plain")):
        for q in (None, Quantization(32, 4, "mxfp4")):  # only affine codes can be compensated
            kept = fit(weight, Form("dense", None, q, None, rounding_to(mx.float32)), scored, "a")
            np.testing.assert_array_equal(kept.parts["weight"], weight)
            assert kept.parts["weight"].dtype == np.float32
            assert (kept.energy, kept.kept) == (1, 1)
    odd = weight_of(20, 40)  # 40 inputs cannot be cut into groups of 32
    kept = fit(odd, Form("dense", None, Q4, None, rounding_to(mx.float32)), whitened(odd), "a")
    np.testing.assert_array_equal(kept.parts["weight"], odd)
    assert kept.parts["weight"].dtype == np.float32


def test_the_same_name_gives_the_same_bits_and_another_one_another_rotation():
    weight = weight_of()
    one, same, other = (
        fit(weight, Form("factored", RANK, Q4, None, rounding_to(mx.float32)), whitened(weight), n)
        for n in ("a.0", "a.0", "a.1")
    )
    np.testing.assert_array_equal(one.parts["down"].codes, same.parts["down"].codes)
    np.testing.assert_array_equal(one.parts["up"].codes, same.parts["up"].codes)
    assert (one.parts["down"].codes != other.parts["down"].codes).mean() > 0.5


def awkward() -> np.ndarray:
    """Random values of all sizes, subnormals, ties between neighbours, both zeros, the ends."""
    rng = np.random.default_rng(0)
    random = rng.standard_normal(4000) * 10.0 ** rng.integers(-40, 38, 4000)
    low = rng.integers(1, 1 << 23, 500).astype(np.uint32).view(np.float32)  # subnormal float32
    upper = rng.integers(0, 0x7F00, 500).astype(np.uint32)
    ties = ((upper << 16) | 0x8000).view(np.float32)
    near = [((upper << 16) | tail).view(np.float32) for tail in (0x7FFF, 0x8001, 0, 0xFFFF)]
    ends = np.array([0.0, -0.0, 3.4028235e38, -3.4028235e38, np.inf, 65504, 65519, 65520, 1 / 3])
    half = 1 + np.arange(9) * 2.0**-11 / 2  # ties of float16
    every = np.concatenate([random, low, -low, ties, -ties, *near, ends, half])
    return every.astype(np.float32).astype(np.float64)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rounding_is_mlxs_cast(dtype):
    values = awkward()
    expected = np.array(mx.array(values.astype(np.float32)).astype(dtype).astype(mx.float32))
    got = rounding_to(dtype)(values)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))
    shaped = rounding_to(dtype)(values[:12].reshape(3, 4).T)  # not contiguous
    np.testing.assert_array_equal(shaped, got[:12].reshape(3, 4).T)
