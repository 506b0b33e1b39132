"""`mllm-assets run` makes what is named, what it needs and is out of date, and nothing else."""

import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from mllm_assets.cli import main
from mllm_assets.components.assets.corrections import DECISIONS
from mllm_assets.components.instance.launch import run
from mllm_assets.components.instance.location import Location
from mllm_assets.components.instance.run_plan import Request, RunPlan, plan_run
from mllm_assets.errors import RecipeError
from mllm_assets.layout import Layout

RECIPE = """model_name_or_path: pretrains/tiny
stage: sft
do_train: true
finetuning_type: full
dataset: birds_train
eval_dataset: birds_val
template: gemma3
output_dir: outputs/birds_sft
max_steps: 40
"""
DEFINITIONS = """from pathlib import Path
import dagster as dg
from mllm_assets.components.instance.executor import patient_in_process_executor
from mllm_assets.components.jobs import LOGGERS
from mllm_assets.components.reporting import failing_asset
from mllm_assets.errors import RecipeError

ROOT = Path(__file__).parents[1]

def asset(name, *deps, checks=(), **metadata):
    @dg.asset(key=name.split("/"), deps=[dep.split("/") for dep in deps], metadata=metadata,
              check_specs=[dg.AssetCheckSpec(check, asset=name.split("/"), blocking=True) for check in checks])
    def made():
        path = ROOT / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        text = "too few are right"
        results = [dg.AssetCheckResult(check_name=name, passed=False, description=text) for name in checks]
        return dg.MaterializeResult(
            data_version=dg.DataVersion("1"), check_results=results,
            metadata={"path": str(path.relative_to(ROOT)), "fingerprint": "f"})
    return made

@dg.multi_asset(specs=[dg.AssetSpec(["birds", name], deps=[["birds", "raw"]]) for name in ("train", "val")])
def splits():
    for name in ("train", "val"):
        yield dg.MaterializeResult(asset_key=["birds", name], data_version=dg.DataVersion("1"))

recipe = dg.MetadataValue.path(str(ROOT / "configs" / "birds_sft.yaml"))
defs = dg.Definitions(loggers=LOGGERS, executor=patient_in_process_executor, assets=[
    asset("birds/raw"), splits, asset("birds/dataset_info", "birds/train", "birds/val"), asset("pretrained/tiny"),
    asset("birds_sft/checkpoint", "birds/dataset_info", "pretrained/tiny", recipe_file=recipe),
    asset("birds_sft/eval_metrics", "birds_sft/checkpoint", checks=["beats_base_model"]),
    asset("birds_sft/released_model", "birds_sft/eval_metrics"),
    asset("birds_sft/hub_model", "birds_sft/released_model"),
    failing_asset(dg.AssetKey(["broken", "checkpoint"]), RecipeError("broken.yaml:3: unknown key")),
])
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A project whose assets write a file each."""
    package = f"shop_{tmp_path.parent.name.replace('-', '_')}_{tmp_path.name}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "definitions.py").write_text(DEFINITIONS)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "birds_sft.yaml").write_text(RECIPE)
    (tmp_path / "pyproject.toml").write_text(f'[tool.dg.project]\nroot_module = "{package}"\n')
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with dg.DagsterInstance.get() as found:
        yield found


def planned(project: Path, instance: dg.DagsterInstance, *names: str, **values: object) -> RunPlan:
    return plan_run(Request(names=names, **values), Location(project), instance, Layout(project))  # pyright: ignore


def names(keys: object) -> list[str]:
    return sorted(key.to_user_string() for key in keys)  # pyright: ignore[reportGeneralTypeIssues]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("birds_stf", "Nothing is called 'birds_stf'. Did you mean 'birds_sft'? There are: birds, birds_sft"),
        ("birds_sft/eval_metric", "Did you mean 'birds_sft/eval_metrics'? birds_sft has checkpoint, eval_metrics"),
        ("zebras", "There are: birds, birds_sft, broken; models: tiny. Nothing was run."),
        ("max_steps", "Nothing is called 'max_steps'. A recipe's key takes a value: max_steps=VALUE. There are:"),
        ("*/nothing", "Nothing is called"),
        ("", "Nothing is called ''"),
        ('"birds_sft"', "Nothing is called '\"birds_sft\"'. Did you mean 'birds_sft'?"),
        ('+key:"birds_sft/eval_metric"', "Did you mean 'birds_sft/eval_metrics'? birds_sft has checkpoint"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_with_the_nearest(
    project: Path, instance: dg.DagsterInstance, name: str, expected: str
) -> None:
    """Dagster's selection of a name with a letter missing ran all 57 assets."""
    with pytest.raises(RecipeError) as refused:
        planned(project, instance, name)
    assert expected in str(refused.value)


@pytest.mark.parametrize("name", ["birds_sft", "configs/birds_sft.yaml", "birds_sft/"])
def test_a_recipe_is_made_up_to_its_release_and_is_not_published(
    project: Path, instance: dg.DagsterInstance, name: str
) -> None:
    plan = planned(project, instance, name)
    assert names(plan.named) == ["birds_sft/released_model"]
    assert "birds_sft/hub_model" not in names(plan.reasons) and "birds/raw" in names(plan.reasons)


def test_what_people_decided_is_read_again_and_nothing_else(project: Path, instance: dg.DagsterInstance) -> None:
    """A decision that was added without Dagster, from another checkout for example, would have waited unseen."""
    made = dg.AssetMaterialization(["birds", "raw"], metadata={DECISIONS: "none", "path": "."})
    (project / "manifest.json").touch()
    instance.report_runless_asset_event(made)
    before = planned(project, instance, "birds").reasons.get(dg.AssetKey(["birds", "raw"]))
    (project / "corrections").mkdir()
    (project / "corrections" / "birds.jsonl").write_text("{}\n")
    after = planned(project, instance, "birds").reasons[dg.AssetKey(["birds", "raw"])]
    assert before != after == "people decided about its samples"


def test_another_file_of_the_same_name_is_not_the_recipe(project: Path, instance: dg.DagsterInstance) -> None:
    """The project's own recipe was run in its place, without a word."""
    (other := project / "birds_sft.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError, match="is not the recipe birds_sft, which is .*configs/birds_sft.yaml"):
        planned(project, instance, str(other))


@pytest.mark.parametrize(("name", "last"), [("birds", "birds/dataset_info"), ("tiny", "pretrained/tiny")])
def test_a_dataset_and_a_model_are_found_by_their_names(
    project: Path, instance: dg.DagsterInstance, name: str, last: str
) -> None:
    assert names(planned(project, instance, name).named) == [last]


def test_a_pattern_leaves_out_what_is_switched_off(project: Path, instance: dg.DagsterInstance) -> None:
    """`*/raw` was refused for three datasets that nobody had asked for."""
    [definitions] = project.glob("*/definitions.py")
    off = 'off_asset(asset("naruto/raw"), "naruto is switched off: it needs the Hub."), asset("birds/raw"),'
    text = definitions.read_text().replace('asset("birds/raw"),', off)
    definitions.write_text(f"from mllm_assets.components.switches import off_asset\n{text}")
    assert names(planned(project, instance, "*/raw").named) == ["birds/raw"]
    with pytest.raises(RecipeError, match="naruto is switched off"):
        planned(project, instance, "nar*/raw")


def test_a_split_is_made_with_the_other_of_its_step(project: Path, instance: dg.DagsterInstance) -> None:
    """Dagster refuses a selection of one alone."""
    assert names(planned(project, instance, "birds/train", only=True).reasons) == ["birds/train", "birds/val"]


def test_only_of_a_recipe_or_a_dataset_is_its_own_assets(project: Path, instance: dg.DagsterInstance) -> None:
    """It was the last of them alone, which there was nothing to make of."""
    own = ["birds_sft/checkpoint", "birds_sft/eval_metrics", "birds_sft/released_model"]
    assert names(planned(project, instance, "birds_sft", only=True).reasons) == own
    trial = planned(project, instance, "birds_sft", only=True, overrides=["max_steps=3"])
    assert names(trial.reasons) == own[:2]
    assert names(planned(project, instance, own[2], only=True).reasons) == own[2:]
    assert "birds/raw" not in names(planned(project, instance, "birds_sft", "birds/val", only=True).reasons)
    assert names(planned(project, instance, "*/raw", "birds_sft/eval*", only=True).reasons) == ["birds/raw", own[1]]


def test_the_plan_says_that_a_finished_run_of_these_values_is_taken(
    project: Path, instance: dg.DagsterInstance
) -> None:
    """It read as if the recipe would be trained again after each trial."""
    run_dir = project / "outputs" / "birds_sft" / "0123abcd"
    run_dir.mkdir(parents=True)
    (run_dir / "manifest.json").write_text('{"kind": "checkpoint", "files": {}, "overrides": {}}')
    (run_dir.parent / "latest").symlink_to(run_dir.name)
    trial = {"path": "outputs/birds_sft/other", "fingerprint": "f", "overrides": {"max_steps": 3}}
    (project / "outputs/birds_sft/other").mkdir()
    (project / "outputs/birds_sft/other/manifest.json").write_text("{}")
    checkpoint = dg.AssetKey(["birds_sft", "checkpoint"])
    instance.report_runless_asset_event(dg.AssetMaterialization(checkpoint, metadata=trial))
    why = planned(project, instance, "birds_sft").reasons[checkpoint]
    expected = "outputs/birds_sft/0123abcd is finished and taken, unless data or model changed"
    assert why == f"the last run had max_steps=3; {expected}"
    assert planned(project, instance, "birds_sft", overrides=["max_steps=4"]).reasons[checkpoint] == "max_steps=4"


def test_a_recipe_that_cannot_be_read_is_refused_before_anything_runs(
    project: Path, instance: dg.DagsterInstance
) -> None:
    with pytest.raises(RecipeError, match=r"broken.yaml:3: unknown key\nNothing was run"):
        planned(project, instance, "birds", "broken")


def test_values_belong_to_a_recipe_and_are_checked_before_anything_runs(
    project: Path, instance: dg.DagsterInstance
) -> None:
    with pytest.raises(RecipeError, match="only a recipe that can be read takes values, which birds is not"):
        planned(project, instance, "birds", overrides=["max_steps=3"])
    with pytest.raises(RecipeError, match="unknown key 'max_stps'. Did you mean max_steps"):
        planned(project, instance, "birds_sft", overrides=["max_stps=3"])
    with pytest.raises(RecipeError, match="Leave --only out"):
        planned(project, instance, "birds_sft/eval_metrics", overrides=["max_steps=3"], only=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("output_dir=outputs/other", "output_dir cannot be another one in a run of birds_sft: what follows looks for"),
        ("model_name_or_path=pretrains/other", "model_name_or_path cannot be another one in a run of birds_sft"),
        ("dataset=birds_trian", "no dataset 'birds_trian'. The nearest are birds_train"),
        (
            "eval_dataset=birds_train",
            "eval_dataset cannot be another one in a run of birds_sft: all its runs are judged by",
        ),
    ],
)
def test_a_value_that_the_graph_has_no_asset_for_is_refused_before_anything_runs(
    project: Path, instance: dg.DagsterInstance, value: str, message: str
) -> None:
    """Another model was named in the record, and the recipe's own was trained; an entry was missed after its data."""
    (project / "data").mkdir()
    (project / "data" / "dataset_info.json").write_text('{"birds_train": {"file_name": "a.json"}}')
    with pytest.raises(RecipeError, match=message):
        planned(project, instance, "birds_sft", overrides=[value])


@pytest.mark.parametrize(
    ("value", "note"),
    [
        ("lora_rank=16", ["lora_rank has no effect: finetuning_type is full, not lora."]),
        ("logging_steps=7", ["logging_steps: the weights do not depend on it. A finished run is taken as it is;"]),
        ("max_steps=40", ["max_steps: as in birds_sft.yaml. A finished run is taken as it is; --force trains again."]),
        ("max_steps=41", []),
    ],
)
def test_a_value_without_effect_is_said_in_the_plan(
    project: Path, instance: dg.DagsterInstance, value: str, note: list[str]
) -> None:
    """`lora_rank=16` of a recipe that trains everything made nothing, and "everything is up to date"."""
    found = planned(project, instance, "birds_sft", overrides=[value]).notes
    assert len(found) == len(note) and all(text.startswith(start) for text, start in zip(found, note, strict=True))


def test_what_is_forced_says_so_and_a_trial_has_its_values(project: Path, instance: dg.DagsterInstance) -> None:
    reasons = planned(project, instance, "birds_sft", force=True).reasons
    assert set(reasons.values()) == {"forced: made again"}
    checkpoint = dg.AssetKey(["birds_sft", "checkpoint"])
    trial = planned(project, instance, "birds_sft", force=True, overrides=["max_steps=3"]).reasons
    assert trial[checkpoint] == "forced: made again, with max_steps=3"
    first = planned(project, instance, "birds_sft", overrides=["max_steps=3"]).reasons
    assert first[checkpoint] == "never made, with max_steps=3"


def test_a_pattern_makes_what_is_out_of_date_and_publishes_nothing(project: Path, instance: dg.DagsterInstance) -> None:
    """`run '*'` made everything again, each asset being "named", and pushed to the Hub."""
    run(Request(names=["birds"]), project, Layout(project), dry_run=False, notify=lambda _: None)
    plan = planned(project, instance, "bird*")
    assert {"birds/raw", "birds/dataset_info"} <= set(names(plan.current))
    assert "birds_sft/checkpoint" in names(plan.reasons) and "birds_sft/hub_model" not in names(plan.reasons)


def test_a_trial_is_judged_and_released_only_by_name(project: Path, instance: dg.DagsterInstance) -> None:
    trial = ["max_steps=3", "logging_steps=7"]
    plan = planned(project, instance, "birds_sft", overrides=trial)
    assert names(plan.named) == ["birds_sft/eval_metrics"] and plan.tags == {"run": "birds_sft", "max_steps": "3"}
    assert plan.config == {
        "ops": {"birds_sft__checkpoint": {"config": {"other": {"max_steps": 3, "logging_steps": 7}}}}
    }
    by_file = planned(project, instance, "configs/birds_sft.yaml", overrides=trial)
    assert by_file == plan, "a trial was released where the recipe's file was given"
    named = planned(project, instance, "birds_sft/released_model", overrides=trial)
    assert names(named.named) == ["birds_sft/released_model"]
    assert names(planned(project, instance, "birds_sft", overrides=["max_steps=40"]).named) == names(named.named)


def test_what_is_up_to_date_stays_and_what_changed_is_made_with_what_follows(
    project: Path, instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    outcome = run(Request(names=["birds_sft"]), project, Layout(project), dry_run=False, notify=said.append)
    assert outcome.problems == ("birds_sft/eval_metrics: beats_base_model failed: too few are right",)
    log = capfd.readouterr().err
    assert "FAILED  beats_base_model: too few are right" in log and "Traceback" not in log

    plan = planned(project, instance, "birds_sft")
    assert names(plan.reasons) == [] and names(plan.blocked) == ["birds_sft/released_model"]
    again = run(Request(names=["birds_sft"]), project, Layout(project), dry_run=False, notify=said.append)
    assert not again.was_made and "failed, and nothing changed since: too few are right" in again.problems[0]

    (project / "made" / "birds" / "dataset_info").unlink()
    changed = planned(project, instance, "birds_sft")
    assert changed.reasons[dg.AssetKey(["birds", "dataset_info"])] == "made/birds/dataset_info is gone"
    assert "birds/raw" in names(changed.current) and "birds_sft/checkpoint" in names(changed.reasons)
    (project / "made" / "birds" / "dataset_info" / "shard").mkdir(parents=True)
    (project / "made" / "birds" / "dataset_info" / "shard" / "manifest.json").write_text("{}")
    there = "a folder of shards, such as cached features, was called gone and made again each time"
    assert names(planned(project, instance, "birds_sft").reasons) == [], there

    assert "birds/raw" in names(planned(project, instance, "birds_sft", force=True).reasons)
    assert names(planned(project, instance, "birds_sft/eval_metrics", only=True).reasons) == ["birds_sft/eval_metrics"]
    [record] = [record for record in instance.get_runs() if record.tags.get("run") == "birds_sft"]
    assert record.is_failure


def test_ctrl_c_in_any_step_is_a_stop_and_no_failure(
    project: Path, instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str]
) -> None:
    module = next(project.glob("shop_*/definitions.py"))
    module.write_text(module.read_text().replace('path.write_text("")', "os.kill(os.getpid(), signal.SIGINT)", 1))
    module.write_text(f"import os, signal\n{module.read_text()}")
    stopped = run(Request(names=["birds"]), project, Layout(project), dry_run=False, notify=lambda _: None)
    assert stopped.was_cancelled
    assert "Execution was interrupted unexpectedly" not in capfd.readouterr().err


def test_a_folder_without_a_project_is_refused_and_gets_no_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.delenv("MLLM_ASSETS_ROOT", raising=False)
    assert main(["run", "emoji"]) == 2
    assert "mllm-assets init" in capsys.readouterr().err and not list(tmp_path.iterdir())
