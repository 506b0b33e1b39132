"""What lmms-eval wrote is read strictly, and a request that failed there is not taken for a wrong answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.errors import DataError
from mllm_assets.evaluation.lmms_eval import last_words, num_questions
from mllm_assets.evaluation.lmms_results import read_results, require_answered, with_pictures
from mllm_assets.inference.recorder import Exchange, exchange_of

# lmms-eval 0.7.3's own words for a request that its server refused
REFUSED = "[LMMS_EVAL_REQUEST_FAILED after 1 retries] Error code: 413 - The messages hold 27 characters: at most 16."


def written(folder: Path, answers: list[Any], *, task: str = "faces", **changed: Any) -> Path:
    """The files of one run, as lmms-eval 0.7.3 writes them; `changed` replaces keys of the results."""
    own = folder / "tuned"
    own.mkdir(parents=True)
    samples = [
        {
            "doc_id": index,
            "target": "face",
            **({"filtered_resps": answer} if isinstance(answer, str) else answer),
            "token_counts": [{"input_tokens": 39, "output_tokens": 8, "reasoning_tokens": 0}],
            "doc_hash": "74234e98afe7498fb5daf1f36ac2d78acc339464f950703b8c019892f982b90b",
            "right": 0.0,
            "num_chars": 7,
            "input": f"What is this, {index}?",
        }
        for index, answer in enumerate(answers)
    ]
    (own / f"20261130_225246_samples_{task}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in samples))
    figures = {"alias": task, "right,none": 0.0, "right_stderr,none": "N/A", "num_chars,none": 7.0, "overall,none": 0.5}
    results = {
        "results": {task: figures, "group": {"right,none": 0.0}},
        "n-samples": {task: {"original": len(answers), "effective": len(answers)}},
        "higher_is_better": {task: {"right": True, "num_chars": False}},
        **changed,
    }
    (own / "20261130_225246_results.json").write_text(json.dumps(results))
    return folder


def said(*answers: str | None) -> list[Exchange]:
    return [
        Exchange(pictures=(f"picture {index // 2}",), answer=answer, problem=None if answer is not None else "busy")
        for index, answer in enumerate(answers)
    ]


def test_samples_figures_and_directions_are_read(tmp_path: Path) -> None:
    found = read_results(written(tmp_path, ["a cat", {"resps": [["so: a face"]], "filtered_resps": "a face"}]))
    assert [sample.answer for sample in found.samples] == ["a cat", "so: a face"]
    assert found.figures == {"faces": {"right": 0.0, "num_chars": 7.0, "overall": 0.5}}
    assert found.samples[1].scores == {"right": 0.0, "num_chars": 7.0}, "`overall` is of all samples together"
    assert found.higher_is_better == {"faces": {"right": True, "num_chars": False}}
    assert found.samples[0].question == "What is this, 0?"


def test_a_request_that_failed_is_no_wrong_answer(tmp_path: Path) -> None:
    """lmms-eval scores it like any answer and ends with exit code 0."""
    samples = read_results(written(tmp_path, ["a cat", REFUSED, REFUSED])).samples
    with pytest.raises(DataError, match=r"2 of 3 questions were not answered.*The first: busy"):
        require_answered(samples, said("a cat", None, None))


def test_an_empty_answer_counts_only_if_the_model_gave_it(tmp_path: Path) -> None:
    samples = read_results(written(tmp_path, ["", "a cat"])).samples
    require_answered(samples, said("", "a cat"))
    with pytest.raises(DataError, match=r"1 of 2 questions were not answered.*the model was not asked"):
        require_answered(samples, said("a cat"))
    with pytest.raises(DataError, match="1 of 2 questions"):
        require_answered(read_results(written(tmp_path / "b", ["", ""])).samples, said("", "a cat"))


def test_a_second_try_that_was_answered_counts(tmp_path: Path) -> None:
    samples = read_results(written(tmp_path, ["a cat"])).samples
    require_answered(samples, said(None, "a cat"))


def test_pictures_are_those_that_the_model_saw_where_the_order_is_known(tmp_path: Path) -> None:
    samples = read_results(written(tmp_path, ["a", "b", "a"])).samples
    found = with_pictures(samples, said("a", "b", "a"))
    assert [sample.pictures for sample in found] == ["picture 0", "picture 0", "picture 1"]
    assert {sample.pictures for sample in with_pictures(samples, said("b", "a", "a"))} == {None}


@pytest.mark.parametrize(
    ("answers", "changed", "problem"),
    [
        (["a"], {"n-samples": {"faces": {"effective": 2}}}, "wrote 1 samples of faces"),
        (["a"], {"n-samples": {"other": {"effective": 1}}}, "no samples of other"),
        (["a"], {"n-samples": {}}, "names no task"),
        (["a"], {"n-samples": []}, "to be an object"),
        (["a"], {"results": {"faces": 1}}, "to be an object"),
        ([{"resps": [["a", "b"]]}], {}, "asks about one row several times"),
        ([{"filtered_resps": "a", "doc_id": "x"}], {}, "expected a number as doc_id"),
        ([{"filtered_resps": "a"}, {"filtered_resps": "a", "doc_id": 0}], {}, "asks about one row several times"),
    ],
)
def test_what_lmms_eval_does_not_write_is_refused(
    tmp_path: Path, answers: list[Any], changed: dict[str, Any], problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        read_results(written(tmp_path, answers, **changed))


def test_files_that_are_cut_off_or_missing_are_refused(tmp_path: Path) -> None:
    output = written(tmp_path, ["a", "b"])
    [samples] = output.glob("*/*.jsonl")
    samples.write_text(samples.read_text()[:-20])
    with pytest.raises(DataError, match="line 2"):
        read_results(output)
    with pytest.raises(DataError, match="0 files of results"):
        read_results(tmp_path / "nothing")


def test_an_exchange_is_read_from_what_was_sent() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    asked = json.dumps({"messages": [{"role": "user", "content": [picture, {"type": "text", "text": "?"}]}]}).encode()
    given = json.dumps({"choices": [{"message": {"content": "a face"}}]}).encode()
    found = exchange_of(asked, 200, given)
    assert found.answer == "a face" and len(found.pictures) == 1 and found.problem is None
    assert exchange_of(asked, 200, given).pictures == found.pictures
    refused = exchange_of(asked, 503, json.dumps({"error": {"message": "The server is busy."}}).encode())
    assert (refused.answer, refused.problem) == (None, "The server is busy.")
    for status, broken in ((200, b"{"), (200, b"[]"), (200, b'{"choices": []}'), (500, b'{"error": "x"}'), (0, b"")):
        assert exchange_of(b"\xff[", status, broken).answer is None
    assert exchange_of(b'{"messages": [1, {"content": [2]}]}', 200, given).pictures == ()


def test_the_log_says_how_many_questions_there_are_and_what_went_wrong() -> None:
    log = "Model Responding:   0%|          | 0/40 [00:00<?]\rModel Responding:  30%|███       | 12/40 [00:05<00:10]"
    assert num_questions(log) == 40 and num_questions("Postprocessing: 100%|█| 4/4") is None
    log = "Traceback (most recent call last):\n  File\nValueError: Tasks not found: x.\n\x1b[32mERROR\x1b[0m later\n\n"
    assert last_words(log) == "ValueError: Tasks not found: x"
    assert last_words("") == "it said nothing" and last_words("\x1b[31mKilled\x1b[0m\n") == "Killed"
