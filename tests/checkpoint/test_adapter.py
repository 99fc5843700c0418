"""An exported model with its adapter is the corrected checkpoint, to stock mlx-lm."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import ModelCard
from mlx_lm.utils import load_adapters
from mlx_lm.utils import load_model as stock_load_model

from mlx_svd.checkpoint.adapter import export_adapter
from mlx_svd.checkpoint.layout import Quantization, quantization
from mlx_svd.checkpoint.writer import CheckpointWriter
from mlx_svd.cli.app import main
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule
from tests.conftest import logits, relative_difference
from tests.tiny import write_tiny

R32, R64 = RankPolicy(rank=32), RankPolicy(rank=64)
Q3 = quantization(3, 32)
CORRECTED = Recipe(policy=R32, form="corrected", quantize=Q3)
# q of layer 0 has twice the rank of the others, and o of layer 0 has no correction.
UNEVEN = Recipe(
    rules=(
        Rule(projections=("q",), layers=(0,), policy=R64),
        Rule(projections=("o",), layers=(0,), skip=True),
        Rule(policy=R32),
    ),
    form="corrected",
    quantize=Q3,
)
FUSED = {
    "gpt2": "attn.c_attn",
    "phi3": "self_attn.qkv_proj",
    "gpt_neox": "attention.query_key_value",
}


def write_model(family: str, folder: Path, **options) -> Path:
    if family == "gpt2":
        return write_tiny(family, folder, n_embd=128, **options)
    options |= {"intermediate_size": 512} if family == "gpt_neox" else {}
    return write_tiny(family, folder, hidden_size=128, **options)


@pytest.fixture
def export(tmp_path, compressed):
    """family, recipe -> (corrected checkpoint, what was exported)."""

    def run(family: str = "llama", recipe: Recipe = CORRECTED, **options):
        model = write_model(family, tmp_path / "model", **options)
        folder, _ = compressed(model, recipe)
        return folder, export_adapter(folder, tmp_path / "export")

    return run


def stock_logits(model: Path, adapter: Path | None = None) -> np.ndarray:
    """As ``tests.conftest.logits``, from mlx-lm alone."""
    loaded, config = stock_load_model(model)
    if adapter:
        loaded = load_adapters(loaded, str(adapter))
        loaded.eval()
    tokens = np.random.default_rng(1).integers(0, config["vocab_size"], 40)
    return np.array(loaded(mx.array(tokens)[None])[0].astype(mx.float32))


def json_of(path: Path) -> dict:
    return json.loads(path.read_text())


def tensors_of(folder: Path) -> dict[str, mx.array]:
    files = [*folder.glob("model*.safetensors"), *folder.glob("adapters.safetensors")]
    assert len(files) == 1
    return mx.load(str(files[0]))


@pytest.mark.parametrize("recipe", [CORRECTED, UNEVEN], ids=["one rank", "several ranks"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "phi3", "gpt_neox"])
def test_stock_model_with_adapter_has_the_logits_of_the_checkpoint(family, recipe, export):
    folder, exported = export(family, recipe)
    expected = logits(folder)
    both = stock_logits(exported.model, exported.adapter)
    assert relative_difference(both, expected) <= 1e-5
    assert relative_difference(stock_logits(exported.model), expected) > 1e-2


def test_half_precision_gives_the_same_logits_within_its_rounding(export):
    folder, exported = export("qwen2", dtype=mx.bfloat16)
    assert {t.dtype for t in tensors_of(exported.adapter).values()} == {mx.bfloat16}
    expected = logits(folder)
    both = stock_logits(exported.model, exported.adapter)
    assert relative_difference(both, expected) <= 2e-2
    alone = stock_logits(exported.model)
    assert np.square(both - expected).mean() < 0.2 * np.square(alone - expected).mean()


def test_model_is_a_stock_checkpoint_and_holds_the_bases_bit_for_bit(export):
    folder, exported = export("qwen2")
    config = json_of(exported.model / "config.json")
    assert not {"mlx_svd", "model_file"} & config.keys()
    assert config["quantization"] == config["quantization_config"] == Q3.config()
    names = {path.name for path in exported.model.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    }
    ours, theirs = tensors_of(folder), tensors_of(exported.model)
    renamed = {name.replace(".base.", "."): t for name, t in ours.items() if ".base." in name}
    assert len(renamed) == 22  # packed q, k, o in two layers, and the bias of q and k
    kept = {n: t for n, t in ours.items() if not any(f".{p}." in n for p in ("base", "down", "up"))}
    assert theirs.keys() == (renamed | kept).keys()
    for name, tensor in (renamed | kept).items():
        assert mx.array_equal(theirs[name], tensor), name


def test_bytes_reported_are_those_on_disk(export):
    folder, exported = export("gpt2", UNEVEN)
    sizes = [
        sum(t.nbytes for t in tensors_of(path).values())
        for path in (exported.model, exported.adapter, folder)
    ]
    reported = [exported.model_bytes, exported.adapter_bytes, exported.checkpoint_bytes]
    assert sizes == reported
    assert sum(sizes[:2]) - exported.padding_bytes == sizes[2]


def test_smaller_corrections_are_filled_with_zeros_up_to_the_one_rank(export):
    _, exported = export("llama", UNEVEN)
    settings = json_of(exported.adapter / "adapter_config.json")["lora_parameters"]
    tensors = tensors_of(exported.adapter)
    assert settings["rank"] == exported.rank == 64
    assert {t.shape[1] for n, t in tensors.items() if n.endswith("lora_a")} == {64}
    k = "model.layers.0.self_attn.k_proj"
    assert not np.array(tensors[f"{k}.lora_a"])[:, 32:].any()
    assert not np.array(tensors[f"{k}.lora_b"])[32:].any()
    assert np.array(tensors[f"{k}.lora_b"])[:32].any()
    zeros = 4 * 32 * (2 * (64 + 128) + 64 + 128 + 128 + 128)
    assert exported.padding_bytes == zeros + 4 * 32 * (128 + 128 - 64 - 128)


def test_keys_name_exactly_the_corrected_modules(export):
    _, exported = export("llama", UNEVEN)
    settings = json_of(exported.adapter / "adapter_config.json")
    assert settings["num_layers"] == 2
    last = "model.layers.1.self_attn.o_proj"
    assert settings["lora_parameters"]["keys"] == [last, "self_attn.k_proj", "self_attn.q_proj"]
    model, _ = stock_load_model(exported.model)
    load_adapters(model, str(exported.adapter))
    adapted = {path for path, module in model.named_modules() if "lora_a" in module}
    assert adapted == {n.rpartition(".")[0] for n in tensors_of(exported.adapter)}
    assert len(adapted) == exported.modules == 5


def test_correction_of_the_last_layer_alone_is_exported(export):
    rules = (Rule(layers=(-1,), projections=("o",), policy=R32), Rule(skip=True))
    folder, exported = export("llama", Recipe(rules=rules, form="corrected", quantize=Q3))
    assert exported.modules == 1
    both = stock_logits(exported.model, exported.adapter)
    assert relative_difference(both, logits(folder)) <= 1e-5


def test_other_projections_may_stay_unquantized_or_have_other_bits(export):
    rules = (
        Rule(projections=("q",), policy=R32, form="corrected", bits=3),
        Rule(projections=("k",), skip=True, bits=8),
        Rule(projections=("o",), policy=R64, form="dense"),
    )
    folder, exported = export("llama", Recipe(("q", "k", "o"), rules=rules))
    section = json_of(exported.model / "config.json")["quantization"]
    base = {"group_size": 64, "mode": "affine"}
    keys = {f"model.layers.{i}.self_attn.k_proj": base | {"bits": 8} for i in range(2)}
    assert section == base | {"bits": 3} | keys
    both = stock_logits(exported.model, exported.adapter)
    assert relative_difference(both, logits(folder)) <= 1e-5


@pytest.mark.parametrize("family", FUSED)
def test_fused_modules_are_joined_under_their_stock_names(family, export):
    rules = (
        Rule(projections=("q",), ranks=(64,), exact=(Quantization(32, 4), None)),
        Rule(projections=("k",), ranks=(32,), exact=(Quantization(32, 4), None)),
        Rule(projections=("v",), skip=True, exact=(Quantization(32, 4), None)),
        Rule(skip=True),
    )
    recipe = Recipe(("q", "k", "v", "o"), rules=rules, form="corrected", quantize=Q3)
    folder, exported = export(family, recipe)
    layers = "model.layers" if family == "phi3" else "model.h"
    names = {f"{layers}.{i}.{FUSED[family]}" for i in range(2)}
    adapter = tensors_of(exported.adapter)
    assert adapter.keys() == {f"{n}.{lora}" for n in names for lora in ("lora_a", "lora_b")}
    section = json_of(exported.model / "config.json")["quantization"]
    expected = Quantization(32, 4).config()
    assert section == Q3.config() | dict.fromkeys(names, expected)
    assert exported.rank == 96
    both = stock_logits(exported.model, exported.adapter)
    assert relative_difference(both, logits(folder)) <= 1e-5


def test_parts_of_a_fused_module_with_other_bits_are_refused_by_name(export):
    rules = (Rule(projections=("q",), policy=R32, bits=4), Rule(policy=R32))
    recipe = Recipe(("q", "k"), rules=rules, form="corrected", quantize=Q3)
    with pytest.raises(
        MlxSvdError, match=r"c_attn\.k: is not quantized like .*c_attn\.q"
    ) as caught:
        export("gpt2", recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "recipe", "words"),
    [
        ("llama", Recipe(policy=R32, form="factored"), "q_proj: is stored factored"),
        ("llama", Recipe(policy=R32, form="pivot"), "q_proj: is stored pivot"),
        ("llama", Recipe(policy=R32, form="dense"), "has no corrected projection"),
        (
            "llama",
            Recipe(rules=(Rule(policy=R32, form="corrected", factor_bits=8),), quantize=Q3),
            r"q_proj: its factors are quantized.*factor_bits",
        ),
        ("gpt_neo", CORRECTED, "mlx-lm has no gpt_neo"),
    ],
    ids=["factored", "pivot", "dense", "8-bit factors", "gpt_neo"],
)  # fmt: skip
def test_what_an_adapter_cannot_express_is_refused_in_one_line(
    family, recipe, words, export, tmp_path
):
    with pytest.raises(MlxSvdError, match=words) as caught:
        export(family, recipe)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("missing", ["up.weight", "base.weight"])
def test_a_checkpoint_without_one_of_its_tensors_is_refused_by_name(missing, export, tmp_path):
    folder, _ = export()
    path = "model.layers.0.self_attn.q_proj"
    tensors = tensors_of(folder)
    tensors.pop(f"{path}.{missing}")
    mx.eval(list(tensors.values()))
    (folder / "model.safetensors.index.json").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    with pytest.raises(MlxSvdError, match=f"^{path}: its .* missing"):
        export_adapter(folder, tmp_path / "again")


def test_an_existing_export_is_not_overwritten(export, tmp_path):
    folder, exported = export()
    before = contents(tmp_path / "export")
    with pytest.raises(MlxSvdError, match="exists already"):
        export_adapter(folder, tmp_path / "export")
    assert contents(tmp_path / "export") == before
    assert exported.model.is_dir()


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Interrupted(BaseException):
    """Stands for a signal between two modules."""


def test_an_interrupted_export_continues_with_equal_bytes(export, tmp_path, monkeypatch):
    folder, exported = export("gpt2", UNEVEN)
    whole = contents(tmp_path / "export")
    write = CheckpointWriter.write
    for stop in (0, 1, exported.modules, exported.modules + 1, exported.modules + 6):
        target, calls = tmp_path / f"stopped-{stop}", []

        def stopping(self, *arguments, calls=calls, stop=stop):
            if len(calls) == stop:
                raise Interrupted
            calls.append(arguments)
            write(self, *arguments)

        monkeypatch.setattr(CheckpointWriter, "write", stopping)
        with pytest.raises(Interrupted):
            export_adapter(folder, target)
        assert not (target / "model").exists()
        assert (target / "adapter").exists() == (stop >= exported.modules)
        monkeypatch.setattr(CheckpointWriter, "write", write)
        export_adapter(folder, target)
        assert contents(target) == whole


def test_the_adapter_of_another_checkpoint_is_not_taken_over(export, tmp_path):
    folder, exported = export()
    other = exported.adapter / "adapter_config.json"
    content = json_of(other)
    content["mlx_svd"]["digest"] = "0" * 64
    other.write_text(json.dumps(content))
    exported.model.rename(tmp_path / "elsewhere")
    with pytest.raises(MlxSvdError, match="adapter: exists already"):
        export_adapter(folder, tmp_path / "export")
    assert not exported.model.exists()


def test_cards_say_how_to_load_both_and_carry_the_licence(tmp_path, compressed):
    model = write_model("llama", tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    folder, _ = compressed(model, CORRECTED)
    exported = export_adapter(folder, tmp_path / "export", "mlx-svd export-adapter --model x")
    for path in (exported.model, exported.adapter):
        card = ModelCard.load(path / "README.md")
        assert card.data.license == "apache-2.0"
        assert card.data.library_name == "mlx"
        assert "mlx_lm generate --model PATH/model --adapter-path PATH/adapter" in card.text
        assert "--trust-remote-code" not in card.text
        assert "mlx-svd export-adapter --model x" in card.text
        assert f"{exported.adapter_bytes:,} bytes" in card.text


def test_cards_name_the_base_model_on_the_hub_and_the_relation_to_it(export):
    folder, exported = export()
    config = json_of(folder / "config.json")
    config["mlx_svd"] |= {"base_model": "owner/name", "revision": "abc"}
    (folder / "config.json").write_text(json.dumps(config))
    again = export_adapter(folder, exported.model.parent.with_name("again"))
    for path, relation in ((again.model, "quantized"), (again.adapter, "adapter")):
        data = ModelCard.load(path / "README.md").data
        assert (data.base_model, data["base_model_relation"]) == ("owner/name", relation)
    assert ModelCard.load(exported.model / "README.md").data.base_model is None


def test_command_prints_the_bytes_and_how_to_use_them(tmp_path, compressed, monkeypatch, capsys):
    folder, _ = compressed(write_model("llama", tmp_path / "model"), CORRECTED)
    for flags in ([], ["--json"]):
        target = tmp_path / f"export{len(flags)}"
        arguments = ["--model", str(folder), "--mlx-path", str(target), *flags]
        monkeypatch.setattr(sys, "argv", ["mlx-svd", "export-adapter", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        printed = capsys.readouterr().out
        size = sum(t.nbytes for t in tensors_of(target / "adapter").values())
        if flags:
            assert json.loads(printed)["adapter_bytes"] == size
        else:
            assert f"6 modules of rank 32, {size:,} bytes" in printed
            assert f"--model {target}/model --adapter-path {target}/adapter" in printed
