"""Sliced checkpoints against dense models with projected or zeroed matrices, built by hand."""

import json
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from mlx_svd.calibrate.calibrate import calibrate
from mlx_svd.calibrate.statistics import Calibration
from mlx_svd.calibrate.text import Windows
from mlx_svd.checkpoint.inspect import inspect
from mlx_svd.checkpoint.layout import quantization
from mlx_svd.checkpoint.loader import load_model, tensor_bytes
from mlx_svd.compress import compress
from mlx_svd.errors import MlxSvdError
from mlx_svd.models.modeling_mlx_svd import _parent
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.plan.recipe_file import load_recipe_fields
from mlx_svd.source.families import PROJECTIONS
from mlx_svd.source.source import open_source
from tests.compress.test_resume import Interrupted, contents
from tests.conftest import logits, relative_difference, source_weights
from tests.tiny import FAMILIES, VOCAB, write_tiny

VALUES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt_neo")
ROTARY = ("llama", "mistral", "qwen2")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def calibrated(folder: Path, projections=PROJECTIONS, moments=("input", "output")) -> Calibration:
    """Of random tokens, kept beside the model."""
    tokens = np.random.default_rng(5).integers(0, VOCAB, (6, 32)).astype(np.int32)
    model, _ = load_model(folder, dtype="float32")
    place = folder.parent / f"calibration-{'-'.join((*projections, *moments))}"
    windows = Windows(tokens, "random", "random", len(tokens))
    source = open_source(str(folder))
    return calibrate(
        source, lambda: model, windows, place, projections=projections, moments=moments
    )


def sliced(names: str, ratio: float = 0.5, **options) -> Recipe:
    projections = tuple(names.split(","))
    return Recipe(projections, RankPolicy(rank_ratio=ratio), form="sliced", **options)


def write_sliced(model: Path, recipe: Recipe, name: str = "sliced", **options):
    """Checkpoint folder and plan."""
    source, known = open_source(str(model)), calibrated(model, **options)
    plan = make_plan(source, recipe, calibration=known)
    return compress(source, plan, model.parent / name, calibration=known), plan


def changed_logits(model: Path, weights: dict, biases: dict, length: int = 40) -> np.ndarray:
    """Logits of the dense model with other matrices (m, n) and biases at projection paths."""
    loaded, config = load_model(model, dtype="float32")
    for linear in open_source(str(model)).linears:
        module = getattr(*_parent(loaded, linear.path))
        for kind, given in (("weight", weights), ("bias", biases)):
            if any(p.path in given for p in linear.projections):
                parts = linear.split(module[kind])
                for p in linear.projections:
                    if p.path in given:
                        parts[p.name] = mx.array(given[p.path].astype(np.float32))
                module[kind] = linear.join(parts)
    tokens = np.random.default_rng(1).integers(0, config["vocab_size"], length)
    return np.array(loaded(mx.array(tokens)[None])[0])


@cache
def _source_biases(model: Path) -> dict[str, np.ndarray]:
    source = open_source(str(model))
    stream, biases = source.stream(), {}
    for linear in source.linears:
        if linear.projections[0].bias:
            parts = linear.split(stream.take(f"{linear.path}.bias"))
            biases |= {p.path: np.array(parts[p.name]) for p in linear.projections}
    return biases


def by_layer(plan) -> list[dict]:
    layers: dict[int, dict] = {}
    for p in plan.projections:
        layers.setdefault(p.projection.layer, {})[p.projection.name] = p
    return list(layers.values())


def projector(output, second, left, rank) -> np.ndarray:
    """Of one group of heads: spectral projector of A G (numpy's own eig, no symmetric roots).

    output: (m, heads, d); second: (heads, d, d)."""
    gram = sum(output[:, h].T @ left @ output[:, h] for h in range(output.shape[1]))
    values, vectors = np.linalg.eig(second.sum(0) @ gram)
    order = np.argsort(-values.real)[:rank]
    return (vectors[:, order] @ np.linalg.inv(vectors)[order]).real


@pytest.mark.parametrize("family", VALUES)
def test_sliced_values_give_the_logits_of_projected_values(family, tmp_path):
    model = write_tiny(family, tmp_path / "model")
    folder, plan = write_sliced(model, sliced("v,o"))
    known, original, biases = calibrated(model), source_weights(model), _source_biases(model)
    weights, shifts = {}, {}
    for layer in by_layer(plan):
        v, o, statistics = layer["v"], layer["o"], known.statistics(layer["o"].projection)
        kv_heads, rank = v.projection.heads, v.ranks[0]
        size = v.projection.shape[0] // kv_heads
        heads = o.projection.shape[1] // size
        output = original[o.path].reshape(-1, heads, size)
        second = statistics.second.reshape(heads, size, heads, size)
        blocks, per = [], heads // kv_heads
        for g in range(kv_heads):
            own = range(g * per, (g + 1) * per)
            seen = np.stack([second[h, :, h] for h in own])
            blocks.append(projector(output[:, own], seen, statistics.output_second, rank))
        rows = np.stack(blocks)
        assert rank == size // 2
        weights[v.path] = np.einsum(
            "gab,gbn->gan", rows, original[v.path].reshape(kv_heads, size, -1)
        ).reshape(v.projection.shape)
        if v.projection.bias:
            bias = biases[v.path].reshape(kv_heads, size)
            shifts[v.path] = np.einsum("gab,gb->ga", rows, bias).ravel()
    expected = changed_logits(model, weights, shifts)
    assert relative_difference(logits(folder), expected) <= 1e-4
    assert relative_difference(logits(folder), logits(model)) > 1e-3


def zero_cost(weighed, dropped: set[int]) -> float:
    """Sum of L * E[y y^T] over the outputs of the dropped pairs, over q and k."""
    total = 0.0
    for p, matrix in weighed:
        size = p.shape[0] // p.heads
        rows = [r for r in range(p.shape[0]) if r % size % (size // 2) in dropped]
        total += matrix[np.ix_(rows, rows)].sum()
    return total


@pytest.mark.parametrize("moments", [("input",), ("input", "output")], ids=len)
@pytest.mark.parametrize("rope", [None, LLAMA3, LINEAR, YARN], ids=str)
@pytest.mark.parametrize("family", ROTARY)
def test_sliced_pairs_give_the_logits_of_zeroed_pairs(family, rope, moments, tmp_path):
    changes = {"rope_parameters": rope} if rope else {}
    model = write_tiny(family, tmp_path / "model", **changes)
    folder, plan = write_sliced(model, sliced("q,k"), moments=moments)
    entries = json.loads((folder / "config.json").read_text())["mlx_svd"]["projections"]
    known = calibrated(model, moments=moments)
    original, biases = source_weights(model), _source_biases(model)
    weights, shifts = {}, {}
    for layer in by_layer(plan):
        energies, weighed = {}, []
        for name in ("q", "k"):
            p = layer[name].projection
            statistics, w = known.statistics(p), original[p.path]
            b = biases.get(p.path, np.zeros(len(w)))
            moment = np.block(
                [
                    [statistics.second, statistics.mean[:, None]],
                    [statistics.mean[None], np.ones((1, 1))],
                ]
            )
            full = np.concatenate([w, b[:, None]], 1)
            second = full @ moment @ full.T
            energies[name] = np.diagonal(second).reshape(p.heads, 2, -1).sum(1)
            if statistics.output_second is not None:
                weighed.append((p, second * statistics.output_second))
        per = len(energies["q"]) // len(energies["k"])
        scores = (energies["q"] * np.repeat(energies["k"], per, 0)).sum(0)
        pairs = sorted(np.argsort(-scores)[: len(scores) // 2].tolist())
        if weighed:  # one pair after the other, the one whose outputs then cost least
            pairs = list(range(len(scores)))
            while len(pairs) > len(scores) // 2:
                costs = [
                    zero_cost(weighed, set(range(len(scores))) - set(pairs) | {j}) for j in pairs
                ]
                del pairs[int(np.argmin(costs))]
        for name in ("q", "k"):
            p = layer[name].projection
            assert entries[p.path]["pairs"] == pairs
            size = p.shape[0] // p.heads
            dead = np.setdiff1d(np.arange(size), pairs + [i + size // 2 for i in pairs])
            weights[p.path] = original[p.path].reshape(p.heads, size, -1).copy()
            weights[p.path][:, dead] = 0
            weights[p.path] = weights[p.path].reshape(p.shape)
            if p.bias:
                bias = biases[p.path].reshape(p.heads, size).copy()
                bias[:, dead] = 0
                shifts[p.path] = bias.ravel()
    expected = changed_logits(model, weights, shifts)
    assert relative_difference(logits(folder), expected) <= 1e-4
    assert relative_difference(logits(folder), logits(model)) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_sliced_neurons_give_the_logits_of_the_regression_on_them(family, tmp_path):
    model = write_tiny(family, tmp_path / "model")
    names = "up,down" if family in ("gpt2", "gpt_neox", "gpt_neo") else "gate,up,down"
    folder, plan = write_sliced(model, sliced(names))
    known, original, biases = calibrated(model), source_weights(model), _source_biases(model)
    stored, _ = load_model(folder)
    weights, shifts = {}, {}
    for layer in by_layer(plan):
        up, down = layer["up"].projection, layer["down"].projection
        path = layer["up"].path
        rows = np.array(getattr(*_parent(stored, path)).weight, dtype=np.float64)
        distances = np.abs(original[up.path][:, None] - rows[None]).max(-1)
        kept = np.sort(distances.argmin(0))
        assert distances.min(0).max() <= 1e-6
        assert len(set(kept)) == down.shape[1] // 2 == layer["down"].ranks[0]
        dead = np.setdiff1d(np.arange(down.shape[1]), kept)
        for name in names.split(",")[:-1]:
            p = layer[name].projection
            weights[p.path] = original[p.path].copy()
            weights[p.path][dead] = 0
            if p.bias:
                shifts[p.path] = biases[p.path].copy()
                shifts[p.path][dead] = 0
        second = known.statistics(down).second
        ridged = second + 1e-4 * np.diagonal(second).mean() * np.eye(len(second))
        reader = original[down.path] @ ridged[:, kept] @ np.linalg.inv(ridged[np.ix_(kept, kept)])
        weights[down.path] = np.zeros(down.shape)
        weights[down.path][:, kept] = reader
    expected = changed_logits(model, weights, shifts)
    assert relative_difference(logits(folder), expected) <= 1e-4
    assert relative_difference(logits(folder), logits(model)) > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_full_size_is_the_dense_model(family, tmp_path):
    model = write_tiny(family, tmp_path / "model")
    folder, plan = write_sliced(model, sliced("v,o,gate,up,down", 1.0))
    assert all(p.form == "dense" and not p.changed for p in plan.projections)
    assert np.array_equal(logits(folder), logits(model))


@pytest.mark.parametrize("family", ROTARY)
def test_almost_full_size_stays_close_to_the_dense_model(family, tmp_path):
    # A dead dimension of every head and a dead neuron cost nothing.
    model = write_tiny(family, tmp_path / "model")
    tensors = mx.load(str(model / "model.safetensors"))
    for name, tensor in tensors.items():
        array = np.array(tensor)
        if ".v_proj." in name:
            array.reshape(2, -1, *array.shape[1:])[:, 3] = 0
        if ".up_proj." in name:
            array[5] = 0
        tensors[name] = mx.array(array)
    mx.save_safetensors(str(model / "model.safetensors"), tensors, {"format": "pt"})
    size = open_source(str(model)).linears[0].projections[0].shape[0] // 4
    rules = (
        Rule(projections=("v", "o"), policy=RankPolicy(rank=size - 1), form="sliced"),
        Rule(projections=("gate", "up", "down"), policy=RankPolicy(rank=95), form="sliced"),
    )
    folder, plan = write_sliced(model, Recipe(("v", "o", "gate", "up", "down"), rules=rules))
    assert all(p.form == "sliced" for p in plan.projections if p.projection.name not in "qk")
    assert relative_difference(logits(folder), logits(model)) <= 2e-3


def everything(family: str) -> str:
    """All groups of a family that can be sliced."""
    no_pairs = {"qwen3": "v,o,gate,up,down", "gemma3_text": "v,o,gate,up,down"}
    return {**no_pairs, "gpt_neo": "v,o,up,down"}.get(family, ",".join(PROJECTIONS))


def stepwise(model: nn.Module, tokens: mx.array, cache: list) -> np.ndarray:
    """Logits with a cache: a prompt of 7 tokens, then one token at a time."""
    parts = [model(tokens[None, :7], cache=cache)]
    parts += [model(tokens[None, i : i + 1], cache=cache) for i in range(7, len(tokens))]
    return np.array(mx.concatenate(parts, axis=1)[0])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt_neo"])
def test_generation_with_a_cache_equals_one_without(family, tmp_path):
    model = write_tiny(family, tmp_path / "model")
    folder, _ = write_sliced(model, sliced(everything(family)))
    loaded, _ = load_model(folder)
    tokens = mx.array(np.random.default_rng(2).integers(0, VOCAB, 24))
    cached = make_prompt_cache(loaded)
    got = stepwise(loaded, tokens, cached)
    assert relative_difference(got, np.array(loaded(tokens[None])[0])) <= 1e-4
    if isinstance(cached[0], KVCache):
        dense, _ = load_model(model)
        whole = make_prompt_cache(dense)
        stepwise(dense, tokens, whole)
        assert cached[0].values.shape[-1] == whole[0].values.shape[-1] // 2


def test_quantized_cache_works_when_keys_and_values_keep_as_many_dimensions(tmp_path):
    model = write_tiny("llama", tmp_path / "model", head_dim=64)
    folder, _ = write_sliced(model, sliced("q,k,v,o"))
    loaded, _ = load_model(folder)
    tokens = mx.array(np.random.default_rng(2).integers(0, VOCAB, 24))
    got = stepwise(loaded, tokens, [QuantizedKVCache(32, 8) for _ in loaded.layers])
    assert relative_difference(got, np.array(loaded(tokens[None])[0])) <= 2e-2


@pytest.mark.parametrize(
    ("heads", "names", "noted"),
    [(64, "q,k,v,o", False), (64, "v,o", True), (24, "q,k,v,o", True), (24, "up,down,gate", False)],
)
def test_plan_notes_that_the_cache_cannot_be_quantized(heads, names, noted, tmp_path):
    model = write_tiny("llama", tmp_path / "model", head_dim=heads)
    plan = make_plan(open_source(str(model)), sliced(names), calibration=calibrated(model))
    assert any("--kv-bits" in note for note in plan.notes) == noted


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neo"])
def test_bytes_of_the_plan_are_those_on_disk(family, bits, tmp_path):
    model = write_tiny(family, tmp_path / "model", dtype=mx.bfloat16)
    names = everything(family).removeprefix("q,k," if family == "phi3" else "")
    recipe = sliced(names, quantize=quantization(bits, 32) if bits else None)
    folder, plan = write_sliced(model, recipe)
    sizes = tensor_bytes(folder)
    assert sizes == {t.name: t.nbytes for t in plan.tensors}
    assert plan.bytes_after == sum(sizes.values())
    inspected = {p.path: p for p in inspect(folder).projections}
    for p in plan.projections:
        if p.projection.name in plan.compressible:
            assert p.form == inspected[p.path].form == "sliced"
            assert p.bytes_after == inspected[p.path].nbytes < p.bytes_dense
            assert not inspected[p.path].saved_again
            assert inspected[p.path].relative_error > 0


@pytest.mark.parametrize("bits", [8, 6])
def test_quantized_slices_stay_close_to_unquantized_ones(bits, tmp_path):
    model = write_tiny("llama", tmp_path / "model")
    names = "q,k,v,o,gate,up,down"
    quantized, plan = write_sliced(model, sliced(names, quantize=quantization(bits, 32)), "low")
    loaded, _ = load_model(quantized)
    for module in (loaded.layers[0].self_attn.o_proj, loaded.layers[0].mlp.down_proj):
        assert isinstance(module, nn.QuantizedLinear)
    mlp = ("gate", "up", "down")
    assert {p.ranks for p in plan.projections if p.projection.name in mlp} == {(64,)}  # of 48
    rules = (Rule(projections=mlp, policy=RankPolicy(rank=64), form="sliced"),)
    plain, _ = write_sliced(model, sliced(names, rules=rules), "plain")
    limit = {8: 0.05, 6: 0.2}[bits]
    assert relative_difference(logits(quantized), logits(plain)) <= limit


def test_saved_plan_repeats_a_sliced_checkpoint(tmp_path):
    model = write_tiny("qwen2", tmp_path / "model", dtype=mx.bfloat16)
    recipe = sliced("q,k,v,o,gate,up,down", quantize=quantization(8, 32))
    folder, plan = write_sliced(model, recipe)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    repeated = Recipe(**load_recipe_fields(tmp_path / "plan.json"))
    again, other = write_sliced(model, repeated, "again")
    assert other.tensors == plan.tensors
    assert tensor_bytes(again) == tensor_bytes(folder)
    assert np.array_equal(logits(again), logits(folder))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_run_interrupted_after_any_unit_continues_with_equal_bytes(family, tmp_path):
    model = write_tiny(family, tmp_path / "model", dtype=mx.bfloat16)
    names = "v,o,gate,up,down" if family == "phi3" else "q,k,v,o,gate,up,down"
    source, known = open_source(str(model)), calibrated(model)
    plan = make_plan(source, sliced(names), calibration=known)
    whole = contents(compress(source, plan, tmp_path / "whole", calibration=known))
    for stop in range(1, len(plan.units), 2):
        told = []

        def advance(unit, told=told, stop=stop):
            told.append(unit.path)
            if len(told) == stop:
                raise Interrupted

        target = tmp_path / f"stopped-{stop}"
        with pytest.raises(Interrupted):
            compress(source, plan, target, advance=advance, calibration=known)
        compress(source, plan, target, calibration=known)
        assert contents(target) == whole


def refusal(model: Path, recipe: Recipe, calibration: Calibration | None = None) -> str:
    with pytest.raises(MlxSvdError) as raised:
        make_plan(open_source(str(model)), recipe, calibration=calibration)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(VALUES)))
def test_values_of_other_families_are_refused_by_name(family, tmp_path):
    model = write_tiny(family, tmp_path / "model")
    assert f"v/o of a {family} model" in refusal(model, sliced("v,o"), calibrated(model))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(ROTARY)))
def test_pairs_of_other_families_are_refused_by_name(family, tmp_path):
    model = write_tiny(family, tmp_path / "model")
    assert f"q/k of a {family} model" in refusal(model, sliced("q,k"), calibrated(model))


def test_rotation_that_depends_on_the_length_is_refused(tmp_path):
    model = write_tiny("llama", tmp_path / "model", rope_parameters=DYNAMIC)
    assert "DynamicNTKScalingRoPE" in refusal(model, sliced("q,k"), calibrated(model))


@pytest.mark.parametrize(
    ("names", "missing"), [("q,o", "k"), ("o", "v"), ("v", "o"), ("gate,down", "up"), ("k", "q")]
)
def test_rule_without_the_partner_is_refused(names, missing, tmp_path):
    model = write_tiny("llama", tmp_path / "model")
    message = refusal(model, sliced(names), calibrated(model))
    assert f"give {missing} the same form and size" in message


def test_partners_of_different_sizes_are_refused(tmp_path):
    model = write_tiny("llama", tmp_path / "model")
    rules = tuple(
        Rule(projections=(name,), policy=RankPolicy(rank=rank), form="sliced")
        for name, rank in (("v", 8), ("o", 4))
    )
    message = refusal(model, Recipe(("v", "o"), rules=rules), calibrated(model))
    assert "one size for v/o, not v 8, o 4" in message


def test_without_a_calibration_slicing_is_refused(tmp_path):
    model = write_tiny("llama", tmp_path / "model")
    assert "form sliced needs a calibration" in refusal(model, sliced("v,o"))
    known = calibrated(model, ("q", "k"))
    assert "no statistics of v" in refusal(model, sliced("v,o"), known)
    source, known = open_source(str(model)), calibrated(model)
    plan = make_plan(source, sliced("v,o"), calibration=known)
    with pytest.raises(MlxSvdError, match="rests on a calibration"):
        compress(source, plan, tmp_path / "out")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (RankPolicy(energy=0.9), "takes rank or rank_ratio, not energy"),
        (RankPolicy(rank=17), "rank 17 is over"),
    ],
)
def test_policy_that_makes_no_sense_is_refused(policy, message, tmp_path):
    model = write_tiny("llama", tmp_path / "model")
    recipe = Recipe(("v", "o"), policy, form="sliced")
    assert message in refusal(model, recipe, calibrated(model))


def test_exact_size_out_of_range_is_refused(tmp_path):
    model = write_tiny("llama", tmp_path / "model")
    rules = (Rule(projections=("v", "o"), ranks=(20,), form="sliced"),)
    assert "one number from 1 to 16" in refusal(model, Recipe(("v", "o"), rules=rules))


def test_slicing_works_without_output_moments(tmp_path):
    model = write_tiny("llama", tmp_path / "model")
    known = calibrated(model, moments=("input",))
    source = open_source(str(model))
    plan = make_plan(source, sliced("q,k,v,o,gate,up,down"), calibration=known)
    folder = compress(source, plan, tmp_path / "sliced", calibration=known)
    assert np.isfinite(logits(folder)).all()


def test_rules_of_a_recipe_file_slice_groups_to_their_own_sizes(tmp_path):
    model = write_tiny("llama", tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(
        "projections: all\n"
        "rules:\n"
        "  - {projections: [q, k], layers: 0, form: sliced, rank: 11}\n"
        "  - {projections: [v, o], form: sliced, rank_ratio: 0.5}\n"
        "  - {projections: mlp, layers: -1, form: sliced, rank: 40}\n"
    )
    recipe = Recipe(**load_recipe_fields(tmp_path / "recipe.yaml"))
    plan = make_plan(open_source(str(model)), recipe, calibration=calibrated(model))
    first, last = by_layer(plan)
    sizes = [
        {name: p.ranks[0] for name, p in layer.items() if p.changed} for layer in (first, last)
    ]
    assert sizes[0] == {"q": 12, "k": 12, "v": 8, "o": 8}  # pairs are two dimensions
    assert sizes[1] == {"v": 8, "o": 8, "gate": 40, "up": 40, "down": 40}
    assert first["q"].reason == "size 11 rounded to a multiple of 2"
    assert (last["down"].stored_shape, last["o"].stored_shape) == ((64, 40), (64, 32))
