"""A mistake in any `defs.yaml` is named by file and line."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from mllm_assets.cli import main
from mllm_assets.components.image_text_dataset import ImageTextDataset
from mllm_assets.components.pretrained_model import wrong_name
from mllm_assets.components.reporting import load_project, unreadable_assets
from mllm_assets.components.yaml_checks import find_mistakes
from mllm_assets.defs import resources
from mllm_assets.errors import RecipeError
from mllm_assets.project.enable import enable
from mllm_assets.project.read import declared_models

DATASET = """type: mllm_assets.components.ImageTextDataset
attributes:
  name: NAME
  source: {kind: parquet, path: x.parquet}
  prompts: ["What is this?"]
  split:
    num_train: 8
    num_val: 2
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.dg]\ndirectory_type = "project"\n[tool.dg.project]\nroot_module = "shop"\n'
    )
    for name in ("ants", "bees", "cats"):
        folder = tmp_path / "shop" / "defs" / name
        folder.mkdir(parents=True)
        (folder / "defs.yaml").write_text(DATASET.replace("NAME", name))
    return tmp_path


SETTING = """type: mllm_assets.components.FineTuning
attributes:
  recipes: configs/*.yaml
  settings:
    - recipe: mine
      KEY
"""


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("benchmarks: {tasks: faces}", "benchmarks.tasks: 'faces' is a text. Write a list: [faces]"),
        ("evaluation: {unrelated: plain}", "evaluation.unrelated: 'plain' is a text. Write a list: [plain]"),
        ("sweep: emoji", "sweep: 'emoji' is a text. Write keys and values below it"),
        ("benchmarks: {tasks: '{{ env.TASKS }}'}", None),
    ],
)
def test_a_text_where_a_list_belongs_is_named_by_line(project: Path, key: str, said: str | None) -> None:
    """Dagster's schema takes it for a template; what it loads ended in a traceback of pydantic."""
    (project / "shop" / "defs" / "ants" / "defs.yaml").write_text(SETTING.replace("KEY", key))
    found = find_mistakes(project)
    where = "shop/defs/ants/defs.yaml:6: attributes.settings.0."
    assert found == ([] if said is None else [where + said])


def test_sound_files_have_no_mistakes(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check-graph` ended in silence, which could have meant that it looked at nothing."""
    assert find_mistakes(project) == []
    monkeypatch.chdir(project)
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:  # another test's project
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(project))
    shutil.copy(Path(resources.__file__), project / "shop" / "defs")
    assert main(["check-graph"]) == 0
    assert capsys.readouterr().out == "No mistake found: ants, bees, cats.\n"


@pytest.mark.parametrize(
    ("right", "wrong", "line", "said"),
    [
        ("num_train: 8", "num_trian: 8", 6, "attributes.split: Additional properties are not allowed ('num_trian'"),
        ("name: ants", "nmae: ants", 2, "attributes: Additional properties are not allowed ('nmae'"),
        ("num_train: 8", "num_train: [8]", 7, "attributes.split.num_train: [8] is not"),
        (
            "components.ImageTextDataset",
            "components.ImageTxtDataset",
            1,
            "the component mllm_assets.components",
        ),
        ("name: ants", "name: [ants", 4, "this is not YAML"),
        ("type: mllm_assets.components.ImageTextDataset\n", "", 1, "`type:` is missing"),
    ],
)
def test_a_mistake_is_named_in_each_file_of_a_type(project: Path, right: str, wrong: str, line: int, said: str) -> None:
    for name in ("ants", "cats"):
        path = project / "shop" / "defs" / name / "defs.yaml"
        path.write_text(DATASET.replace("NAME", "ants").replace(right, wrong))
    mistakes = find_mistakes(project)
    assert any(m.startswith(f"shop/defs/ants/defs.yaml:{line}: {said}") for m in mistakes), mistakes
    assert any(m.startswith(f"shop/defs/cats/defs.yaml:{line}: ") for m in mistakes), mistakes
    if wrong.startswith("num_trian"):
        assert mistakes[0].endswith("('num_trian' was unexpected). Did you mean 'num_train'?")


SECRET = "hidden-4Xb7Qz9T"
MODELS = """type: mllm_assets.components.PretrainedModels
attributes:
  models:
    - {name: tiny, kind: tiny_gemma3}
    - {name: mine, kind: local, license: LICENSE}
"""
RECIPES = """type: mllm_assets.components.FineTuning
attributes:
  defaults:
    push_to_hub: {repo_id: 'me/LICENSE'}
"""


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (DATASET.replace("NAME", "ants") + "  license: LICENSE\n", "9: attributes.license"),
        (DATASET.replace("NAME", "ants").replace("What is this?", "What? LICENSE"), "5: attributes.prompts.0"),
        (MODELS, "5: attributes.models.1.license"),
    ],
)
def test_a_secret_is_refused_by_file_and_line_and_not_shown(
    text: str, where: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was accepted, and was shown in the asset's metadata."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.chdir(project)
    (project / "shop" / "defs" / "ants" / "defs.yaml").write_text(text.replace("LICENSE", SECRET))
    assert main(["check-graph"]) == 2
    said = capsys.readouterr().err
    assert f"shop/defs/ants/defs.yaml:{where} holds what looks like a token or password." in said
    assert SECRET not in said and "HF_TOKEN " not in said


@pytest.mark.parametrize("text", [DATASET.replace("NAME", "ants") + "  license: LICENSE\n", MODELS, RECIPES])
def test_a_component_with_a_secret_from_a_template_is_not_built(
    text: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file shows a template; the values that the component was loaded with hold the secret."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:  # another test's project
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(project))
    shutil.copy(Path(resources.__file__), project / "shop" / "defs")
    (project / "shop" / "defs" / "ants" / "defs.yaml").write_text(
        text.replace("'me/LICENSE'", "LICENSE").replace("LICENSE", "'{{ env.HF_TOKEN }}'")
    )
    definitions = load_project(project)
    [message] = [text for text in unreadable_assets(definitions).values() if "token or password" in text]
    assert "shop/defs/ants/defs.yaml:" in message
    specs = list(definitions.resolve_all_asset_specs())
    leaving = [(spec.key, spec.description, spec.tags) for spec in specs]  # Dagster keeps the component for itself
    assert SECRET not in str(leaving)


def test_what_is_wrong_with_each_part_of_a_dataset_is_said_at_once() -> None:
    parts = {"source": {"kind": "parquet", "path": ""}, "split": {"num_train": 0}, "quality": {"max_decode_s": -1.0}}
    dataset = ImageTextDataset.model_validate({"name": "ants", **parts})
    with pytest.raises(RecipeError) as caught:
        dataset.spec()
    assert [line.partition(" ")[0] for line in str(caught.value).splitlines()] == [
        "source.path", "split.num_train:", "quality.max_decode_s:"
    ]  # fmt: skip


@pytest.mark.attack("names")
def test_a_name_that_cannot_be_one_fails_its_own_asset_only(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model called `../../x` was written there; a recipe without a letter kept all others from loading."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:  # another test's project
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(project))
    shutil.copy(Path(resources.__file__), project / "shop" / "defs")
    names = ["../../x", "/tmp/x", "..", ".hidden", "a/b", "~", "", "\u5199\u771f", "x" * 300]
    models = "".join(f"    - {{name: {json.dumps(name)}, kind: tiny_gemma3}}\n" for name in names[:1])
    (project / "shop/defs/ants/defs.yaml").write_text(f"{MODELS.partition('    - ')[0]}{models}")
    (project / "shop/defs/bees/defs.yaml").write_text(DATASET.replace("NAME", "'!!!'"))
    (project / "shop/defs/recipes").mkdir()
    (project / "shop/defs/recipes/defs.yaml").write_text("type: mllm_assets.components.FineTuning\nattributes: {}\n")
    (project / "configs").mkdir()
    (project / "configs" / "---.yaml").write_text("model_name_or_path: x\n")
    definitions = load_project(project)
    assert {key.split("/")[0] for key in unreadable_assets(definitions)} == {"pretrained", "unnamed"}
    assert any(spec.key.path[0] == "cats" for spec in definitions.resolve_all_asset_specs())
    assert [name for name in names if wrong_name(name) is None] == []
    assert wrong_name("gemma3-4b-it") is None


@pytest.mark.parametrize("name", ["images", "x" * 300])
def test_a_dataset_has_a_folder_of_its_own(name: str) -> None:
    dataset = ImageTextDataset.model_validate({"name": name, "source": {"kind": "parquet", "path": "x"}})
    with pytest.raises(RecipeError, match="is the folder of all pictures, or longer than 100 characters"):
        dataset.spec()


@pytest.mark.attack("YAML")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: \0", "cannot be read as text in YAML: unacceptable character"),
        (b"a: \xff", "cannot be read as text in YAML: 'utf-8' codec"),
        (b"", "is empty"),
        (b"type: os\nattributes: {}\n", "the component os does not exist"),
        (None, "cannot be read as text in YAML: .*Is a directory"),
    ],
    ids=["NUL", "bytes", "empty", "a module", "a folder"],
)
def test_a_file_that_is_no_text_is_named_too(project: Path, content: bytes | None, said: str) -> None:
    path = project / "shop" / "defs" / "ants" / "defs.yaml"
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    [mistake] = find_mistakes(project)
    assert re.match(rf"shop/defs/ants/defs.yaml:1: {said}", mistake), mistake


@pytest.mark.attack("YAML")
@pytest.mark.parametrize(
    "text",
    [
        "type: x.PretrainedModels\nattributes: {models: 3}",
        "type: x.PretrainedModels\nattributes: {models: [3, {name: [a]}]}",
        "type: x.FineTuning\nattributes: {enabled: 3, recipes: /etc/*}",
        "type: x.FineTuning\nattributes: abc",
    ],
)
def test_what_looks_for_names_passes_other_shapes_by(project: Path, text: str) -> None:
    (project / "shop" / "defs" / "ants" / "defs.yaml").write_text(text)
    with pytest.raises(RecipeError, match="Nothing that can be switched on is called 'zzz'"):
        enable(project, "zzz")
    assert declared_models(project) == set()
