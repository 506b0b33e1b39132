"""`review`: what people decide about a dataset's samples, before they are split."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_assets.cli.data import shown_text
from mllm_assets.cli.options import Verbs, announce_home, at_least_one
from mllm_assets.errors import RecipeError
from mllm_assets.layout import Layout

if TYPE_CHECKING:
    from mllm_assets.data.curate.corrections import Correction

LIST, HISTORY, UNMATCHED, EXPORT, IMPORT = "list", "history", "unmatched", "export", "import"
KEEP, RELABEL, DROP, UNDO = DECIDING = ("keep", "relabel", "drop", "undo")
MAX_ANSWER_CHARS = 60  # on a terminal


def add_commands(verbs: Verbs) -> None:
    review = verbs.add_parser("review", help="correct, drop and keep samples of a dataset; its sides do not move by it")
    review.add_argument("dataset", metavar="DATASET")
    actions = (LIST, *DECIDING, HISTORY, UNMATCHED, EXPORT, IMPORT)
    review.add_argument("action", nargs="?", default=LIST, choices=actions, metavar="ACTION",
                        help=f"{', '.join(actions)}; by default list")  # fmt: skip
    review.add_argument("what", nargs="*", metavar="SAMPLE", help="ids of samples; of export and import the file")
    review.add_argument("--to", metavar="TEXT", help="of relabel: the new answer")
    review.add_argument("--why", default="", metavar="TEXT", help="kept with the decision")
    review.add_argument("--who", metavar="NAME", help="who decides; by default the name of the user")
    review.add_argument("--as", dest="format", choices=("label-studio", "fiftyone"), default="label-studio",
                        help="of export and import: whose JSON; by default label-studio")  # fmt: skip
    review.add_argument("--find", default="", metavar="TEXT", help="of list: what text, label or id contains")
    review.add_argument("--split", default="", choices=("train", "val", "test", "unused", "rejected"))
    review.add_argument("--recipe", default="", help="of list: highest loss of its model first, with its answers")
    review.add_argument("--wrong", action="store_true", help="of list with --recipe: only what its model got wrong")
    review.add_argument("--page", type=at_least_one, default=1, help="of list: 24 samples each")
    review.add_argument("--json", action="store_true", help="of list: print a JSON list")
    review.set_defaults(run=_review)


def _review(arguments: argparse.Namespace) -> int:
    run = {LIST: _list, HISTORY: _history, UNMATCHED: _unmatched, EXPORT: _export, IMPORT: _import}
    return run.get(arguments.action, _decide)(arguments, Layout.from_environment())


def _decide(arguments: argparse.Namespace, layout: Layout) -> int:
    from mllm_assets.data.curate.review import decisions, proposed
    from mllm_assets.decisions import user_name

    dataset, action = arguments.dataset, arguments.action
    if not arguments.what:
        raise RecipeError(f"{action} which? Give ids: mllm-assets review {dataset} {action} SAMPLE ...")
    if (action == RELABEL) != (arguments.to is not None):
        raise RecipeError(f"relabel needs --to TEXT, the new answer, and nothing else has it; this is {action}.")
    who = arguments.who or user_name()
    made = proposed(layout, dataset, action, arguments.what, new=arguments.to or "", who=who, why=arguments.why)
    _record(layout, dataset, made)
    left = decisions(layout, dataset)
    for one in made:
        now = left.get(one.sample_id)
        print(f"{one.sample_id}: {shown_text(str(now)) if now else 'nothing is decided about it'}")
    print(f"To make the splits with it: mllm-assets run {dataset}", file=sys.stderr)
    return 0


def _list(arguments: argparse.Namespace, layout: Layout) -> int:
    from mllm_assets.data.curate.review import review_page
    from mllm_assets.data.quality.browse import SampleQuery

    page = review_page(
        layout,
        SampleQuery(
            dataset=arguments.dataset,
            text=arguments.find,
            split=arguments.split,
            recipe=arguments.recipe,
            answers="wrong" if arguments.wrong else "",
            order="highest loss first" if arguments.recipe else "most suspicious first",
            page=arguments.page,
        ),
    )
    rows: list[dict[str, Any]] = [
        {
            "sample": one.seen.sample_id,
            "where": one.seen.location or "",
            "split": one.seen.split or "",
            "answer": one.answer,
            "model": one.seen.answer or "",
            "loss": one.seen.loss_nats,
            "suspicion": one.seen.issue,
            "decision": str(one.decision) if one.decision else "",
        }
        for one in page.samples
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    of_model = ["model", "loss"] * bool(arguments.recipe)
    suspicion = ["suspicion"] * any(row["suspicion"] for row in rows)
    _print(rows, ("sample", "where", "split", "answer", *of_model, *suspicion, "decision"))
    print(f"page {arguments.page} of {page.num_pages}, {page.num_matching} samples", file=sys.stderr)
    return 0


def _history(arguments: argparse.Namespace, layout: Layout) -> int:
    from mllm_assets.data.curate.corrections import content_id, read_corrections

    wanted = {content_id(text) for text in arguments.what}
    found = [one for one in read_corrections(layout, arguments.dataset) if not wanted or one.sample_id in wanted]
    _print_decisions(found)
    return 0


def _unmatched(arguments: argparse.Namespace, layout: Layout) -> int:
    from mllm_assets.data.curate.corrected import find_source, settle

    spec, raw = find_source(layout, arguments.dataset)
    result = settle(spec, layout, raw)
    _print_decisions([one for one, _ in result.unmatched], [why for _, why in result.unmatched])
    return 0


def _print_decisions(found: "Sequence[Correction]", notes: Sequence[str] = ()) -> None:
    rows = [
        {"sample": one.sample_id, "decision": str(one), "in the source": one.old, "note": note}
        for one, note in zip(found, notes or [""] * len(found), strict=True)
    ]
    _print(rows, ("sample", "decision", "in the source", *["note"] * bool(notes)))
    if not rows:
        print("There is none.", file=sys.stderr)


def _export(arguments: argparse.Namespace, layout: Layout) -> int:
    from mllm_assets.data.curate.exchange import LABEL_STUDIO, export_samples

    path = _file(arguments)
    num_samples = export_samples(layout, arguments.dataset, arguments.format, path)
    print(f"{num_samples} samples are in {path}")
    if arguments.format == LABEL_STUDIO:
        print(f"The labelling interface is in {path.with_suffix('.xml')}. Pictures are served with")
        print("  LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true "
              f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={layout.data} label-studio")  # fmt: skip
    else:
        print(f"To open it: fiftyone.Dataset.from_json({str(path)!r}, rel_dir={str(layout.data)!r})")
    return 0


def _import(arguments: argparse.Namespace, layout: Layout) -> int:
    from mllm_assets.data.curate.exchange import import_decisions
    from mllm_assets.decisions import user_name

    who = arguments.who or user_name()
    found = import_decisions(layout, arguments.dataset, arguments.format, _file(arguments), who=who)
    if found.corrections:
        _record(layout, arguments.dataset, found.corrections)
    counts = {
        "imported": len(found.corrections),
        "as decided before": found.num_same,
        "without a decision": found.num_silent,
        f"of no sample of {arguments.dataset}": found.num_unknown,
    }
    print(", ".join(f"{number} {what}" for what, number in counts.items()))
    return 0


def _record(layout: Layout, dataset: str, made: "Sequence[Correction]") -> None:
    from mllm_assets.components.instance.reviewing import record  # with Dagster, which takes seconds

    announce_home(layout)
    record(layout, dataset, made)


def _file(arguments: argparse.Namespace) -> Path:
    if len(arguments.what) != 1:
        raise RecipeError(f"{arguments.action} needs one file: mllm-assets review DATASET {arguments.action} FILE")
    return Path(arguments.what[0])


def _print(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    from mllm_assets.tables import print_table

    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else shown_text(value or "")
        is_long = sys.stdout.isatty() and len(text) > MAX_ANSWER_CHARS
        return f"{text[: MAX_ANSWER_CHARS - 1]}…" if is_long else text

    prose = [name for name in columns if name not in ("sample", "split", "loss")]
    if rows:
        print_table(columns, [[cell(row[name]) for name in columns] for row in rows], numbers=["loss"], prose=prose)
