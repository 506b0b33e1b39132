"""The runs that the board lists, their curves and what differs between them."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from mllm_assets.artifacts import lock_path, write_manifest
from mllm_assets.evaluation.side_by_side import table_of
from mllm_assets.layout import Layout
from mllm_assets.training.runs.history import MAX_POINTS, curve, differing_keys, known_runs, smoothed


def made(root: Path, name: str, *, finished: bool = False, losses: int = 2, **overrides: Any) -> Path:
    run = root / "outputs" / "mine" / name
    run.mkdir(parents=True)
    recipe = {"learning_rate": 1e-3, "max_steps": 4, "output_dir": f"outputs/{name}", **overrides}
    (run / "run.json").write_text(json.dumps({"starts_from": {"recipe": recipe}, "overrides": overrides}))
    lines = [{"current_steps": step, "total_steps": 4, "loss": 1 / step} for step in range(1, losses + 1)]
    (run / "trainer_log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"current_st')
    if finished:
        write_manifest(run, {"recipe": recipe, "overrides": overrides, "weights_digest": name})
    return run


def test_a_run_has_its_name_and_curve_before_it_is_finished(tmp_path: Path) -> None:
    made(tmp_path, "aaaa", finished=True)
    made(tmp_path, "bbbb", learning_rate=0.01)
    (tmp_path / "outputs" / "mine" / "latest").symlink_to("aaaa")
    running, finished = known_runs(Layout(tmp_path))
    assert (running.name, running.state) == ("mine learning_rate=0.01", "training")
    assert (finished.name, finished.state) == ("mine", "finished")
    assert curve(running.log, "loss") == [(1, 1.0), (2, 0.5)]
    assert differing_keys([running, finished]) == ["learning_rate"]


def test_the_table_of_runs_shows_what_differs_and_which_is_best(tmp_path: Path) -> None:
    made(tmp_path, "aaaa", losses=2)
    made(tmp_path, "bbbb", losses=4, max_steps=8)
    runs = known_runs(Layout(tmp_path))
    lines = {line.name: line for line in table_of(Layout(tmp_path), runs, {})}
    assert sorted(lines["max_steps"].texts) == ["4", "8"] and "learning_rate" not in lines
    [best] = lines["last loss"].best
    assert lines["last loss"].texts[best] == "0.25"


def test_a_key_that_a_run_did_not_know_is_what_it_trained_with(tmp_path: Path) -> None:
    """A run of an older version "differed" from a new one in each key that had come since."""
    made(tmp_path, "aaaa")
    made(tmp_path, "bbbb", enable_liger_kernel=False, neftune_noise_alpha=None)
    made(tmp_path, "cccc", enable_liger_kernel=True)
    old, same, other = sorted(known_runs(Layout(tmp_path)), key=lambda run: run.key)
    assert differing_keys([old, same]) == [] and differing_keys([old, other]) == ["enable_liger_kernel"]
    [line] = [line for line in table_of(Layout(tmp_path), [old, other], {}) if line.group == "recipe"]
    assert line.texts == ["False", "True"]


@pytest.mark.attack("clock")
@pytest.mark.parametrize("step_s", [3600, -3600, 86400, -86400])
def test_a_run_trains_while_its_lock_is_held_whatever_the_clock_says(tmp_path: Path, step_s: int) -> None:
    """An hour after its last line by the clock a living run was "stopped", and a dead one of the future "training"."""
    run = made(tmp_path, "aaaa")
    for path in (run, *run.iterdir()):
        os.utime(path, (time.time() - step_s, time.time() - step_s))
    assert [found.state for found in known_runs(Layout(tmp_path))] == ["stopped"]
    with FileLock(lock_path(run)):
        assert [found.state for found in known_runs(Layout(tmp_path))] == ["training"]


@pytest.mark.attack("damage")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"starts_from": 3}', '{"starts_from": {"recipe": []}}', "\udcff"])
def test_a_damaged_run_costs_no_other(tmp_path: Path, text: str) -> None:
    made(tmp_path, "aaaa")
    (made(tmp_path, "bbbb") / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert [run.directory.name for run in known_runs(Layout(tmp_path))] == ["aaaa"]


def test_a_long_curve_keeps_its_first_and_last_point() -> None:
    log = [{"current_steps": step, "loss": 1.0} for step in range(1, 5001)]
    points = curve(log, "loss")
    assert len(points) == MAX_POINTS and (points[0][0], points[-1][0]) == (1, 5000)


def test_the_smoothed_loss_neither_trails_a_steep_fall_nor_is_pulled_at_its_ends() -> None:
    """A running mean was 0.9 nats above a loss that fell from 4.3 with a time constant of 10 steps."""
    loss = [(step, 0.3 + 4 * math.exp(-step / 10)) for step in range(100)]
    distances = [found - true for (_, found), (_, true) in zip(smoothed(loss, 0.9), loss, strict=True)]
    assert max(map(abs, distances)) < 0.2 and abs(distances[-1]) < 0.001


def test_the_smoothed_loss_calms_noise_like_a_running_mean_of_the_same_weight() -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    found = smoothed(list(enumerate(noise)), 0.9)
    assert np.std([value for _, value in found]) < 0.35


@pytest.mark.parametrize("weight", [0.0, 0.05, 0.6, 0.99])
def test_a_curve_of_few_or_odd_points_is_smoothed_too(weight: float) -> None:
    assert smoothed([], weight) == [] and smoothed([(1, 2.0)], weight) == [(1, 2.0)]
    found = smoothed([(1, 4.0), (2, math.nan), (3, 3.0), (4, 2.0)], weight)
    assert [value for _, value in found] == pytest.approx([4.0, 3.0, 2.0])
