"""Bad input: exit code 2, one line on stderr that names the culprit and the remedy, no output."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_svd
from mlx_svd.cli import app
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError

Q_PROJ = "model.layers.2.self_attn.q_proj.weight"
Q_PATH = "model.layers.2.self_attn.q_proj"
NORM = "model.layers.3.input_layernorm.weight"
RATIO = ("--rank-ratio", "0.5", "--scorer", "plain")


def copy_demo(folder: Path) -> Path:
    """The demo model; its weights are linked, so replace them, never write into them."""
    folder.mkdir()
    for path in DEMO_MODEL.iterdir():
        if path.name == "model.safetensors":
            (folder / path.name).symlink_to(path)
        else:
            shutil.copy(path, folder)
    return folder


def replace(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def save(folder: Path, tensors: dict[str, mx.array], name: str = "model.safetensors") -> None:
    mx.eval(tensors)
    (folder / name).unlink(missing_ok=True)
    mx.save_safetensors(str(folder / name), tensors, {"format": "pt"})


def change_tensors(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    tensors = mx.load(str(folder / "model.safetensors"))
    change(tensors)
    save(folder, tensors)


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in {**config, **values}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def change_header(folder: Path, change: Callable[[dict], object]) -> None:
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    replace(
        folder / "model.safetensors", len(text).to_bytes(8, "little") + text + data[8 + length :]
    )


def poke(name: str, value: float) -> Callable[[Path], None]:
    """One element of a tensor set to a value."""

    def change(tensors):
        flat = tensors[name].flatten()
        flat[7] = value
        tensors[name] = flat.reshape(tensors[name].shape)

    return lambda folder: change_tensors(folder, change)


class Run:
    """What one run of the command line left: exit code, stdout, stderr without blank lines."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out = code, out
        self.err = [line for line in err.splitlines() if line.strip()]

    def assert_one_error(self, *words: str) -> None:
        errors = [line for line in self.err if not line.startswith("note: ")]
        assert self.code == 2, self.err
        assert len(errors) == 1, self.err
        assert errors[0].startswith("error: ")
        for word in words:
            assert word in errors[0], (word, errors[0])
        assert len(errors[0]) < 700
        assert "Traceback" not in self.out


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., Run]:
    """Run the command line in this process."""

    def main(*argv: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["mlx-svd", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            app.main()
        code = exited.value.code
        captured = capsys.readouterr()
        return Run(0 if code is None else code, captured.out, captured.err)

    return main


@pytest.fixture
def model(tmp_path):
    yield copy_demo(tmp_path / "model")
    shutil.rmtree(tmp_path / "model", ignore_errors=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A good compressed checkpoint of the demo model."""
    from mlx_svd.compress import compress
    from mlx_svd.plan.make import make_plan
    from mlx_svd.plan.policy import RankPolicy
    from mlx_svd.plan.recipe import Recipe
    from mlx_svd.source.source import open_source

    source = open_source(str(DEMO_MODEL))
    plan = make_plan(source, Recipe(policy=RankPolicy(rank_ratio=0.3), form="factored"))
    return compress(source, plan, tmp_path_factory.mktemp("good") / "checkpoint")


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint to be broken."""
    yield shutil.copytree(checkpoint, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken", ignore_errors=True)


def assert_no_output(target: Path) -> None:
    assert not target.exists()
    incomplete = target.with_name(target.name + ".incomplete")
    if incomplete.exists():  # started: what is there can be continued, but not taken for a model
        names = {path.name for path in incomplete.iterdir()}
        assert "journal.jsonl" in names
        assert not names & {"config.json", "model.safetensors.index.json"}


# -- the model folder ---------------------------------------------------------------------------

# name -> how to break the model folder, words that the message must hold
BROKEN_MODELS = {
    "empty folder": (
        lambda f: [p.unlink() for p in f.iterdir()],
        ("no config.json", "give a Hugging Face model"),
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "config not JSON": (
        lambda f: (f / "config.json").write_text('{"model_type": "qwen2",'),
        ("config.json", "not valid JSON", "download"),
    ),
    "config not UTF-8": (
        lambda f: (f / "config.json").write_bytes(b'{"a": "\xff\xfe\xfa"}'),
        ("config.json", "not valid JSON", "download"),
    ),
    "config nested without end": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        ("config.json", "not valid JSON", "download"),
    ),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[1, 2]"),
        ("config.json", "not a model config", "download"),
    ),
    "model type unknown": (
        lambda f: change_config(f, model_type="mamba"),
        ("config.json", "'mamba'", "supported: llama", "gpt_neo"),
    ),
    "model type missing": (
        lambda f: change_config(f, model_type=...),
        ("config.json", "None", "supported: llama"),
    ),
    "model type a list": (
        lambda f: change_config(f, model_type=["qwen2"]),
        ("config.json", "list", "download"),
    ),
    "size missing": (lambda f: change_config(f, hidden_size=...), ("config.json", "hidden_size")),
    "size a text": (
        lambda f: change_config(f, hidden_size="many"),
        ("config.json", "download config.json again"),
    ),
    "size zero": (
        lambda f: change_config(f, num_attention_heads=0),
        ("config.json", "download config.json again"),
    ),
    "size negative": (
        lambda f: change_config(f, num_hidden_layers=-1),
        ("config.json", "download config.json again"),
    ),
    "own code": (
        lambda f: change_config(f, model_file="../evil.py"),
        ("config.json", "../evil.py", "never runs", "give the original model"),
    ),
    "quantized": (
        lambda f: change_config(f, quantization={"group_size": 64, "bits": 4}),
        ("config.json", "already quantized", "original"),
    ),
    "quantized by another program": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq"}),
        ("config.json", "already quantized", "original"),
    ),
    "compressed before": (
        lambda f: change_config(f, mlx_svd={"format": 1}),
        ("config.json", "already compressed", "original"),
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        ("no model*.safetensors", "give a Hugging Face model folder"),
    ),
    "PyTorch weights only": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ("PyTorch .bin", "convert", "safetensors"),
    ),
    "weights a broken link": (
        lambda f: [(f / "model.safetensors").unlink(), (f / "model.safetensors").symlink_to("x")],
        ("model.safetensors", "cannot be read", "download or copy it again"),
    ),
    "weights a folder": (
        lambda f: [(f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()],
        ("model.safetensors", "cannot be read", "download or copy it again"),
    ),
    "empty shard": (
        lambda f: replace(f / "model.safetensors", b""),
        ("model.safetensors", "truncated or corrupt", "download or copy it again"),
    ),
    "truncated shard": (
        lambda f: replace(
            f / "model.safetensors", (f / "model.safetensors").read_bytes()[:5_000_000]
        ),
        ("model.safetensors", "truncated or corrupt", "5000000 bytes", "download"),
    ),
    "overlong shard": (
        lambda f: replace(f / "model.safetensors", (f / "model.safetensors").read_bytes() + b"x"),
        ("model.safetensors", "truncated or corrupt", "download"),
    ),
    "corrupt header": (
        lambda f: replace(
            f / "model.safetensors", (f / "model.safetensors").read_bytes().replace(b'"', b"x", 1)
        ),
        ("model.safetensors", "unreadable header", "download"),
    ),
    "HTML page in place of a shard": (
        lambda f: replace(f / "model.safetensors", b"<!doctype html><html>404</html>" * 9),
        ("model.safetensors", "truncated or corrupt", "download"),
    ),
    "Git LFS pointer in place of a shard": (
        lambda f: replace(
            f / "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        ("model.safetensors", "truncated or corrupt", "download"),
    ),
    "tensor in two files": (
        lambda f: save(f, {NORM: mx.ones(256)}, "model-00002-of-00002.safetensors"),
        (NORM, "model-00002-of-00002.safetensors", "also in", "delete the stale file"),
    ),
    "8-bit float": (
        lambda f: change_header(
            f, lambda h: h[NORM].update(dtype="F8_E4M3", shape=[2 * h[NORM]["shape"][0]])
        ),
        (NORM, "F8_E4M3", "bfloat16"),
    ),
    "integer weight": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: t[NORM].astype(mx.int32)})),
        (NORM, "int32", "bfloat16"),
    ),
    "missing tensor": (
        lambda f: change_tensors(f, lambda t: t.pop(Q_PROJ)),
        (Q_PROJ, "missing", "download"),
    ),
    "unknown tensor": (
        lambda f: change_tensors(f, lambda t: t.update({"adapter.weight": mx.ones((2, 2))})),
        ("adapter.weight", "not part of a qwen2 model", "do not belong together"),
    ),
    "one layer too many": (
        lambda f: change_config(f, num_hidden_layers=7),
        ("model.layers.6.", "missing", "download"),
    ),
    "shape contradicts config": (
        lambda f: change_config(f, intermediate_size=700),
        ("mlp.gate_proj.weight", "(704, 256)", "(700, 256)", "config.json"),
    ),
    "vocabulary contradicts config": (
        lambda f: change_config(f, vocab_size=100),
        ("model.embed_tokens.weight", "(8192, 256)", "(100, 256)"),
    ),
    "index names an absent tensor": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"model.ghost.weight": "model.safetensors"}})
        ),
        ("index.json", "model.ghost.weight", "model.safetensors", "download the model again"),
    ),
    "index names an absent file": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {NORM: "model-00002-of-00002.safetensors"}})
        ),
        ("index.json", "model-00002-of-00002.safetensors", "missing", "download the model again"),
    ),
    "index names a file outside": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {NORM: f"../{f.name}/model.safetensors"}})
        ),
        ("index.json", NORM, "download the model again"),
    ),
    "index without file names": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {NORM: 1}})
        ),
        ("index.json", "not a valid index", "download it again"),
    ),
    "index not JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        ("index.json", "not a valid index", "download it again"),
    ),
    "NaN in a projection": (poke(Q_PROJ, float("nan")), (Q_PROJ, "NaN or Inf", "damaged")),
    "NaN in an untouched tensor": (poke(NORM, float("nan")), (NORM, "NaN or Inf", "damaged")),
    "infinity in a projection": (poke(Q_PROJ, float("inf")), (Q_PROJ, "NaN or Inf", "damaged")),
    "minus infinity in the embedding": (
        poke("model.embed_tokens.weight", float("-inf")),
        ("model.embed_tokens.weight", "NaN or Inf", "damaged"),
    ),
}


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_broken_model_is_refused_in_one_line(case, model, tmp_path, run):
    break_it, words = BROKEN_MODELS[case]
    break_it(model)
    target = tmp_path / "out"
    run("compress", "--model", model, *RATIO, "--mlx-path", target).assert_one_error(*words)
    assert_no_output(target)


@pytest.mark.parametrize(
    "case", [c for c in BROKEN_MODELS if " in a" not in c and "minus" not in c]
)
def test_plan_refuses_a_broken_model_too(case, model, run):
    break_it, words = BROKEN_MODELS[case]
    break_it(model)
    run("plan", "--model", model, *RATIO).assert_one_error(*words)


def test_energy_plan_that_reads_a_damaged_projection_is_refused(model, run):
    poke(Q_PROJ, float("nan"))(model)
    run("plan", "--model", model, "--energy", "0.9").assert_one_error(Q_PROJ, "NaN or Inf")


@pytest.mark.parametrize("tensor", [Q_PROJ, NORM])
def test_value_beyond_float16_is_refused_and_bfloat16_named_as_remedy(tensor, model, tmp_path, run):
    poke(tensor, 1e5)(model)
    command = ("compress", "--model", model, *RATIO, "--mlx-path", tmp_path / "out", "--dtype")
    path = tensor if tensor == NORM else tensor.removesuffix(".weight")
    run(*command, "float16").assert_one_error(path, "float16", "--dtype bfloat16")
    assert_no_output(tmp_path / "out")


def test_checkpoint_is_no_source(checkpoint, tmp_path, run):
    result = run("compress", "--model", checkpoint, *RATIO, "--mlx-path", tmp_path / "out")
    result.assert_one_error("config.json", "already compressed", "original")
    assert_no_output(tmp_path / "out")


# -- paths ----------------------------------------------------------------------------------------


def test_missing_path_is_refused(tmp_path, run):
    for missing in ("no/such/folder", "../nothing", tmp_path / "missing", "~nobody-here/model"):
        run("plan", "--model", missing, *RATIO).assert_one_error(str(missing))


def test_model_path_that_is_a_file_or_empty_or_too_long_is_refused(model, run):
    file = model / "config.json"
    run("plan", "--model", file, *RATIO).assert_one_error(str(file), "give the folder")
    run("plan", "--model", "", *RATIO).assert_one_error("--model", "give")
    run("plan", "--model", "x" * 300 + "/a/b", *RATIO).assert_one_error("xxx", "give")


def test_revision_of_a_local_folder_is_refused(model, run):
    result = run("plan", "--model", model, *RATIO, "--revision", "main")
    result.assert_one_error(str(model), "leave out --revision")


@pytest.mark.parametrize("kind", ["folder", "full folder", "file", "link to nothing"])
def test_existing_output_is_refused_and_left_as_it_was(kind, tmp_path, run):
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    elif kind == "link to nothing":
        target.symlink_to(tmp_path / "nothing")
    else:
        target.mkdir()
    if kind == "full folder":
        (target / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    result = run("compress", "--model", DEMO_MODEL, *RATIO, "--mlx-path", target)
    result.assert_one_error(str(target), "exists already", "--mlx-path")
    assert sorted(tmp_path.rglob("*")) == before
    assert kind != "file" or target.read_text() == "mine"


def test_output_below_a_file_is_refused(tmp_path, run):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "out"
    result = run("compress", "--model", DEMO_MODEL, *RATIO, "--mlx-path", target)
    result.assert_one_error(str(target), "Not a directory", "--mlx-path")


def test_foreign_folder_in_place_of_the_unfinished_one_is_refused_and_kept(tmp_path, run):
    target = tmp_path / "out"
    mine = tmp_path / "out.incomplete" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    result = run("compress", "--model", DEMO_MODEL, *RATIO, "--mlx-path", target)
    result.assert_one_error("out.incomplete", "delete it or give another --mlx-path")
    assert mine.read_text() == "mine"
    assert not target.exists()


def test_full_disk_is_seen_before_anything_is_written(tmp_path, run, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    target = tmp_path / "out"
    result = run("compress", "--model", DEMO_MODEL, *RATIO, "--mlx-path", target)
    result.assert_one_error(str(target), "0.01 GB", "0.00 GB are free", "free some space")
    assert list(tmp_path.iterdir()) == []


# -- options --------------------------------------------------------------------------------------

# name -> options, words that the message must hold
BAD_OPTIONS = {
    "nothing said": ((), ("--rank-ratio", "--rank", "--energy")),
    "two policies": (("--rank", 8, *RATIO), ("exactly one", "rank and rank_ratio")),
    "three policies": (("--rank", 8, *RATIO, "--energy", 0.9), ("exactly one", "energy")),
    "rank 0": (("--rank", 0), ("rank 0", "at least 1")),
    "rank negative": (("--rank", -3), ("rank -3", "at least 1")),
    "rank over the limit": (
        ("--rank", 9999),
        ("model.layers.0.self_attn.", "9999", "min(m, n)", "smaller rank"),
    ),
    "rank over the limit of one": (
        ("--rank", 200),
        ("model.layers.0.self_attn.k_proj", "200", "128", "rule"),
    ),
    "ratio 0": (("--rank-ratio", 0), ("rank_ratio 0", "above 0 and at most 1")),
    "ratio negative": (("--rank-ratio", -0.5), ("rank_ratio -0.5", "above 0")),
    "ratio over 1": (("--rank-ratio", 1.01), ("rank_ratio 1.01", "at most 1")),
    "ratio nan": (("--rank-ratio", "nan"), ("rank_ratio nan", "at most 1")),
    "energy over 1": (("--energy", 1.5), ("energy 1.5", "at most 1")),
    "energy 0": (("--energy", 0), ("energy 0", "above 0")),
    "energy a word": (("--energy", "abc"), ("'abc'", "0.95")),
    "energy ramp out of range": (("--energy", "0.9:1.2"), ("energy 1.2", "at most 1")),
    "energy of three": (("--energy", "0.9:0.8:0.7"), ("0.9:0.8:0.7", "first:last")),
    "form": ((*RATIO, "--form", "bogus"), ("form bogus", "auto, dense, factored, pivot")),
    "pivot in 4 bits": (
        (*RATIO, "--form", "pivot", "-q", "--q-bits", 4),
        ("model.layers.0.", "pivot", "4 bits", "--form factored"),
    ),
    "bits": ((*RATIO, "-q", "--q-bits", 7), ("--q-bits 7", "2, 3, 4, 5, 6, 8")),
    "group size": ((*RATIO, "-q", "--q-group-size", 48), ("--q-group-size 48", "32, 64, 128")),
    "quantization mode": ((*RATIO, "-q", "--q-mode", "int"), ("--q-mode int", "affine")),
    "bits without -q": ((*RATIO, "--q-bits", 8), ("--q-bits", "need -q")),
    "mode without -q": ((*RATIO, "--q-mode", "mxfp4"), ("--q-mode", "need -q")),
    "rank multiple no multiple of the group": (
        (*RATIO, "-q", "--rank-multiple", 48),
        ("--rank-multiple 48", "multiple of the group size 64"),
    ),
    "rank multiple 0": ((*RATIO, "--rank-multiple", 0), ("rank_multiple 0", "at least 1")),
    "projection": ((*RATIO, "--projections", "q,x"), ("'x'", "q, k, v, o")),
    "no projection": ((*RATIO, "--projections", ""), ("projection ''", "q, k, v, o")),
    "dtype": ((*RATIO, "--dtype", "int8"), ("dtype int8", "bfloat16")),
    "recipe missing": (("--config", "no/recipe.yaml"), ("no/recipe.yaml", "no such recipe")),
    "recipe a folder": (("--config", "/"), ("/", "no such recipe")),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option_is_refused_in_one_line(case, tmp_path, run):
    options, words = BAD_OPTIONS[case]
    target = tmp_path / "out"
    result = run("compress", "--model", DEMO_MODEL, *options, "--mlx-path", target)
    result.assert_one_error(*words)
    assert list(tmp_path.iterdir()) == []


# name -> text of the recipe file, words that the message must hold
BAD_RECIPES = {
    "not YAML": ("rank: [1, 2", ("not valid YAML",)),
    "a list": ("- rank: 8", ("a recipe is a mapping",)),
    "empty": ("", ("a recipe is a mapping",)),
    "unknown key": ("rank_ratio: 0.5\nlayer: 3", ("unknown key 'layer'", "use ")),
    "unknown key in a rule": (
        "rank_ratio: 0.5\nrules: [{match: '**', rang: 3}]",
        ("rule 1", "unknown key 'rang'"),
    ),
    "rank a text": ("rank: eight", ("rank", "'eight'")),
    "rank and ratio": ("rank: 8\nrank_ratio: 0.5", ("rank and rank_ratio", "exactly one")),
    "ratio over 1": ("rank_ratio: 70", ("rank_ratio 70", "at most 1")),
    "rule that never matches": (
        "rank_ratio: 0.5\nrules: [{match: '**.c_attn', rank: 8}]",
        ("rule 1", "**.c_attn", "model.layers.0.self_attn.q_proj", "correct or remove"),
    ),
    "rule for a layer that is not there": (
        "rank_ratio: 0.5\nrules: [{layers: [17], rank: 8}]",
        ("rule 1", "17", "correct or remove"),
    ),
    "shadowed rule": (
        "rules: [{match: '**', rank: 8}, {layers: [0], rank: 4}]",
        ("rule 2", "rule 1 before it", "move it up"),
    ),
    "skip and rank": (
        "rank_ratio: 0.5\nrules: [{match: '**', skip: true, rank: 8}]",
        ("rule 1", "skip"),
    ),
    "rank over the limit in a rule": (
        "rank_ratio: 0.5\nrules: [{projections: k, rank: 129}]",
        ("k_proj", "129", "128"),
    ),
    "ranks of too few heads": (
        "rank_ratio: 0.5\nrules: [{projections: q, ranks: [3, 4, 5]}]",
        ("q_proj", "[3, 4, 5]", "heads"),
    ),
    "quantize a word": ("rank_ratio: 0.5\nquantize: yes please", ("quantize",)),
    "bits in a rule": ("rules: [{match: '**', rank: 64, bits: 7}]", ("7", "2, 3, 4, 5, 6, 8")),
    "form in a rule": ("rules: [{match: '**', rank: 64, form: x}]", ("form x", "factored")),
    "plan of a newer version": ('{"plan_format": 99, "projections": []}', ("saved plan",)),
    "plan without its projections": ('{"plan_format": 2}', ("saved plan", "projections")),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipe_is_refused_in_one_line(case, tmp_path, run):
    text, words = BAD_RECIPES[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    target = tmp_path / "out"
    result = run("compress", "--model", DEMO_MODEL, "--config", recipe, "--mlx-path", target)
    result.assert_one_error(*words)
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize(
    "argv",
    [
        ("compress", "--model", "x", "--rank-rattio", "0.5"),
        ("plan", *RATIO),
        ("plan", "--model", "x", "--rank-ratio", "much"),
        ("compress", "--model", "x", *RATIO, "--workers", "0"),
        ("generate", "--model", "x", "--prompt", "a", "--max-tokens", "0"),
        ("squeeze",),
        ("inspect",),
    ],
    ids=" ".join,
)
def test_usage_error_exits_with_2(argv, run):
    result = run(*argv)
    assert result.code == 2
    assert result.err
    assert "Traceback" not in "\n".join(result.err)


def test_rank_that_is_rounded_for_quantization_is_reported(run):
    """0.7 of 256 is 179, of 128 it is 89; the multiples of 64 nearest to them are 192 and 64."""
    asked = {"q_proj": (179, 192), "o_proj": (179, 192), "k_proj": (89, 64)}
    result = run("plan", "--model", DEMO_MODEL, "--rank-ratio", 0.7, "-q", "--form", "factored")
    assert result.code == 0
    rows = [line for line in result.out.splitlines() if line.startswith("model.layers.")]
    assert len(rows) == 18
    for row in rows:
        before, after = asked[row.split()[0].split(".")[-1]]
        assert f"rank {before} rounded to a multiple of 64" in row
        assert f" {after}/" in row
    result = run(
        *("plan", "--model", DEMO_MODEL, "--rank-ratio", 0.7, "-q", "--form", "factored"), "--json"
    )
    for entry in json.loads(result.out)["projections"]:
        if entry["ranks"]:
            before, after = asked[entry["path"].split(".")[-1]]
            assert entry["ranks"] == [after]
            assert f"rank {before} rounded to a multiple of 64" in entry["reason"]


# -- checkpoints ----------------------------------------------------------------------------------

# name -> how to break the checkpoint, words that generate's message must hold
BROKEN_CHECKPOINTS = {
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 1_000_000),
        ("model.safetensors", "truncated or corrupt", "download or copy it again"),
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("no model*.safetensors",)),
    "no config": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "of a newer version": (
        lambda f: change_section(f, lambda s: s.update(format=2, version="9.9")),
        ("config.json", "newer mlx-svd", "9.9", "upgrade"),
    ),
    "section a number": (
        lambda f: change_config(f, mlx_svd=5),
        ("config.json", "mlx_svd section", "again"),
    ),
    "section without projections": (
        lambda f: change_section(f, lambda s: s.pop("projections")),
        ("config.json", "mlx_svd section", "projections", "again"),
    ),
    "entry without its form": (
        lambda f: change_section(f, lambda s: s["projections"][Q_PATH].pop("form")),
        ("config.json", "mlx_svd section", "form", "again"),
    ),
    "tensor removed": (
        lambda f: change_tensors(f, lambda t: [t.pop(n) for n in list(t) if Q_PATH in n]),
        (Q_PATH, "again"),
    ),
}


def change_section(folder: Path, change: Callable[[dict], object]) -> None:
    section = json.loads((folder / "config.json").read_text())["mlx_svd"]
    change(section)
    change_config(folder, mlx_svd=section)


@pytest.mark.parametrize("command", ["generate", "inspect"])
@pytest.mark.parametrize("case", BROKEN_CHECKPOINTS)
def test_broken_checkpoint_is_refused_in_one_line(case, command, broken, run):
    break_it, words = BROKEN_CHECKPOINTS[case]
    break_it(broken)
    argv = ("generate", "--prompt", "a", "--model") if command == "generate" else ("inspect",)
    run(*argv, broken).assert_one_error(*words)


@pytest.mark.parametrize("with_index", [True, False])
def test_lost_tensor_is_named_with_and_without_an_index(with_index, broken, run):
    change_tensors(broken, lambda t: [t.pop(n) for n in list(t) if Q_PATH in n])
    if not with_index:
        (broken / "model.safetensors.index.json").unlink()
    run("inspect", broken).assert_one_error(Q_PATH, "again")
    run("generate", "--model", broken, "--prompt", "a").assert_one_error(Q_PATH, "again")


def test_config_of_other_ranks_does_not_load(broken, run):
    change_section(broken, lambda s: s["projections"][Q_PATH].update(ranks=[3]))
    run("generate", "--model", broken, "--prompt", "a").assert_one_error(
        str(broken), "do not fit together", f"{Q_PATH}."
    )


@pytest.mark.parametrize("damage", ["missing", "not JSON", "not a tokenizer"])
def test_damaged_tokenizer_is_refused_in_one_line(damage, broken, run):
    path = broken / "tokenizer.json"
    path.unlink()
    if damage == "missing":
        (broken / "tokenizer_config.json").unlink()
    else:
        path.write_text("{" if damage == "not JSON" else '{"model": 3}')
    run("generate", "--model", broken, "--prompt", "a").assert_one_error(
        str(broken), "tokenizer", "copy the tokenizer files"
    )


def test_generate_refuses_a_missing_path_and_an_empty_prompt(tmp_path, checkpoint, run):
    missing = tmp_path / "missing"
    run("generate", "--model", missing, "--prompt", "a").assert_one_error(
        str(missing), "no such folder"
    )
    run("generate", "--model", checkpoint, "--prompt", "").assert_one_error("--prompt", "give")
    run("inspect", missing).assert_one_error(str(missing), "no such folder")


def test_inspect_refuses_an_uncompressed_model(run):
    run("inspect", DEMO_MODEL).assert_one_error("config.json", "no mlx_svd section", "give")


# -- code from elsewhere ---------------------------------------------------------------------------


def plant(folder: Path) -> tuple[Path, list[str]]:
    """Python files inside and outside the folder that leave a marker when they are run."""
    marker = folder.parent / "executed"
    code = f"from pathlib import Path\nPath({str(marker)!r}).write_text('executed')\n"
    (folder.parent / "evil.py").write_text(code)
    (folder / "modeling_mlx_svd.py").write_text(code)
    (folder / "inside.py").write_text(code)
    return marker, ["../evil.py", str(folder.parent / "evil.py"), "inside.py"]


def test_planted_code_would_leave_its_marker(broken):
    """Stock mlx-lm, told to trust the checkpoint, runs it: the test below can fail."""
    from mlx_lm.utils import load_model

    marker, files = plant(broken)
    change_config(broken, model_file=files[0])
    with pytest.raises(AttributeError):
        load_model(broken, lazy=True, trust_remote_code=True)
    assert marker.exists()


def test_model_file_of_a_checkpoint_is_never_run(broken, run):
    marker, files = plant(broken)
    for file in [*files, "modeling_mlx_svd.py"]:
        change_config(broken, model_file=file)
        model, _ = mlx_svd.load(broken, lazy=True)
        assert len(model.layers) == 6
        assert run("inspect", broken, "--json").code == 0
    run_result = run("generate", "--model", broken, "--prompt", "a", "-m", 1, "--dtype", "float32")
    assert run_result.code == 0
    assert not marker.exists()


def test_model_file_of_an_uncompressed_model_is_never_run(model, tmp_path, run):
    marker, files = plant(model)
    for file in files:
        change_config(model, model_file=file)
        with pytest.raises(MlxSvdError, match="never runs"):
            mlx_svd.load(model)
        target = tmp_path / "out"
        for argv in (
            ("generate", "--model", model, "--prompt", "a"),
            ("plan", "--model", model, *RATIO),
            ("compress", "--model", model, *RATIO, "--mlx-path", target),
        ):
            run(*argv).assert_one_error("config.json", file, "never runs")
        assert_no_output(target)
    run("inspect", model).assert_one_error("config.json", "no mlx_svd section")
    assert not marker.exists()


def test_code_of_a_tokenizer_or_config_class_is_never_run(broken, run):
    marker, _ = plant(broken)
    change_config(broken, auto_map={"AutoConfig": "inside.Config", "AutoTokenizer": "inside.Tok"})
    (broken / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["inside.Tok", None]}})
    )
    result = run("generate", "--model", broken, "--prompt", "a", "-m", 1, "--dtype", "float32")
    assert result.code in (0, 2)
    if result.code:
        result.assert_one_error("tokenizer")
    assert not marker.exists()


def test_code_in_a_source_is_not_copied(model, tmp_path, run):
    plant(model)
    change_config(model, auto_map={"AutoModelForCausalLM": "inside.Model"})
    target = tmp_path / "out"
    assert run("compress", "--model", model, *RATIO, "--mlx-path", target).code == 0
    own = Path(mlx_svd.__file__).with_name("models") / "modeling_mlx_svd.py"
    assert [path.name for path in target.glob("*.py")] == [own.name]
    assert (target / own.name).read_bytes() == own.read_bytes()
    assert "auto_map" not in json.loads((target / "config.json").read_text())


# -- a real process --------------------------------------------------------------------------------


def python_m_mlx_svd(*argv: object, **environment: str) -> Run:
    root = str(Path(mlx_svd.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-m", "mlx_svd", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": root, "LD_PRELOAD": "", **environment},
        check=False,
    )
    return Run(result.returncode, result.stdout, result.stderr)


def test_process_refuses_damaged_weights(model, tmp_path):
    poke(NORM, float("nan"))(model)
    target = tmp_path / "out"
    result = python_m_mlx_svd("compress", "--model", model, *RATIO, "--mlx-path", target)
    result.assert_one_error(NORM, "NaN or Inf")
    assert result.out == ""
    assert_no_output(target)


def test_process_refuses_a_model_of_an_unreachable_hub(tmp_path):
    result = python_m_mlx_svd(
        *("compress", "--model", "some/model", *RATIO, "--mlx-path", tmp_path / "out"),
        HF_HOME=str(tmp_path / "hf"),
        HF_HUB_OFFLINE="1",
    )
    result.assert_one_error("some/model", "cannot be reached", "connect, or give a local folder")
    assert not (tmp_path / "out").exists()


def test_process_refuses_a_damaged_checkpoint(broken):
    os.truncate(broken / "model.safetensors", 1_000_000)
    result = python_m_mlx_svd("generate", "--model", broken, "--prompt", "a")
    result.assert_one_error("model.safetensors", "truncated or corrupt")


def test_debug_adds_the_traceback_and_keeps_the_line_and_the_code(model, run):
    (model / "config.json").unlink()
    result = run("--debug", "plan", "--model", model, *RATIO)
    assert result.code == 2
    assert any("Traceback" in line for line in result.err)
    assert result.err[-1].startswith("error: ")


def test_error_of_several_lines_is_printed_as_one(tmp_path, run):
    folder = tmp_path / "two\nlines"
    folder.mkdir()
    run("plan", "--model", folder, *RATIO).assert_one_error("two lines", "no config.json")
