"""probe-kv, kv-bases, sweep-kv and the caches of generate, from the command line."""

import json

import pytest

from mlx_svd.demo import DEMO_MODEL

MODEL = ["--model", str(DEMO_MODEL)]


@pytest.fixture
def bases(run, tmp_path):
    path = tmp_path / "bases.safetensors"
    code, out, _ = run(
        "kv-bases", *MODEL, "--output", str(path), "--windows", "2", "--length", "128"
    )
    assert code == 0
    assert "6 layers of model, 256 tokens of the text shipped with mlx-svd" in out
    assert "warning: measured on 256 tokens, fewer than four times the 128 dimensions" in out
    return path


def test_generate_reads_latents_and_continues_a_saved_prompt(run, bases, tmp_path):
    file = tmp_path / "prompt.safetensors"
    common = [
        "generate",
        *MODEL,
        "--dtype",
        "float32",
        "--kv-bases",
        str(bases),
        "--kv-group",
        "all",
    ]
    code, out, err = run(
        *common, "-p", "The capital of France is", "-m", "4", "--save-prompt-cache", str(file)
    )
    assert code == 0
    assert "Paris" in out
    # 6 layers, K and V of 2 heads of 64 float32 numbers.
    assert f"cache: {6 * 2 * 2 * 64 * 4:,} bytes per token" in err
    code, out, err = run(
        *common, "-p", ". The capital of Italy is", "-m", "4", "--prompt-cache-file", str(file),
        "--json",
    )  # fmt: skip
    assert code == 0
    cache = json.loads(out)["kv_cache"]
    assert cache["tokens"] > json.loads(out)["prompt_tokens"] + 4
    code, out, _ = run(*common, "--kv-bits", "8", "-p", "The capital of France is", "-m", "4")
    assert (code, "Paris" in out) == (0, True)


def test_generate_names_what_is_missing(run, tmp_path):
    ask = ["generate", *MODEL, "-p", "It was", "-m", "3", "--dtype", "float32"]
    code, _, err = run(*ask, "--kv-rank", "3")
    assert (code, "--kv-bases: is needed" in err) == (2, True)
    code, _, err = run(*ask, "--kv-bits", "3")
    assert (code, "--kv-bits 3: use 8 or 4" in err) == (2, True)
    code, _, err = run(*ask, "--kv-bases", str(tmp_path / "none"))
    assert (code, "make one with mlx-svd kv-bases" in err) == (2, True)
    code, _, err = run(*ask, "--kv-group", "two")
    assert (code, "--kv-group two" in err) == (2, True)
    assert run(*ask, "--kv-bits", "8")[0] == 0


def test_probe_prints_the_seeds_columns_and_draws_from_its_file(run, tmp_path):
    output, plot = tmp_path / "new" / "probe.json", tmp_path / "probe.png"
    code, out, _ = run(
        "probe-kv", *MODEL, "--windows", "1", "--length", "64", "--layers", "0,5",
        "--output", str(output), "--plot", str(plot),
    )  # fmt: skip
    assert code == 0
    assert "| K post-RoPE | 2 | yes | 128 |" in out
    assert "seed 003's columns (layers 0,5, all heads, centred)" in out
    assert "the four sentences of seed 003" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    content = json.loads(output.read_bytes())
    assert [layer["layer"] for layer in content["texts"][0]["layers"]] == [0, 5]
    assert content["conditions"]["command"].startswith("mlx-svd probe-kv")
    # The seed's second command: no picture.
    code, out, _ = run("probe-kv", *MODEL, "--windows", "1", "--length", "64", "--no-toy", "--json")
    assert (code, len(json.loads(out)["texts"])) == (0, 1)
    code, _, err = run("probe-kv", *MODEL, "--plot", str(plot))
    assert (code, "drawn from the file of --output" in err) == (2, True)


def test_sweep_measures_rivals_at_their_bytes_and_continues(run, bases, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    ask = [
        "sweep-kv", *MODEL, "--kv-bases", str(bases), "--heldout", str(text), "--windows", "2",
        "--length", "48", "--output", str(tmp_path / "sweep"), "--arm", "q8", "--arm", "q4",
        "--arm", "lowrank:group=all,bytes=q8", "--arm", "lowrank:bits=4,group=all",
        "--arm", "mla:pairs=24,rank=64", "--arm", "lowrank:rank=3,bits=8,gs=128",
        "--plot", str(tmp_path / "sweep.png"),
    ]  # fmt: skip
    code, out, err = run(*ask, "--json")
    assert code == 0
    records = {r["name"]: r for r in json.loads(out)}
    dense = records["dense"]["bytes_per_token"]
    assert dense == 6 * 2 * 2 * 64 * 2
    assert records["q8"]["bytes_per_token"] == dense * 68 / 128
    assert records["q4"]["bytes_per_token"] == dense * 36 / 128
    assert records["lowrank:bits=4,group=all"]["bytes_per_token"] == dense * 36 / 128
    ours = records["lowrank:group=all,bytes=q8"]["bytes_per_token"]
    assert dense * 67 / 128 < ours <= dense * 68 / 128
    assert records["mla:pairs=24,rank=64"]["bytes_per_token"] == 6 * 2 * (64 + 2 * 48)
    assert "128: does not divide" in records["lowrank:rank=3,bits=8,gs=128"]["reason"]
    assert records["q8"]["kl"]["mean"] < records["q4"]["kl"]["mean"]
    assert (tmp_path / "sweep.png").is_file()
    changed = tmp_path / "sweep" / "q8.json"
    content = json.loads(changed.read_bytes()) | {"marked": True}
    changed.write_text(json.dumps(content))
    code, out, _ = run(*ask, "--json")
    assert {r["name"]: r for r in json.loads(out)}["q8"]["marked"]
    code, _, err = run(*ask, "--arm", "lowrank:what=3")
    assert (code, "what=3 is none of" in err) == (2, True)


def test_a_continued_sweep_compares_with_the_dense_model(run, bases, tmp_path):
    """The dense record comes from disk then, and the first arm to be measured is a latent one."""
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    ask = ["sweep-kv", *MODEL, "--kv-bases", str(bases), "--heldout", str(text), "--windows", "2"]
    ask += ["--length", "48", "--json", "--output"]
    low, other = ["--arm", "lowrank:rank=8"], ["--arm", "mla:pairs=16,rank=32"]
    _, out, _ = run(*ask, str(tmp_path / "at once"), *low, *other)
    fresh = json.loads(out)
    run(*ask, str(tmp_path / "continued"), "--arm", "q8")
    _, out, _ = run(*ask, str(tmp_path / "continued"), *low, *other)
    for got, expected in zip(json.loads(out)[1:], fresh[1:], strict=True):
        assert got["kl"] == pytest.approx(expected["kl"])
        assert got["perplexity_ratio"] == pytest.approx(expected["perplexity_ratio"])
    for record in fresh[1:]:
        # By definition: the ratio is that of the two perplexities, and half of the ranks cost.
        ratio = record["perplexity"]["perplexity"] / fresh[0]["perplexity"]["perplexity"]
        assert record["perplexity_ratio"]["ratio"] == pytest.approx(ratio)
        assert record["kl"]["mean"] > 0.01
