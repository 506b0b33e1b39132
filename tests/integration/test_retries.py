"""A step whose worker is killed goes on by itself; a user's mistake is not tried twice."""

import signal
from collections import Counter

import dagster as dg
import pytest

from tests.integration.conftest import Project, wait_for
from tests.integration.test_interruption import find_trainer, num_steps_logged, weights

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

SELECT = 'key:"victim/checkpoint"'


def retrying(max_retries: int) -> dict[str, object]:
    return {"resources": {"gpu": {"config": {"max_retries": max_retries, "retry_delay_s": 0.1}}}}


def steps_of_newest_run(project: Project) -> Counter[str]:
    """How often each kind of step event is in the newest run."""
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        [run] = instance.get_runs(limit=1)
        events = [record.dagster_event for record in instance.all_logs(run.run_id)]
    return Counter(event.event_type_value for event in events if event and event.step_key)


def test_a_killed_trainer_is_started_again_and_the_weights_are_those_of_a_run_never_killed(project: Project) -> None:
    project.write_recipe("victim")
    command = project.materialize(SELECT, retrying(2))
    wait_for(lambda: num_steps_logged(project) >= 7, "step 7")
    find_trainer(command).send_signal(signal.SIGKILL)
    output, _ = command.communicate(timeout=500)
    assert command.returncode == 0, output
    assert "was ended by signal 9" in output and "run it again and it goes on" in output
    counts = steps_of_newest_run(project)
    assert (counts["STEP_START"], counts["STEP_UP_FOR_RETRY"], counts["STEP_RESTARTED"]) == (1, 1, 1)
    resumed = project.run_manifest("victim")
    assert resumed["resumed_from_step"] == 6

    project.made(SELECT, {"ops": {"victim__checkpoint": {"config": {"force": True}}}})
    whole = project.run_manifest("victim")
    assert whole["resumed_from_step"] is None
    assert weights(project, whole["fingerprint"]) == weights(project, resumed["fingerprint"])


def test_retries_end_with_the_reason_and_a_mistake_of_a_person_is_not_tried_again(project: Project) -> None:
    project.write_recipe("victim", max_steps=2000)
    killed = project.materialize(SELECT, retrying(0))
    find_trainer(killed).send_signal(signal.SIGKILL)
    output, _ = killed.communicate(timeout=500)
    assert killed.returncode != 0
    assert "The system may have run out of memory: lower the batch size." in output
    assert steps_of_newest_run(project)["STEP_FAILURE"] == 1

    project.write_recipe("victim", max_steps=1, cutoff_len=16)  # the worker finds that this cuts images
    mistaken = project.materialize(SELECT, retrying(2))
    output, _ = mistaken.communicate(timeout=500)
    assert mistaken.returncode != 0 and "cutoff_len" in output
    counts = steps_of_newest_run(project)
    assert (counts["STEP_START"], counts["STEP_FAILURE"], counts["STEP_UP_FOR_RETRY"]) == (1, 1, 0)
