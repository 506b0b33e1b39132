"""The state of a machine and of what lies on its disk: `mllm-assets doctor`, `mllm-assets gc`."""
