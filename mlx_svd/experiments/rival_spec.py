"""Names of rivals -> the mlx-lm quantizer and the settings that they stand for."""

import re
from dataclasses import dataclass

from mlx_svd.errors import MlxSvdError

BITS = (2, 3, 4, 5, 6, 8)  # of mx.quantize in affine mode
_METHOD_BITS = {
    "q": BITS,
    "gptq": (2, 4, 8),  # mlx_lm.quant.gptq packs no others
    "awq": BITS,
    "dwq": (2, 3, 4, 5, 6),  # mlx_lm.quant.dwq trains nothing in 8-bit layers
}
MIXED = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
# Of Adam, for scales and biases. With mlx-lm's default of 1e-6 a hundred steps move a scale of
# 0.03 by at most 1e-4, which is less than bfloat16 resolves there; it is for thousands of steps.
# On a model of 16 million parameters, 21 steps of one window at 1e-4 lowered dwq's validation loss
# at 2 bits (0.335 to 0.249; 0.243 at 5e-4) and raised it at 4 bits (0.013 to 0.015): more bits need
# less, so compare the two validation losses in a record's settings before using its row.
LEARNING_RATE = 1e-4
BATCH_SIZE = 4
_HELP = (
    "q8 q6 q5 q4 q3 q2, mixed_2_6 mixed_3_4 mixed_3_6 mixed_4_6, dynamic_quant@4.5 (target bits "
    "per weight), gptq2 gptq4 gptq8, awq2..awq8, dwq2..dwq6"
)


@dataclass(frozen=True)
class RivalSpec:
    """What to run. method: affine, mixed, dynamic_quant, gptq, awq or dwq; bits: of the method's
    layers (of the less important ones for dynamic_quant); high_bits and target_bpw: dynamic_quant;
    recipe: mixed; learning_rate and batch_size: dwq."""

    name: str
    method: str
    group_size: int
    bits: int | None = None
    high_bits: int | None = None
    target_bpw: float | None = None
    recipe: str | None = None
    learning_rate: float | None = None
    batch_size: int | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at text."""
        return self.method not in ("affine", "mixed")

    @property
    def command(self) -> str:
        """The mlx-lm command that this is, which takes its text from the network."""
        group = f"-group-size {self.group_size}"
        if self.method == "affine":
            return f"mlx_lm convert -q --q-bits {self.bits} --q{group}"
        if self.method == "mixed":
            return f"mlx_lm convert -q --quant-predicate {self.recipe} --q{group}"
        if self.method == "dynamic_quant":
            return (
                f"mlx_lm dynamic_quant --target-bpw {self.target_bpw:g} --low-bits {self.bits} "
                f"--low{group} --high-bits {self.high_bits} --high{group}"
            )
        trained = ""
        if self.method == "dwq":
            trained = f" --learning-rate {self.learning_rate:g} --batch-size {self.batch_size}"
        return f"mlx_lm {self.method} --bits {self.bits} -{group}{trained}"


def rival_spec(
    name: str,
    *,
    group_size: int = 64,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = BATCH_SIZE,
) -> RivalSpec:
    """The meaning of a rival's name. Raises MlxSvdError for an unknown one."""
    if name in MIXED:
        return RivalSpec(name, "mixed", group_size, recipe=name)
    if found := re.fullmatch(r"dynamic_quant@(\d+(?:\.\d+)?)", name):
        return _dynamic(name, float(found[1]), group_size)
    found = re.fullmatch(r"(q|gptq|awq|dwq)(\d)", name)
    if not found or int(found[2]) not in _METHOD_BITS[found[1]]:
        raise MlxSvdError(f"rival {name!r}: no such quantizer of mlx-lm; give one of {_HELP}")
    method, bits = found[1], int(found[2])
    if method == "q":
        return RivalSpec(name, "affine", group_size, bits)
    if method == "dwq":
        trained = {"learning_rate": learning_rate, "batch_size": batch_size}
        return RivalSpec(name, "dwq", group_size, bits, **trained)
    return RivalSpec(name, method, group_size, bits)


def _dynamic(name: str, target: float, group_size: int) -> RivalSpec:
    """The two widths next to the target between which mlx-lm then chooses for every layer.

    A group of weights has a scale and a bias of 16 bits each.
    """
    overhead = 32 / group_size
    low = [bits for bits in BITS if bits + overhead < target]
    high = [bits for bits in BITS if bits + overhead > target]
    if not low or not high:
        raise MlxSvdError(
            f"rival {name!r}: the target must be between {BITS[0] + overhead:g} and "
            f"{BITS[-1] + overhead:g} bits per weight"
        )
    return RivalSpec(
        name, "dynamic_quant", group_size, low[-1], high_bits=high[0], target_bpw=target
    )
