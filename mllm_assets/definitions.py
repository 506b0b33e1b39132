"""The code location: every asset comes from a `defs.yaml` below `mllm_assets/defs/`."""

from pathlib import Path

import dagster as dg

from mllm_assets.components.loading import load_once


@dg.definitions
def defs() -> dg.Definitions:
    return load_once(Path(__file__).parent)
