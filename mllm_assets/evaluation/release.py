"""Releases: the model that passed its gates, as a plain Hugging Face directory with a card that carries its lineage.

`releases/<recipe>/v1`, `v2`, ... never change once they are complete. The same checkpoint is released once.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock

from mllm_assets.artifacts import (
    MANIFEST,
    digest_json,
    find_damage,
    is_complete,
    read_manifest,
    staged_directory,
    write_json_atomic,
    write_manifest,
)
from mllm_assets.errors import GateError, IntegrityError
from mllm_assets.evaluation.gates import GateResult, GateSpec, evaluate_gates, failed
from mllm_assets.evaluation.metrics import METRICS_FILE, gains_over_release
from mllm_assets.evaluation.model_card import Lineage, write_model_card
from mllm_assets.evaluation.table import PREDICTIONS_FILE
from mllm_assets.layout import Layout

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter

_LINK_ABOVE_BYTES = 1 << 20  # larger files (weights) share their blocks with the run's directory
_PARTS = {"model": "", "adapter": "adapter/"}  # folder of the run -> where it goes in the release


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A released model; `digest` is over the checkpoint's files and is the asset's data version."""

    directory: Path
    version: str
    digest: str


def publish(
    recipe_name: str,
    run_dir: Path,
    metrics: Mapping[str, Any],
    predictions: pa.Table,
    gates: GateSpec,
    lineage: Lineage,
    layout: Layout,
    *,
    scored_weights: str,
    verify: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Release:
    """Release a finished run's model, or return the release that already holds it.

    Args:
        recipe_name: The recipe's slug.
        run_dir: A finished training run with `model/`, and `adapter/` where LoRA was trained.
        metrics: What `compute_metrics` returned for it.
        predictions: The rows that the metrics were made of. The tuned model's are kept for the next release.
        gates: Judged here again, against the newest release too, whatever judged them before.
        lineage: What the model was made from, for the card.
        layout: Where releases lie.
        scored_weights: The `weights_digest` of the model that the metrics were measured on.
        verify: Called with the staged directory before it is published, in practice a worker that runs
            `verify_task` in a new process; what it returns goes into the card and the manifest.

    Raises:
        GateError: A gate did not pass. Names each that did not, with its figures.
        IntegrityError: The run is not finished, a file of its model does not match its digest, or the metrics are of
            another model.
    """
    run = read_manifest(run_dir)
    if scored_weights != run["weights_digest"]:
        raise IntegrityError(
            f"{recipe_name} is not released: the metrics are of other weights ({scored_weights[:12]}) than those of "
            f"{run_dir} ({run['weights_digest'][:12]}). Materialise predictions and eval_metrics, then the release."
        )
    files = _model_files(run_dir, run)
    with FileLock(_lock_path(layout, recipe_name)):
        newest = newest_release(layout, recipe_name)
        over_release = gains_over_release(predictions, read_judged(newest)) if newest else None
        results = _require_passed(recipe_name, evaluate_gates(metrics, gates, over_release))
        digest = digest_json(files)
        for release in list_releases(layout, recipe_name):
            if release.digest == digest and find_damage(release.directory, deep=False) is None:
                return release
        version = f"v{_number(newest.version) + 1 if newest else 1}"
        directory = layout.releases(recipe_name) / version
        with staged_directory(directory) as staging:
            _copy_files(run_dir, files, staging)
            write_json_atomic(staging / METRICS_FILE, metrics)
            pq.write_table(predictions.filter(pc.field("model") == "tuned"), staging / PREDICTIONS_FILE)
            verification = dict(verify(staging)) if verify else {}
            write_model_card(
                staging, recipe_name, version, run=run, metrics=metrics, gates=results, lineage=lineage,
                verification=verification,
            )  # fmt: skip
            payload = _payload(recipe_name, version, digest, run, results, lineage, verification)
            _require_same_bytes(run_dir, files, write_manifest(staging, payload))
    return Release(directory=directory, version=version, digest=digest)


def list_releases(layout: Layout, recipe_name: str) -> list[Release]:
    """Complete releases of a recipe, oldest first."""
    parent = layout.releases(recipe_name)
    found = [path for path in parent.iterdir() if _number(path.name) and is_complete(path)] if parent.is_dir() else []
    found.sort(key=lambda path: _number(path.name))
    return [Release(directory=p, version=p.name, digest=read_manifest(p)["digest"]) for p in found]


def newest_release(layout: Layout, recipe_name: str) -> Release | None:
    releases = list_releases(layout, recipe_name)
    return releases[-1] if releases else None


def read_judged(release: Release) -> pa.Table:
    """The released model's own predictions, by which it was judged."""
    return pq.read_table(release.directory / PREDICTIONS_FILE)


def verify_task(request: dict[str, Any], reporter: "Reporter") -> dict[str, Any]:
    """Worker entry: load `request["directory"]` as any user would and compare it with `request["checkpoint_dir"]`."""
    from mllm_assets.evaluation.release_check import verify

    return verify(Path(request["directory"]), Path(request["checkpoint_dir"]), reporter)


def _model_files(run_dir: Path, run: Mapping[str, Any]) -> dict[str, str]:
    """The digests of what is released, by path within the run."""
    names = [name for name in run["files"] if name.split("/")[0] in _PARTS and Path(name).name != MANIFEST]
    if "model/config.json" not in names:
        raise IntegrityError(f"{run_dir} holds no model/config.json. Materialise the checkpoint again.")
    return {name: run["files"][name]["sha256"] for name in names}


def _require_passed(recipe_name: str, results: list[GateResult]) -> list[GateResult]:
    if failures := failed(results):
        reasons = "\n".join(f"  {result.name}: {result.description}" for result in failures)
        raise GateError(
            f"{recipe_name} is not released: {len(failures)} of {len(results)} gates did not pass.\n{reasons}\n"
            "Train longer or on more data, or change the gates in the component's YAML."
        )
    return results


def _copy_files(run_dir: Path, files: Mapping[str, str], staging: Path) -> None:
    for name in files:
        part, _, rest = name.partition("/")
        source, target = run_dir / name, staging / (_PARTS[part] + rest)
        if not source.is_file():
            raise IntegrityError(f"{source} is missing. Materialise the checkpoint again.")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.stat().st_size > _LINK_ABOVE_BYTES:
            _link_or_copy(source, target)
        else:
            shutil.copyfile(source, target)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _require_same_bytes(run_dir: Path, files: Mapping[str, str], manifest: Mapping[str, Any]) -> None:
    for name, sha256 in files.items():
        part, _, rest = name.partition("/")
        if part == "model" and rest == "README.md":
            continue  # replaced by the card
        if manifest["files"][_PARTS[part] + rest]["sha256"] != sha256:
            raise IntegrityError(f"{run_dir / name} does not match its digest. Materialise the checkpoint again.")


def _payload(
    recipe_name: str,
    version: str,
    digest: str,
    run: Mapping[str, Any],
    results: list[GateResult],
    lineage: Lineage,
    verification: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "recipe": recipe_name,
        "version": version,
        "digest": digest,
        "weights_digest": run["weights_digest"],
        "fingerprint": run["fingerprint"],
        "gates": [asdict(result) for result in results],
        "lineage": dict(lineage),
        "verification": dict(verification),
    }


def _number(version: str) -> int:
    """The number of a version name, 0 for what is none."""
    match = re.fullmatch(r"v([1-9]\d*)", version)
    return int(match[1]) if match else 0


def _lock_path(layout: Layout, recipe_name: str) -> Path:
    path = layout.releases(recipe_name) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
