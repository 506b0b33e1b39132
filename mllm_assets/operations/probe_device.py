"""Name the device as one line of JSON: `python -m mllm_assets.operations.probe_device auto`. Loads torch."""

import json
import sys
from pathlib import Path

from mllm_assets.errors import MachineError


def main() -> None:
    import torch

    from mllm_assets.training.device import GIB, pick_device

    try:
        device = pick_device(sys.argv[1])
    except MachineError as error:
        print(json.dumps({"error": str(error)}))
        return
    free_gib = torch.cuda.mem_get_info()[0] / GIB if device.kind == "cuda" else _available_gib()
    print(json.dumps({**device.to_dict(), "free_gib": free_gib}))


def _available_gib() -> float | None:
    """Main memory that programs can still get, or None where the system does not say."""
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="ascii").splitlines() if info.is_file() else ()
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:")), None)


if __name__ == "__main__":
    main()
