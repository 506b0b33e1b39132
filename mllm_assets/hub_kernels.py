"""Compiled code that a library would fetch from the Hub and run."""

import logging
import sys
from typing import Any


def refuse_hub_kernels() -> None:
    """Keep bitsandbytes from it, which PEFT imports wherever it is installed. Before anything imports PEFT.

    On CPUs with AVX512-BF16 it asks the package `kernels` for one, and advises to install that where it is missing.
    """
    modules: dict[str, Any] = sys.modules
    modules.setdefault("kernels", None)  # as if it were not installed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def leave_out_bitsandbytes() -> None:
    """Keep PEFT from importing it in a process that does not quantise: 1.2 s of CPU time."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault("bitsandbytes", None)
