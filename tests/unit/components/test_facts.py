"""What an asset's page shows fits its columns, and programs find each fact whatever its width."""

import dagster as dg
import pytest

from mllm_assets.components.facts import DETAILS, MAX_WORD_CHARS, as_texts, facts_of, fitted
from mllm_assets.components.reporting import facts_text

WIDE = {
    "path": "outputs/gemma3_trans_projector_head_sft/predictions/7f74552b3f04ddbd",
    "report_path": dg.MetadataValue.path('/home/Zoë/a "b" ```c/data/.quality/emoji/b82477487df02bec/report.html'),
    "weights_digest": "b9f65e9f" * 8,
    "data_digests": dg.MetadataValue.json({"a_name_that_somebody_gave_test": "902320b368d58e7a"}),
    "base_model": dg.MetadataValue.json({"name": "tiny", "hub": None, "revision": None, "license": "x", "n": 1}),
    "leaks": ["birds_validation_2024/img_00012345.png"],
}
NARROW = {
    "num_samples": 3,
    "loss": 0.5,
    "note": "words that wrap " * 9,
    "gallery": dg.MetadataValue.md("x" * 50),
    "entries": dg.MetadataValue.json({"long": "y" * 2000}),  # Dagster shows it behind a button
    "model_path": "p" * MAX_WORD_CHARS,
    "overrides": dg.MetadataValue.json({"max_steps": 60}),
}


def test_what_is_wider_than_its_column_is_in_one_window_and_found_by_its_name() -> None:
    """Paths and digests ended at the edge of a page of 1280 px."""
    shown = fitted(WIDE | NARROW)
    assert shown.keys() == {*NARROW, DETAILS}
    assert len(shown[DETAILS].value) >= 1000, "shown behind a button"
    recorded = dg.AssetMaterialization("photos", metadata=shown).metadata
    values = {name: getattr(value, "value", value) for name, value in (WIDE | NARROW).items()}
    assert facts_of(recorded) == values


@pytest.mark.parametrize("metadata", [{}, NARROW])
def test_without_wide_values_there_is_no_window(metadata: dict[str, object]) -> None:
    assert fitted(metadata) == metadata


def test_a_wide_link_stays_one() -> None:
    url = "https://huggingface.co/somebody/something/commit/0123456789abcdef"
    shown = fitted({"commit_url": dg.MetadataValue.url(url)})
    assert shown["commit_url"] == dg.MetadataValue.md(f"[open](<{url}>)")
    assert facts_of(shown) == {"commit_url": url}


def test_what_an_older_version_recorded_is_read() -> None:
    older = dg.AssetMaterialization("photos", metadata=WIDE | {"details": "of a user's own"}).metadata
    assert facts_of(older)["path"] == WIDE["path"]
    assert facts_of(older)["details"] == "of a user's own"


def test_a_terminal_shows_no_list_of_what_did_not_happen() -> None:
    """Nine zeros and a path of its own stood before the path that was looked for."""
    counts = {"num_samples": 0, "num_train": 32, "num_rejected": 0, "num_unused": 0, "already_finished": False}
    shown = facts_text(
        {**counts, "loss": 0.0, "report_path": "/home/birds/data/birds/report.html", "path": "data/birds"}
    )
    assert shown == "num_samples 0, num_train 32, loss 0, path data/birds"


def test_the_figures_of_a_check_are_rounded_texts() -> None:
    """Every check had plots of one point each, and 16 digits."""
    figures = {
        "low": 4.940468736208976,
        "num_rows": 800,
        "given": True,
        "pairs": ["a"],
        "inf": float("inf"),
        "no": -0.0,
    }
    check = dg.AssetCheckResult(passed=True, metadata=figures)
    shown = {
        name: value.value
        for name, value in dg.AssetCheckResult(passed=True, metadata=as_texts(check.metadata)).metadata.items()
    }
    assert shown == {"low": "4.9405", "num_rows": "800", "given": True, "pairs": ["a"], "inf": "inf", "no": "0"}
