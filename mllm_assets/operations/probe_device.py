"""Name the device as one line of JSON: `python -m mllm_assets.operations.probe_device auto`. Loads torch."""

import json
import sys
from dataclasses import asdict

from mllm_assets.errors import MachineError


def main() -> None:
    from mllm_assets.training.models.device import pick_device

    try:
        device = pick_device(sys.argv[1])
    except MachineError as error:
        print(json.dumps({"error": str(error)}))
        return
    print(json.dumps(asdict(device)))


if __name__ == "__main__":
    main()
