"""Where a recipe's run lies and what is left to do of it, so that nothing is computed twice or mixed up.

`<output_dir>/<fingerprint>/` is finished if it has a manifest, and resumed if it has none. `force` makes
`<fingerprint>-2`, `-3`, ... Nothing overwrites another run's output.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm_assets.artifacts import digest_json, is_complete, point_symlink, read_manifest
from mllm_assets.data.sharegpt import entry_digest
from mllm_assets.data.stages import Stage, stages_behind
from mllm_assets.errors import RecipeError
from mllm_assets.training.cache_settings import CacheSettings
from mllm_assets.training.fingerprint import run_fingerprint
from mllm_assets.training.model_directory import find_model_dir, model_fingerprint
from mllm_assets.training.recipe import Recipe, with_config_files


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """Where a recipe's run lies and what is left to do.

    Attributes:
        recipe: What is trained.
        root: The project's folder, which the recipe's paths are relative to.
        model_dir: The model that it starts from.
        data_dir: The folder of `dataset_info.json`.
        fingerprint: 16 hex digits that name what the run computes, with "-2" and so on where it was forced.
        directory: Of the run; its last part is the fingerprint.
        state: "new": no directory yet; "unfinished": to be resumed; "finished": nothing is left to do.
        data_digests: Of each entry that it trains on or evaluates, by name.
        pretrained_fingerprint: Of the model that it starts from.
        stages: The runs that this model went through, and last this one, each with what it trains on.
        regroup: Whether micro-batches may be regrouped to the largest that fits, which changes the loss a little.
        resume_from: The checkpoint that the recipe's `resume_from_checkpoint` names, or None.
    """

    recipe: Recipe
    root: Path
    model_dir: Path
    data_dir: Path
    fingerprint: str
    directory: Path
    state: Literal["new", "unfinished", "finished"]
    data_digests: Mapping[str, str]
    pretrained_fingerprint: str
    stages: Sequence[Stage]
    regroup: bool = False
    resume_from: Path | None = None


def find_named_checkpoint(recipe: Recipe, root: Path) -> Path | None:
    """The checkpoint directory that `resume_from_checkpoint` names, relative to the root.

    Raises:
        RecipeError: It is no checkpoint of this project, or incomplete. Says what can be named.
    """
    name = recipe.spec.resume_from_checkpoint
    if not isinstance(name, str):
        return None
    directory = (root / name).resolve()
    if not is_complete(directory) or "conditions" not in read_manifest(directory):
        raise RecipeError(
            f"{recipe.path}: resume_from_checkpoint names {directory}, which is no complete checkpoint of a run here. "
            f"Name a checkpoint-<step> folder below outputs/, or true for the run's own newest; to start from a whole "
            f"model, name it in model_name_or_path."
        )
    return directory


def plan_run(
    recipe: Recipe,
    *,
    root: Path,
    model_dir: Path | None = None,
    data_dir: Path | None = None,
    output_dir: Path | None = None,
    force: bool = False,
    num_processes: int = 1,
    regroup: bool = False,
) -> RunPlan:
    """Name a recipe's run, and find what is there of it.

    Args:
        recipe: What to train.
        root: The project's folder.
        model_dir: The model to start from, by default what `model_name_or_path` names.
        data_dir: The folder of `dataset_info.json`, by default the recipe's `dataset_dir`.
        output_dir: The folder of the recipe's runs, by default the recipe's `output_dir`.
        force: Train again where this very run is finished. An unfinished run is resumed all the same.
        num_processes: How many processes train.
        regroup: Whether micro-batches may be regrouped to the largest that fits.

    Raises:
        MllmAssetsError: The model, an entry or its rows are missing or wrong.
    """
    recipe = with_config_files(recipe, root)
    spec = recipe.spec
    resume_from = find_named_checkpoint(recipe, root)
    data_dir = data_dir or root / spec.dataset_dir
    model_dir = model_dir or find_model_dir(recipe, root)
    digests = {name: entry_digest(data_dir, name) for name in dict.fromkeys((*spec.train_entries, *spec.eval_entries))}
    pretrained_fingerprint = model_fingerprint(model_dir)
    name = run_fingerprint(
        spec,
        data_digests=digests,
        pretrained_fingerprint=pretrained_fingerprint,
        num_processes=num_processes,
        regroup=regroup,
        resume_digest=digest_json(read_manifest(resume_from)["files"]) if resume_from else None,
    )
    directory = _choose(output_dir or root / recipe.spec.output_dir, name, force=force)
    own = Stage(
        recipe=recipe.name,
        fingerprint=directory.name,
        data_dir=data_dir,
        entries={name: digests[name] for name in spec.train_entries},
    )
    state = "finished" if is_complete(directory) else "unfinished" if directory.exists() else "new"
    return RunPlan(
        recipe=recipe,
        root=root,
        model_dir=model_dir,
        data_dir=data_dir,
        fingerprint=directory.name,
        directory=directory,
        state=state,
        data_digests=digests,
        pretrained_fingerprint=pretrained_fingerprint,
        stages=[*stages_behind(model_dir, root), own],
        regroup=regroup,
        resume_from=resume_from,
    )


def _choose(folder: Path, name: str, *, force: bool) -> Path:
    """The newest finished attempt, else the newest one; forced: the newest one if it is unfinished, else the next."""
    attempts = [folder / name]
    while (following := folder / f"{name}-{len(attempts) + 1}").exists():
        attempts.append(following)
    finished = [attempt for attempt in attempts if is_complete(attempt)]
    if not force:
        return finished[-1] if finished else attempts[-1]
    return folder / f"{name}-{len(attempts) + 1}" if is_complete(attempts[-1]) else attempts[-1]


def train_request(
    plan: RunPlan, *, cache: CacheSettings | None = None, accelerator: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The worker's request for a planned run, JSON-able."""
    return {
        "task": "train",
        "recipe": plan.recipe.spec.to_dict(),
        "recipe_name": plan.recipe.name,
        "root": str(plan.root),
        "model_dir": str(plan.model_dir),
        "data_dir": str(plan.data_dir),
        "run_dir": str(plan.directory),
        "fingerprint": plan.fingerprint,
        "data_digests": dict(plan.data_digests),
        "pretrained_fingerprint": plan.pretrained_fingerprint,
        "stages": [stage.to_dict(plan.root) for stage in plan.stages],
        **(cache or CacheSettings()).to_request(),
        "resume_from": str(plan.resume_from) if plan.resume_from is not None else None,
        "notes": list(plan.recipe.notes),
        "regroup": plan.regroup,
        **({"accelerator": dict(accelerator)} if accelerator is not None else {}),
    }


def describe_resume(run_dir: Path) -> str:
    """What the same run goes on from when it is started again."""
    steps = [int(path.name.split("-")[1]) for path in run_dir.glob("checkpoint-*") if is_complete(path)]
    where = f"goes on from checkpoint-{max(steps)}" if steps else "begins anew: no checkpoint was saved yet"
    return f"Started again, the run {where}."


def point_latest(plan: RunPlan) -> None:
    """Let `latest` beside a finished run point to it, for people and for recipes that start from it."""
    if is_complete(plan.directory):
        point_symlink(plan.directory.parent / "latest", plan.directory)
