"""Numbers as strict JSON can hold them."""

import math
from typing import Any


def finite(value: Any) -> Any:
    """JSON has no infinity (as the interval of a single item has) and no NaN: None instead, also
    inside of dicts and lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
