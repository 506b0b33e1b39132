"""A recipe means what LLaMA-Factory reads in it."""

from pathlib import Path

import pytest
import yaml

from mllm_assets.errors import RecipeError
from mllm_assets.recipe.load import load_recipe
from mllm_assets.recipe.spec import TrainSpec, split_names

CONFIGS = Path(__file__).parents[3] / "configs"
BASE = {"model_name_or_path": "model", "dataset": "emoji_train", "template": "gemma3", "do_train": True}


def spec_of(**values: object) -> TrainSpec:
    return TrainSpec(**{**BASE, **values})


@pytest.fixture
def recipe_file(tmp_path: Path):
    def write(text: str = "", name: str = "My-Recipe.v2.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(BASE) + text)
        return path

    return write


@pytest.mark.parametrize("name", ["gemma3_projector_sft", "gemma3_trans_projector_head_sft"])
def test_the_guides_recipes_load_as_they_are(name: str, golden) -> None:
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    assert recipe.name == name
    assert recipe.spec.train_entries == ("gemma3_vlm_train",)
    assert recipe.spec.eval_entries == ("gemma3_vlm_val",)
    golden(f"recipes/{name}", {"spec": recipe.spec.to_dict(), "notes": list(recipe.notes)})


def test_the_parity_references_recipes_load_as_they_are(parity_dir: Path, tmp_path: Path) -> None:
    import json

    for name in ("projector", "freeze", "full", "lora"):
        config = json.loads((parity_dir / "reference" / f"{name}.json").read_text())["config"]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        spec = load_recipe(tmp_path / f"{name}.yaml").spec
        assert spec.finetuning_type == ("full" if name == "projector" else name)
        assert spec.save_strategy == "no" and spec.eval_strategy == "epoch" and spec.disable_shuffling


def test_numbers_are_read_as_omegaconf_reads_them(recipe_file) -> None:
    """Plain PyYAML makes the text '1e-4' of 1e-4, and training would fail, or compare texts, far from the file."""
    recipe = load_recipe(recipe_file("learning_rate: 1e-4\nadam_epsilon: 1.e-8\nmax_steps: 1e2\nsave_steps: 1_000\n"))
    assert recipe.spec.learning_rate == 1e-4
    assert recipe.spec.adam_epsilon == 1e-8
    assert (recipe.spec.max_steps, type(recipe.spec.max_steps)) == (100, int)
    assert recipe.spec.save_steps == 1000


def test_a_date_stays_text(recipe_file) -> None:
    assert load_recipe(recipe_file("output_dir: 2026-01-31\n")).spec.output_dir == "2026-01-31"


def test_a_bare_no_is_the_strategy_no(recipe_file) -> None:
    recipe = load_recipe(recipe_file("save_strategy: no\neval_strategy: no\n"))
    assert (recipe.spec.save_strategy, recipe.spec.eval_strategy) == ("no", "no")


def test_a_list_serves_as_a_comma_list(recipe_file) -> None:
    recipe = load_recipe(recipe_file("freeze_extra_modules: [multi_modal_projector, lm_head]\n"))
    assert recipe.spec.freeze_extra_modules == "multi_modal_projector,lm_head"
    assert split_names(recipe.spec.freeze_extra_modules) == ("multi_modal_projector", "lm_head")
    assert split_names(" a , b,") == ("a", "b") and split_names(None) == ()


def test_shares_may_be_a_list_of_numbers(recipe_file) -> None:
    values = "mix_strategy: interleave_over\ninterleave_probs: [0.7, 0.3]\n"
    assert load_recipe(recipe_file(values), ["dataset=a,b"]).spec.probabilities == [0.7, 0.3]


def test_derived_defaults_are_those_of_llamafactory_and_transformers() -> None:
    assert spec_of().lora_alpha == 16
    assert spec_of(lora_rank=4).lora_alpha == 8
    assert spec_of(lora_rank=4, lora_alpha=3).lora_alpha == 3
    assert spec_of(eval_strategy="steps", eval_dataset="v", logging_steps=7).eval_steps == 7
    best = spec_of(eval_strategy="steps", eval_dataset="v", load_best_model_at_end=True)
    assert (best.metric_for_best_model, best.greater_is_better) == ("loss", False)
    assert spec_of().metric_for_best_model is None


def test_a_metric_of_answers_brings_its_direction_along() -> None:
    evaluated = {"eval_strategy": "steps", "eval_dataset": "v", "load_best_model_at_end": True}
    for name, is_better in (("label_accuracy", True), ("eval_exact_match", True), ("character_error_rate", False)):
        spec = spec_of(**evaluated, metric_for_best_model=name)
        assert spec.greater_is_better is is_better
        assert spec.answer_metric == name.removeprefix("eval_") and spec.measures_answers
    assert not spec_of(**evaluated).measures_answers
    assert not spec_of(metric_for_best_model="label_accuracy").measures_answers  # nothing is evaluated


def test_warmup_ratio_becomes_a_share_of_warmup_steps() -> None:
    """`warmup_ratio` is gone from transformers 5; there a `warmup_steps` below 1 is the share."""
    assert spec_of(warmup_ratio=0.05).training_arguments()["warmup_steps"] == 0.05
    assert spec_of(warmup_steps=30).training_arguments()["warmup_steps"] == 30
    assert "warmup_ratio" not in spec_of(warmup_ratio=0.05).training_arguments()


def test_a_spec_survives_the_trip_to_the_worker() -> None:
    import json

    spec = spec_of(lr_scheduler_kwargs={"num_cycles": 2}, warmup_ratio=0.1, lora_rank=4)
    assert TrainSpec(**json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_key_that_is_given_twice_is_refused(recipe_file) -> None:
    """The last one was taken in silence."""
    with pytest.raises(RecipeError, match=r"argument 'max_steps=70': max_steps is given twice, .* 'max_steps=60'"):
        load_recipe(recipe_file(), ["max_steps=60", "seed=1", "max_steps=70"])


def test_overrides_win_and_are_checked_alike(recipe_file) -> None:
    path = recipe_file("max_steps: 3\nlearning_rate: 0.1\n")
    by_text = load_recipe(path, ["max_steps=10", "learning_rate=1e-3", "dataset=a,b", "bf16=true"])
    by_value = load_recipe(path, {"max_steps": 10, "learning_rate": 1e-3, "dataset": "a,b", "bf16": True})
    assert by_text.spec == by_value.spec
    assert by_text.spec.max_steps == 10 and by_text.spec.train_entries == ("a", "b")
    assert by_text.values["max_steps"] == 10


def test_names_of_earlier_versions_are_understood(recipe_file) -> None:
    recipe = load_recipe(
        recipe_file("evaluation_strategy: epoch\neval_dataset: v\ngroup_by_length: true\nno_cuda: true\n")
    )
    assert recipe.spec.eval_strategy == "epoch"
    assert recipe.spec.train_sampling_strategy == "group_by_length"
    assert recipe.spec.use_cpu


def test_what_has_no_effect_is_noted_and_a_default_is_not(recipe_file) -> None:
    """Many recipes spell the defaults out; a note for each would bury the ones that matter."""
    recipe = load_recipe(
        recipe_file(
            "trust_remote_code: true\nuse_galore: false\ngalore_rank: 16\npacking: false\nstage: sft\n"
            "report_to: null\ninclude_num_input_tokens_seen: false\n"
        )
    )
    assert recipe.notes == ("trust_remote_code has no effect: code from a model or dataset repository is never run.",)


def test_the_name_is_a_slug_of_the_files_stem(recipe_file) -> None:
    assert load_recipe(recipe_file()).name == "my_recipe_v2"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert load_recipe(path).name == path.stem
