"""A weekly tick retrains exactly what changed since the last checkpoint."""

import json
import re
from typing import Any

import pytest
import yaml

from tests.integration.conftest import Project, line_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]


# A process of its own for each tick: definitions are read once a process
TICK = """
import importlib, json, sys
import dagster as dg

repository = importlib.import_module(sys.argv[1] + ".definitions").defs().get_repository_def()
schedule = repository.get_schedule_def("weekly_retraining")
with dg.DagsterInstance.get() as instance:
    data = schedule.evaluate_tick(dg.build_schedule_context(instance=instance, repository_def=repository))
    requests = [
        {"assets": sorted(key.to_user_string() for key in request.asset_selection), "tags": dict(request.tags)}
        for request in data.run_requests or []
    ]
    print(json.dumps({"requests": requests, "skipped": data.skip_message, "status": schedule.default_status.value}))
    if "--in-progress" in sys.argv:
        keys = frozenset(data.run_requests[0].asset_selection)
        job = repository.get_job("retraining")
        instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, asset_selection=keys)
"""


def tick(project: Project, *options: str) -> dict[str, Any]:
    """Evaluate the schedule once; `--in-progress` then records a run of what it asked for as started."""
    process = project.start_python("-c", TICK, project.package, *options)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return json.loads(output.strip().splitlines()[-1])


@pytest.fixture
def trained(project: Project) -> Project:
    project.write_recipe("mine", max_steps=1, max_samples=8, eval_dataset=None)
    project.write_recipe("other", max_steps=1, max_samples=8, eval_dataset=None)
    project.made('key:"mine/checkpoint"')
    return project


@pytest.mark.slow
def test_a_tick_launches_what_changed_and_skips_the_rest_with_a_reason(trained: Project) -> None:
    first = tick(trained)
    assert first["requests"] == []
    assert first["skipped"] == "mine: nothing changed; other: never trained, so there is nothing to retrain"

    trained.write_recipe("mine", max_steps=2, max_samples=8, eval_dataset=None)
    [request] = tick(trained)["requests"]
    assert request["assets"] == ["mine/checkpoint"]
    assert request["tags"]["mllm_assets/retraining"] == "mine"

    trained.set_split(num_train=600, num_val=100)
    [request] = tick(trained, "--in-progress")["requests"]
    assert request["assets"] == ["emoji/dataset_info", "emoji/test", "emoji/train", "emoji/val", "mine/checkpoint"]

    while_one_runs = tick(trained)
    assert while_one_runs["requests"] == []
    assert while_one_runs["skipped"].startswith("mine: a run of it is in progress")


@pytest.mark.slow
def test_a_line_that_a_failed_check_blocks_is_not_launched_again(project: Project) -> None:
    """With the same inputs the gate would fail again, every week."""
    project.write_recipe("weak", max_steps=1, max_samples=8)
    project.set_defaults(gates={"min_answer_gain": 0.5})
    project.materialize(line_of("weak", "eval_metrics")).communicate(timeout=500)
    blocked = tick(project)
    assert blocked["requests"] == []
    assert re.fullmatch("weak: blocked by the failed check [a-z_]+ of weak/eval_metrics", blocked["skipped"])


def test_the_schedule_is_off_until_the_yaml_switches_it_on(project: Project) -> None:
    project.write_recipe("mine")
    assert tick(project)["status"] == "STOPPED"
    path = project.root / project.package / "defs" / "recipes" / "defs.yaml"
    component = yaml.safe_load(path.read_text())
    component["attributes"]["weekly_retraining"]["enabled"] = True
    path.write_text(yaml.safe_dump(component))
    assert tick(project)["status"] == "RUNNING"
