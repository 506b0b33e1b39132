"""What loading the graph may cost."""

import subprocess
import sys

HEAVY = [
    *"torch transformers datasets accelerate peft sacrebleu cleanvision imagehash matplotlib tensorboard".split(),
    *"ray dagster_ray fsspec s3fs botocore psycopg2".split(),
]


def test_the_graph_loads_without_torch_transformers_datasets() -> None:
    """Every step worker imports the definitions again: a second of torch there is a second in each step."""
    code = (
        "import sys; from mllm_assets.definitions import defs; defs().resolve_asset_graph();"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == "[]"
