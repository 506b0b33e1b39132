"""The real `dagster-daemon`, headless: it launches what changed, skips with a reason, and tells of what failed."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.scheduler.instigation import InstigatorTick, TickStatus

from tests.integration.conftest import IN_PROCESS, Project, wait_for
from tests.processes import processes_of
from tests.unit.operations.test_alerts import Receiver, receiver  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

BIRDS = {
    "type": "mllm_assets.components.ImageTextDataset",
    "attributes": {
        "name": "birds",
        "source": {"kind": "image_folder", "path": "birds"},
        "prompts": ["What?"],
        "split": {"num_train": 3, "num_val": 1},
        "watch": {"enabled": True, "every_s": 1, "settle_s": 1},
        "automatic": True,
    },
}


def write_image(project: Project, number: int) -> None:
    from PIL import Image

    folder = project.root / "birds"
    folder.mkdir(exist_ok=True)
    Image.effect_noise((48, 48), 40 + 9 * number).save(folder / f"{number}.png")
    (folder / f"{number}.txt").write_text(f"Bird number {number}.")


def start_daemon(project: Project) -> subprocess.Popen[str]:
    """Start the daemon with its log in a file: a pipe that nobody reads would stop it."""
    with (project.root / "daemon.log").open("w") as log:
        command = [sys.executable, "-m", "dagster._daemon", "run", "-m", f"{project.package}.definitions"]
        daemon = subprocess.Popen(
            command, cwd=project.root, env=project.env, stdout=log, stderr=subprocess.STDOUT, text=True
        )
    project.processes.append(daemon)
    return daemon


def change_defs(path: Path, **attributes: Any) -> None:
    component = yaml.safe_load(path.read_text())
    component["attributes"].update(attributes)
    path.write_text(yaml.safe_dump(component))


class Headless:
    """What the daemon did, read from the instance as the UI reads it."""

    def __init__(self, project: Project, instance: dg.DagsterInstance) -> None:
        self.project, self.instance = project, instance

    def ticks(self, name: str) -> list[InstigatorTick]:
        time.sleep(0.3)  # the daemon needs the databases, and the cores, more
        [state] = [state for state in self.instance.all_instigator_state() if state.instigator_name == name] or [None]
        return list(self.instance.get_ticks(state.instigator_origin_id, state.selector_id)) if state else []

    def skips(self, name: str) -> list[str]:
        return [tick.skip_reason or "" for tick in self.ticks(name) if tick.status is TickStatus.SKIPPED]

    def launched(self, name: str) -> list[str]:
        return [run_id for tick in self.ticks(name) for run_id in tick.run_ids]

    def finished(self, name: str) -> dg.DagsterRun | None:
        """The first run that a sensor or schedule launched, once it ended."""
        run = next((self.instance.get_run_by_id(run_id) for run_id in reversed(self.launched(name))), None)
        return run if run is not None and run.is_finished else None


def test_the_daemon_retrains_what_changed_ingests_new_files_skips_with_reasons_and_alerts(
    project: Project,
    receiver: Receiver,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLLM_ASSETS_ALERT_WEBHOOK", receiver.url)
    defs = project.root / project.package / "defs"
    (defs / "datasets" / "birds").mkdir()
    (defs / "datasets" / "birds" / "defs.yaml").write_text(yaml.safe_dump(BIRDS))
    for number in range(4):
        write_image(project, number)
    project.write_recipe("mine", max_steps=1, max_samples=8, eval_dataset=None)
    project.made('key:"mine/checkpoint" or key:"birds/raw"')
    (defs / "executor.py").write_text(IN_PROCESS)
    # a step more, and every minute is as good as every week; a tick missed while no daemon ran is made up for
    project.write_recipe("mine", max_steps=2, max_samples=8, eval_dataset=None)
    change_defs(defs / "recipes" / "defs.yaml", weekly_retraining={"enabled": True, "cron_schedule": "* * * * *"})

    daemon = start_daemon(project)
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        seen = Headless(project, instance)
        # a tick that skips
        unchanged = "the 8 files of birds are those that were ingested"
        wait_for(lambda: unchanged in seen.skips("birds_new_files"), "a tick that skips")
        # a tick that launches a run, which succeeds; a tick while it runs
        write_image(project, 4)
        run = wait_for(lambda: seen.finished("birds_new_files"), "the run that ingests")
        assert run.status is dg.DagsterRunStatus.SUCCESS
        assert run.tags["dagster/max_runtime"] == "21600"
        assert re.fullmatch("the 10 files of birds changed, and then did not for .* s", run.tags["mllm_assets/reason"])
        assert project.metadata("birds", "raw")["num_samples"] == 5
        assert "a run of birds is in progress" in seen.skips("birds_new_files")
        assert len(seen.launched("birds_new_files")) == 1
        # the schedule
        retrained = wait_for(lambda: seen.finished("weekly_retraining"), "the retraining")
        assert retrained.status is dg.DagsterRunStatus.SUCCESS
        assert retrained.tags["dagster/max_runtime"] == "86400"
        assert project.run_manifest("mine")["num_steps"] == 2
        # a failure is told
        (project.root / "birds" / "metadata.jsonl").write_text("no JSON\n")
        [alert] = wait_for(lambda: receiver.alerts, "the alert")
        assert (alert["event"], alert["step"]) == ("run_failed", "birds__raw")
        assert "metadata.jsonl" in alert["error"]
    daemon.send_signal(signal.SIGINT)
    daemon.wait(300)
    wait_for(lambda: not processes_of(project.root), "all processes to end")
    written = [
        path
        for path in project.root.rglob("*")
        if path.is_file() and "planted-secret" in path.read_text(errors="ignore")
    ]
    assert written == [], "the webhook's address is a secret"


def test_a_scheduled_run_that_takes_too_long_is_ended_and_leaves_no_trainer(project: Project) -> None:
    settings = yaml.safe_load((project.home / "dagster.yaml").read_text())
    settings["run_monitoring"]["poll_interval_seconds"] = 1  # instead of two minutes
    (project.home / "dagster.yaml").write_text(yaml.safe_dump(settings))
    defs = project.root / project.package / "defs"
    project.write_recipe("mine", max_steps=1, max_samples=8, eval_dataset=None)
    project.made('key:"mine/checkpoint"')
    project.write_recipe("mine", max_steps=9000, max_samples=8, eval_dataset=None)
    (defs / "executor.py").write_text(IN_PROCESS)
    schedule = {"enabled": True, "cron_schedule": "* * * * *", "max_runtime_h": 10 / 3600}
    change_defs(defs / "recipes" / "defs.yaml", weekly_retraining=schedule)
    daemon = start_daemon(project)
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        seen = Headless(project, instance)
        run = wait_for(lambda: seen.finished("weekly_retraining"), "the run's end")
        assert run.status is dg.DagsterRunStatus.FAILURE
        told = [str(record.dagster_event and record.dagster_event.message) for record in instance.all_logs(run.run_id)]
        assert any("exceeding maximum runtime of 10 seconds" in text for text in told)
    daemon.send_signal(signal.SIGINT)
    daemon.wait(300)
    wait_for(lambda: not processes_of(project.root), "all processes to end")
