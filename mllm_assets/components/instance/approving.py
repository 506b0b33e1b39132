"""A person's decision about a model, kept with the recipe's releases and told to Dagster."""

import os

import dagster as dg

from mllm_assets.components.instance.home import open_instance
from mllm_assets.components.instance.judged import judged_gates
from mllm_assets.evaluation.gates import APPROVAL
from mllm_assets.layout import Layout
from mllm_assets.releases.approvals import Decision, approval_gate, decide
from mllm_assets.releases.candidate import Considered


def gates_of(considered: Considered) -> dict[str, str]:
    """How its gates were judged last, the person's own left out; empty without a DAGSTER_HOME.

    Raises:
        InstanceError: Dagster's instance does not open.
    """
    judged = judged_gates([considered.recipe]).get(considered.metrics_dir, {})
    return {gate: text for gate, text in judged.items() if gate != APPROVAL}


def record(layout: Layout, considered: Considered, decision: Decision) -> None:
    """Add the decision, and let the asset check `a_person_approved` show it at once.

    Raises:
        IntegrityError: The file of decisions is damaged.
        InstanceError: Dagster's instance does not open; the decision is kept.
    """
    decide(layout, considered.recipe, decision)
    if not os.environ.get("DAGSTER_HOME"):
        return
    result = approval_gate(considered.recipe, [decision], considered.subject)
    with open_instance() as instance:
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=dg.AssetKey([considered.recipe, "eval_metrics"]),
                check_name=APPROVAL,
                passed=result.passed,
                description=result.description,
                metadata={"who": dg.MetadataValue.text(decision.who), "run": dg.MetadataValue.text(considered.run)},
                severity=dg.AssetCheckSeverity.ERROR,
                blocking=True,
            )
        )
