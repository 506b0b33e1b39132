"""Where a recipe's run is and what is left to do, so that nothing is computed twice or mixed up.

`<output_dir>/<fingerprint>/` is finished if it has a manifest, and resumed if it has none. `force` makes
`<fingerprint>-2`, `-3`, ... Nothing overwrites another run's output.
"""

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mllm_assets.artifacts import (
    digest_json,
    is_complete,
    point_symlink,
    read_manifest,
    resolved_path,
)
from mllm_assets.data.curate.leaks import Stage, earlier_stages
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import RecipeError
from mllm_assets.file_digests import FileDigests
from mllm_assets.layout import Layout
from mllm_assets.recipe.load import Recipe, load_recipe, with_config_files
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.runs.models import (
    checkpoint_digest,
    find_adapters,
    find_model_dir,
    find_run_damage,
    reopen_run,
    starting_fingerprint,
)
from mllm_assets.training.runs.run_file import DATA_DIGESTS, RUN_FILE, read_run_file, spec_of_run
from mllm_assets.worker.run_settings import RunSettings
from mllm_assets.worker.tasks import TrainTask

# Raise it when the same recipe on the same data would give other weights than before
ENGINE_VERSION = 2
STARTS_FROM = ("model_name_or_path", "adapter_name_or_path", "dataset_dir")


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A recipe's run and what is left to do.

    Attributes:
        task: The worker's task, without its caches and accelerator.
        state: "new": no directory yet; "unfinished": to be resumed; "finished": nothing is left to do.
    """

    task: TrainTask
    state: Literal["new", "unfinished", "finished"]

    @property
    def directory(self) -> Path:
        return self.task.run_dir

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name what the run computes, with "-2" and so on if it was forced."""
        return self.task.fingerprint


def find_named_checkpoint(recipe: Recipe, root: Path) -> Path | None:
    """The checkpoint directory that `resume_from_checkpoint` names, relative to the root.

    Raises:
        RecipeError: It is not a complete checkpoint of this project. Says what can be named.
    """
    name = recipe.spec.resume_from_checkpoint
    if not isinstance(name, str):
        return None
    directory = resolved_path(root, name, what=f"{recipe.path}: resume_from_checkpoint")
    if not is_complete(directory) or "conditions" not in read_manifest(directory):
        raise RecipeError(
            f"{recipe.path}: resume_from_checkpoint names {directory}, which is not a complete checkpoint of a run "
            f"here. Name a checkpoint-<step> folder below outputs/, or true for the run's own newest; to start from a "
            f"complete model, name it in model_name_or_path."
        )
    return directory


def plan_run(
    recipe: Recipe,
    *,
    root: Path,
    model_dir: Path | None = None,
    dataset: Dataset | None = None,
    force: bool = False,
    num_processes: int = 1,
    settings: RunSettings = RunSettings(),
) -> RunPlan:
    """Name a recipe's run, and find what exists of it.

    By default `model_dir` is what `model_name_or_path` names, and `dataset` the recipe's, with the images' recorded
    digests. `force` trains a finished run again, not an unfinished one.

    Raises:
        MllmAssetsError: The model, an entry or its rows are missing or wrong.
    """
    overrides = overridden(recipe)
    recipe = with_config_files(recipe, root)
    spec = recipe.spec
    resume_from, adapters = find_named_checkpoint(recipe, root), find_adapters(recipe, root)
    dataset = dataset or Dataset.of_recipe(spec, root, read_part=None)
    model_dir = model_dir or find_model_dir(recipe, root)
    digests = {name: dataset.entry(name).digest for name in dict.fromkeys((*spec.train_entries, *spec.eval_entries))}
    pretrained_fingerprint = starting_fingerprint(model_dir, adapters, read=(read := FileDigests()))
    if resume_from:
        _require_same_run(recipe, resume_from, digests, pretrained_fingerprint, regroup=settings.regroup)
    name = run_fingerprint(
        spec,
        data_digests=digests,
        pretrained_fingerprint=pretrained_fingerprint,
        num_processes=num_processes,
        settings=settings,
        resume_digest=checkpoint_digest(resume_from) if resume_from else None,
    )
    directory = _choose(_folder_of_runs(recipe, root), name, force=force)
    own = _own_stage(recipe, directory.name, dataset, digests)
    state = "finished" if is_complete(directory) else "unfinished" if directory.exists() else "new"
    task = TrainTask(
        recipe=spec,
        recipe_name=recipe.name,
        model_dir=model_dir,
        adapters=adapters,
        data_dir=dataset.data_dir,
        media_dir=dataset.media_dir,
        rows_root=Layout(root).rows,
        run_dir=directory,
        fingerprint=directory.name,
        data_digests=digests,
        pretrained_fingerprint=pretrained_fingerprint,
        model_files=read.states(),
        stages=tuple(stage.to_dict(root) for stage in (*earlier_stages(model_dir, adapters, root), own)),
        resume_from=resume_from,
        notes=recipe.notes,
        regroup=settings.regroup,
        answers=settings.answers,
        overrides=overrides,
    )
    return RunPlan(task, state)


def reopen_if_damaged(plan: RunPlan, warn: Callable[[str], None]) -> RunPlan:
    """A plan as it is, or where its finished run was changed since, the plan to finish it again; `warn` says why."""
    if plan.state != "finished" or (damage := find_run_damage(plan.directory)) is None:
        return plan
    reopen_run(plan.directory)
    warn(f"{plan.directory} was finished, but was changed since: {damage}. {describe_resume(plan.directory)}")
    return replace(plan, state="unfinished")


def _own_stage(recipe: Recipe, fingerprint: str, dataset: Dataset, digests: Mapping[str, str]) -> Stage:
    return Stage(
        recipe=recipe.name,
        fingerprint=fingerprint,
        data_dir=dataset.data_dir,
        media_dir=dataset.media_dir,
        entries={name: digests[name] for name in recipe.spec.train_entries},
    )


def overridden(recipe: Recipe) -> dict[str, Any]:
    """Where a recipe differs from its file, of what decides about the weights."""
    values = _deciding_values(recipe.spec)
    try:
        written = _deciding_values(load_recipe(recipe.path).spec)
    except RecipeError:  # the overrides correct it
        return values
    return {key: value for key, value in values.items() if key not in written or value != written[key]}


def require_overridable(recipe: Recipe) -> None:
    """Refuse other values of what the graph has from the recipe's file: what a run starts from, its place, its judges.

    Raises:
        RecipeError: Names the keys, and what to do instead.
    """
    cure = "Write a recipe of its own (copy the file with another output_dir)"
    if changed := [key for key in STARTS_FROM if key in overridden(recipe)]:
        raise RecipeError(
            f"{' and '.join(changed)} cannot be another one in a run of {recipe.name}: what it is made from is an "
            f"asset before it, which {recipe.path.name} names. {cure}, or train it without Dagster: "
            "mllm-assets train RECIPE key=value."
        )
    try:
        written = load_recipe(recipe.path).spec
    except RecipeError:  # the overrides correct it
        return
    if recipe.spec.output_dir != written.output_dir:
        raise RecipeError(
            f"output_dir cannot be another one in a run of {recipe.name}: what follows looks for its runs where "
            f"{recipe.path.name} says. {cure}."
        )
    if set(recipe.spec.eval_entries) != set(written.eval_entries):
        raise RecipeError(
            f"eval_dataset cannot be another one in a run of {recipe.name}: all its runs are judged by the same "
            f"samples, those that {recipe.path.name} names. {cure}."
        )


def _deciding_values(spec: TrainSpec) -> dict[str, Any]:
    paths = (
        "model_name_or_path",
        "adapter_name_or_path",
        "dataset",
        "dataset_dir",
        "media_dir",
        "resume_from_checkpoint",
    )
    return semantic_values(spec) | {key: getattr(spec, key) for key in paths}


def _require_same_run(
    recipe: Recipe, checkpoint: Path, digests: Mapping[str, str], model: str, *, regroup: bool
) -> None:
    """Refuse to resume a checkpoint with other values than it was trained with: the optimizer keeps its own.

    Raises:
        RecipeError: Names each key with both values, and what to do.
    """
    run_dir = checkpoint.parent
    kept = read_run_file(run_dir)
    if not all(isinstance(kept.get(key), dict) for key in ("starts_from", DATA_DIGESTS)):
        raise RecipeError(
            f"{recipe.path}: {run_dir / RUN_FILE} does not say what {checkpoint.name} was trained with, "
            f"so whether this recipe can resume it is unknown. Name a checkpoint of a run that was trained since."
        )
    spec, trained = recipe.spec, spec_of_run(kept["starts_from"].get("recipe"), run_dir / RUN_FILE)

    def values(spec: TrainSpec, digests: Mapping[str, str], model: str) -> dict[str, Any]:
        found = semantic_values(spec)
        if regroup:
            found["gradient_accumulation_steps"] *= found.pop("per_device_train_batch_size")
        entries = {"dataset": spec.train_entries, "eval_dataset": spec.eval_entries if spec.evaluation_selects else ()}
        found |= {key: [f"{name} ({str(digests.get(name))[:12]})" for name in names] for key, names in entries.items()}
        return found | {"model_name_or_path": f"a model with the fingerprint {model}"}

    then, now = (
        values(trained, kept[DATA_DIGESTS], kept["starts_from"].get("fingerprint")),
        values(spec, digests, model),
    )
    differ = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if spec.max_steps > 0:  # used as they are: the schedule is that of the longer or shorter run from there on
        differ = [key for key in differ if key not in ("max_steps", "num_train_epochs")]
    if differ:
        how = f"set model_name_or_path: {run_dir / 'model'} and delete resume_from_checkpoint"
        if not is_complete(run_dir):
            how = f"let that run finish first, then {how}"
        raise RecipeError(
            f"{recipe.path}: resume_from_checkpoint names {checkpoint}, whose optimizer, schedule and place in the "
            "data go with the values that it was trained with:\n"
            + "".join(f"  {key} was {then.get(key)!r}, and is {now.get(key)!r} here\n" for key in differ)
            + f"Set them back; max_steps may be another number. To train on with other values, {how}."
        )


def _folder_of_runs(recipe: Recipe, root: Path) -> Path:
    """The recipe's `output_dir`; refuses a file, and what is below one."""
    folder = resolved_path(root, recipe.spec.output_dir, what=f"{recipe.path}: output_dir")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise RecipeError(
            f"{recipe.path}: output_dir is {recipe.spec.output_dir}, and {there} is no folder. Name a folder of its "
            "own, for example output_dir: outputs/my_recipe."
        )
    return root / recipe.spec.output_dir


def _choose(folder: Path, name: str, *, force: bool) -> Path:
    """The newest finished attempt, else the newest one; forced: the newest one if it is unfinished, else the next."""
    attempts = [folder / name]
    while (following := folder / f"{name}-{len(attempts) + 1}").exists():
        attempts.append(following)
    finished = [attempt for attempt in attempts if is_complete(attempt)]
    if not force:
        return finished[-1] if finished else attempts[-1]
    return folder / f"{name}-{len(attempts) + 1}" if is_complete(attempts[-1]) else attempts[-1]


def describe_resume(run_dir: Path) -> str:
    """Where the same run resumes when it is started again."""
    steps = [int(path.name.split("-")[1]) for path in run_dir.glob("checkpoint-*") if is_complete(path)]
    where = f"resumes from checkpoint-{max(steps)}" if steps else "starts from step 0: no checkpoint was saved yet"
    return f"Started again, the run {where}."


def shown_overrides(values: Mapping[str, Any]) -> str:
    """Overrides as a command line takes them."""
    return " ".join(shlex.quote(f"{key}={v if isinstance(v, str) else json.dumps(v)}") for key, v in values.items())


def published_note(manifest: Mapping[str, Any]) -> str:
    """Which step of a finished run was published, where it is not the last one; the losses are those of that step."""
    step = manifest.get("published_step", manifest["num_steps"])
    return "" if step == manifest["num_steps"] else f", the model of step {step}, the best"


def point_latest(plan: RunPlan) -> None:
    """Let the link `latest` next to a finished run of the recipe as written point to it.

    Users and recipes that start from it mean what the file says; a trial with other values is found by them.
    """
    if is_complete(plan.directory) and not plan.task.overrides:
        point_symlink(plan.directory.parent / "latest", plan.directory)


def semantic_values(spec: TrainSpec) -> dict[str, Any]:
    """The fields that decide which weights come out."""
    scopes = {"semantic", "selection"} if spec.evaluation_selects else {"semantic"}
    idle = set(spec.idle_keys)
    if not spec.packs:
        idle |= {"preprocessing_batch_size", "preprocessing_num_workers"}
    if len(spec.train_entries) == 1 and len(spec.eval_entries) < 2:
        idle |= {"mix_strategy", "interleave_probs"}
    if spec.quantization_bit is None:
        idle.add("quantization_bit")
    idle |= {f.name for f in dataclasses.fields(spec) if "added" in f.metadata and getattr(spec, f.name) == f.default}
    return {
        f.name: getattr(spec, f.name)
        for f in dataclasses.fields(spec)
        if f.metadata["scope"] in scopes and f.name not in idle
    }


def run_fingerprint(
    spec: TrainSpec,
    *,
    data_digests: Mapping[str, str],
    pretrained_fingerprint: str,
    num_processes: int = 1,
    settings: RunSettings = RunSettings(),
    resume_digest: str | None = None,
) -> str:
    """Name what a run computes: 16 hex digits.

    Covers the semantic keys, the content of the training entries in the recipe's order, the model, the number of
    processes, which multiplies the batch, and the checkpoint that `resume_from_checkpoint` names (`resume_digest`).
    The evaluation entries, and how much the model is asked about them, count only if evaluation chooses the weights.
    Paths, names of entries, logging, loader processes and save intervals do not count.
    """
    asked, chooses_by_answers = settings.answers, spec.measures_answers and spec.evaluation_selects
    return digest_json(
        {
            **({"resume_from": resume_digest} if resume_digest else {}),
            "engine": ENGINE_VERSION,
            "spec": semantic_values(spec),
            "train": [data_digests[name] for name in spec.train_entries],
            "eval": [data_digests[name] for name in spec.eval_entries] if spec.evaluation_selects else [],
            "model": pretrained_fingerprint,
            "num_processes": num_processes,
            **({"regroup": True} if settings.regroup else {}),
            **({"answers": [asked.max_samples, asked.max_new_tokens]} if chooses_by_answers else {}),
        }
    )[:16]
