"""A task crosses the border as JSON, whole; what does not fit is refused by its name."""

import json
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.errors import MachineError, RecipeError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.worker.tasks import (
    TASKS,
    BuildTask,
    CacheSettings,
    EvaluateTask,
    Evaluation,
    EvaluationSettings,
    Features,
    FeaturesTask,
    Measured,
    Part,
    Task,
    TrainTask,
    Verification,
    VerifyTask,
    from_json,
    result_from_json,
    to_json,
)
from mllm_assets.worker.typed_json import encode
from tests.fake_tasks import FakeTask

HERE = Path("/a")
RECIPE = TrainSpec(
    model_name_or_path="m", dataset="d", eval_dataset="e", template="gemma3", do_train=True, warmup_steps=3,
    quantization_bit=4, finetuning_type="lora", lr_scheduler_kwargs={"a": [1]}, report_to=["none"],
)  # fmt: skip
FEATURES = Features(
    directory="t", digest="d", tower_fingerprint="t", num_images=3, num_computed=2, num_bytes=9, dtype="float32"
)
MEASURED = Measured(losses={"0": (0.5, 3)}, shuffled_losses={}, answers={"0": ("yes", 1, 0.25)})
EVALUATION = Evaluation(manifest={"digest": "d"}, measured={"tuned": MEASURED})
SAMPLES: dict[str, Task[Any]] = {
    "build_pretrained": BuildTask(directory=HERE),
    "vision_features": FeaturesTask(
        recipe=RECIPE, model_dir=HERE, data_dir=HERE, features_root=HERE, part=Part(index=1, count=2), parts=(FEATURES,)
    ),
    "train": TrainTask(
        recipe=RECIPE, recipe_name="r", model_dir=HERE, data_dir=HERE, run_dir=HERE, rows_root=HERE, fingerprint="f",
        data_digests={"d": "1"}, pretrained_fingerprint="p", stages=({"recipe": "r"},), notes=("careful",),
        caches=CacheSettings(features_root=HERE),
    ),
    "evaluate": EvaluateTask(
        recipe=RECIPE, recipe_name="r", entries=("d",), model_dir=HERE, base_model_dir=HERE, data_dir=HERE,
        data_digests={"d": "1"}, model_digests={"base": "2", "tuned": "3"}, directory=HERE,
        settings=EvaluationSettings(max_new_tokens=8), parts=(EVALUATION,),
    ),
    "release": VerifyTask(directory=HERE, checkpoint_dir=HERE, base_model_dir=HERE),
}  # fmt: skip
RESULTS = {
    "build_pretrained": {"num_params": 1},
    "vision_features": FEATURES,
    "train": {"num_steps": 4, "eval_loss": None},
    "evaluate": EVALUATION,
    "release": Verification(num_missing=0, num_unexpected=0, num_params=2, loss=1.5),
}


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_and_its_result_come_back_equal(name: str) -> None:
    task = SAMPLES[name]
    values = through_json(to_json(task))
    assert values["task"] == name and from_json(values) == task
    assert result_from_json(task, through_json(encode(RESULTS[name]))) == RESULTS[name]


@pytest.mark.parametrize("name", TASKS)
def test_an_unknown_a_missing_and_a_mistyped_key_are_refused_by_their_names(name: str) -> None:
    """Such as `max_new_token: 8`, which was 64 without a word, and a digest that was not there and was not checked."""
    whole = through_json(to_json(SAMPLES[name]))
    for key in (key for key in whole if key != "task"):
        lacking = {other: value for other, value in whole.items() if other != key}
        with pytest.raises(MachineError, match=rf"^The task {name}: the key {key} is missing\. .* one version"):
            from_json(lacking)
        with pytest.raises(MachineError, match=rf"^The task {name}: the key {key}x is unknown; the nearest is {key}\."):
            from_json({**lacking, f"{key}x": whole[key]})
        wrong = 7 if not isinstance(whole[key], int) or isinstance(whole[key], bool) else "seven"
        with pytest.raises(MachineError, match=rf"^The task {name}: {key} is of the type (int|str), expected "):
            from_json({**whole, key: wrong})


def test_a_key_of_a_part_is_named_with_its_place() -> None:
    values = through_json(to_json(SAMPLES["evaluate"]))
    values["settings"]["max_new_token"] = values["settings"].pop("max_new_tokens")
    with pytest.raises(
        MachineError, match=r"the key settings\.max_new_token is unknown; the nearest is settings\.max_new_tokens\."
    ):
        from_json(values)
    values = through_json(to_json(SAMPLES["train"]))
    values["accelerator"]["device"] = "tpu"
    with pytest.raises(MachineError, match=r"accelerator\.device is of the type str, expected 'auto' or 'cuda' or"):
        from_json(values)
    values = through_json(to_json(SAMPLES["train"]))
    values["data_digests"]["d"] = None
    with pytest.raises(MachineError, match=r"data_digests\.d is of the type NoneType, expected str\."):
        from_json(values)


def test_a_recipe_in_a_task_is_validated_as_any_other() -> None:
    values = through_json(to_json(SAMPLES["train"]))
    values["recipe"]["learning_rate"] = -1.0
    with pytest.raises(RecipeError, match="learning_rate is -1.0"):
        from_json(values)


def test_a_result_that_is_none_names_the_key() -> None:
    with pytest.raises(MachineError, match="^The result of the task release: the key num_unexpected is missing"):
        result_from_json(SAMPLES["release"], {"num_missing": 0})


@pytest.mark.parametrize("name", ["trian", "os:system", "json:JSONDecoder", None])
def test_json_names_no_other_code_than_tasks(name: str | None) -> None:
    with pytest.raises(
        MachineError, match=f"^Unknown task {name!r}: expected one of build_pretrained, vision_features"
    ):
        from_json({"task": name})


def test_a_task_outside_of_the_table_is_known_by_its_class() -> None:
    task = FakeTask(what="waits", folder=HERE)
    assert task.name == "tests.fake_tasks:FakeTask" and from_json(through_json(to_json(task))) == task


@pytest.mark.parametrize(("values", "reason"), [({"temperature": 0.0}, "above 0"), ({"top_p": 1.5}, "at most 1")])
def test_settings_that_cannot_sample_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=f"evaluation.{next(iter(values))} is .*{reason}"):
        EvaluationSettings(**values)


def test_predictions_of_chosen_samples_are_not_those_of_the_first_samples_that_an_earlier_version_took() -> None:
    limited, whole = EvaluationSettings(max_samples=16).conditions(RECIPE), EvaluationSettings().conditions(RECIPE)
    assert limited["chosen"] == "spread" and "chosen" not in whole


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"backend": "127.0.0.1:8000"}, "is not an address"),
        ({"backend": "file:///etc/passwd"}, "is not an address"),
        ({"backend": "http://me:secret@host/v1"}, "MLLM_ASSETS_API_KEY"),
        ({"backend": "http://host/v1?key=secret"}, "MLLM_ASSETS_API_KEY"),
        ({"backend": "http://host/v1", "do_sample": True}, "do_sample"),
    ],
)
def test_a_backend_that_cannot_be_asked_is_refused_without_its_secret(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        EvaluationSettings(**values)
    assert "secret" not in str(refused.value)


def test_predictions_of_a_backend_are_others_and_those_without_keep_their_names() -> None:
    own, other = EvaluationSettings(), EvaluationSettings(backend="http://host/v1", backend_model="m")
    assert own.identity() != other.identity() and not [name for name in own.identity() if name.startswith("backend")]
