"""`python -m mllm_assets.cli`."""

import sys

from mllm_assets.cli import main

sys.exit(main())
