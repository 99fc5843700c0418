"""Words for a cosine. They are labels of bands and no measurement of quality."""

from dataclasses import dataclass

from mlx_svd.errors import MlxSvdError

_SEED_001 = ((0.99, "excellent"), (0.95, "good"), (0.90, "moderate"), (0.80, "ruim"))


@dataclass(frozen=True)
class Bands:
    """bands: (bound, word), highest bound first: the word holds above its bound; otherwise: the
    word below all bounds."""

    bands: tuple[tuple[float, str], ...]
    otherwise: str

    def __post_init__(self):
        bounds = [bound for bound, _ in self.bands]
        if not bounds or bounds != sorted(set(bounds), reverse=True):
            raise MlxSvdError("bands: give bounds from the highest to the lowest, none twice")

    def verdict(self, cosine: float) -> str:
        """The word for a cosine."""
        return next((word for bound, word in self.bands if cosine > bound), self.otherwise)


# seed-001: the code that made that seed's table; its "RUIM" at 0.6565 contradicts its own bands.
# seed-002: the target of that seed, cosine 0.85.
PRESETS = {
    "seed-001": Bands(_SEED_001, "critical"),
    "seed-002": Bands(((0.85, "target met"),), "target missed"),
}


def parse_bands(text: str) -> Bands:
    """A preset's name, or '0.99=excellent,0.9=fair,poor' (the last word: below all bounds)."""
    if text in PRESETS:
        return PRESETS[text]
    *parts, otherwise = (part.strip() for part in text.split(","))
    try:
        pairs = [part.split("=", 1) for part in parts]
        bands = tuple((float(bound), word.strip()) for bound, word in pairs)
    except ValueError:
        bands = ()
    if not bands or not otherwise or "=" in otherwise:
        raise MlxSvdError(
            f"--bands {text}: use {', '.join(PRESETS)}, or bounds and words such as "
            "0.99=excellent,0.9=fair,poor"
        )
    return Bands(bands, otherwise)
