"""The corrected form against numpy: what is stored, what is read back, and that it is the best."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_svd
from mlx_svd.calibrate.calibrate import calibrate
from mlx_svd.calibrate.fit import Form, dense, fit, rounding_to
from mlx_svd.calibrate.scorers import score
from mlx_svd.calibrate.statistics import Statistics
from mlx_svd.calibrate.text import Windows
from mlx_svd.checkpoint.layout import Quantization, quantization
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.compress import compress
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.source.families import PROJECTIONS
from mlx_svd.source.source import open_source
from tests.conftest import logits, relative_difference, source_weights
from tests.tiny import write_tiny

RANK, BITS, GROUP = 32, 3, 32
POLICY = RankPolicy(rank=RANK)
CORRECTED = Recipe(PROJECTIONS, POLICY, form="corrected", quantize=quantization(BITS, GROUP))


def write_model(family: str, folder: Path, **options) -> Path:
    """128 wide, so that a correction of rank 32 is not everything."""
    if family == "gpt2":
        return write_tiny(family, folder, n_embd=128, **options)
    options |= {"intermediate_size": 512} if family == "gpt_neox" else {}
    return write_tiny(family, folder, hidden_size=128, **options)


def stored_tensors(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))


def unpacked(tensors: dict[str, mx.array], path: str, group_size: int, bits: int) -> np.ndarray:
    """A weight (m, n), packed or not, in float64, with bits taken out by numpy."""
    weight = tensors[f"{path}.weight"]
    if f"{path}.scales" not in tensors:
        return np.array(weight.astype(mx.float32), dtype=np.float64)
    raw = np.array(weight).view(np.uint8)
    ones = np.unpackbits(raw, axis=-1, bitorder="little").reshape(len(raw), -1, bits)
    codes = (ones.astype(np.int64) << np.arange(bits)).sum(-1)
    scales, biases = (
        np.array(tensors[f"{path}.{part}"].astype(mx.float32), dtype=np.float64)
        for part in ("scales", "biases")
    )
    return codes * scales.repeat(group_size, 1) + biases.repeat(group_size, 1)


def read_back(folder: Path, bits: int = BITS, factors: tuple[int, int] = (GROUP, 8)) -> dict:
    """Projection path -> base + up down as stored. factors: group size and bits, if quantized."""
    tensors, weights = stored_tensors(folder), {}
    section = json.loads((folder / "config.json").read_text())["mlx_svd"]
    for path, entry in section["projections"].items():
        if entry["form"] == "corrected":
            base = unpacked(tensors, f"{path}.base", GROUP, bits)
            up, down = (unpacked(tensors, f"{path}.{name}", *factors) for name in ("up", "down"))
            assert (up.shape[1], down.shape[0]) == (entry["ranks"][0],) * 2
            weights[path] = base + up @ down
    return weights


def reference_logits(model: Path, folder: Path, weights: dict[str, np.ndarray]) -> np.ndarray:
    """Logits of the original architecture with ``weights`` in the projections and everything else
    as dequantized from the checkpoint."""
    reference, config = load_model(model, dtype="float32")
    tensors, source = stored_tensors(folder), open_source(str(model))
    linears = {linear.path: linear for linear in source.linears}
    values = {}
    for name in source.tensors:
        path, _, kind = name.rpartition(".")
        if path in linears and kind == "weight":
            if f"{path}.scales" in tensors:  # not corrected
                values[name] = mx.array(unpacked(tensors, path, GROUP, BITS)).astype(mx.float32)
                continue
            parts = {p.name: mx.array(weights[p.path]) for p in linears[path].projections}
            values[name] = linears[path].join(parts).astype(mx.float32)
        elif kind == "weight" and f"{path}.scales" in tensors:
            values[name] = mx.array(unpacked(tensors, path, GROUP, BITS)).astype(mx.float32)
        elif path not in linears:
            values[name] = tensors[name].astype(mx.float32)
    reference.load_weights(list(values.items()), strict=False)  # biases are the source's own
    tokens = np.random.default_rng(1).integers(0, config["vocab_size"], 40)
    return np.array(reference(mx.array(tokens)[None])[0].astype(mx.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3"])
def test_logits_are_those_of_the_dequantized_base_plus_up_down(family, dtype, tmp_path, compressed):
    # bfloat16 in the source too: both models then have the same biases.
    model = write_model(family, tmp_path / "model", dtype=getattr(mx, dtype))
    folder, _ = compressed(model, CORRECTED)
    expected = reference_logits(model, folder, read_back(folder))
    assert relative_difference(logits(folder), expected) <= 1e-4
    plain, _ = compressed(model, Recipe(rules=(Rule(skip=True),), quantize=CORRECTED.quantize))
    assert relative_difference(logits(plain), expected) > 1e-2


@pytest.mark.parametrize("factor_bits", [None, 8])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_bytes_on_disk_are_the_plans(family, factor_bits, tmp_path, compressed):
    model = write_model(family, tmp_path / "model", dtype=mx.bfloat16)
    rules = (Rule(policy=POLICY, form="corrected", factor_bits=factor_bits),)
    folder, plan = compressed(model, Recipe(rules=rules, quantize=CORRECTED.quantize))
    tensors = stored_tensors(folder)
    assert sum(t.nbytes for t in tensors.values()) == plan.bytes_after
    for p in (p for p in plan.projections if p.form == "corrected"):
        own = {n: t for n, t in tensors.items() if n.startswith(f"{p.path}.")}
        assert sum(t.nbytes for t in own.values()) == p.bytes_after
        for factor in ("down", "up"):
            packed = own[f"{p.path}.{factor}.weight"].dtype == mx.uint32
            assert packed == (factor_bits is not None)
    for entry in mlx_svd.inspect(folder).projections:
        assert entry.nbytes == plan.by_path[entry.path].bytes_after


def moments(n: int, seed: int) -> Statistics:
    """Of inputs with correlated directions of very different size."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((4 * n, n)) * np.arange(1, n + 1) ** -0.7
    inputs = mixed @ np.linalg.qr(rng.standard_normal((n, n)))[0]
    second = inputs.T @ inputs / len(inputs)
    return Statistics(second, inputs.mean(0), np.abs(inputs).mean(0))


def root(second: np.ndarray) -> np.ndarray:
    """C^1/2 with the ridge that the metric is documented to add, by numpy's eigh."""
    ridged = second + 1e-6 * np.trace(second) / len(second) * np.eye(len(second))
    values, vectors = np.linalg.eigh(ridged)
    return vectors * np.sqrt(values) @ vectors.T


@pytest.mark.parametrize("shape", [(48, 64), (96, 64)])
@pytest.mark.parametrize("scorer", ["plain", "whitened"])
def test_no_correction_of_the_same_rank_is_better_in_its_metric(scorer, shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    statistics = moments(shape[1], 1)
    scored = score(scorer, weight, statistics)
    form = Form("corrected", 12, Quantization(32, 3), None, rounding_to(mx.float32))
    low = fit(weight, form, scored, "name")
    half = np.eye(shape[1]) if scorer == "plain" else root(statistics.second)
    error = weight - low.parts["base"].dense()
    left = np.linalg.norm((weight - dense(low)) @ half)
    sigma = np.linalg.svd(error @ half, compute_uv=False)
    assert left == pytest.approx(np.sqrt((sigma[12:] ** 2).sum()), rel=1e-5)
    total = np.linalg.norm(weight @ half) ** 2
    assert 1 - low.kept / low.energy == pytest.approx(left**2 / total, rel=1e-4)
    # The optimum of the other metric is not as good in this one.
    other = root(statistics.second) if scorer == "plain" else np.eye(shape[1])
    u, s, v = np.linalg.svd(error @ other, full_matrices=False)
    rival = (u[:, :12] * s[:12]) @ v[:12] @ np.linalg.inv(other)
    assert left < 0.98 * np.linalg.norm((error - rival) @ half)


def test_the_correction_of_a_checkpoint_is_numpys_svd_of_what_its_base_lost(tmp_path, compressed):
    model = write_model("llama", tmp_path / "model")
    folder, _ = compressed(model, CORRECTED)
    weights, tensors, read = source_weights(model), stored_tensors(folder), read_back(folder)
    assert len(read) == 14
    for path, matrix in read.items():
        lost = weights[path] - unpacked(tensors, f"{path}.base", GROUP, BITS)
        sigma = np.linalg.svd(lost, compute_uv=False)
        best = np.sqrt((sigma[RANK:] ** 2).sum())
        assert np.linalg.norm(weights[path] - matrix) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("factor_bits", [None, 8])
def test_calibrated_corrections_lose_less_of_the_outputs_than_plain_ones(factor_bits, tmp_path):
    model = write_model("llama", tmp_path / "model")
    source = open_source(str(model))
    ids = np.random.default_rng(2).integers(0, source.config["vocab_size"], (8, 64))
    windows = Windows(ids.astype(np.int32), "random", "digest", len(ids))
    calibration = calibrate(
        source, lambda: load_model(model)[0], windows, tmp_path / "c", moments=("input",)
    )
    rules = (Rule(policy=POLICY, form="corrected", factor_bits=factor_bits),)
    weights, losses = source_weights(model), {}
    for scorer in ("whitened", "plain"):
        recipe = Recipe(rules=rules, quantize=CORRECTED.quantize, scorer=scorer)
        given = calibration if scorer == "whitened" else None
        plan = make_plan(source, recipe, calibration=given)
        folder = compress(source, plan, tmp_path / scorer, calibration=given)
        read = read_back(folder)
        expected = reference_logits(model, folder, weights | read)
        assert relative_difference(logits(folder), expected) <= 1e-4
        for path, matrix in read.items():
            projection = plan.by_path[path].projection
            half = root(calibration.statistics(projection).second)
            loss = np.linalg.norm((weights[path] - matrix) @ half)
            losses.setdefault(path, []).append(loss)
    assert len(losses) == 6
    for whitened, plain in losses.values():
        assert whitened < plain


def test_inspect_shows_ranks_energy_and_weight_error_of_base_and_correction(tmp_path, compressed):
    model = write_model("gpt2", tmp_path / "model")
    folder, _ = compressed(model, CORRECTED)
    weights, read = source_weights(model), read_back(folder)
    found = {p.path: p for p in mlx_svd.inspect(folder).projections}
    assert found.keys() == read.keys()
    for path, p in found.items():
        norm = np.linalg.norm(weights[path])
        error = np.linalg.norm(weights[path] - read[path]) / norm
        assert (p.form, p.ranks) == ("corrected", (RANK,))
        assert p.rank_text() == f"{RANK}/128"
        assert p.relative_error == pytest.approx(error, rel=1e-3)
        assert p.energy == pytest.approx(1 - error**2, abs=1e-5)
        assert not p.saved_again


def test_factors_in_8_bits_lose_little_of_the_correction(tmp_path, compressed):
    model = write_model("llama", tmp_path / "model")
    errors = {}
    for bits in (None, 8):
        rules = (Rule(policy=POLICY, form="corrected", factor_bits=bits),)
        folder, _ = compressed(model, Recipe(rules=rules, quantize=CORRECTED.quantize))
        weights = source_weights(model)
        for path, matrix in read_back(folder).items():
            errors.setdefault(path, []).append(np.linalg.norm(weights[path] - matrix))
    assert len(errors) == 6
    for exact, rounded in errors.values():
        assert exact < rounded < 1.01 * exact


def test_modules_that_differ_from_the_default_have_their_own_entry_in_the_config(
    tmp_path, compressed
):
    model = write_model("llama", tmp_path / "model")
    special = Rule(
        projections=("q",),
        ranks=(64,),
        form="corrected",
        exact=(Quantization(64, 4), Quantization(32, 8)),
    )
    bits = Rule(projections=("k",), policy=POLICY, form="corrected", bits=2)
    recipe = Recipe(rules=(special, bits, Rule(skip=True)), quantize=quantization(BITS, 64))
    folder, _ = compressed(model, recipe)
    section = json.loads((folder / "config.json").read_text())["quantization"]
    expected = {"group_size": 64, "bits": BITS, "mode": "affine"}
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn"
        expected[f"{path}.q_proj.base"] = {"group_size": 64, "bits": 4, "mode": "affine"}
        for factor in ("down", "up"):
            entry = {"group_size": 32, "bits": 8, "mode": "affine"}
            expected[f"{path}.q_proj.{factor}"] = entry
        expected[f"{path}.k_proj.base"] = {"group_size": 64, "bits": 2, "mode": "affine"}
    assert section == expected
    loaded, _ = load_model(folder)
    q, k = (getattr(loaded.layers[0].self_attn, name) for name in ("q_proj", "k_proj"))
    assert [(m.group_size, m.bits) for m in (q.base, q.down, q.up)] == [(64, 4), (32, 8), (32, 8)]
    assert (k.base.group_size, k.base.bits) == (64, 2)
    assert "scales" not in k.up


def test_factors_that_their_groups_do_not_divide_stay_unquantized_and_load(tmp_path, compressed):
    # The inputs of down_proj are 96, no multiple of 64.
    model = write_tiny("llama", tmp_path / "model")
    exact = (Quantization(GROUP, BITS), Quantization(64, 8))
    rules = (Rule(ranks=(RANK,), form="corrected", exact=exact),)
    folder, plan = compressed(model, Recipe(("down",), rules=rules, quantize=CORRECTED.quantize))
    weights, read = source_weights(model), read_back(folder, factors=(64, 8))
    path = "model.layers.0.mlp.down_proj"
    assert plan.by_path[path].ranks[0] % RANK == 0
    assert f"{path}.down.scales" not in stored_tensors(folder)
    error = np.linalg.norm(weights[path] - read[path]) / np.linalg.norm(weights[path])
    assert error < 0.1
    assert np.isfinite(logits(folder)).all()


def test_a_matrix_of_zeros_is_stored_and_read_as_zeros(tmp_path, compressed):
    model = write_model("llama", tmp_path / "model")
    tensors, name = stored_tensors(model), "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = mx.zeros_like(tensors[name])
    mx.eval(list(tensors.values()))
    mx.save_safetensors(str(model / "model.safetensors"), tensors)
    folder, _ = compressed(model, CORRECTED)
    assert not read_back(folder)[name.removesuffix(".weight")].any()
    assert np.isfinite(logits(folder)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs affine quantization"),
        ({"quantize": quantization(mode="mxfp4")}, "needs affine quantization"),
        # The inputs of down_proj are 96, no multiple of 64.
        ({"quantize": quantization(4), "projections": ("down",)}, "multiple of the group size"),
        ({"quantize": quantization(4, 32), "per_head": True}, "use --whole-matrix"),
    ],
    ids=["not quantized", "mxfp4", "inputs do not divide", "per head"],
)
def test_what_cannot_be_corrected_is_refused_in_one_line(options, words, tmp_path):
    source = open_source(str(write_tiny("llama", tmp_path / "model", num_attention_heads=2)))
    policy = RankPolicy(rank_ratio=0.5)
    with pytest.raises(MlxSvdError, match=words) as caught:
        make_plan(source, Recipe(policy=policy, form="corrected", **options))
    assert str(caught.value).startswith("model.layers.0.")
    assert "\n" not in str(caught.value)
