"""`mllm-assets generate` on a tiny model: what it prints, and what it says of what cannot be used."""

import json
import shutil
from pathlib import Path

import pytest

from mllm_assets.cli import main

pytestmark = pytest.mark.integration
GOLDEN = Path(__file__).parents[1] / "golden" / "parity"
MODEL = str(GOLDEN / "model")
IMAGES = [str(GOLDEN / "data" / "images" / f"emoji_00{index}.png") for index in range(3)]


def run(*arguments: str, code: int = 0) -> None:
    assert main(["generate", "--model", MODEL, "--device", "cpu", "--max-new-tokens", "8", *arguments]) == code


def test_what_is_streamed_is_what_json_holds(capsys: pytest.CaptureFixture[str]) -> None:
    question = ("--image", IMAGES[0], "--prompt", "What is this?")
    run(*question)
    *text, time_line = capsys.readouterr().out.splitlines()
    run(*question, "--json")
    answer = json.loads(capsys.readouterr().out)
    assert "\n".join(text) == answer["text"] and answer["num_tokens"] == 8
    assert time_line.startswith("Time taken: ") and time_line.endswith(" seconds")


def test_system_images_and_sampling_each_change_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        run("--prompt", "What?", "--json", *arguments)
        return json.loads(capsys.readouterr().out)["text"]

    one = ("--image", IMAGES[0])
    sampled = (*one, "--do-sample", "--temperature", "3.0", "--seed")
    answers = [said(*one), said(*one, "--system", "Be brief."), said(*one, "--image", IMAGES[1]), said(*sampled, "1")]
    assert len(set(answers)) == 4
    assert said(*sampled, "1") == answers[3] != said(*sampled, "2")


def test_a_sampling_key_without_sampling_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    run("--prompt", "What?", "--temperature", "0.7")
    assert "note: without --do-sample temperature has no effect" in capsys.readouterr().err


def test_a_folder_is_a_batch_and_bad_images_cost_their_own_answers_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in IMAGES:
        shutil.copy(path, tmp_path)
    (tmp_path / "emoji_000_bad.png").write_bytes(Path(IMAGES[0]).read_bytes()[:150])
    (tmp_path / "notes.txt").write_text("no image")
    run("--prompt", "What?", "--image", str(tmp_path), "--batch-size", "2", "--json", code=2)
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    names = ["emoji_000.png", "emoji_000_bad.png", "emoji_001.png", "emoji_002.png"]
    assert [line["image"] for line in lines] == names
    assert "cannot be used" in lines[1]["error"] and "error: 1 of 4 images could not be used" in err
    for line, path in zip((lines[0], *lines[2:]), IMAGES, strict=True):
        run("--prompt", "What?", "--image", path, "--json")
        assert json.loads(capsys.readouterr().out)["text"] == line["text"]
    (tmp_path / "emoji_000_bad.png").unlink()
    run("--prompt", "What?", "--image", str(tmp_path))
    out = capsys.readouterr().out
    assert f"emoji_001.png: {lines[2]['text']}\n" in out and " seconds, 3 images, " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "no.png"), "error: The image no.png cannot be used: it does not exist."),
        (
            ("--image", "."),
            "error: . holds no image files. Give a folder with PNG, JPEG or other images, or one image.",
        ),
        (("--image", ".", "--image", "x.png"), "error: . is a folder, whose images are asked about one by one."),
        (("--model", "nowhere/model"), "error: nowhere/model does not exist."),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run("--prompt", "What?", *arguments, code=2)
    assert capsys.readouterr().err.startswith(message)
