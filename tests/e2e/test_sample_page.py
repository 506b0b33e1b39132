"""`report.html` of a dataset, in a real browser and from the disk: every sample is found, with its picture."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from playwright.sync_api import Page, expect

from mllm_assets.data.curate.assign import SPLITS, Assignments
from mllm_assets.data.curate.sample_page import SamplePage
from mllm_assets.data.quality.groups import SampleGroups
from mllm_assets.data.quality.report import write_report
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import made_spec, png, run_line, write_source

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_label(label).select_option(option)


def found(page: Page) -> str:
    return page.get_by_role("status").inner_text()


def test_samples_are_filtered_and_searched_without_a_server(tmp_path: Path, page: Page) -> None:
    layout = Layout(tmp_path)
    rows = [(png(number), f"picture {number} <b>bold</b>") for number in range(12)] + [(b"no picture", "broken")]
    write_source(layout.root, rows)
    raw, quality, version = run_line(made_spec(8, 2), layout)
    write_report(raw.directory, quality.directory)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for folder in (layout.data / "made", version.directory):  # through the link, and in the version itself
        page.goto((folder / "report.html").absolute().as_uri())
        expect(page.get_by_text("13 samples, page 1 of 1")).to_be_visible()
        choose(page, "Split", "train")
        assert found(page) == "8 samples, page 1 of 1"
        picture = page.locator(".card img").first
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.naturalWidth") > 0
        choose(page, "Split", "")
        page.get_by_label("Search").fill("picture 7 <B>")
        assert found(page) == "1 sample, page 1 of 1"
        expect(page.locator(".card")).to_contain_text("picture 7 <b>bold</b>")
        page.get_by_label("Search").fill("")
        choose(page, "Flag or reason", "image_unreadable")
        expect(page.locator(".card")).to_contain_text("its picture is not published")
        page.get_by_role("link", name="sample quality").click()
        expect(page.get_by_role("heading", name="made: sample quality")).to_be_visible()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_fifty_thousand_samples_are_paged(tmp_path: Path, page: Page) -> None:
    num_samples = 50_000
    splits = np.arange(num_samples, dtype=np.int8) % 2  # train, val, train, ...
    none = np.full(num_samples, -1, np.int8)
    groups = SampleGroups(np.zeros(num_samples, np.int64), np.zeros(0, "S16"), np.zeros(0, np.int64))
    verdicts = pa.table({"reject_reason": pa.nulls(num_samples, pa.string()), "flags": [[]] * num_samples})
    collected = SamplePage(tmp_path, Assignments(splits, none, none.astype(np.int64), groups), verdicts)
    for number in range(num_samples):
        sample = {"sample_id": f"{number:016x}", "source_location": f"rows.jsonl:{number}"}
        turns = [
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": f"answer {number} " + "x" * 300},
        ]
        collected.add(sample, {"messages": turns, "images": [f"images/{number}.png"], "label": f"label {number % 7}"})
    version = tmp_path / "data" / ".versions" / "large" / "digest"
    version.mkdir(parents=True)
    path = collected.write(version, tmp_path / "data" / ".quality" / "large" / "digest", dataset="large")
    page.goto(path.as_uri())
    expect(page.get_by_text("50,000 samples, page 1 of 1042")).to_be_visible()
    choose(page, "Split", SPLITS[1])
    choose(page, "Label", "label 3")
    page.get_by_label("Page").fill("2")
    page.get_by_label("Page").press("Enter")
    of_label = [number for number in range(num_samples) if number % 2 and number % 7 == 3]
    assert found(page) == f"{len(of_label):,} samples, page 2 of {-(-len(of_label) // 48)}"
    expect(page.locator(".card").first).to_contain_text(f"answer {of_label[48]} ")
    page.get_by_label("Search").fill("rows.jsonl:49997")
    assert found(page) == "1 sample, page 1 of 1"
