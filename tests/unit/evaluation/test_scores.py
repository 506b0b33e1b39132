"""Scores of answers against references and labels."""

import os
import subprocess
import sys

import pytest

from mllm_assets.evaluation.scores import Answers, corpus_score, definitions, exact_matches, find_label

DISHES = ["carrot cake", "cake", "apple_pie", "pho"]


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("This image shows apple pie.", "apple_pie"),
        ("PHO!", "pho"),
        ("a carrot cake", "carrot cake"),
        ("photo of nothing", "(none)"),
        ("", "(none)"),
        ("pho or cake", "(several)"),
        ("a cake beside a carrot cake", "carrot cake"),
    ],
)
def test_an_answer_names_one_label_or_none(answer: str, label: str) -> None:
    """`label in answer` alone would find "pho" in "photo" and both cakes in "carrot cake"."""
    assert find_label(answer, DISHES) == label


def test_labels_that_differ_in_punctuation_only_are_told_apart_when_given_exactly() -> None:
    assert find_label("C++", ["C", "C#", "C++"]) == "C++"
    assert find_label("it is c", ["C", "C#"]) == "(several)"


def test_a_label_in_a_script_without_spaces_is_found_inside_a_sentence() -> None:
    assert find_label("これは寿司です。", ["寿司", "天ぷら"]) == "寿司"


def test_one_word_answers_that_are_all_right_get_full_marks() -> None:
    """Plain corpus BLEU-4 gives 0 to one-word answers."""
    words = ["objects", "symbols"]
    assert [corpus_score(name, words, words) for name in ("bleu", "chrf")] == [pytest.approx(100.0)] * 2
    assert exact_matches([" objects\n", "Symbols"], words).tolist() == [1.0, 0.0]


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    assert Answers(answers=["a red bird"], references=["a small red bird sings"]).rouge["rouge_l"][0] == pytest.approx(
        0.75
    )


def test_definitions_name_library_version_and_tokeniser() -> None:
    text = definitions()
    assert "tok:13a" in text["bleu"] and "version:2." in text["bleu"] and "eff:yes" in text["bleu"]
    assert "rouge-score 0.1" in text["rouge_l"]


SCORED = """
import os, sys
before = dict(os.environ)
from mllm_assets.evaluation.scores import Answers
print(float(Answers(answers=["a cat"], references=["a cat"]).rouge["rouge_l"][0]), dict(os.environ) == before)
print([name for name in ("sklearn", "scipy") if name in sys.modules])
import scipy
"""


def test_rouge_loads_no_library_that_it_does_not_use_and_sets_no_variable() -> None:
    """NLTK imported scikit-learn, whose variables ended the worker that is kept: the release loaded PyTorch again."""
    command = [sys.executable, "-c", SCORED]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
    assert output.splitlines() == ["1.0 True", "[]"]
