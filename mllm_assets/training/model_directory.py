"""The directory of the model that a run starts from: where it is, what names its content, whether it is as written."""

from pathlib import Path

from mllm_assets.artifacts import MANIFEST, digest_json, find_damage, is_complete, read_manifest, sha256_file, slug
from mllm_assets.errors import IntegrityError, MllmAssetsError, ModelError
from mllm_assets.project.read import declared_models, materialize_command
from mllm_assets.training.recipe import Recipe, load_recipe

PUBLISHED = ("model", "adapter")  # what a finished run holds for others to use; the second only with LoRA


def find_model_dir(recipe: Recipe, root: Path) -> Path:
    """The directory that `model_name_or_path` names, relative to the root, links followed.

    Raises:
        ModelError: It is not there, or is a run rather than its model. Says how to get it.
    """
    name = recipe.spec.model_name_or_path
    directory = (root / name).resolve()
    if not directory.is_dir():
        raise ModelError(
            f"{recipe.path}: model_name_or_path is {name}, and {directory} is no directory. "
            f"{_how_to_get(directory, recipe, root)}"
        )
    if not (directory / "config.json").exists() and (directory / "model" / "config.json").is_file():
        raise ModelError(
            f"{recipe.path}: model_name_or_path is {name}, which is a run; its model is in the folder model/ of it. "
            f"Write model_name_or_path: {name.rstrip('/')}/model"
        )
    return directory


def _how_to_get(directory: Path, recipe: Recipe, root: Path) -> str:
    for path in sorted(recipe.path.parent.glob("*.yaml")):
        try:
            output_dir = (root / load_recipe(path).spec.output_dir).resolve()
        except MllmAssetsError:
            continue  # this one is told what is wrong with it when it is trained
        if directory.is_relative_to(output_dir) and path != recipe.path:
            return f"Train the recipe that makes it first: mllm-assets train {path}"
    if directory.is_relative_to(root.resolve() / "outputs"):
        return "Train the recipe whose output_dir it is in first: mllm-assets train RECIPE.yaml"
    if directory.parent == (root / "pretrains").resolve() and directory.name in declared_models(Path.cwd()):
        return f"Make it with: {materialize_command(f'pretrained/{slug(directory.name)}')}"
    return f"Download the model there, for example: hf download google/gemma-3-4b-it --local-dir {directory}"


def model_fingerprint(directory: Path, *, deep: bool = False) -> str:
    """Name a model directory's content: 16 hex digits over the names and digests of its files.

    The digests come from a manifest where there is one (its own, or that of the run which the directory is part of),
    otherwise the files are read. README, LICENSE and hidden files do not count: the same weights, the same name.

    Args:
        directory: A Hugging Face model directory.
        deep: Read the files in any case and compare them with the manifest, at about 1.6 GB a CPU-second.

    Raises:
        ModelError: There is no such directory, or no config.json in it.
        IntegrityError: A file no longer has the size, or with `deep` the digest, that the manifest says.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory} holds no model: it has no config.json. Materialise the model's asset, or put a Hugging Face "
            "model directory there."
        )
    digests = _manifest_digests(directory, deep=deep)
    if digests is None:
        paths = (path for path in directory.rglob("*") if path.is_file())
        names = {path.relative_to(directory).as_posix(): path for path in paths}
        digests = {name: sha256_file(path) for name, path in names.items() if _counts(name)}
    return digest_json(digests)[:16]


def require_published(run_dir: Path) -> None:
    """Compare what a finished run published with its manifest, every byte.

    Raises:
        IntegrityError: Names the file that is missing or changed, and how to write it anew.
    """
    damage = find_damage(run_dir, only=PUBLISHED)
    if damage is not None:
        raise IntegrityError(f"{run_dir} is finished, but was changed since: {damage}. {_train_again(run_dir)}")


def _manifest_digests(directory: Path, *, deep: bool) -> dict[str, str] | None:
    for owner, prefix in ((directory, ""), (directory.parent, f"{directory.name}/")):
        if not is_complete(owner):
            continue
        files = read_manifest(owner)["files"]
        names = [name for name in files if name.startswith(prefix) and _counts(name.removeprefix(prefix))]
        if f"{prefix}config.json" not in names:
            continue
        cure = _train_again(owner) if prefix else f"Delete {owner} and materialise its asset again."
        for name in names:
            path, expected = owner / name, files[name]["num_bytes"]
            found = path.stat().st_size if path.is_file() else 0
            if found != expected:
                raise IntegrityError(f"{path} has {found} bytes, but {MANIFEST} says {expected}. {cure}")
            if deep and sha256_file(path) != files[name]["sha256"]:
                raise IntegrityError(
                    f"{path} does not match its digest in {MANIFEST}: its bytes changed since it was written. {cure}"
                )
        return {name.removeprefix(prefix): files[name]["sha256"] for name in names}
    return None


def _train_again(run_dir: Path) -> str:
    name = read_manifest(run_dir).get("recipe_name")
    which = f"its recipe, {name}," if name else "its recipe"
    return (
        f"Delete {run_dir / MANIFEST} and train {which} again: it goes on from its last checkpoint and writes the "
        f"model anew."
    )


def _counts(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and parts[-1] != MANIFEST and not parts[-1].startswith(("README", "LICENSE"))
