"""The README.md files of an exported model and its adapter."""

from pathlib import Path
from typing import TYPE_CHECKING

import mlx_svd
from mlx_svd.checkpoint.card import front_matter

if TYPE_CHECKING:
    from mlx_svd.checkpoint.adapter import ExportedAdapter

_LOAD = """## Use

```
python -m mlx_lm generate --model PATH/model --adapter-path PATH/adapter --prompt "..."
python -m mlx_lm server --model PATH/model --adapter-path PATH/adapter
```

Stock mlx-lm only: no code from the folders is run, and no flag is needed.
"""


def adapter_cards(
    folder: Path, section: dict, exported: "ExportedAdapter", command: str
) -> tuple[str, str]:
    """Markdown of the model's card and of the adapter's. folder: the corrected checkpoint;
    section: its ``mlx_svd`` section; command: how the export was made, "" to leave it out."""
    name, revision = section["base_model"], section["revision"]
    hub_id = name if revision else None
    base = name + (f" @ {revision}" if revision else "")
    digest = section["plan_digest"][:16]
    made = f"## Made by\n\nmlx-svd {mlx_svd.__version__}, from a checkpoint of plan {digest}\n"
    made += f"\n```\n{command}\n```\n" if command else ""
    title = name.split("/")[-1]
    padding = (
        f", {exported.padding_bytes:,} of them zeros that fill all corrections up to one rank"
        if exported.padding_bytes
        else ""
    )
    model = (
        f"# {title}, quantized, for use with its adapter\n\n"
        f"- base model: {base}\n"
        f"- tensor data: {exported.model_bytes:,} bytes\n\n"
        f"The quantized half of {title} compressed with mlx-svd. The other half is the LoRA "
        f"adapter in the folder beside this one ({exported.modules} modules, rank "
        f"{exported.rank}, {exported.adapter_bytes:,} bytes): the largest components of what "
        "quantization lost. Without it this is a plain quantized model with larger errors.\n"
    )
    adapter = (
        f"# Adapter: low-rank correction of quantized {title}\n\n"
        f"- base model: {base}\n"
        f"- LoRA layers: {exported.modules}, rank {exported.rank}, scale 1\n"
        f"- tensor data: {exported.adapter_bytes:,} bytes{padding}\n\n"
        "Belongs to the model in the folder beside this one and to no other: it holds the largest "
        "components of what that model lost in quantization.\n\n"
        "`mlx_lm fuse` without `--dequantize` would quantize the corrected weights again and lose "
        "the correction.\n"
    )
    return tuple(
        "\n".join([front_matter(hub_id, relation, folder), text, _LOAD, made])
        for relation, text in (("quantized", model), ("adapter", adapter))
    )
