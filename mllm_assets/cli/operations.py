"""A deployment and its state: `init`, `doctor`, `gc`, `slots`, `check-graph`."""

import argparse
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_assets.cli.options import Verbs, at_least_one
from mllm_assets.errors import MllmAssetsError, RecipeError
from mllm_assets.layout import Layout

if TYPE_CHECKING:
    from mllm_assets.operations.findings import Finding


def add_commands(verbs: Verbs) -> None:
    init = verbs.add_parser("init", help="make a project with the emoji example in an empty folder")
    init.add_argument("folder", type=Path, metavar="DIR")
    init.add_argument("--name", help="of the project's Python package; by default the folder's")
    init.set_defaults(run=_init)

    slots = verbs.add_parser("slots", help="pool slots that killed runs still hold")
    slots.add_argument("action", choices=("free",))
    slots.add_argument("--quiet", action="store_true", help="print nothing if no slot is held")
    slots.set_defaults(run=_free_slots)

    doctor = verbs.add_parser("doctor", help="what is wrong with this machine, and what to do (exit code 1 on a fail)")
    doctor.add_argument(
        "--repair",
        action="store_true",
        help="compare every artefact with its record, repair what can be made again",
    )
    doctor.add_argument("--json", action="store_true", help="print a JSON list")
    doctor.set_defaults(run=_doctor)

    gc = verbs.add_parser("gc", help="what can be deleted: old runs, and artefacts that nothing refers to")
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
    from mllm_assets.components.instance.home import open_instance, use_home
    from mllm_assets.components.slots import end_dead_runs

    if text := use_home(Path.cwd()):
        print(text, file=sys.stderr)
    with open_instance() as instance:
        dead = end_dead_runs(instance)
    for run_id in dead:
        print(f"run {run_id}: ended, its process is gone; its slots are free")
    if not dead and not arguments.quiet:
        print("Nothing to free: no killed run holds a slot.")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from mllm_assets.components.instance.doctor import check_dagster
    from mllm_assets.operations import machine
    from mllm_assets.operations.alerts import check_alerts
    from mllm_assets.operations.processes import check_database, check_orphans
    from mllm_assets.operations.repair import check_artefacts, repair
    from mllm_assets.store.errors import SETTING

    layout = Layout.from_environment()
    if arguments.repair:
        return _shown(repair(layout), as_json=arguments.json)
    home = os.environ.get("DAGSTER_HOME")
    dagster, models = check_dagster(Path.cwd(), layout)
    findings = [
        *machine.check_versions(),
        machine.check_device(),
        *check_alerts(),
        machine.check_disk(layout.root),
        machine.check_write_access(layout, *([Path(home)] if home else [])),
        *dagster,
        check_orphans(),
        check_database(layout.quality_db),
        check_artefacts(layout),
        *machine.check_hub(models),
        *machine.check_store(os.environ.get(SETTING, ""), layout.root),
    ]
    return _shown(findings, as_json=arguments.json)


def _shown(findings: Sequence["Finding"], *, as_json: bool) -> int:
    from mllm_assets.operations.findings import print_findings

    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print_findings(findings)
    return 1 if any(finding.status == "fail" for finding in findings) else 0


def _gc(arguments: argparse.Namespace) -> int:
    from mllm_assets.components.instance.home import latest_metadata, use_home
    from mllm_assets.operations.artefacts import project_names
    from mllm_assets.operations.gc import Policy, delete, find_garbage, print_plan
    from mllm_assets.project.create import HOME
    from mllm_assets.project.read import find_root_module

    layout, project = Layout.from_environment(), Path.cwd()
    policy = Policy(keep_runs=arguments.keep_runs, older_than_s=arguments.older_than)
    package = find_root_module(project)
    of_project = project if package else layout.root
    if (of_project / HOME).is_dir():  # what `run` keeps its history in
        use_home(of_project)
    named, in_progress = latest_metadata()
    named += project_names(project, package)
    plan = find_garbage(layout, policy, also_named=named, in_progress=in_progress)
    notes = list(plan.notes)
    if not os.environ.get("DAGSTER_HOME"):
        notes.append("DAGSTER_HOME is not set: Dagster's latest materialisations and runs were not checked")
    if package is None:
        notes.append(f"{project} is not a project: recipes and defs.yaml files were not checked")
    print_plan(layout, replace(plan, notes=notes), deleted=delete(plan) if arguments.delete else None)
    return 0


def _duration_s(text: str) -> float:
    match = re.fullmatch(r"(\d+)([dhm])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a number with d, h or m, such as 14d, got {text!r}")
    return int(match[1]) * {"d": 86400.0, "h": 3600.0, "m": 60.0}[match[2]]


def _check_graph(arguments: argparse.Namespace) -> int:
    from mllm_assets.components.reporting import innermost, load_project, unreadable_assets
    from mllm_assets.components.yaml_checks import find_mistakes

    if mistakes := find_mistakes(Path.cwd()):
        print(*mistakes, sep="\n", file=sys.stderr)
        return 2
    try:
        definitions = load_project(Path.cwd())
        unreadable = unreadable_assets(definitions)
    except MllmAssetsError:
        raise
    except Exception as error:  # the project's own files can raise anything
        cause = innermost(error)
        place = traceback.extract_tb(cause.__traceback__)[-1]
        raise RecipeError(
            f"The definitions do not load ({type(cause).__name__} at {place.filename}:{place.lineno}): {cause}"
        ) from None
    for key, message in unreadable.items():
        print(f"{key}: {message}", file=sys.stderr)
    if unreadable:
        return 2
    groups = {spec.group_name for spec in definitions.resolve_all_asset_specs()}
    print(f"No mistake found: {', '.join(sorted(filter(None, groups)))}.")
    return 0
