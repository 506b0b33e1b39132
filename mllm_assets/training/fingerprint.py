"""A training run is named by what it computes: the recipe's keys that decide the weights, the data, the model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mllm_assets.artifacts import digest_json
from mllm_assets.training.spec import TrainSpec

# Raise it when the same recipe on the same data would give other weights than before
ENGINE_VERSION = 1

# Beginnings of the keys that one way of fine-tuning alone reads
_PREFIXES = {
    "lora": {"lora_", "use_rslora", "use_dora"},
    "freeze": {"freeze_trainable_", "freeze_extra_"},
    "full": set[str](),
}


def semantic_values(spec: TrainSpec) -> dict[str, Any]:
    """The fields that decide which weights come out."""
    scopes = {"semantic", "selection"} if spec.evaluation_selects else {"semantic"}
    idle = set().union(*_PREFIXES.values()) - _PREFIXES[spec.finetuning_type]
    if not spec.packs:
        idle.add("preprocessing_")
    if len(spec.train_entries) == 1 and len(spec.eval_entries) < 2:
        idle |= {"mix_strategy", "interleave_probs"}
    if spec.quantization_bit is None:
        idle |= {"quantization_", "double_quantization"}
    elif spec.quantization_bit != 4:
        idle |= {"quantization_type", "double_quantization"}
    return {
        f.name: getattr(spec, f.name)
        for f in dataclasses.fields(spec)
        if f.metadata["scope"] in scopes and not f.name.startswith(tuple(idle))
    }


def run_fingerprint(
    spec: TrainSpec,
    *,
    data_digests: Mapping[str, str],
    pretrained_fingerprint: str,
    num_processes: int = 1,
    regroup: bool = False,
    resume_digest: str | None = None,
) -> str:
    """Name what a run computes: 16 hex digits.

    Covers the semantic keys, the content of the training entries in the recipe's order, the model, the number of
    processes where it multiplies the batch, and the checkpoint that `resume_from_checkpoint` names. The evaluation
    entries count only where evaluation chooses the weights. Paths, names of entries, logging, loader processes and
    save intervals do not count.

    Args:
        spec: What is trained.
        data_digests: Of each entry that it trains on or evaluates, by name.
        pretrained_fingerprint: Of the model that it starts from.
        num_processes: How many processes train.
        regroup: Whether micro-batches may be regrouped.
        resume_digest: Of the checkpoint that the recipe names, or None.
    """
    return digest_json(
        {
            **({"resume_from": resume_digest} if resume_digest else {}),
            "engine": ENGINE_VERSION,
            "spec": semantic_values(spec),
            "train": [data_digests[name] for name in spec.train_entries],
            "eval": [data_digests[name] for name in spec.eval_entries] if spec.evaluation_selects else [],
            "model": pretrained_fingerprint,
            "num_processes": num_processes,
            **({"regroup": True} if regroup else {}),
        }
    )[:16]
