"""The state of a machine and of the artefacts on its disk: `mllm-assets doctor`, `mllm-assets gc`."""
