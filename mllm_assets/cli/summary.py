"""A recipe's results and where they are, for a terminal."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from mllm_assets.artifacts import is_complete, read_manifest
from mllm_assets.data.sharegpt.conversation import without_placeholders
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.entries import load_entries
from mllm_assets.errors import MllmAssetsError
from mllm_assets.evaluation.gallery import GALLERY, rights_of
from mllm_assets.evaluation.metrics import read_metrics
from mllm_assets.evaluation.run_lookup import EvaluatedRun, evaluated_runs, evaluation_of, find_run, how_to_evaluate
from mllm_assets.evaluation.scores import in_order
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout
from mllm_assets.project.read import dev_command, materialize_command
from mllm_assets.releases.versions import Release, current_release
from mllm_assets.training.runs.history import REWARD, TRAINER_LOG, read_log
from mllm_assets.training.runs.plan import published_note, shown_overrides

SPARKS = "▁▂▃▄▅▆▇█"
TITLE_WIDTH, TERMINAL_WIDTH = 14, 80  # columns
MAX_ASKED = 1000  # samples among which one that is answered rightly is looked for


def summarise(layout: Layout, recipe: str, overrides: Sequence[str] = ()) -> str:
    """Describe the newest run of a recipe as written, of one with overrides, or of `<recipe>/<fingerprint>`.

    Raises:
        IntegrityError: It has no such run. Gives the command.
    """
    run_dir = find_run(layout, recipe, overrides)
    recipe = run_dir.parent.name
    run = read_manifest(run_dir)
    release = current_release(layout, recipe)
    evaluated = evaluation_of(layout, run_dir)
    parts = [
        f"\n{recipe} {shown_overrides(run.get('overrides', {}))}".rstrip(),
        *_samples(layout, run),
        *_losses(run_dir, run),
        *(_metrics(read_metrics(evaluated.metrics_dir)) if evaluated else _not_evaluated(layout, recipe, run_dir)),
        f"  run         {layout.relative(run_dir)}",
        *(_gallery(layout, evaluated) if evaluated else []),
        f"  released    {_describe_release(layout, recipe, release, run)}",
        *_questions(layout, run_dir, run, evaluated),
        f"\nOpen the UI:  {dev_command(Path.cwd())}   (http://127.0.0.1:3000)",
    ]
    return "\n".join(parts)


def _gallery(layout: Layout, evaluated: EvaluatedRun) -> list[str]:
    page = evaluated.predictions_dir / GALLERY
    return [f"  answers     {layout.relative(page)}, to open in a browser"] if page.is_file() else []


def _not_evaluated(layout: Layout, recipe: str, run_dir: Path) -> list[str]:
    """Which run was evaluated last, and how to evaluate the newest."""
    last = next(evaluated_runs(layout, recipe), None)
    others = f"; the last run that was evaluated is {layout.relative(last.run_dir)}" if last else ""
    return [f"  metrics     none yet of this run{others}", f"              {how_to_evaluate(layout, run_dir)}"]


def _describe_release(layout: Layout, recipe: str, release: Release | None, run: Mapping[str, Any]) -> str:
    if release is None:
        return f"nothing yet; to release it, or see why not: {materialize_command(recipe)}"
    of_this_run = read_manifest(release.directory)["weights_digest"] == run["weights_digest"]
    return f"{layout.relative(release.directory)}, made from {'this run' if of_this_run else 'another run'}"


def _questions(layout: Layout, run_dir: Path, run: Mapping[str, Any], evaluated: EvaluatedRun | None) -> Iterator[str]:
    """Commands to copy: a question that the model answered rightly when it was evaluated, and one that it did not."""
    data_dir = layout.root / run["recipe"]["dataset_dir"]
    first = {right: row for row, right in reversed(_asked(evaluated) if evaluated else [])}
    shown = [("Try it:", first[True])] if True in first else []
    if False in first:
        shown.append(("It fails on:" if shown else "Try it:", first[False]))
    for title, row in shown:
        images = [data_dir / path for path in row["images"]]
        said, right = (repr(" ".join(row[name].split())) for name in ("answer", "reference"))
        yield f"\n{title:<{TITLE_WIDTH}}{_generate_command(run_dir, images, row['prompt'])}"
        instead = "" if row is first.get(True) else f", but right is {right}"
        yield f"{'':{TITLE_WIDTH}}when it was evaluated it said {said}{instead}"
    if not shown:
        media_dir = run["recipe"].get("media_dir")
        dataset = Dataset(data_dir, media_dir=layout.root / media_dir if media_dir else None)
        [row] = dataset.entry(next(reversed(run["data_digests"]))).read(max_samples=1)
        question = without_placeholders(next(m.content for m in row.messages if m.role == "user"))
        yield f"\n{'Try it:':<{TITLE_WIDTH}}{_generate_command(run_dir, row.images, question)}"


def _asked(evaluated: EvaluatedRun) -> list[tuple[dict[str, Any], bool | None]]:
    """What the tuned model was asked and answered, and whether it was right; nothing where that cannot be read."""
    columns = ["entry", "images", "prompt", "reference", "label", "answer"]
    try:
        table = read_predictions(evaluated.predictions_dir, columns=columns, model="tuned")
    except MllmAssetsError:
        return []
    rows = table.slice(0, MAX_ASKED)
    return list(zip(rows.to_pylist(), rights_of(table)[:MAX_ASKED], strict=True))


def _generate_command(run_dir: Path, images: Sequence[Path], question: str) -> str:
    """To copy; in a few lines where one would be wrapped on a terminal of 80 columns."""
    pieces = ["mllm-assets generate", f"--model {_typed(run_dir)}"]
    pieces += [*(f"--image {_typed(path)}" for path in images), f"--prompt {shlex.quote(question)}"]
    if TITLE_WIDTH + cell_len(command := " ".join(pieces)) <= TERMINAL_WIDTH:
        return command
    return f" \\\n{' ' * (TITLE_WIDTH + 2)}".join([" ".join(pieces[:2]), *pieces[2:]])


def _typed(path: Path) -> str:
    """A path for the shell, relative to the working directory, which need not be the root."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _sparkline(values: Sequence[float]) -> str:
    """Values as a line of block characters, the mean of each of at most 60 equal parts."""
    num_bins = min(60, len(values))
    edges = [round(i * len(values) / num_bins) for i in range(num_bins + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)


def _samples(layout: Layout, run: Mapping[str, Any]) -> list[str]:
    """Counts of the datasets that the run used, each once."""
    data_dir = layout.root / run["recipe"]["dataset_dir"]
    entries = load_entries(data_dir)
    folders = {data_dir / Path(entries[name].file_name).parent for name in run["data_digests"] if name in entries}
    lines = []
    for folder in sorted(folder for folder in folders if is_complete(folder)):  # entries written by hand have no counts
        counts = read_manifest(folder.resolve())
        lines.append(
            f"  samples     {counts['num_raw']} raw = {counts['num_train']} train + {counts['num_val']} validation + "
            f"{counts.get('num_test', 0)} test + {counts['num_unused']} unused + {counts['num_rejected']} rejected"
        )
        source = counts.get("spec", {}).get("source", {})
        if not counts.get("num_test") and not source.get("val_split") and not source.get("split_column"):
            cure = f"`num_test: {max(1, counts['num_val'])}` below `split:` in its defs.yaml makes one"
            lines.append(f"              no test split: {cure}")
    return lines


def _losses(run_dir: Path, run: Mapping[str, Any]) -> list[str]:
    log = read_log(run_dir / TRAINER_LOG)
    learnt = {REWARD: "reward    "} if any(REWARD in line for line in log) else {"loss": "loss curve"}
    lines = [
        f"  trained     {run['num_steps']} steps in {run['train_wall_s']:.0f} s, {run['samples_per_s']:.0f} samples/s"
    ]
    for key, shown in learnt.items():  # the loss of rewards is about 0 all the time
        if values := [line[key] for line in log if line.get(key) is not None]:
            lines.append(f"  {shown}  {values[0]:.3f} {_sparkline(values)} {values[-1]:.3f}")
    if note := published_note(run):
        lines.append(f"  published   {note.removeprefix(', ')}, with eval loss {run['eval_loss']:.4f}")
    if asked := run.get("eval_answers"):
        values = ", ".join(f"{name} {value:.4f}" for name, value in asked.items())
        lines.append(f"  answers     {values}, of a sample of {run['recipe']['eval_dataset']}")
    return lines


def _metrics(metrics: Mapping[str, Any]) -> list[str]:
    lines = []
    for entry, scored in metrics["entries"].items():
        models = scored["models"]
        constant = models.get("most_common_answer", {}).get("label_accuracy")
        title = f"  {entry}, {scored['num_samples']} samples"
        width = max(28, len(title))
        most_common = "" if constant is None else f"{'most common answer':>22}"
        lines.append(f"\n{title:<{width}}{'base model':>14}{'tuned model':>14}{most_common}")
        for name in in_order(models["tuned"], headlines=True):
            line = f"    {name:<{width - 4}}{models['base'][name]:>14.4f}{models['tuned'][name]:>14.4f}"
            lines.append(f"{line}{constant:>22.4f}" if name == "label_accuracy" and constant is not None else line)
        if constant is not None:
            lines.append(f"    (the most common answer in training is {scored['most_common_answer']!r})")
    return [*lines, ""]
