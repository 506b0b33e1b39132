"""How well answers match references and labels: per-sample scores, corpus scores, and what made them."""

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, cast

import numpy as np

from mllm_assets.evaluation.intervals import METHOD, paired_corpus_interval

NO_LABEL = "(none)"
SEVERAL_LABELS = "(several)"


def exact_matches(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """1.0 where the answer is the reference, white space around both aside."""
    return np.array([float(a.strip() == r.strip()) for a, r in zip(answers, references, strict=True)])


def rouge_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F1 of each answer, 0..1."""
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(names.values()), use_stemmer=False)
    scored = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {ours: np.array([score[theirs].fmeasure for score in scored]) for ours, theirs in names.items()}


def cider_d_scores(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """CIDEr-D of each answer, 0..10; words are weighed by how rare they are among these references."""
    from pycocoevalcap.cider.cider import Cider
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    said = {index: [tokenize(text.lower())] for index, text in enumerate(answers)}
    right = {index: [tokenize(text.lower())] for index, text in enumerate(references)}
    _, scores = Cider().compute_score(right, said)
    return np.asarray(scores, dtype=float)


def corpus_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF over all answers together, 0..100."""
    bleu, chrf = _bleu_and_chrf()
    return {
        "bleu": bleu.corpus_score(list(answers), [list(references)]).score,
        "chrf": chrf.corpus_score(list(answers), [list(references)]).score,
    }


def corpus_gains(answers: Sequence[str], others: Sequence[str], references: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Gains in BLEU and chrF of `answers` over `others`, each with its interval and sacrebleu's own p-value.

    Both come of a paired bootstrap over samples; sacrebleu tells no interval of the difference.
    """
    from sacrebleu.significance import PairedTest, Result

    bleu, chrf = _bleu_and_chrf()
    systems: list[tuple[str, Sequence[str]]] = [("other", others), ("this", answers)]
    test = PairedTest(systems, {"BLEU": bleu, "chrF2": chrf}, [list(references)], test_type="bs")
    _, scored = test()
    gains = {}
    for ours, theirs in (("bleu", "BLEU"), ("chrf", "chrF2")):
        other, this = cast(list[Result], scored[theirs])
        gains[ours] = {
            "mean": this.score - other.score,
            **_interval(bleu if ours == "bleu" else chrf, answers, others, references),
            "p_value": this.p_value,
            "num_pairs": len(references),
        }
    return gains


def _interval(metric: Any, answers: Sequence[str], others: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    this, other = (
        np.asarray(metric._extract_corpus_statistics(list(said), [list(references)]), dtype=float)
        for said in (answers, others)
    )
    return paired_corpus_interval(this, other, lambda sums: metric._compute_score_from_stats(sums.tolist()).score)


def _bleu_and_chrf():
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # Without effective order, one-word answers have no 4-gram and score 0 even when each is right.
    return BLEU(tokenize="13a", effective_order=True), CHRF()


def definitions() -> dict[str, str]:
    """What each metric is: unit, library, version and tokeniser, as the model card and metadata state it."""
    bleu, chrf = _bleu_and_chrf()
    probe = ["a b c d e"], [["a b c d e"]]  # sacrebleu knows the number of references only after a score
    for metric in (bleu, chrf):
        metric.corpus_score(*probe)
    rouge = f"rouge-score {version('rouge-score')}, mean F1, 0-1, lower-case a-z and 0-9 tokens, no stemming"
    return {
        "loss": "nats per supervised token, mean over all tokens of the split",
        "loss_shuffled": "the same with each sample's images replaced by another sample's",
        "perplexity": "exp(loss)",
        "bleu": f"sacrebleu, 0-100, {bleu.get_signature()}",
        "chrf": f"sacrebleu, 0-100, {chrf.get_signature()}",
        "rouge_1": rouge,
        "rouge_2": rouge,
        "rouge_l": rouge,
        "cider_d": f"pycocoevalcap {version('pycocoevalcap')}, mean, 0-10, sacrebleu's 13a tokens in lower case, "
        "document frequencies of the split's own references",
        "exact_match": "share of answers equal to the reference, outer white space aside",
        "gain": METHOD,
        "label_accuracy": "share of answers that name the sample's label and no other, case and punctuation aside",
    }


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


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.replace("_", " ").casefold()))
