"""Asking models: from the command line, a page or another program. What is here loads with the command line."""

HOW_TO_NAME = (
    "a model or run directory, checkpoint-<step> of a run, a release (emoji_sft@v1), a recipe (emoji_sft: its newest "
    "release, else its latest run) or pretrained/<model>"
)
