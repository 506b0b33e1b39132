"""A mistake in any `defs.yaml` is named by file and line."""

from pathlib import Path

import pytest

from mllm_assets.components.component_yaml import find_mistakes

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


def test_sound_files_have_no_mistakes(project: Path) -> None:
    assert find_mistakes(project) == []


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
            "there is no component mllm_assets.components",
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
