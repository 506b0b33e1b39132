"""Releases: the model that passed its gates, as a plain Hugging Face directory with a card that carries its lineage.

`releases/<recipe>/v1`, `v2`, ... never change once they are complete; the newest becomes the current one. The same
checkpoint is released once.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mllm_assets.artifacts import digest_json, find_damage, read_manifest, staged_directory, write_json_atomic
from mllm_assets.errors import GateError, IntegrityError
from mllm_assets.evaluation.gates import (
    APPROVAL,
    GateResult,
    GateSpec,
    evaluate_gates,
    failed,
    leakage_gate,
    reload_gate,
)
from mllm_assets.evaluation.metrics import METRICS_FILE, gains_over_release, read_metrics
from mllm_assets.evaluation.table import PREDICTIONS_FILE, read_predictions
from mllm_assets.file_digests import FileDigests, remembered
from mllm_assets.layout import Layout
from mllm_assets.releases.approvals import Decision, Subject, approval_gate, read_decisions
from mllm_assets.releases.files import (
    PARTS,
    copy_files,
    has_adapter,
    model_files,
    name_base_model,
    require_same_bytes,
    write_llamafactory,
)
from mllm_assets.releases.model_card import Lineage, ModelCard
from mllm_assets.releases.versions import (
    Release,
    find_release_damage,
    judged_release,
    list_releases,
    make_current,
    releases_lock,
    seal,
    version_folders,
    version_number,
)

MOST_DECISIONS = 50  # of a recipe's history that a card tells


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """The metrics of a model's weights, and the predictions that they were made of."""

    metrics: dict[str, Any]
    predictions: pa.Table  # the tuned model's are kept for the next release
    weights_digest: str
    predictions_digest: str
    data_digests: Mapping[str, str]  # of each evaluation entry when the model was asked


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A model that may be released."""

    recipe_name: str
    run_dir: Path  # a finished training run with `model/`, and `adapter/` if LoRA was trained
    judgement: Judgement
    lineage: Lineage


def publish(
    candidate: Candidate,
    gates: GateSpec,
    layout: Layout,
    *,
    allow_leakage: bool = False,
    verify: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Release:
    """Release a finished run's model, or return the release that already holds it.

    A new release becomes the current one. An existing one is returned unchanged: if it was rolled back, it stays so.

    All gates are judged here again, against the current release too. With `allow_leakage` a model is released although
    something leaked; the card says so. `verify` is called with the staged directory before it is published, in practice
    to run a `VerifyTask`; its result goes into the card and the manifest. What an earlier step of this
    process read of the run is not hashed again, unless something touched it since.

    Raises:
        GateError: A gate did not pass. Names each that did not, with its figures.
        IntegrityError: The run is not finished, a file of its model changes while it is copied, or the metrics are of
            another model.
    """
    name, run_dir, digests = candidate.recipe_name, candidate.run_dir, FileDigests()
    digests.take_untouched(remembered(run_dir))
    run = read_manifest(run_dir)
    _require_same_weights(candidate, run)
    files = model_files(run_dir, run)
    with releases_lock(layout, name):
        decisions = read_decisions(layout, name)
        reload = reload_gate(run["reload"], find_damage(run_dir, only=PARTS, digest=digests.of), gates)
        results = _passed_gates(
            candidate, reload, gates, judged_release(layout, name), decisions, allow_leakage=allow_leakage
        )
        digest = digest_json(files)
        for release in list_releases(layout, name):
            if release.digest == digest and find_release_damage(release.directory) is None:
                return release
        folders = version_folders(layout, name)  # of damaged ones too: no folder is written over
        version = f"v{version_number(folders[-1].name) + 1 if folders else 1}"
        directory = layout.releases(name) / version
        with staged_directory(directory) as staging:
            copy_files(run_dir, files, staging, digests)
            _write_next_to_model(candidate, run, staging, layout.relative(directory))
            card = ModelCard(
                recipe_name=name,
                version=version,
                run=run,
                metrics=candidate.judgement.metrics,
                gates=results,
                lineage=candidate.lineage,
                decisions=decisions[-MOST_DECISIONS:],
                verification=dict(verify(staging)) if verify else {},
            )
            card.write(staging)
            require_same_bytes(run_dir, files, seal(staging, _payload(card, digest), digests.of))
        release = Release(directory=directory, version=version, digest=digest)
        make_current(layout, release)
    return release


def _require_same_weights(candidate: Candidate, run: Mapping[str, Any]) -> None:
    scored, weights = candidate.judgement.weights_digest, run["weights_digest"]
    if scored != weights:
        raise IntegrityError(
            f"{candidate.recipe_name} is not released: the metrics are of other weights ({scored[:12]}) than those of "
            f"{candidate.run_dir} ({weights[:12]}). Materialise predictions and eval_metrics, then the release."
        )


def _passed_gates(
    candidate: Candidate,
    reload: GateResult,
    gates: GateSpec,
    current: tuple[Release, pa.Table] | None,
    decisions: list[Decision],
    *,
    allow_leakage: bool,
) -> list[GateResult]:
    judgement = candidate.judgement
    release_gains = gains_over_release(judgement.predictions, current[1]) if current else None
    results = [
        reload,
        leakage_gate(candidate.lineage["leaks"], allowed=allow_leakage),
        *evaluate_gates(judgement.metrics, gates, release_gains),
    ]
    if gates.approval == "required":
        subject = Subject(weights_digest=judgement.weights_digest, predictions_digest=judgement.predictions_digest)
        results.append(approval_gate(candidate.recipe_name, decisions, subject))
    if failures := failed(results):
        reasons = "\n".join(f"  {result.name}: {result.description}" for result in failures)
        can_be_trained = [result.name for result in failures] != [APPROVAL]
        raise GateError(
            f"{candidate.recipe_name} is not released: {len(failures)} of {len(results)} gates did not pass.\n"
            f"{reasons}"
            + ("\nTrain longer or on more data, or change the gates in the component's YAML." if can_be_trained else "")
        )
    return results


def _write_next_to_model(candidate: Candidate, run: Mapping[str, Any], staging: Path, path: str) -> None:
    base_model = candidate.lineage["base_model"]
    if has_adapter(run):
        name_base_model(staging, base_model)
    write_llamafactory(staging, path, run, base_model["name"])
    write_json_atomic(staging / METRICS_FILE, candidate.judgement.metrics)
    pq.write_table(candidate.judgement.predictions.filter(pc.field("model") == "tuned"), staging / PREDICTIONS_FILE)


def _payload(card: ModelCard, digest: str) -> dict[str, Any]:
    run = card.run
    return {
        "recipe": card.recipe_name,
        "version": card.version,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "digest": digest,
        "weights_digest": run["weights_digest"],
        "fingerprint": run["fingerprint"],
        "stages": run.get("stages", []),
        "quantization": run.get("quantization"),
        "gates": [asdict(result) for result in card.gates],
        "decisions": [asdict(decision) for decision in card.decisions],
        "lineage": dict(card.lineage),
        "verification": dict(card.verification),
    }


def read_judgement(metrics_dir: Path, layout: Layout) -> Judgement:
    """Read metrics and predictions, byte for byte as they were written.

    Raises:
        IntegrityError: A file was changed since, or is gone. Names it.
    """
    inputs = read_manifest(metrics_dir)["inputs"]
    predictions_dir = layout.root / inputs["predictions_path"]
    digests = FileDigests()
    for directory, name in ((metrics_dir, METRICS_FILE), (predictions_dir, PREDICTIONS_FILE)):
        if damage := find_damage(directory, only=[name], digest=digests.of):
            raise IntegrityError(f"{directory}: {damage}. Materialise predictions and eval_metrics again.")
    judgement = Judgement(
        metrics=read_metrics(metrics_dir),
        predictions=read_predictions(predictions_dir),
        weights_digest=inputs["weights_digest"],
        predictions_digest=inputs["predictions"],
        data_digests=inputs["data_digests"],
    )
    digests.require_unchanged()
    return judgement
