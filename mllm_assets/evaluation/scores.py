"""The metrics: how well answers match references and labels, of each sample and of all, and what each is."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from typing import Any, cast

import numpy as np

from mllm_assets import plugins
from mllm_assets.evaluation.intervals import METHOD, paired_corpus_interval, paired_gain

NO_LABEL = "(none)"
SEVERAL_LABELS = "(several)"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One model's answers to the samples of an entry, in their order.

    Attributes:
        answers: Its answers.
        references: The right ones.
        labels: The true labels; None unless all samples have one.
        known_labels: Those that answers may name; by default the true ones.
        losses: Nats a token of each right answer; None of a model that has no losses.
        shuffled_losses: The same with another sample's images; NaN where a sample has none.
        num_tokens: Tokens of each right answer.
        pictures: Number of each sample's picture; None where no two samples show the same.
    """

    answers: Sequence[str]
    references: Sequence[str]
    labels: Sequence[str] | None = None
    losses: np.ndarray | None = None
    shuffled_losses: np.ndarray | None = None
    num_tokens: np.ndarray | None = None
    pictures: np.ndarray | None = None
    known_labels: Sequence[str] | None = None

    @cached_property
    def samples(self) -> dict[str, np.ndarray]:
        """Each sample's value of every metric that has one, by name."""
        found = {name: metric.score(self) for name, metric in METRICS.items() if metric.score}
        return {name: values for name, values in found.items() if values is not None}

    @cached_property
    def totals(self) -> dict[str, float]:
        """Every metric over all samples that can be computed, by name."""
        found: dict[str, float | None] = {}
        for name, metric in METRICS.items():
            if metric.total is not None:
                found[name] = metric.total(self)
            elif name in self.samples:
                found[name] = float(self.samples[name].mean())
        return {name: value for name, value in found.items() if value is not None}

    def total(self, name: str) -> float | None:
        """One metric over all samples, without the others; None where it cannot be computed."""
        metric = METRICS[name]
        if metric.total is not None:
            return metric.total(self)
        values = metric.score(self) if metric.score else None
        return None if values is None else float(values.mean())

    @cached_property
    def rouge(self) -> dict[str, np.ndarray]:
        """ROUGE-1, ROUGE-2 and ROUGE-L F1 of each answer, 0..1."""
        # Its NLTK would import them for what is not used here: a second of CPU time. And scikit-learn sets variables
        # when it is imported, for which the worker that is kept would not do any longer
        with plugins.counting_as_missing(("scipy", "sklearn")):
            from rouge_score.rouge_scorer import RougeScorer

        names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
        scorer = RougeScorer(list(names.values()), use_stemmer=False)
        scored = [scorer.score(right, answer) for answer, right in zip(self.answers, self.references, strict=True)]
        return {ours: np.array([score[theirs].fmeasure for score in scored]) for ours, theirs in names.items()}

    def gains_over(self, other: "Answers") -> dict[str, dict[str, Any]]:
        """How much better it is than another model on the same samples, by metric; a lower loss counts as a gain."""
        gains = {}
        for name, metric in METRICS.items():
            if metric.gain is not None:
                gains[name] = metric.gain(self, other)
            elif name in self.samples and name in other.samples:
                sign = 1 if metric.higher_is_better else -1
                gains[name] = paired_gain((self.samples[name] - other.samples[name]) * sign, self.pictures)
        return gains


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One figure of how well a model answers. At least one of `score` and `total` is given.

    Attributes:
        name: Its key in `eval_metrics.json`, DuckDB and an asset's metadata.
        unit: For axes and the reference.
        definition: What it is: library, version and tokeniser too, as model card and metadata state it.
        higher_is_better: Whether more is better.
        headline: Whether it is among the few that the commands show.
        score: Each sample's value; None if it cannot be computed.
        total: The value over all samples, where it is not the mean of theirs; None if it cannot be computed.
        gain: How much better the first is than the second, with an interval, where it is not the mean of the samples'
            differences.
        of_answers: Whether answers and what they should be are enough, without losses.
        of_one: Whether a sample's value is the same beside whatever other samples.
    """

    name: str
    unit: str
    definition: str | Callable[[], str]
    higher_is_better: bool = True
    headline: bool = False
    score: Callable[[Answers], np.ndarray | None] | None = None
    total: Callable[[Answers], float | None] | None = None
    gain: Callable[[Answers, Answers], dict[str, Any]] | None = None
    of_answers: bool = True
    of_one: bool = True


METRICS: dict[str, Metric] = {}  # in the order in which they are shown


def register(metric: Metric) -> Metric:
    """Add a metric: it is computed, kept, compared and shown like all others.

    Raises:
        RecipeError: Another has its name.
    """
    plugins.add(METRICS, metric.name, metric, "metric")
    return metric


def in_order(names: Iterable[str], *, headlines: bool = False) -> list[str]:
    """Names of computed metrics in the order in which they are shown; those that are not registered here come last.

    `headlines` gives only the few that a command shows.
    """
    found = list(names)
    known = [name for name, metric in METRICS.items() if name in found and (metric.headline or not headlines)]
    return known if headlines else [*known, *(name for name in found if name not in METRICS)]


def definitions() -> dict[str, str]:
    """What each metric is, and how sure a gain is, by name."""
    texts = {name: m.definition if isinstance(m.definition, str) else m.definition() for name, m in METRICS.items()}
    return {**texts, "gain": METHOD}


def exact_matches(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """1.0 where the answer is the reference, white space around both aside."""
    return np.array([float(a.strip() == r.strip()) for a, r in zip(answers, references, strict=True)])


def _right_labels(given: Answers) -> np.ndarray | None:
    if not given.labels:
        return None
    known = given.known_labels or sorted(set(given.labels))
    return np.array([float(find_label(a, known) == b) for a, b in zip(given.answers, given.labels, strict=True)])


def _rouge_definition() -> str:
    return f"rouge-score {version('rouge-score')}, mean F1, 0-1, lower-case a-z and 0-9 tokens, no stemming"


def cider_d_scores(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """CIDEr-D of each answer, 0..10; words are weighed by how rare they are among these references."""
    from pycocoevalcap.cider.cider import Cider
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    given = {index: [tokenize(text.lower())] for index, text in enumerate(answers)}
    right = {index: [tokenize(text.lower())] for index, text in enumerate(references)}
    _, scores = Cider().compute_score(right, given)
    return np.asarray(scores, dtype=float)


def _cider_definition() -> str:
    return (
        f"pycocoevalcap {version('pycocoevalcap')}, mean, 0-10, sacrebleu's 13a tokens in lower case, "
        "document frequencies of the split's own references"
    )


def token_mean(losses: np.ndarray | None, num_tokens: np.ndarray | None) -> float | None:
    """The mean over the tokens of all samples that have a loss; None where none has."""
    if losses is None or num_tokens is None or np.isnan(losses).all():
        return None
    known = ~np.isnan(losses)
    return float(np.average(losses[known], weights=num_tokens[known]))


def _perplexity(given: Answers) -> float | None:
    loss = token_mean(given.losses, given.num_tokens)
    return None if loss is None else math.exp(min(loss, 700.0))  # exp overflows a double above 709


def corpus_score(name: str, answers: Sequence[str], references: Sequence[str]) -> float:
    """BLEU or chrF over all answers together, 0..100."""
    return _sacrebleu(name).corpus_score(list(answers), [list(references)]).score


def corpus_gain(name: str, given: Answers, other_model: Answers) -> dict[str, Any]:
    """Gain in BLEU or chrF of one model over another with its interval and sacrebleu's own p-value.

    Both come from a paired bootstrap over samples; sacrebleu has no interval of the difference.
    """
    from sacrebleu.significance import PairedTest, Result

    answers, others, references = given.answers, other_model.answers, given.references
    metric, theirs = _sacrebleu(name), {"bleu": "BLEU", "chrf": "chrF2"}[name]
    systems: list[tuple[str, Sequence[str]]] = [("other", others), ("this", answers)]
    _, scored = PairedTest(systems, {theirs: metric}, [list(references)], test_type="bs")()
    other, this = cast(list[Result], scored[theirs])
    statistics, other_statistics = (
        np.asarray(metric._extract_corpus_statistics(list(texts), [list(references)]), dtype=float)
        for texts in (answers, others)
    )
    return {
        "mean": this.score - other.score,
        **paired_corpus_interval(
            statistics,
            other_statistics,
            lambda sums: metric._compute_score_from_stats(sums.tolist()).score,
            given.pictures,
        ),
        "p_value": this.p_value,
        "num_pairs": len(references),
    }


def _sacrebleu(name: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # Without effective order, one-word answers have no 4-gram and score 0 even when each is right.
    return BLEU(tokenize="13a", effective_order=True) if name == "bleu" else CHRF()


def _sacrebleu_definition(name: str) -> str:
    metric = _sacrebleu(name)
    metric.corpus_score(["a b c d e"], [["a b c d e"]])  # it knows the number of references only after a score
    return f"sacrebleu, 0-100, {metric.get_signature()}"


for _entry in (
    Metric(
        name="loss",
        unit="nats a token",
        definition="nats per supervised token, mean over all tokens of the split",
        higher_is_better=False,
        headline=True,
        score=lambda given: given.losses,
        total=lambda given: token_mean(given.losses, given.num_tokens),
        of_answers=False,
    ),
    Metric(
        name="loss_shuffled",
        unit="nats a token",
        definition="the same with each sample's images replaced by another sample's",
        headline=True,
        total=lambda given: token_mean(given.shuffled_losses, given.num_tokens),
        of_answers=False,
    ),
    Metric(
        name="perplexity",
        unit="1 and more",
        definition="exp(loss)",
        higher_is_better=False,
        headline=True,
        total=_perplexity,
        of_answers=False,
    ),
    Metric(
        name="label_accuracy",
        unit="0 to 1",
        definition="share of answers that name the sample's label and no other, case and punctuation aside",
        headline=True,
        score=_right_labels,
    ),
    Metric(
        name="exact_match",
        unit="0 to 1",
        definition="share of answers equal to the reference, outer white space aside",
        score=lambda given: exact_matches(given.answers, given.references),
    ),
    Metric(
        name="cider_d",
        unit="0 to 10",
        definition=_cider_definition,
        score=lambda given: cider_d_scores(given.answers, given.references),
        of_one=False,
    ),
):
    register(_entry)
for _name in ("rouge_1", "rouge_2", "rouge_l"):
    register(
        Metric(
            name=_name,
            unit="0 to 1",
            definition=_rouge_definition,
            headline=_name == "rouge_l",
            score=lambda given, name=_name: given.rouge[name],
        )
    )
for _name in ("bleu", "chrf"):
    register(
        Metric(
            name=_name,
            unit="0 to 100",
            definition=partial(_sacrebleu_definition, _name),
            headline=True,
            total=lambda given, name=_name: corpus_score(name, given.answers, given.references),
            gain=lambda this, other, name=_name: corpus_gain(name, this, other),
        )
    )


def find_label(answer: str, labels: Sequence[str]) -> str:
    """The one label an answer names, `(none)` or `(several)`.

    Case, punctuation and underscores do not count. A label inside a longer one that is named too ("cake" in
    "carrot cake") does not count either.
    """
    if answer.strip() in labels:
        return answer.strip()
    named = [label for label in labels if _names(answer, label)]
    longest = [label for label in named if not any(_names(other, label) for other in named if other != label)]
    if len(longest) == 1:
        return longest[0]
    return SEVERAL_LABELS if named else NO_LABEL


def _names(text: str, label: str) -> bool:
    words, inside = _words(label), _words(text)
    # Scripts without spaces between words (Chinese, Japanese, Thai) have no word boundary to look for.
    return bool(words) and (f" {words} " in f" {inside} " if words.isascii() else words in inside)


@lru_cache(maxsize=4096)
def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.replace("_", " ").casefold()))
