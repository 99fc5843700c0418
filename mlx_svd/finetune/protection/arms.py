"""What an arm does to protect knowledge: compression, freezing, adapters, KL to base, replay.

Arms are data: combine the fields, or take one of ``ARMS`` and change it with
``dataclasses.replace``.
"""

import math
from dataclasses import asdict, dataclass, replace

from mlx_svd.checkpoint.layout import FORMS
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.recipe import parse_projections

COMPRESS = ("none", "frozen", "all")
FREEZE = ("none", "bottom", "top", "hierarchical")
ADAPTERS = ("none", "lora", "dora")
REPLAY = ("none", "facts", "text")
# Written by the seeds' own arms: alpha = 2 r, dropout 0.05, q k v o.
_ADAPTED = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Arm:
    """compress: whose projections are truncated before training: none, those of frozen layers, or
    all; rank_ratio: share of the singular values kept, int(ratio * min(m, n)); form: how they are
    stored (factored and pivot train as factors and keep their rank; dense ones may regain it).

    freeze: none; bottom or top: the int(L * share) lowest or highest of L layers; hierarchical: of
    every matrix and vector of layer i a share of the rows, drawn by seed, that goes linearly from
    early (first layer) to late (last one), so that every layer keeps a part that learns, unlike the
    block that the seeds' own schedule amounts to. Where anything is frozen, so are the embeddings;
    a separate head and the last norm are trained.

    adapter: train low-rank adapters of mlx-lm (LoRA, DoRA) instead of the weights of the layers
    that are not frozen; rank, scale (alpha / r), dropout, projections: of them.

    kl: weight of KL(base || model) per token on the text; replay: known facts that are set aside,
    or the text, trained along with weight replay_weight.

    Raises MlxSvdError for values that do not go together.
    """

    name: str = "custom"
    compress: str = "none"
    rank_ratio: float = 0.7
    projections: tuple[str, ...] = ("q", "k", "o")
    form: str = "auto"
    freeze: str = "none"
    share: float = 0.75
    early: float = 0.9
    late: float = 0.5
    adapter: str = "none"
    adapter_rank: int = 8
    adapter_scale: float = 2.0
    adapter_dropout: float = 0.05
    adapter_projections: tuple[str, ...] = _ADAPTED
    kl: float = 0.0
    replay: str = "none"
    replay_weight: float = 1.0

    def __post_init__(self):
        for name, allowed in (
            ("compress", COMPRESS),
            ("freeze", FREEZE),
            ("adapter", ADAPTERS),
            ("replay", REPLAY),
            ("form", ("auto", *(form for form in FORMS if form not in ("corrected", "sliced")))),
        ):
            if getattr(self, name) not in allowed:
                option = "--" + name
                raise MlxSvdError(
                    f"{option} {getattr(self, name)}: use one of {', '.join(allowed)}"
                )
        for name in ("share", "early", "late"):
            if not 0 <= getattr(self, name) <= 1:
                raise MlxSvdError(
                    f"freeze {name} {getattr(self, name)}: give a share from 0 to 1, as 0.75"
                )
        if not 0 < self.rank_ratio <= 1:
            raise MlxSvdError(f"--rank-ratio {self.rank_ratio}: must be above 0 and at most 1")
        if self.compress == "frozen" and self.freeze not in ("bottom", "top"):
            raise MlxSvdError(
                f"--compress frozen: needs whole frozen layers, but --freeze is {self.freeze}; "
                "freeze bottom or top layers, or use --compress all"
            )
        if self.adapter != "none" and self.freeze == "hierarchical":
            raise MlxSvdError(
                "--adapter with --freeze hierarchical: rows of an adapter cannot be frozen; freeze "
                "bottom or top layers"
            )
        if self.adapter_rank < 1 or not 0 <= self.adapter_dropout < 1:
            raise MlxSvdError(
                f"--adapter-rank {self.adapter_rank}, dropout {self.adapter_dropout}: give a rank "
                "of at least 1 and a dropout from 0 to below 1"
            )
        for name in ("kl", "replay_weight", "adapter_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise MlxSvdError(f"--{name.replace('_', '-')} {value}: must be a number from 0 on")
        for name in ("projections", "adapter_projections"):
            object.__setattr__(self, name, parse_projections(list(getattr(self, name))))

    def layer_shares(self, layers: int) -> list[float]:
        """Of each of ``layers`` layers, the share of it that is frozen."""
        if self.freeze == "hierarchical":
            steps = max(1, layers - 1)
            return [self.early + (self.late - self.early) * i / steps for i in range(layers)]
        count = int(layers * self.share) if self.freeze != "none" else 0
        shares = [1.0] * count + [0.0] * (layers - count)
        return shares[::-1] if self.freeze == "top" else shares

    @property
    def reads_text(self) -> bool:
        """Whether training needs the text beside the facts."""
        return self.kl > 0 or self.replay == "text"

    def to_json(self) -> dict:
        """For digests and records."""
        return asdict(self)


_CF90 = Arm("cf90", compress="frozen", freeze="bottom", share=0.75)
_ARMS = (
    Arm("none"),
    Arm("freeze-50", freeze="bottom", share=0.5),
    Arm("freeze-75", freeze="bottom", share=0.75),
    Arm("freeze-90", freeze="bottom", share=0.9),
    Arm("freeze-top-75", freeze="top", share=0.75),
    Arm("hierarchical", freeze="hierarchical"),
    Arm("compress", compress="all"),
    _CF90,
    replace(_CF90, name="cf90-90", share=0.9),
    replace(_CF90, name="cf90-all", compress="all"),
    Arm("cf90-hierarchical", compress="all", freeze="hierarchical"),
    Arm("lora-r8", adapter="lora"),
    Arm("lora-r16", adapter="lora", adapter_rank=16),
    Arm("dora-r8", adapter="dora"),
    Arm("kl", kl=1.0),
    Arm("replay", replay="facts"),
    Arm("replay-text", replay="text"),
)
# The seeds' arms and their rivals, by name.
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}


def arm_named(name: str) -> Arm:
    """One of ``ARMS``. Raises MlxSvdError for another name."""
    if name not in ARMS:
        raise MlxSvdError(f"--arm {name}: use one of {', '.join(ARMS)}")
    return ARMS[name]
