"""Which Parquet files of a Hub dataset hold a split: by the dataset card where it says so, otherwise by their names."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from mllm_assets.data.spec import SourceSpec
from mllm_assets.errors import SourceError
from mllm_assets.hub import find_repo, find_sizes
from mllm_assets.hub_errors import HubRepo, NoSuchRevision

CONVERTED = "refs/convert/parquet"  # where the Hub keeps its own Parquet conversion of any dataset


def find_split_files(hub: HubRepo, source: SourceSpec) -> tuple[str, dict[str, int]]:
    """The commit of the revision, and the split's files in their order with their sizes in bytes.

    Raises:
        SourceError: The Hub does not answer, or there are no such files. Says what to do.
    """
    info = find_repo(hub)
    files = _files_of(info, source)
    if not files and source.revision is None:
        with suppress(NoSuchRevision):
            info = find_repo(hub, revision=CONVERTED)
            files = _files_of(info, source, converted=True)
    if not files:
        subset = f" of the subset {source.subset!r}" if source.subset else ""
        raise SourceError(
            f"{source.repo} at {info.sha} has no Parquet files of the split {source.split!r}{subset}. Correct "
            f"source.split, or set source.revision to {CONVERTED!r} for the Hub's own Parquet conversion, or write "
            "the dataset to Parquet yourself and use a source of kind 'parquet'."
        )
    return info.sha, find_sizes(hub, info.sha, files)


def _files_of(info: Any, source: SourceSpec, *, converted: bool = False) -> list[str]:
    names = sorted(item.rfilename for item in info.siblings or () if item.rfilename.endswith(".parquet"))
    configs = getattr(info.card_data, "configs", None) or []
    if converted or source.revision == CONVERTED:
        # <subset>/<split>/0000.parquet
        subset = _chosen_subset([{"config_name": name.split("/")[0]} for name in names], source)
        return split_files([name for name in names if name.startswith(f"{subset.get('config_name')}/")], source.split)
    config = _chosen_subset(configs, source)
    if "data_files" in config:
        return _matching(names, _patterns(config["data_files"], source.split))
    folder = config.get("data_dir") or (source.subset if not configs else None)
    prefix = f"{_plain(folder)}/" if folder else ""
    return split_files([name for name in names if name.startswith(prefix)], source.split)


def _chosen_subset(configs: Sequence[Mapping[str, Any]], source: SourceSpec) -> Mapping[str, Any]:
    by_name = {str(config.get("config_name")): config for config in configs}
    if source.subset in by_name or len(by_name) <= 1 and source.subset is None:
        return by_name[source.subset] if source.subset else next(iter(by_name.values()), {})
    default = [config for name, config in by_name.items() if config.get("default") or name == "default"]
    if source.subset is None and default:
        return default[0]
    if not by_name:
        return {}
    raise SourceError(
        f"{source.repo} has the subsets {', '.join(sorted(by_name))}. Set source.subset to one of them in the "
        "dataset's YAML."
    )


def _patterns(data_files: Any, split: str) -> list[str]:
    """The patterns of one split, of the forms that a dataset card may have: text, list of texts, list of splits."""
    if isinstance(data_files, str):
        data_files = [data_files]
    if all(isinstance(item, str) for item in data_files):
        return list(data_files) if split == "train" else []
    paths = [item.get("path", []) for item in data_files if item.get("split") == split]
    return [pattern for path in paths for pattern in ([path] if isinstance(path, str) else path)]


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    from fsspec.utils import glob_translate

    compiled = [re.compile(glob_translate(_plain(pattern))) for pattern in patterns]
    return list(dict.fromkeys(name for pattern in compiled for name in names if pattern.fullmatch(name)))


def _plain(path: str) -> str:
    return path.removeprefix("./").strip("/")


def split_files(names: Sequence[str], split: str) -> list[str]:
    """The Parquet files of a split, by the Hub's naming: `data/train-0-of-2.parquet`, `default/train/0.parquet`.

    Files that name no split at all count as "train".
    """
    files = sorted(name for name in names if name.endswith(".parquet"))
    matching = [name for name in files if re.search(rf"(^|[/_.-]){re.escape(split)}([/_.-])", name)]
    if not matching and split == "train":
        other = re.compile(r"(^|[/_.-])(validation|valid|val|test|dev)([/_.-])")
        matching = [name for name in files if not other.search(name)]
    return matching
