"""Rows scored by models that were not trained on them: the training engine, once for each fold, without its rows.

Encoded rows, cached features and the process are those of all folds; a fold that was interrupted resumes from its
checkpoint, and one that is done is not trained again.
"""

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mllm_assets.artifacts import write_json_atomic
from mllm_assets.errors import RecipeError
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.loop.engine import Prepared, open_run, prepare_run, train
from mllm_assets.training.loop.preferences import sequence_logps
from mllm_assets.training.models.device import out_of_memory_is_an_error
from mllm_assets.training.models.load import release
from mllm_assets.worker.fold_task import FoldLosses, FoldsTask

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter


def folds_task(task: FoldsTask, reporter: "Reporter") -> FoldLosses:
    """Worker entry: train each fold's model that is missing, and score the fold's rows with it.

    Raises:
        MllmAssetsError: Recipe, data, model, machine or disk must change. Folds that are done stay.
    """
    run = replace(task.run, accelerator=task.accelerator, run_dir=task.directory)
    setup = open_run(run, reporter)
    if not setup.shape.family.is_described:
        raise RecipeError(
            f"label_issues ranks the rows of a recipe whose model's family is described, and {setup.shape.family.name} "
            "is not. Name another recipe in the dataset's label_issues."
        )
    rows, asked = setup.inputs.train_rows, set(task.asked)
    ids = [row.id for row in rows]
    losses: dict[str, float] = {}
    num_folds = 1 + max(task.folds.values())
    for fold in range(num_folds):
        kept = task.directory / f"fold-{fold}.json"
        if not kept.is_file():
            reporter.notify(f"fold {fold + 1} of {num_folds}: without its rows, then asked about them")
            left_out = [place for place, row_id in enumerate(ids) if task.folds.get(row_id) == fold]
            trained = [place for place, row_id in enumerate(ids) if task.folds.get(row_id) != fold]
            inputs = replace(setup.inputs, train_rows=rows.take(trained), eval_rows=rows.take(left_out), eval_parts={})
            own = replace(run, run_dir=task.directory / f"fold-{fold}")
            own.run_dir.mkdir(parents=True, exist_ok=True)
            prepared = prepare_run(own, replace(setup, inputs=inputs), reporter)
            train(prepared, reporter)
            places = [place for place in left_out if ids[place] in asked]
            found = _losses(prepared, rows.take(places), reporter)
            release(prepared.trainable.model)
            del prepared
            write_json_atomic(kept, dict(zip((ids[place] for place in places), found, strict=True)))
            shutil.rmtree(own.run_dir, ignore_errors=True)
        losses |= json.loads(kept.read_text(encoding="utf-8"))
    setup.inputs.digests.require_unchanged()
    return FoldLosses(losses=losses)


def _losses(prepared: Prepared, rows: EncodedRows, reporter: "Reporter") -> list[float]:
    """The mean loss in nats of what is learnt of each row, in the trained model."""
    model, setup = prepared.trainer.model, prepared.setup
    device, size = next(model.parameters()).device, setup.spec.per_device_eval_batch_size
    collator = prepared.collator
    collator.selects_by_mask = False
    found: list[float] = []
    model.eval()
    cure = f"per_device_eval_batch_size is {size}: lower it; the losses stay the same."
    with (
        out_of_memory_is_an_error("while the rows of a fold were scored", cure),
        torch.no_grad(),
        setup.precision.context(device.type),
    ):
        while len(found) < len(rows):
            batch = collator([rows[place] for place in range(len(found), min(len(found) + size, len(rows)))])
            logps_B, num_tokens_B = sequence_logps(model, {key: value.to(device) for key, value in batch.items()})
            found += (-logps_B.double() / num_tokens_B).tolist()
            reporter.progress("score", len(found), len(rows))
    return found
