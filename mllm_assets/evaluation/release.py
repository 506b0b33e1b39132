"""Releases: the model that passed its gates, as a plain Hugging Face directory with a card that carries its lineage.

`releases/<recipe>/v1`, `v2`, ... never change once they are complete; the newest becomes the current one. The same
checkpoint is released once.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mllm_assets.artifacts import digest_json, find_damage, read_manifest, staged_directory, write_json_atomic
from mllm_assets.errors import GateError, IntegrityError
from mllm_assets.evaluation.gates import (
    GateResult,
    GateSpec,
    evaluate_gates,
    failed,
    leakage_gate,
    reload_gate,
)
from mllm_assets.evaluation.metrics_file import METRICS_FILE
from mllm_assets.evaluation.model_card import Lineage, write_model_card
from mllm_assets.evaluation.over_release import gains_over_release
from mllm_assets.evaluation.release_files import (
    PARTS,
    copy_files,
    has_adapter,
    model_files,
    name_base_model,
    require_same_bytes,
    write_llamafactory,
)
from mllm_assets.evaluation.release_integrity import find_release_damage, seal
from mllm_assets.evaluation.release_versions import (
    Release,
    current_release,
    list_releases,
    make_current,
    releases_lock,
    version_folders,
    version_number,
)
from mllm_assets.evaluation.table import PREDICTIONS_FILE
from mllm_assets.layout import Layout

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter


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
    allow_leakage: bool = False,
    verify: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Release:
    """Release a finished run's model, or return the release that already holds it.

    A new release becomes the current one. One that already holds the model is returned as it is: where it was rolled
    back, it stays so.

    Args:
        recipe_name: The recipe's slug.
        run_dir: A finished training run with `model/`, and `adapter/` where LoRA was trained.
        metrics: What `compute_metrics` returned for it.
        predictions: The rows that the metrics were made of. The tuned model's are kept for the next release.
        gates: All are judged here again, against the current release too, whatever judged them before.
        lineage: What the model was made from, for the card, and what leaked.
        layout: Where releases lie.
        scored_weights: The `weights_digest` of the model that the metrics were measured on.
        allow_leakage: Release where something leaked; the card says so.
        verify: Called with the staged directory before it is published, in practice a worker that runs
            `verify_task` in a new process; what it returns goes into the card and the manifest.

    Raises:
        GateError: A gate did not pass. Names each that did not, with its figures.
        IntegrityError: The run is not finished, a file of its model changes while it is copied, or the metrics are of
            another model.
    """
    run = read_manifest(run_dir)
    if scored_weights != run["weights_digest"]:
        raise IntegrityError(
            f"{recipe_name} is not released: the metrics are of other weights ({scored_weights[:12]}) than those of "
            f"{run_dir} ({run['weights_digest'][:12]}). Materialise predictions and eval_metrics, then the release."
        )
    files = model_files(run_dir, run)
    with releases_lock(layout, recipe_name):
        current = current_release(layout, recipe_name)
        over_release = gains_over_release(predictions, read_judged(current)) if current else None
        judged = [
            reload_gate(run["reload"], find_damage(run_dir, only=PARTS), gates),
            leakage_gate(lineage["leaks"], allowed=allow_leakage),
            *evaluate_gates(metrics, gates, over_release),
        ]
        results = _require_passed(recipe_name, judged)
        digest = digest_json(files)
        for release in list_releases(layout, recipe_name):
            if release.digest == digest and find_release_damage(release.directory) is None:
                return release
        folders = version_folders(layout, recipe_name)  # of damaged ones too: no folder is written over
        version = f"v{version_number(folders[-1].name) + 1 if folders else 1}"
        directory = layout.releases(recipe_name) / version
        with staged_directory(directory) as staging:
            copy_files(run_dir, files, staging)
            if has_adapter(run):
                name_base_model(staging, lineage["base_model"])
            write_llamafactory(staging, layout.relative(directory), run, lineage["base_model"]["name"])
            write_json_atomic(staging / METRICS_FILE, metrics)
            pq.write_table(predictions.filter(pc.field("model") == "tuned"), staging / PREDICTIONS_FILE)
            verification = dict(verify(staging)) if verify else {}
            write_model_card(
                staging, recipe_name, version, run=run, metrics=metrics, gates=results, lineage=lineage,
                verification=verification,
            )  # fmt: skip
            payload = _payload(recipe_name, version, digest, run, results, lineage, verification)
            require_same_bytes(run_dir, files, seal(staging, payload))
        release = Release(directory=directory, version=version, digest=digest)
        make_current(layout, release)
    return release


def read_judged(release: Release) -> pa.Table:
    """The released model's own predictions, by which it was judged."""
    return pq.read_table(release.directory / PREDICTIONS_FILE)


def verify_task(request: dict[str, Any], reporter: "Reporter") -> dict[str, Any]:
    """Worker entry: load `request["directory"]` as any user would and compare it with `request["checkpoint_dir"]`.

    `request["base_model_dir"]` is what an adapter is put on.
    """
    from mllm_assets.evaluation.release_check import verify

    base_model_dir = Path(request["base_model_dir"])
    return verify(Path(request["directory"]), Path(request["checkpoint_dir"]), base_model_dir, reporter)


def _require_passed(recipe_name: str, results: list[GateResult]) -> list[GateResult]:
    if failures := failed(results):
        reasons = "\n".join(f"  {result.name}: {result.description}" for result in failures)
        raise GateError(
            f"{recipe_name} is not released: {len(failures)} of {len(results)} gates did not pass.\n{reasons}\n"
            "Train longer or on more data, or change the gates in the component's YAML."
        )
    return results


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
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "digest": digest,
        "weights_digest": run["weights_digest"],
        "fingerprint": run["fingerprint"],
        "stages": run.get("stages", []),
        "quantization": run.get("quantization"),
        "gates": [asdict(result) for result in results],
        "lineage": dict(lineage),
        "verification": dict(verification),
    }
