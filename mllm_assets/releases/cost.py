"""What a line cost: the figures of `worker.usage` over the assets that a release was made from."""

from collections.abc import Mapping
from dataclasses import asdict

import orjson
import pyarrow as pa

from mllm_assets.data.quality.store import QualityStore
from mllm_assets.worker.usage import Usage


def line_costs(store: QualityStore, versions: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """What the versions of assets cost, by asset: all steps that made that version, or found it made already.

    Args:
        store: Has a row for each step that succeeded.
        versions: Asset -> digest.
    """
    wanted = pa.table(
        {"asset": pa.array(versions.keys(), pa.string()), "digest": pa.array(versions.values(), pa.string())}
    )
    rows = store.query_arrow(
        "SELECT asset, metadata FROM runs JOIN wanted USING (asset, digest)", given={"wanted": wanted}
    )
    costs: dict[str, Usage] = {}
    for row in rows.to_pylist():
        costs.setdefault(row["asset"], Usage()).add(Usage.from_metadata(orjson.loads(row["metadata"])))
    return {asset: asdict(costs[asset]) for asset in versions if asset in costs}


def total(costs: Mapping[str, Mapping[str, float]]) -> Usage:
    """What all of them cost; the peak is the largest."""
    sum_of_all = Usage()
    for figures in costs.values():
        sum_of_all.add(Usage(**figures))
    return sum_of_all
