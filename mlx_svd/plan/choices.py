"""What a budget may choose from: forms, bits, group size."""

from dataclasses import dataclass

from mlx_svd.checkpoint.layout import FORMS, Quantization, quantization
from mlx_svd.errors import MlxSvdError

UNQUANTIZED_BITS = 16
# Slices lost to the pivot form at equal bytes wherever they were measured, so they are asked for.
AUTO_FORMS = tuple(form for form in FORMS if form != "sliced")
DEFAULT_BITS = (16, 8, 6, 5, 4, 3, 2)


@dataclass(frozen=True)
class Choices:
    """What a budget may choose from. bits: 16 = unquantized; group_size: of everything quantized;
    rank_multiple: of unquantized ranks."""

    forms: tuple[str, ...] = AUTO_FORMS
    bits: tuple[int, ...] = DEFAULT_BITS
    group_size: int = 64
    rank_multiple: int = 1

    def quantization(self, bits: int) -> Quantization | None:
        return None if bits == UNQUANTIZED_BITS else Quantization(self.group_size, bits)


def parse_choices(
    forms: str | list[str] | None = None,
    bits: str | list[int] | int | None = None,
    group_size: int | None = None,
    rank_multiple: int | None = None,
) -> Choices:
    """Choices as users write them: "factored,pivot", "16,8,4". The dense form is always one."""
    forms = _listed(forms if forms not in (None, "auto") else list(AUTO_FORMS))
    if unknown := [name for name in forms if name not in FORMS]:
        raise MlxSvdError(f"form {unknown[0]}: use auto, {', '.join(FORMS)}")
    listed = _listed(bits if bits is not None else list(DEFAULT_BITS))
    try:
        numbers = tuple(sorted({int(b) for b in listed}, reverse=True))
    except ValueError as error:
        raise MlxSvdError(f"bits {bits!r}: give numbers such as 16,8,4") from error
    if not numbers or (unknown := [b for b in numbers if b not in DEFAULT_BITS]):
        raise MlxSvdError(f"bits {bits!r}: use {', '.join(map(str, DEFAULT_BITS))}")
    size = quantization(4, group_size).group_size
    return Choices(tuple(forms), numbers, size, rank_multiple or 1)


def _listed(value) -> list:
    parts = value.split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    return [part.strip() if isinstance(part, str) else part for part in parts]
