"""A user's own project around the installed package: made by `mllm-assets init`, read by the commands."""
