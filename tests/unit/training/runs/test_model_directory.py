"""The model that a run starts from: found, named by its content, and known to be as it was written."""

import shutil
from pathlib import Path

import pytest

from mllm_assets.artifacts import is_complete, write_manifest
from mllm_assets.cli import main
from mllm_assets.errors import IntegrityError, ModelError
from mllm_assets.file_digests import FileDigests
from mllm_assets.operations.gc import STAGING
from mllm_assets.recipe.load import Recipe, load_recipe
from mllm_assets.training.loop.engine import require_same_model
from mllm_assets.training.runs.models import find_model_dir, model_fingerprint
from mllm_assets.training.runs.plan import describe_resume, plan_run

pytestmark = pytest.mark.not_fast

REPOSITORY = Path(__file__).parents[4]


@pytest.fixture
def run_dir(project: Path, recipe: Recipe) -> Path:
    """A finished run of the recipe, with a model of the right size whose bytes were changed since."""
    run_dir = plan_run(recipe, root=project).directory
    shutil.copytree(project / "pretrains" / "tiny", run_dir / "model")
    write_manifest(run_dir, {"recipe_name": "r"})
    (run_dir / "model" / "model.safetensors").write_bytes(b"Weights")
    return run_dir


def test_a_model_has_one_name_with_or_without_a_manifest(project: Path) -> None:
    """A copy of a downloaded model has no manifest; training from it is the same run."""
    model = project / "pretrains" / "tiny"
    plain = model_fingerprint(model)
    (model / "README.md").write_text("about")
    write_manifest(model, {})
    assert model_fingerprint(model) == plain
    run = project / "outputs" / "run"
    shutil.copytree(model, run / "model")
    (run / "model" / "manifest.json").unlink()
    write_manifest(run, {})
    assert model_fingerprint(run / "model") == plain


def test_other_weights_are_another_model(project: Path) -> None:
    model = project / "pretrains" / "tiny"
    before = model_fingerprint(model)
    (model / "model.safetensors").write_bytes(b"Weights")
    assert model_fingerprint(model) != before


def test_a_model_that_no_longer_fits_its_manifest_is_named(project: Path) -> None:
    model = project / "pretrains" / "tiny"
    write_manifest(model, {})
    (model / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(IntegrityError) as caught:
        model_fingerprint(model)
    assert str(caught.value) == (
        f"{model / 'model.safetensors'} has 3 bytes, but manifest.json says 7. Materialise its asset again."
    )


def test_a_missing_model_says_how_to_get_it(recipe: Recipe, project: Path) -> None:
    shutil.rmtree(project / "pretrains")
    with pytest.raises(ModelError) as caught:
        find_model_dir(recipe, project)
    where = (project / "pretrains" / "tiny").resolve()
    assert str(caught.value) == (
        f"{recipe.path}: model_name_or_path is pretrains/tiny, and {where} is not a directory. "
        f"Download the model there, for example: hf download google/gemma-3-4b-it --local-dir {where}"
    )


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no model: it has no config.json. Materialise the model's asset"):
        model_fingerprint(tmp_path)


def test_changed_bytes_of_a_model_that_a_run_starts_from_are_found_by_their_digest(run_dir: Path) -> None:
    """The size is the same, so that the run's name is too, and the weights load without an error."""
    model = run_dir / "model"
    with pytest.raises(IntegrityError) as caught:
        require_same_model(model, model_fingerprint(model), FileDigests())
    assert str(caught.value) == (
        f"{model / 'model.safetensors'} does not match its digest in manifest.json: its bytes changed since it was "
        f"written. Train its recipe, r, again: it resumes from its last checkpoint and writes the model again."
    )


def test_changed_bytes_of_a_fetched_model_are_found_by_their_digest(project: Path) -> None:
    model = project / "pretrains" / "tiny"
    write_manifest(model, {})
    (model / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(IntegrityError, match=r"its bytes changed .* Materialise its asset again\."):
        require_same_model(model, model_fingerprint(model), FileDigests())


def test_another_model_than_the_one_that_named_the_run_is_refused(project: Path) -> None:
    model = project / "pretrains" / "tiny"
    before = model_fingerprint(model)
    (model / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(IntegrityError, match=r"tiny changed after this run was named .* expected digest .* Start the"):
        require_same_model(model, before, FileDigests())


def test_train_makes_a_finished_run_again_that_was_changed(
    run_dir: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It said "was finished already" and showed the way to a model that nobody had trained."""
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(project))
    main(["train", str(project / "configs" / "r.yaml")])  # its own model is not one that can be trained
    said = (
        f"warning: {run_dir} was finished, but was changed since: model/model.safetensors does not match its digest. "
    )
    assert said + describe_resume(run_dir) in capsys.readouterr().err
    assert not is_complete(run_dir) and not (run_dir / "model").exists()  # nobody starts from it meanwhile
    assert sorted(STAGING.fullmatch(path.name) is not None for path in run_dir.parent.glob(".m*")) == [True, True]


def second_stage(project: Path, model: str, **files: str) -> Recipe:
    for name, text in files.items():
        (project / "configs" / f"{name}.yaml").write_text(text)
    text = (project / "configs" / "r.yaml").read_text()
    (project / "configs" / "second.yaml").write_text(text.replace("outputs/r", "outputs/second"))
    return load_recipe(project / "configs" / "second.yaml", [f"model_name_or_path={model}"])


def test_a_missing_output_names_the_recipe_that_makes_it(project: Path) -> None:
    """It advised to download the other recipe's output from the Hub."""
    recipe = second_stage(project, "outputs/r/latest/model", broken="dataset: [")
    with pytest.raises(ModelError) as caught:
        find_model_dir(recipe, project)
    assert str(caught.value).endswith(
        f"is not a directory. Train the recipe that makes it first: mllm-assets train {project / 'configs' / 'r.yaml'}"
    )


def test_a_missing_output_of_an_unknown_recipe_is_not_looked_for_on_the_hub(project: Path) -> None:
    with pytest.raises(ModelError, match=r"Train the recipe whose output_dir it is in first: mllm-assets train RECIPE"):
        find_model_dir(second_stage(project, "outputs/gone/latest/model"), project)


def test_a_run_in_place_of_its_model_names_the_folder_in_it(project: Path, run_dir: Path) -> None:
    (run_dir.parent / "latest").symlink_to(run_dir.name)
    with pytest.raises(ModelError, match=r"which is a run; .* Write model_name_or_path: outputs/r/latest/model$"):
        find_model_dir(second_stage(project, "outputs/r/latest/"), project)


def test_a_missing_model_that_the_project_declares_names_its_asset(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fresh clone it advised to download Gemma 3 4B into the folder of the tiny model that is built in code."""
    monkeypatch.chdir(REPOSITORY)
    recipe = load_recipe(project / "configs" / "r.yaml", ["model_name_or_path=pretrains/gemma3_tiny"])
    with pytest.raises(ModelError, match=r"Make it with: mllm-assets run pretrained/gemma3_tiny$"):
        find_model_dir(recipe, project)
