"""The conditions of a result: program versions, machine, command."""

import os
import platform
import resource
import shlex
import sys
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from mlx_svd import __version__

_PACKAGES = ("mlx", "mlx-lm", "numpy", "scipy", "transformers", "tokenizers")


def conditions() -> dict[str, Any]:
    """What a result of this process depends on beside its own settings; JSON values only."""
    return {
        "command": command_line(),
        "device": str(mx.default_device()),
        "versions_of_packages": {"mlx-svd": __version__}
        | {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def command_line() -> str:
    """This process's command, with the names of local files but not their folders."""
    words = []
    for word in sys.argv[1:]:
        option, equals, value = word.rpartition("=")
        if os.path.isabs(value) or value.startswith((".", "~")):
            value = os.path.basename(os.path.normpath(value))
        words.append(option + equals + value)
    return "mlx-svd " + shlex.join(words)


def peak_memory() -> int:
    """Bytes that this process has occupied at most, as the system counts them."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
