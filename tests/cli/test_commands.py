"""The command line does what the library does and prints it."""

import json
import os
import subprocess
import sys

from mlx_svd.demo import DEMO_MODEL

COMPRESS = ["compress", "--model", str(DEMO_MODEL), "--rank-ratio", "0.5"]


def test_compress_inspect_generate(run, tmp_path):
    folder = tmp_path / "out"
    code, out, _ = run(
        *COMPRESS, "--mlx-path", str(folder), "--form", "factored", "--rank-multiple", "64"
    )
    assert code == 0
    assert "18 projections truncated, 0 quantized" in out
    code, out, _ = run("inspect", str(folder))
    assert code == 0
    assert "model.layers.5.self_attn.o_proj  256x256  factored  128/256" in out
    code, out, err = run(
        "generate", "--model", str(folder), "-p", "The capital of France is", "-m", "5",
        "--dtype", "float32",
    )  # fmt: skip
    assert code == 0
    assert "Paris" in out
    assert "tokens/s" in err


def test_dry_run_prints_the_plan_and_writes_nothing(run, tmp_path):
    code, out, _ = run(*COMPRESS, "--mlx-path", str(tmp_path / "out"), "--dry-run")
    assert code == 0
    assert run("plan", *COMPRESS[1:])[1] == out
    for column in ("projection", "shape", "form", "rank", "break-even", "before", "after"):
        assert column in out
    assert "whole checkpoint: 13,054,464 ->" in out
    assert list(tmp_path.iterdir()) == []


def test_json_is_one_document_on_stdout(run, tmp_path):
    folder = tmp_path / "out"
    plan = json.loads(run("plan", *COMPRESS[1:], "--json")[1])
    done = json.loads(run(*COMPRESS, "--mlx-path", str(folder), "--json")[1])
    # A plan of given ranks needs no calibration; carrying it out does.
    assert done["plan"]["calibration"]["windows"] > 0
    assert {**done["plan"], "calibration": None} == plan
    inspection = json.loads(run("inspect", str(folder), "--json")[1])
    assert inspection["nbytes"] == plan["bytes_after"]
    text = json.loads(
        run(
            "generate",
            "--model",
            str(folder),
            "-p",
            "The",
            "-m",
            "3",
            "--json",
            "--dtype",
            "float32",
        )[1]
    )
    assert text["generation_tokens"] == 3


def test_saved_plan_as_config_makes_the_same_tensors(run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(*COMPRESS, "--mlx-path", str(first), "-q", "--q-bits", "8")[0] == 0
    config = str(first / "mlx_svd_plan.json")
    args = ("--model", str(DEMO_MODEL), "--config", config, "--mlx-path", str(second))
    assert run("compress", *args)[0] == 0
    for name in ("model.safetensors", "model.safetensors.index.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_options_override_the_file(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rank_ratio: 0.9\nprojections: [q]\nform: dense\n")
    args = ("--model", str(DEMO_MODEL), "--config", str(recipe), "--json")
    plan = json.loads(run("plan", *args, "--projections", "v", "--rank", "32")[1])
    changed = {
        (p["projection"], p["form"], p["ranks"][0]) for p in plan["projections"] if p["ranks"]
    }
    assert changed == {("v", "dense", 32)}


def test_checkpoint_copies_the_tokenizer_but_no_foreign_code(run, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in DEMO_MODEL.iterdir():
        os.link(file, model / file.name)
    (model / "modeling_evil.py").write_text("raise SystemExit")
    folder = tmp_path / "out"
    assert run("compress", "--model", str(model), "--rank", "64", "--mlx-path", str(folder))[0] == 0
    names = {file.name for file in folder.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "mlx_svd_plan.json",
        "model.safetensors", "model.safetensors.index.json", "modeling_mlx_svd.py",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert list(config) == sorted(config)


def test_all_dense_checkpoint_has_no_model_file(run, tmp_path):
    folder = tmp_path / "out"
    assert run(*COMPRESS, "--mlx-path", str(folder), "--form", "dense")[0] == 0
    assert not list(folder.glob("*.py"))
    assert "model_file" not in json.loads((folder / "config.json").read_text())


def test_help_and_version_load_no_model_library():
    code = (
        "import sys; sys.argv = ['mlx-svd', 'compress', '--help']\n"
        "from mlx_svd.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'mlx', 'mlx_lm', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "--rank-ratio" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def test_module_and_command_are_the_same_program():
    result = subprocess.run(
        [sys.executable, "-m", "mlx_svd", "--version"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert result.stdout.startswith("mlx-svd 0.")
