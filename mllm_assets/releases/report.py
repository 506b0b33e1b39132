"""What `mllm-assets releases` shows: facts as JSON-able values, and the same as text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import UNNAMED, read_manifest, slug
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.intervals import gain_text
from mllm_assets.evaluation.metrics import read_metrics
from mllm_assets.evaluation.scores import in_order
from mllm_assets.layout import Layout
from mllm_assets.project.read import materialize_command
from mllm_assets.releases.versions import (
    current_release,
    find_release,
    find_release_damage,
    released_recipes,
    version_folders,
)

USES = {"train": "trained on", "validate": "chosen on", "evaluate": "judged on"}  # of an entry, by DatasetLineage
LIST_COLUMNS = ("recipe", "version", "current", "released (UTC)", "MiB", "where")


def list_facts(layout: Layout, recipe_name: str | None = None, *, deep: bool = True) -> list[dict[str, Any]]:
    """Every release of a recipe, or of all, oldest first. `deep` compares the files' digests, not only their sizes.

    Raises:
        ModelError: The recipe has no release.
    """
    if recipe_name is not None and not version_folders(layout, recipe_name):
        find_release(layout, recipe_name)
    recipes = [recipe_name] if recipe_name is not None else released_recipes(layout)
    return [
        _facts(layout, name, directory, deep=deep) for name in recipes for directory in version_folders(layout, name)
    ]  # fmt: skip


def show_facts(layout: Layout, recipe_name: str, version: str | None = None) -> dict[str, Any]:
    """One release: what it was made from, how it was judged, what it scored.

    Raises:
        ModelError: There is no such release.
    """
    release = find_release(layout, recipe_name, version)
    manifest = read_manifest(release.directory)
    names = ("digest", "weights_digest", "fingerprint", "gates", "lineage", "verification", "engine_version", "files")
    facts = _facts(layout, recipe_name, release.directory, deep=True)
    metrics = None if facts["damage"] else read_metrics(release.directory)
    return {**facts, **{name: manifest[name] for name in names}, "metrics": metrics}


def _facts(layout: Layout, recipe_name: str, directory: Path, *, deep: bool) -> dict[str, Any]:
    damage = find_release_damage(directory, deep=deep)
    try:
        current = current_release(layout, recipe_name)
    except IntegrityError as error:  # `current` does not point to a release: reported, and the rest is shown
        current, damage = None, damage or str(error)
    try:
        manifest = read_manifest(directory)
    except IntegrityError:
        manifest = {}
    return {
        "recipe": recipe_name,
        "version": directory.name,
        "is_current": current is not None and current.directory == directory,
        "created_at": manifest.get("created_at"),
        "num_bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        "path": layout.relative(directory),
        "damage": damage,
    }


def list_rows(facts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row of `LIST_COLUMNS` for each release."""
    return [
        (
            release["recipe"],
            release["version"],
            "yes" if release["is_current"] else "",
            (release["created_at"] or "?")[:16].replace("T", " "),
            f"{release['num_bytes'] / 2**20:.1f}",
            _state(release),
        )
        for release in facts
    ]


def nothing_released(layout: Layout) -> str:
    """What to say where no recipe has a release, and what to do: of a recipe that was trained, if there is one."""
    trained = sorted(path.parent.name for path in layout.outputs.glob("*/latest"))
    declared = sorted(slug(path.stem, UNNAMED) for path in layout.configs.glob("*.yaml"))
    if not trained + declared:
        return f"Nothing is released below {layout.root}, and no recipe is there: put one into configs/."
    command = materialize_command((trained + declared)[0])
    return f"Nothing is released below {layout.root} yet. Make a release, for example: {command}"


def _state(release: Mapping[str, Any]) -> str:
    return f"DAMAGED: {release['damage']}" if release["damage"] else release["path"]


def show_text(facts: Mapping[str, Any]) -> str:
    """A release on one screen; its README.md has the rest."""
    lineage, base = facts["lineage"], facts["lineage"]["base_model"]
    models = {"base model": base}
    if (pretrained := lineage["pretrained_model"])["name"] != base["name"]:
        models["pretrained"] = pretrained
    lines = [
        f"{facts['recipe']} {facts['version']}{', the current release' if facts['is_current'] else ''}",
        f"  released    {facts['created_at']}, {_state(facts)}",
        *(
            f"  {what}  {_name(model)}, fingerprint {model['fingerprint'][:16]}, licence {model.get('license') or '?'}"
            for what, model in models.items()
        ),
        *(
            f"  {USES.get(dataset['use'], dataset['use']):<10}  {dataset['entry']}: "
            f"{_name(dataset)}, digest {dataset['digest'][:16]}, licence {dataset.get('license') or '?'}"
            for dataset in lineage["datasets"]
        ),
        f"  run         {facts['fingerprint']}, weights {facts['weights_digest'][:16]}",
        f"  made with   {', '.join(f'{library} {version}' for library, version in lineage['versions'].items())}",
        f"  made by     {lineage['command']}",
    ]
    for entry, scored in ((facts["metrics"] or {}).get("entries") or {}).items():
        tuned, gains = scored["models"]["tuned"], scored["gains"]["tuned_over_base"]
        lines.append(f"  {entry}, {scored['num_samples']} samples; gain over the base model with its 95 % interval:")
        lines += [
            f"    {name:<16}{tuned[name]:>10.4f}  {gain_text(gains.get(name))}"
            for name in in_order(tuned, headlines=True)
        ]
    width = max(len(gate["name"]) for gate in facts["gates"])
    lines += [
        f"  {'passed' if gate['passed'] else 'FAILED'}  {gate['name']:<{width}}  {gate['description']}"
        for gate in facts["gates"]
    ]
    return "\n".join(lines)


def _name(source: Mapping[str, Any]) -> str:
    name = source.get("hub_id") or source.get("source") or source.get("name") or "written by hand"
    return f"{name} at {source['revision']}" if source.get("revision") else name
