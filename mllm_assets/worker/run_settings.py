"""What a run is told beside its recipe."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSample:
    """What a model is asked at each evaluation while it trains, where metrics of answers are measured.

    Attributes:
        metrics: Those that are measured beside the recipe's `metric_for_best_model`.
        max_samples: Rows of the evaluation entries, spread evenly over them.
        max_new_tokens: Tokens after which an answer is cut.
    """

    metrics: tuple[str, ...] = ()
    max_samples: int = 64
    max_new_tokens: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """What a run is told for which LLaMA-Factory has no key.

    Attributes:
        regroup: Whether micro-batches may be regrouped to the largest that fits.
        answers: What the model is asked while it trains.
    """

    regroup: bool = False
    answers: AnswerSample = AnswerSample()
