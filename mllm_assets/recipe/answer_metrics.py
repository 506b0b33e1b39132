"""The metrics of answers that a recipe may name; they are registered above this room, and looked up by name."""

from collections.abc import Iterator, Mapping, Sequence

from mllm_assets.plugins import resolve

UNTRIED = ("fsdp", "deepspeed", "torch_compile")  # together with answers while a model trains
REGISTERED = "mllm_assets.evaluation.metrics:of_answers"
REWARDING = "mllm_assets.evaluation.metrics:of_each_answer"


def answer_metrics() -> Mapping[str, bool]:
    """Whether more is better of each metric that answers alone give, by its name."""
    return resolve(REGISTERED)()


def rewarding_metrics() -> Mapping[str, bool]:
    """The same of each metric that has a value for every answer."""
    return resolve(REWARDING)()


def answer_problems(metric: str, *, holds_rows_out: bool, untried: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What stands against measuring a metric while a recipe trains: keys of the recipe, each with a sentence.

    Args:
        metric: What `metric_for_best_model` names.
        holds_rows_out: Whether what is evaluated are rows that `val_size` keeps from training.
        untried: Keys that are set and were not tried together with it.
    """
    key = "metric_for_best_model"
    if metric not in (known := answer_metrics()):
        yield key, f"{key} is {metric!r}: expected loss, or one of {', '.join(known)}. Correct it."
    if holds_rows_out:
        text = f"{key} is {metric}, which is of answers to an entry, and val_size holds rows out."
        yield key, f"{text} Name an eval_dataset instead, or set {key}: loss."
    for other in untried:
        yield other, f"{other} together with {key}: {metric} has not been tried. Set {key}: loss."
