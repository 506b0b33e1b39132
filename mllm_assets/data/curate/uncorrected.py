"""A dataset's training rows as its source has them, as an entry beside those with people's corrections.

data/<entry>_uncorrected -> .versions/<dataset>/<digest>/    the version that the splits had without any decision
"""

from dataclasses import dataclass

from mllm_assets.artifacts import point_symlink, read_manifest
from mllm_assets.data.curate.corrected import spec_of
from mllm_assets.data.curate.corrections import KEEP, in_force, read_corrections
from mllm_assets.data.curate.publish import side_files
from mllm_assets.data.curate.register import build_entry, write_entries
from mllm_assets.data.curate.splits import make_version
from mllm_assets.data.ingest.split_spec import TRAIN
from mllm_assets.data.sharegpt.dataset import Dataset, Entry
from mllm_assets.layout import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Uncorrected:
    """The entry without corrections, and how many training rows they change or take out of it."""

    entry: str
    num_changed: int
    num_dropped: int


def uncorrected_entry(entry: str) -> str:
    """The name of the entry that holds a training entry's rows as the source has them."""
    return f"{entry}_uncorrected"


def publish_uncorrected(layout: Layout, entry: Entry) -> Uncorrected | None:
    """Make the entry; None where no decision of a person changes the rows: there are none, or it is no dataset's.

    Raises:
        IntegrityError: The source or its assessment is gone.
    """
    manifest = read_manifest(entry.version) if entry.version else {}
    if manifest.get("kind") != "split" or entry.file.stem != TRAIN:
        return None
    dataset = manifest["dataset"]
    if all(one.action == KEEP for one in in_force(read_corrections(layout, dataset)).values()):
        return None
    spec = spec_of(manifest["spec"])
    raw, quality = layout.raw(dataset, manifest["raw_digest"]), layout.quality(dataset, manifest["quality_digest"])
    made = make_version(spec, layout, raw, quality).result
    if made.train_digest == manifest["train_digest"]:
        return None
    name = uncorrected_entry(entry.name)
    file = side_files(made.directory, spec.output.format)[TRAIN]
    point_symlink(layout.data / name, made.directory)
    write_entries(layout, name, {name: build_entry(f"{name}/{file.name}")})
    return _counted(entry, Dataset(layout.data, read_part=None).entry(name))


def _counted(corrected: Entry, source: Entry) -> Uncorrected:
    now = {row.id: row.messages[-1].content for row in corrected.each()}
    then = {row.id: row.messages[-1].content for row in source.each()}
    return Uncorrected(
        entry=source.name,
        num_changed=sum(now[name] != then.get(name) for name in now),
        num_dropped=len(then.keys() - now.keys()),
    )
