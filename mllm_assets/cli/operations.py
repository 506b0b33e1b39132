"""A deployment and its state: `init`, `doctor`, `gc`, `slots`, `check-graph`."""

import argparse
import json
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from mllm_assets.cli.options import Verbs, at_least_one
from mllm_assets.errors import MachineError
from mllm_assets.layout import Layout


def add_commands(verbs: Verbs) -> None:
    init = verbs.add_parser("init", help="make a project that runs the emoji line in an empty folder")
    init.add_argument("folder", type=Path, metavar="DIR")
    init.add_argument("--name", help="of the project's Python package; by default the folder's")
    init.set_defaults(run=_init)

    slots = verbs.add_parser("slots", help="pool slots that killed runs still hold")
    slots.add_argument("action", choices=("free",))
    slots.add_argument("--quiet", action="store_true", help="say nothing where there is nothing to free")
    slots.set_defaults(run=_free_slots)

    doctor = verbs.add_parser("doctor", help="what is wrong with this machine, and what to do (exit code 1 on a fail)")
    doctor.add_argument("--json", action="store_true", help="print a JSON list")
    doctor.set_defaults(run=_doctor)

    gc = verbs.add_parser("gc", help="what can be deleted: old runs, and what nothing names any more")
    gc.add_argument("--keep-runs", type=at_least_one, default=3, metavar="N", help="newest runs of each recipe to keep")
    gc.add_argument("--older-than", type=_duration_s, default="14d", metavar="AGE", help="14d (default), 12h, 30m")
    gc.add_argument("--delete", action="store_true", help="delete it; by default it is only listed")
    gc.set_defaults(run=_gc)

    check = verbs.add_parser(
        "check-graph",
        help="name every mistake in a defs.yaml, and every recipe and dataset that cannot be built (exit code 2)",
    )
    check.set_defaults(run=_check_graph)


def _init(arguments: argparse.Namespace) -> int:
    from mllm_assets.project.create import create_project

    written = create_project(arguments.folder, name=arguments.name)
    print(f"wrote {', '.join(written)} into {arguments.folder}")
    print(f"Next: cd {shlex.quote(str(arguments.folder))} && make demo")
    return 0


def _free_slots(arguments: argparse.Namespace) -> int:
    if not os.environ.get("DAGSTER_HOME"):
        raise MachineError(
            "DAGSTER_HOME is not set, so no run outlives its command. Set it as `make dev` does: "
            "export DAGSTER_HOME=$PWD/.dagster_home"
        )
    from mllm_assets.components.instance import opened_instance
    from mllm_assets.components.slots import end_dead_runs

    with opened_instance() as instance:
        dead = end_dead_runs(instance)
    for run_id in dead:
        print(f"run {run_id}: ended, its process is gone; its slots are free")
    if not dead and not arguments.quiet:
        print("Nothing to free: no run that was killed holds a slot.")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from mllm_assets.components.instance_checks import check_dagster
    from mllm_assets.operations.alert_access import check_alerts
    from mllm_assets.operations.findings import print_findings
    from mllm_assets.operations.hub_access import check_hub
    from mllm_assets.operations.machine import check_device, check_disk, check_versions, check_write_access
    from mllm_assets.operations.processes import check_database, check_orphans
    from mllm_assets.operations.store_access import check_store
    from mllm_assets.store_errors import SETTING

    layout = Layout.from_environment()
    home = os.environ.get("DAGSTER_HOME")
    dagster, models = check_dagster(Path.cwd(), layout)
    findings = [
        *check_versions(),
        check_device(),
        *check_alerts(),
        check_disk(layout.root),
        check_write_access(layout, *([Path(home)] if home else [])),
        *dagster,
        check_orphans(),
        check_database(layout.quality_db),
        *check_hub(models),
        *check_store(os.environ.get(SETTING, ""), layout.root),
    ]
    if arguments.json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=2))
    else:
        print_findings(findings)
    return 1 if any(finding.status == "fail" for finding in findings) else 0


def _gc(arguments: argparse.Namespace) -> int:
    from mllm_assets.components.materialized import latest_metadata
    from mllm_assets.operations.artefacts import project_names
    from mllm_assets.operations.gc import Policy, delete, find_garbage, print_plan
    from mllm_assets.project.read import find_root_module

    layout, project = Layout.from_environment(), Path.cwd()
    policy = Policy(keep_runs=arguments.keep_runs, older_than_s=arguments.older_than)
    named, in_progress = latest_metadata()
    package = find_root_module(project)
    named += project_names(project, package)
    plan = find_garbage(layout, policy, also_named=named, in_progress=in_progress)
    notes = [*plan.notes, *_not_looked_at(project, package)]
    print_plan(layout, replace(plan, notes=notes), deleted=delete(plan) if arguments.delete else None)
    return 0


def _not_looked_at(project: Path, package: str | None) -> list[str]:
    """What may name artefacts and was not asked, on one line each."""
    notes = []
    if not os.environ.get("DAGSTER_HOME"):
        notes.append("DAGSTER_HOME is not set: what Dagster's latest materialisations and runs name was not looked at")
    if package is None:
        notes.append(f"{project} is no project: what recipes and defs.yaml of one name was not looked at")
    return notes


def _duration_s(text: str) -> float:
    match = re.fullmatch(r"(\d+)([dhm])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a number with d, h or m, such as 14d, got {text!r}")
    return int(match[1]) * {"d": 86400.0, "h": 3600.0, "m": 60.0}[match[2]]


def _check_graph(arguments: argparse.Namespace) -> int:
    from mllm_assets.components.component_yaml import find_mistakes
    from mllm_assets.components.reporting import load_project, unreadable_assets

    if mistakes := find_mistakes(Path.cwd()):
        print(*mistakes, sep="\n", file=sys.stderr)
        return 2
    unreadable = unreadable_assets(load_project(Path.cwd()))
    for key, message in unreadable.items():
        print(f"{key}: {message}", file=sys.stderr)
    return 2 if unreadable else 0
