"""The command line, before it starts any work."""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from mllm_assets.cli import EXIT_READER_GONE, _parser, main, parse
from mllm_assets.cli.training import run_settings
from mllm_assets.worker.launch import thread_variables
from mllm_assets.worker.run_settings import RunSettings
from mllm_assets.worker.tasks import Accelerator


def test_the_device_of_the_environment_counts_unless_an_option_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training silently took the CPU where MLLM_ASSETS_DEVICE asked for a GPU."""
    monkeypatch.setenv("MLLM_ASSETS_DEVICE", "cuda")
    monkeypatch.setenv("MLLM_ASSETS_NUM_PROCESSES", "2")
    arguments = _parser().parse_args(["train", "r.yaml"])
    assert (arguments.device, arguments.num_processes) == ("cuda", 2)
    assert _parser().parse_args(["train", "r.yaml", "--device", "cpu"]).device == "cpu"


def test_train_takes_how_many_rows_are_asked_about_while_it_trains() -> None:
    """The setting of a recipe was in YAML alone, which `train` does not read."""
    asked = run_settings(_parser().parse_args(["train", "r.yaml", "--metric-samples", "8"]))
    assert asked.answers.max_samples == 8
    assert run_settings(_parser().parse_args(["train", "r.yaml"])) == RunSettings()


@pytest.mark.parametrize("wanted", [None, "30"])
def test_threads_of_a_command_spin_as_shortly_as_a_workers(wanted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine answers took twice the CPU time, for libgomp's threads waited for one another awake."""
    monkeypatch.setenv("GOMP_SPINCOUNT", wanted or "")
    if wanted is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == (wanted or thread_variables(Accelerator(device="cpu"))["GOMP_SPINCOUNT"])


def test_an_unknown_device_in_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLLM_ASSETS_DEVICE", "gpu")
    assert main(["train", "r.yaml"]) == 2
    assert "MLLM_ASSETS_DEVICE is 'gpu': expected one of auto, cuda, mps, cpu" in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    declared = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["version"]
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"mllm-assets {declared}\n")


def test_help_loads_neither_torch_nor_dagster() -> None:
    """Each command pays for its own imports only: torch and transformers take 15 seconds."""
    heavy = "torch transformers dagster datasets gradio fastapi".split()
    code = "import sys; from mllm_assets.cli import _parser; _parser().format_help(); "
    code += f"print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_no_command_lets_a_library_import_what_fetches_and_runs_code_of_the_hub(tmp_path: Path) -> None:
    """bitsandbytes, which PEFT imports, asks the package `kernels` for compiled code."""
    (tmp_path / "kernels.py").write_text("print('kernels was imported')")
    code = """
import sys; from mllm_assets.cli import main; main(["releases", "list"])
try: import kernels
except ModuleNotFoundError: print("refused")
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    environment["MLLM_ASSETS_ROOT"] = str(tmp_path)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "refused"


@pytest.mark.parametrize(
    "line",
    [
        "train r.yaml max_steps=3 seed=1 --num-processes 2 --force",
        "train r.yaml --num-processes 2 max_steps=3 seed=1 --force",
        "train r.yaml max_steps=3 --num-processes 2 --force seed=1",
        "train --num-processes 2 r.yaml --force max_steps=3 seed=1",
    ],
)
def test_overrides_stand_before_between_and_behind_the_options(line: str) -> None:
    """`train x.yaml --num-processes 2 key=value` ended in "unrecognized arguments"."""
    arguments = parse(line.split())
    assert arguments.overrides == ["max_steps=3", "seed=1"]
    assert (arguments.num_processes, arguments.force) == (2, True)


@pytest.mark.parametrize("line", ["train r.yaml --num-processes 2 --seed=1", "doctor extra=1"])
def test_an_option_that_does_not_exist_is_no_override(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(line.split())
    assert f"unrecognized arguments: {line.split()[-1]}" in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "meant"), [("--dryrun", "--dry-run"), ("--forc", "--force")])
def test_a_mistyped_option_is_refused_with_the_nearest_and_the_verb_s_usage(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run emoji_sft --forc` trained everything again: argparse takes the beginning of an option for it."""
    with pytest.raises(SystemExit):
        parse(["run", "emoji_sft", typed])
    said = capsys.readouterr().err
    assert said.startswith("usage: mllm-assets run ") and f"{typed}. Did you mean '{meant}'?" in said


@pytest.mark.parametrize(("line", "unbuffered"), [("--help", ""), ("releases list", ""), ("releases list", "1")])
def test_a_command_ends_quietly_when_its_reader_goes_away(line: str, unbuffered: str, tmp_path: Path) -> None:
    """`mllm-assets inspect RECIPE | head` ended in the traceback of a BrokenPipeError."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "mllm_assets.cli", *line.split()]
    env = {**os.environ, "MLLM_ASSETS_ROOT": str(tmp_path), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, env=env)
    os.close(writes)
    assert (done.returncode, done.stderr) == (EXIT_READER_GONE, "")


@pytest.mark.parametrize("command", [["serve", "emoji_sft"], ["chat", "emoji_sft"]])
def test_a_server_says_that_packages_are_missing_before_it_asks_for_a_key(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who had made a key was told only then that nothing could start."""
    monkeypatch.delenv("MLLM_ASSETS_API_KEY", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*command, "--host", "0.0.0.0"]) == 2
    assert "This command needs" in capsys.readouterr().err


def test_inspect_finds_a_missing_recipe_before_it_loads_torch(tmp_path: Path) -> None:
    """A typing error in the path took fifteen seconds."""
    code = "import sys; from mllm_assets.cli import main; main(['inspect', 'nope.yaml']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "There is no recipe nope.yaml" in done.stderr and done.stdout == "False\n"


@pytest.mark.parametrize(("command", "verb"), [([], "train"), (["releases"], "rollback")])
def test_without_a_verb_the_help_lists_them(command: list[str], verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It said only that a VERB is required."""
    assert main(command) == 2
    said = capsys.readouterr()
    assert f"    {verb} " in said.err and said.out == ""


def test_overrides_are_not_said_to_be_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err.endswith("the following arguments are required: RECIPE\n")


@pytest.mark.parametrize("verb", ["slots free", "gc"])
@pytest.mark.parametrize(
    ("damage", "problem", "next_step"),
    [
        (None, "DAGSTER_HOME is {home}, which is not a folder.", "Make it, or set the one that the deployment uses."),
        (
            "concurrency: [",
            "{home} does not open: dagster.yaml:1: expected the node content, but found '<stream end>'.",
            "Correct {home}/dagster.yaml, or start the storage that it names.",
        ),
        (
            "concurency: {}",
            '{home} does not open: Received unexpected config entry "concurency" at the root.',
            "Correct {home}/dagster.yaml, or start the storage that it names.",
        ),
        (
            "storage: {postgres: {postgres_db: {hostname: 127.0.0.1, port: 9, username: u, password: p, db_name: d}}}",
            "{home} does not open: ",
            "Correct {home}/dagster.yaml, or start the storage that it names.",
        ),
        (
            "storage: {postgres: {postgres_url: {env: NOWHERE_SET}}}",
            "{home}/dagster.yaml names variables that are not set: NOWHERE_SET.",
            "Set them here as for the services: their values are in the file that the services read.",
        ),
    ],
    ids=["no folder", "no yaml", "unknown key", "postgres", "unset variable"],
)
def test_an_instance_that_does_not_open_is_a_message(
    verb: str,
    damage: str | None,
    problem: str,
    next_step: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Dagster's own words fill pages, and do not name what is missing."""
    home = tmp_path / "home"
    if damage is not None:
        home.mkdir()
        (home / "dagster.yaml").write_text(damage)
        if "postgres" in damage:
            pytest.importorskip("dagster_postgres")
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda _: None)  # Dagster tries several times
    assert main(verb.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {problem.format(home=home)}")
    assert error.endswith(f" {next_step.format(home=home)}\n")


def test_gc_says_what_it_could_not_look_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    assert main(["gc"]) == 0
    said = capsys.readouterr().out
    assert "DAGSTER_HOME is not set: Dagster's latest materialisations and runs were not checked" in said
    assert f"{tmp_path} is not a project: recipes and defs.yaml files were not checked" in said


def test_gc_looks_at_the_history_that_run_keeps_in_a_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run` finds it without DAGSTER_HOME; what only that history names could have been deleted."""
    monkeypatch.setenv("DAGSTER_HOME", "set and taken away, so that it is restored")
    monkeypatch.delenv("DAGSTER_HOME")
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dagster_home").mkdir()
    assert main(["gc"]) == 0
    assert "DAGSTER_HOME is not set" not in capsys.readouterr().out
    assert (tmp_path / ".dagster_home" / "history").is_dir(), "it was opened"


def test_init_where_a_file_is_in_the_way_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "birds"
    assert main(["init", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder} cannot be made: ")
    assert error.endswith("Name a folder that this user may write to.\n")


def test_init_makes_parents_and_quotes_a_path_with_a_space_where_make_works_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`cd a b` and `mkdir -p .../a b/.dagster_home` are two paths each."""
    folder = tmp_path / "not there" / "a b"
    assert main(["init", str(folder)]) == 0
    assert f"Next: cd '{folder}' && make demo" in capsys.readouterr().out
    for makefile in (folder / "Makefile", Path(__file__).parents[3] / "Makefile"):
        command = ["make", "-f", str(makefile), ".dagster_home/dagster.yaml"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        assert (folder / ".dagster_home" / "dagster.yaml").resolve() == (folder / "dagster.yaml").resolve()
        shutil.rmtree(folder / ".dagster_home")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["a b"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sumary emoji_sft", "unknown: 'sumary'. Did you mean 'summary'? There are: run,"),
        ("releases lst", "Did you mean 'list'?"),
        ("rn emoji_sft", "Did you mean 'run'?"),
        ("zebra", "unknown: 'zebra'. There are: run, "),
    ],
)
def test_a_mistyped_verb_is_refused_with_the_nearest(
    line: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2 and expected in capsys.readouterr().err


def test_the_help_of_every_verb_ends_with_an_example_that_the_parser_takes() -> None:
    [verbs] = [action for action in _parser()._actions if isinstance(action.choices, dict)]
    [actions] = [action for action in verbs.choices["releases"]._actions if isinstance(action.choices, dict)]
    below = {f"releases {name}": parser for name, parser in actions.choices.items()}
    for verb, parser in {**verbs.choices, **below}.items():
        example = (parser.epilog or "").removeprefix("example: mllm-assets ")
        assert example.startswith(verb), f"{verb} has no example"
        assert parse(shlex.split(example)).run


INLINE = re.compile(r"`mllm-assets\s+([^`]+)`")
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs"])
def test_the_commands_within_a_sentence_are_what_the_parser_takes(page: str) -> None:
    """Those in fences are run; a sentence went on naming an option that is gone."""
    paths = sorted((ROOT / page).rglob("*.md")) if page == "docs" else [ROOT / page]
    for path in paths:
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for line in INLINE.findall(text):
            assert is_taken(shlex.split(line)), f"{path.relative_to(ROOT)}: mllm-assets {line}"


def is_taken(words: list[str]) -> bool:
    """Whether it is a command, or names a verb, maybe with options, and not what the verb needs."""
    parser = _parser()
    while words and (choices := [a.choices for a in parser._actions if isinstance(a.choices, dict)]):
        if words[0].startswith("-"):
            break
        if words[0] not in choices[0]:
            return False
        parser, words = choices[0][words[0]], words[1:]
    options = [word for word in words if word.startswith("-")]
    return set(options) <= parser._option_string_actions.keys()


@pytest.mark.attack("names")
@pytest.mark.parametrize("command", ["summary", "evaluate", "compare", "add-dataset", "releases list"])
def test_a_path_that_is_too_long_is_a_sentence(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "a/" * 2500, *(["x"] if command == "compare" else [])]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.attack("names")
def test_a_name_that_is_no_text_is_printed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's name of other bytes, or half a character in JSON, ended a command when it was printed."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert main(["check-data", "x\udc80"]) == 2
    sys.stderr.flush()
    assert b"x\\udc80" in sys.stderr.buffer.getvalue()


@pytest.mark.attack("names")
@pytest.mark.parametrize("name", ["a\nb", "a\x01b", "a\x7fb", "\u202eevil", "a\udcffb"], ids=ascii)
def test_a_project_has_a_name_that_can_be_printed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`init` made the folder, and its advice to go there broke in two lines."""
    for arguments in ([str(tmp_path / name)], [str(tmp_path / "fine"), "--name", name]):
        assert main(["init", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "cannot be printed" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
