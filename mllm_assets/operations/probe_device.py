"""Name the device as one line of JSON: `python -m mllm_assets.operations.probe_device auto`. Loads torch."""

import json
import sys
from dataclasses import asdict

from mllm_assets.errors import MachineError


def main() -> None:
    from mllm_assets.training.models.device import pick_device

    idle: list[str] = []  # why an NVIDIA card is left idle
    try:
        device = pick_device(sys.argv[1], warn=idle.append)
    except MachineError as error:
        print(json.dumps({"error": str(error)}))
        return
    print(json.dumps({**asdict(device), "idle": idle}))


if __name__ == "__main__":
    main()
