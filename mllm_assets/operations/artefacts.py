"""The artefacts below a root, and what still refers to them: links, releases, recipes, Dagster, kept artefacts.

Artefacts are named by 16 hex digits, and their manifests name what they were made from in the same way. So what is
needed is found as a garbage collector marks memory: from what is in use, along the names. A name that occurs somewhere
by chance keeps too much, never too little.
"""

import math
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.artifacts import MANIFEST, is_complete, read_manifest, sha256_file
from mllm_assets.data.curate.publish import NAMED_IMAGES
from mllm_assets.data.sharegpt.dataset import IMAGE_LIST, Dataset, listed_images
from mllm_assets.data.sharegpt.entries import load_entries
from mllm_assets.errors import IntegrityError, MllmAssetsError
from mllm_assets.layout import Layout

NAME = re.compile(r"\b[0-9a-f]{16}(?:-\d+)?\b")
RUN, METRICS = "run", "metrics"
CACHES = ("features", "hidden states", "encoded rows", "frozen weights", "folds", "evaluations")
DATA_AND_CACHES = ("dataset version", "measurements", "source", "corrections", *CACHES)
PLACES = {
    RUN: "outputs/*/*",
    "predictions": "outputs/*/predictions/*",
    METRICS: "outputs/*/eval_metrics/*",
    "sweep": "outputs/*/sweep/*",
    "label issues": "outputs/*/label_issues/*",
    "what it gained": "outputs/*/what_it_gained/*",
    "copy of a release": "outputs/*/copies/*",
    "benchmarks": "outputs/*/benchmarks/*",
    "dataset version": "data/.versions/*/*",
    "measurements": "data/.quality/*/*",
    "source": "data/.raw/*/*",
    "corrections": "data/.corrections/*/*",
    "features": "cache/features/*",
    "hidden states": "cache/hidden_states/*",
    "encoded rows": "cache/rows/*",
    "frozen weights": "cache/frozen_weights/*",
    "folds": "cache/folds/*",
    "evaluations": "cache/evaluations/*",
}
LINKS = ("outputs/*/*", "releases/*/*", "data/*", "data/.corrections/*/*")
WITH_NAMES = (MANIFEST, "run.json", "checkpoint_metrics.json")
MEDIA_DIR = re.compile(r"\bmedia_dir\b[\"']?\s*[:=]\s*[\"']?([^\"'\n,#}\[\]]+)")
BY_CONTENT = re.compile(r"([0-9a-f]{16})\.\w+")


@dataclass(frozen=True, slots=True)
class Artefact:
    """One directory; `used_s` is the Unix time at which it was last written or opened."""

    kind: str
    path: Path
    used_s: float


def find_artefacts(layout: Layout) -> list[Artefact]:
    """Every artefact below the root that could be made again."""
    return [
        Artefact(kind, path, last_used_s(path))
        for kind, pattern in PLACES.items()
        for path in sorted(layout.root.glob(pattern))
        if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]


def last_used_s(directory: Path) -> float:
    """The newest modification time of a directory and its direct children."""
    times = []
    for path in (directory, *directory.iterdir()):
        try:
            times.append(path.lstat().st_mtime)
        except FileNotFoundError:  # deleted meanwhile
            continue
    return max(times, default=0.0)


def find_kept(
    layout: Layout, artefacts: Iterable[Artefact], *, keep_runs: int, also_named: str = ""
) -> dict[Path, str]:
    """Each artefact that is still needed, with the reason.

    The `keep_runs` newest runs of each recipe are kept whatever names them. `also_named` is text that names artefacts:
    Dagster's latest materialisations, the project's YAML.
    """
    artefacts = list(artefacts)
    by_name: dict[str, list[Artefact]] = {}
    for artefact in artefacts:
        by_name.setdefault(artefact.path.name, []).append(artefact)
    kept: dict[Path, str] = {}
    waiting: list[tuple[Path, str]] = list(_newest(artefacts, keep_runs))
    links = [path for pattern in LINKS for path in layout.root.glob(pattern) if path.is_symlink()]
    waiting += [(link.resolve(), f"{link.name} points to it") for link in links]
    for why, text in (("Dagster or a recipe names it", also_named), *_releases(layout)):
        waiting += [(a.path, why) for name in set(NAME.findall(text)) for a in by_name.get(name, ())]
    known = {artefact.path for artefact in artefacts}
    while waiting:
        while waiting:
            path, why = waiting.pop()
            if path in known and path not in kept:
                kept[path] = why
                here = f"{path.relative_to(layout.root)} names it"
                waiting += [(a.path, here) for name in _names_in(path) for a in by_name.get(name, ())]
        waiting = [(path, why) for path, why in _metrics_of(layout, artefacts, kept) if path not in kept]
    return kept


def _newest(artefacts: Iterable[Artefact], keep_runs: int) -> Iterator[tuple[Path, str]]:
    """The newest runs of each recipe, finished or not, and the newest of everything else in each folder."""
    now_s = time.time()
    groups: dict[tuple[Path, bool], list[Artefact]] = {}
    for artefact in artefacts:
        if artefact.kind not in CACHES:  # of these only the last use counts
            complete = artefact.kind != RUN or is_complete(artefact.path)
            groups.setdefault((artefact.path.parent, complete), []).append(artefact)
    for (_, complete), group in groups.items():
        # of interrupted runs only the newest is likely to be resumed
        count = keep_runs if group[0].kind == RUN and complete else 1
        # times in the future, from before the clock was set back, count as now
        times = sorted((min(artefact.used_s, now_s) for artefact in group), reverse=True)
        oldest_s = times[min(count, len(times)) - 1] if count else math.inf
        yield from ((artefact.path, "among the newest") for artefact in group if artefact.used_s >= oldest_s)


def _releases(layout: Layout) -> Iterator[tuple[str, str]]:
    for manifest in layout.root.glob(f"releases/*/*/{MANIFEST}"):
        release = manifest.parent.relative_to(layout.root)
        yield f"{release} names it", _text(manifest)


def _metrics_of(layout: Layout, artefacts: Iterable[Artefact], kept: Mapping[Path, str]) -> Iterator[tuple[Path, str]]:
    """The metrics of runs that are kept and of releases; they name the weights."""
    weights = {_weights(path): path for path in kept}
    weights |= {_weights(manifest.parent): manifest.parent for manifest in layout.root.glob(f"releases/*/*/{MANIFEST}")}
    for artefact in artefacts:
        if artefact.kind == METRICS and is_complete(artefact.path):
            digest = read_manifest(artefact.path).get("inputs", {}).get("weights_digest")
            if digest is not None and digest in weights:
                yield artefact.path, f"metrics of {weights[digest].relative_to(layout.root)}"


def _weights(directory: Path) -> str | None:
    return read_manifest(directory).get("weights_digest") if is_complete(directory) else None


def _text(path: Path) -> str:
    """A file's text, a damaged one's too."""
    return path.read_text(encoding="utf-8", errors="replace")


def _names_in(directory: Path) -> set[str]:
    files = [directory / name for name in WITH_NAMES]
    return {name for file in files if file.is_file() for name in NAME.findall(_text(file))}


def project_names(project: Path, package: str | None) -> str:
    """The text of a project's YAML: a recipe may start from a run, or resume a checkpoint, by its name.

    Raises:
        IntegrityError: A file cannot be read, so what it names is not known.
    """
    folders = [project / "configs", *([project / package.replace(".", "/") / "defs"] if package else [])]
    texts = []
    for path in (path for folder in folders for path in folder.rglob("*.y*ml")):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path} cannot be read ({error}), and it may name what is needed. Fix it.") from None
    return "\n".join(texts)


def media_dirs(layout: Layout, also_named: str) -> list[Path]:
    """The folders that recipes and runs name as `media_dir`; `also_named` holds the recipes."""
    texts = [also_named, *(_text(path) for path in layout.outputs.glob("*/*/run.json"))]
    names = {name.strip() for text in texts for name in MEDIA_DIR.findall(text)}
    return [layout.root / name for name in sorted(names) if (layout.root / name).is_dir()]


def find_unnamed_images(layout: Layout, gone: Collection[Path], media: Sequence[Path] = ()) -> Iterator[Path]:
    """Images that this project wrote and that nothing names except the dataset versions in `gone`.

    A picture of the user's is never among them: ours are named by their content, or are in the list that a dataset with
    `output.image_prefix` keeps of its own. The paths of an entry may be relative to each of the `media` folders.

    Raises:
        MllmAssetsError: An entry of `dataset_info.json` cannot be read, so what it names is not known.
    """
    named: set[Path] = set()
    for version in layout.data.glob(".versions/*/*"):
        if version not in gone and (version / IMAGE_LIST).is_file():
            named.update((layout.data / name).resolve() for name, _ in listed_images(version))
    for name, entry in load_entries(layout.data).items() if layout.dataset_info.is_file() else ():
        if entry.remote is None and (layout.data / entry.file_name).exists():  # a missing file names nothing
            named |= _images_of(layout, name, media)
    ours = {name for claims in layout.data.glob(f".versions/*/{NAMED_IMAGES}") for name in _text(claims).splitlines()}
    for path in sorted(layout.images.iterdir()) if layout.images.is_dir() else ():
        if path.is_file() and path.resolve() not in named:
            match = BY_CONTENT.fullmatch(path.name)
            if f"images/{path.name}" in ours or (match and sha256_file(path).startswith(match[1])):
                yield path


def _images_of(layout: Layout, entry: str, media: Sequence[Path]) -> set[Path]:
    """The images that an entry names, as every folder has it that has all of them.

    Raises:
        MllmAssetsError: None has.
    """
    named: list[Path] = []
    problems: list[MllmAssetsError] = []
    for folder in (None, *media):
        try:
            rows = Dataset(layout.data, media_dir=folder).entry(entry).rows
            named += [image for row in rows for image in row.images]
        except MllmAssetsError as error:
            problems.append(error)
    if len(problems) == len(media) + 1:
        raise problems[0]
    return set(named)
