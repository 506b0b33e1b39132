"""Model families; whoever imports one module of them finds all registered."""

from mllm_assets.families import described  # noqa: F401
