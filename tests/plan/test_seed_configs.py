"""The recipes of the seed documents against their functions, written out again here."""

import json
from pathlib import Path

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.recipe import Recipe
from mlx_svd.plan.recipe_file import load_recipe_fields
from mlx_svd.source.source import open_source
from tests.tiny import tiny_config, write_tiny

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def gpt_neo_1b(tmp_path_factory) -> Path:
    """A folder that looks like GPT-Neo 1.3B: real shapes, weights that are holes in a file."""
    folder = tmp_path_factory.mktemp("gpt-neo-1.3b")
    config = tiny_config(
        "gpt_neo", hidden_size=2048, num_heads=16, num_layers=24, vocab_size=50257,
        attention_types=[[["global", "local"], 12]], max_position_embeddings=2048,
    )  # fmt: skip
    shapes = {"transformer.wte.weight": (50257, 2048), "transformer.wpe.weight": (2048, 2048)}
    for i in range(24):
        h = f"transformer.h.{i}"
        shapes |= {f"{h}.attn.attention.{p}_proj.weight": (2048, 2048) for p in "qkv"}
        shapes |= {
            f"{h}.attn.attention.out_proj.weight": (2048, 2048),
            f"{h}.mlp.c_fc.weight": (8192, 2048),
            f"{h}.mlp.c_proj.weight": (2048, 8192),
            f"{h}.attn.attention.out_proj.bias": (2048,),
            f"{h}.mlp.c_fc.bias": (8192,),
            f"{h}.mlp.c_proj.bias": (2048,),
        }
        shapes |= {f"{h}.ln_{n}.{k}": (2048,) for n in (1, 2) for k in ("weight", "bias")}
    shapes |= {f"transformer.ln_f.{k}": (2048,) for k in ("weight", "bias")}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def ranks(folder: Path, name: str) -> dict[str, int | None]:
    """Seed's name of each matrix -> the rank that the recipe gives it."""
    recipe = Recipe(**load_recipe_fields(CONFIGS / f"{name}.yaml"))
    plan = make_plan(open_source(str(folder)), recipe)
    return {
        p.path.removeprefix("model."): p.ranks[0] if p.ranks else None for p in plan.projections
    }


def should_compress(name: str) -> bool:
    return not ("h.23." in name or "h.0." in name or "mlp" in name)


def hybrid(name: str) -> int | None:
    if "mlp" in name:
        return None
    if "h.0." in name or "h.23." in name:
        return 384
    return 256 if "out_proj" in name else 192


def adaptive_as_meant(name: str) -> int | None:
    if "mlp" in name:
        return None
    return 384 if "h.0." in name or "h.23." in name else 256


def high_rank(name: str) -> int | None:
    if "mlp" in name:
        return None
    return 640 if "h.0." in name or "h.23." in name else 512


def selective(name: str) -> int:
    if any(f"h.{i}." in name for i in (0, 1, 22, 23)):
        return 512
    return 256 if "attn.attention" in name else 128


SEEDS = {
    "seed-001-selective": lambda name: 128 if should_compress(name) else None,
    "seed-001-hybrid": hybrid,
    "seed-002-adaptive": adaptive_as_meant,
    "seed-002-high-rank": high_rank,
    "seed-002-selective": selective,
}


@pytest.mark.parametrize("name", SEEDS)
def test_recipe_gives_the_ranks_of_the_seeds_function(name, gpt_neo_1b):
    got = ranks(gpt_neo_1b, name)
    assert len(got) == 24 * 6
    assert got == {path: SEEDS[name](path) for path in got}


def test_policy_as_printed_is_refused_because_its_second_rule_cannot_apply(gpt_neo_1b):
    with pytest.raises(MlxSvdError, match=r"rule 2 \(layers 0, -1\) never applies: rule 1"):
        ranks(gpt_neo_1b, "seed-002-as-printed")


def test_rank_cliff_recipe_gives_each_head_57_of_64_and_the_output_691_of_768(tmp_path):
    model = write_tiny("gpt2", tmp_path / "model", n_embd=768, n_head=12, n_layer=1, n_inner=None)
    recipe = Recipe(**load_recipe_fields(CONFIGS / "seed-000-per-head.yaml"))
    plan = make_plan(open_source(str(model)), recipe)
    chosen = {p.projection.name: p.ranks for p in plan.projections if p.changed}
    assert chosen == {"q": (57,) * 12, "k": (57,) * 12, "v": (57,) * 12, "o": (691,)}


def test_cf90_recipe_keeps_70_percent_multiplied_back(tmp_path):
    source = open_source(str(write_tiny("qwen2", tmp_path / "model")))
    plan = make_plan(source, Recipe(**load_recipe_fields(CONFIGS / "seed-004-cf90.yaml")))
    assert {p.projection.name for p in plan.projections if p.changed} == {"q", "k", "o"}
    for p in plan.projections:
        if p.changed:
            assert (p.form, p.ranks) == ("dense", (int(0.7 * min(p.projection.shape)),))


@pytest.mark.parametrize(
    "path",
    sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("recipes/*.yaml")]),
    ids=lambda path: path.stem,
)
def test_every_recipe_file_is_read(path):
    Recipe(**load_recipe_fields(path))
