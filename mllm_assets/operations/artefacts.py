"""What lies below a root, and what is still named: by links, releases, recipes, Dagster, or something that is kept.

Artefacts are named by 16 hex digits, and their manifests name what they were made from in the same way. So what is
needed is found as a garbage collector marks memory: from what is in use, along the names. A name that stands somewhere
by chance keeps too much, never too little.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mllm_assets.artifacts import MANIFEST, is_complete, read_manifest
from mllm_assets.errors import IntegrityError
from mllm_assets.layout import Layout

NAME = re.compile(r"\b[0-9a-f]{16}(?:-\d+)?\b")
RUN, METRICS = "run", "metrics"
DATA_AND_CACHES = ("dataset version", "measurements", "source", "features", "hidden states")
PLACES = {
    RUN: "outputs/*/*",
    "predictions": "outputs/*/predictions/*",
    METRICS: "outputs/*/eval_metrics/*",
    "dataset version": "data/.versions/*/*",
    "measurements": "data/.quality/*/*",
    "source": "data/.raw/*/*",
    "features": "cache/features/*",
    "hidden states": "cache/hidden_states/*",
}
LINKS = ("outputs/*/*", "releases/*/*", "data/*")
WITH_NAMES = (MANIFEST, "run.json", "checkpoint_metrics.json")


@dataclass(frozen=True, slots=True)
class Artefact:
    """One directory; `used_s` is when it was last written or opened, in seconds since the epoch."""

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
    """The newest time of a directory and of what is right below it."""
    times = []
    for path in (directory, *directory.iterdir()):
        try:
            times.append(path.lstat().st_mtime)
        except FileNotFoundError:  # gone meanwhile
            continue
    return max(times, default=0.0)


def find_kept(
    layout: Layout, artefacts: Iterable[Artefact], *, keep_runs: int, also_named: str = ""
) -> dict[Path, str]:
    """Each artefact that something still needs, with what that is.

    Args:
        layout: The root.
        artefacts: What was found below it.
        keep_runs: So many newest runs of each recipe are kept whatever names them.
        also_named: Text that names artefacts: what Dagster's latest materialisations and the project's YAML say.
    """
    artefacts = list(artefacts)
    by_name: dict[str, list[Artefact]] = {}
    for artefact in artefacts:
        by_name.setdefault(artefact.path.name, []).append(artefact)
    kept: dict[Path, str] = {}
    waiting: list[tuple[Path, str]] = list(_newest(artefacts, keep_runs))
    waiting += [(link.resolve(), f"{link.name} points to it") for link in _links(layout)]
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
    """The newest runs of each recipe, finished or not, and the newest of everything else beside it."""
    groups: dict[tuple[Path, bool], list[Artefact]] = {}
    for artefact in artefacts:
        if artefact.kind not in ("features", "hidden states"):  # used or not used, whichever came last
            complete = artefact.kind != RUN or is_complete(artefact.path)
            groups.setdefault((artefact.path.parent, complete), []).append(artefact)
    for (_, complete), group in groups.items():
        group.sort(key=lambda artefact: -artefact.used_s)
        # of runs that were broken off only the newest is likely to be resumed
        count = keep_runs if group[0].kind == RUN and complete else 1
        yield from ((artefact.path, "among the newest") for artefact in group[:count])


def _links(layout: Layout) -> list[Path]:
    return [path for pattern in LINKS for path in layout.root.glob(pattern) if path.is_symlink()]


def _releases(layout: Layout) -> Iterator[tuple[str, str]]:
    for manifest in layout.root.glob(f"releases/*/*/{MANIFEST}"):
        release = manifest.parent.relative_to(layout.root)
        yield f"{release} names it", manifest.read_text(encoding="utf-8")


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


def _names_in(directory: Path) -> set[str]:
    files = [directory / name for name in WITH_NAMES]
    return {name for file in files if file.is_file() for name in NAME.findall(file.read_text(encoding="utf-8"))}


def is_in_use(run_dir: Path) -> bool:
    """Whether a process trains in a run's directory: it holds the lock beside it."""
    return is_held(lock_of(run_dir))


def is_held(lock: Path) -> bool:
    """Whether a living process holds a lock file; none is made by asking."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock).acquire(blocking=False):
            return False
    except Timeout:
        return True


def lock_of(run_dir: Path) -> Path:
    """The lock that a worker holds while it trains there; see `mllm_assets.worker`."""
    return run_dir.with_name(f".{run_dir.name}.lock")


def project_names(project: Path, package: str | None) -> str:
    """The text of a project's YAML: a recipe may start from a run, or resume a checkpoint, by its name.

    Raises:
        IntegrityError: A file cannot be read, so that nobody knows what it names.
    """
    folders = [project / "configs", *([project / package.replace(".", "/") / "defs"] if package else [])]
    texts = []
    for path in (path for folder in folders for path in folder.rglob("*.y*ml")):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path} cannot be read ({error}), and it may name what is needed. Mend it.") from None
    return "\n".join(texts)
