"""`mllm-assets init`, from a wheel in an environment of its own; and the components in a project that is not ours."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mllm_assets.cli import main
from tests.integration.conftest import REPOSITORY

pytestmark = pytest.mark.integration
LAX = {"min_loss_gain_nats": -99, "min_answer_gain": -1, "min_image_gain_nats": -99}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The `bin` of an environment with the built wheel and, from here, what it depends on; no checkout is there."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(REPOSITORY)], folder)
    [wheel] = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)], folder)
    found = run([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], folder).strip()
    # a plain path file, so that the path files in there, the checkout's own among them, do not count
    Path(found, "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    for script in ("dg", "dagster"):
        text = Path(sys.executable).with_name(script).read_text().splitlines(keepends=True)
        python.with_name(script).write_text("".join([f"#!{python}\n", *text[1:]]))
        python.with_name(script).chmod(0o755)
    yield python.parent


def run(command: list[str], folder: Path, binaries: Path | None = None) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DAGSTER_HOME")}
    if binaries is not None:
        env["PATH"] = f"{binaries}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_installed_wheel_makes_a_project_that_runs_the_emoji_line(installed: Path, tmp_path: Path) -> None:
    """Configs and declarations were in the repository only, so that the installed package could run nothing."""
    project = tmp_path / "birds"
    run(["mllm-assets", "init", str(project)], tmp_path, installed)
    where = run([str(installed / "python"), "-c", "import mllm_assets; print(mllm_assets.__file__)"], project)
    assert where.startswith(str(installed.parent))

    run(["make", "check"], project, installed)

    recipe = project / "configs" / "emoji_sft.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: 400", "max_steps: 4").replace("steps: 100", "steps: 4"))
    emoji = project / "birds" / "defs" / "datasets" / "emoji" / "defs.yaml"
    emoji.write_text(emoji.read_text().replace("num_train: 560", "num_train: 80").replace(": 120", ": 24"))
    settings = project / "birds" / "defs" / "recipes" / "defs.yaml"
    values = yaml.safe_load(settings.read_text())
    values["attributes"]["defaults"] = {"gates": LAX, "evaluation": {"max_samples": 8, "max_new_tokens": 4}}
    settings.write_text(yaml.safe_dump(values, sort_keys=False))
    shown = run(["make", "demo"], project, installed)

    assert "releases/emoji_sft/v1" in shown
    [run_dir] = {path.resolve() for path in (project / "outputs" / "emoji_sft").glob("latest")}
    assert (run_dir / "model" / "model.safetensors").is_file()
    assert json.loads((run_dir / "manifest.json").read_text())["num_steps"] == 4
    assert list((project / "outputs" / "emoji_sft" / "eval_metrics").glob("*/manifest.json"))
    card = (project / "releases" / "emoji_sft" / "v1" / "README.md").read_text()
    assert "mllm-assets run emoji_sft" in card
    assert (project / ".dagster_home" / "dagster.yaml").resolve() == project / "dagster.yaml"


OTHER = {
    "pyproject.toml": """[project]
name = "shop"
version = "0.1.0"

[tool.dg]
directory_type = "project"

[tool.dg.project]
root_module = "shop"
""",
    "shop/__init__.py": "",
    "shop/definitions.py": """from pathlib import Path

import dagster as dg
from mllm_assets.components.resources import AcceleratorResource, ProjectResource


@dg.asset
def orders() -> dg.MaterializeResult:
    return dg.MaterializeResult(metadata={"num_orders": 3})


@dg.definitions
def defs() -> dg.Definitions:
    return dg.Definitions.merge(
        dg.load_from_defs_folder(path_within_project=Path(__file__).parent),
        dg.Definitions(
            assets=[orders],
            resources={"project": ProjectResource(root="."), "gpu": AcceleratorResource(device="cpu")},
        ),
    )
""",
    "shop/defs/vision/defs.yaml": """type: mllm_assets.components.ImageTextDataset
attributes:
  name: faces
  source: {kind: parquet, path: "package:emoji.parquet", caption_column: text, label_column: group}
  prompts: ["What is this?"]
  answer: "{label}"
  split: {num_train: 20, num_val: 5}
post_processing:
  assets:
    - {target: "*", attributes: {owners: ["team:vision"], tags: {cost_center: research}}}
""",
}


@pytest.mark.slow
def test_the_components_work_in_another_dagster_project_beside_its_own_assets(tmp_path: Path) -> None:
    for name, text in OTHER.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    env.pop("DAGSTER_HOME", None)
    command = "-m dagster asset materialize -m shop.definitions --select".split()
    faces = 'key:"faces/raw" and owner:"team:vision" and tag:cost_center=research'
    done = subprocess.run(
        [sys.executable, *command, f'({faces}) or key:"orders"'],
        cwd=tmp_path, env=env, text=True, capture_output=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert list((tmp_path / "data" / ".raw" / "faces").glob("*/manifest.json"))
    assert "ASSET_MATERIALIZATION" in done.stderr and "orders" in done.stderr


def test_init_refuses_a_folder_that_holds_something_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    assert main(["init", str(tmp_path)]) == 2
    assert "holds notes.txt: expected an empty folder, or none." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_init_goes_on_beside_an_environment_and_a_repository(tmp_path: Path) -> None:
    """Who follows the tutorial has made both before."""
    project = tmp_path / "my-birds"
    (project / ".venv").mkdir(parents=True)
    (project / ".git").mkdir()
    assert main(["init", str(project)]) == 0
    assert (project / "my_birds" / "definitions.py").is_file()
    assert "module_name: my_birds.definitions" in (project / "workspace.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torch", "A package 'torch' is already installed, and the project would hide it."),
        ("3birds", "'3birds' cannot be the name of a Python package."),
        ("class", "'class' cannot be the name of a Python package."),
    ],
)
def test_init_refuses_a_name_that_no_package_can_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, expected: str
) -> None:
    assert main(["init", str(tmp_path / "new"), "--name", name]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
