"""The DuckDB schema, version 8: tables, columns, each table's key, and what a second write of a key does.

Content (what a sample, an image or a caption is) is keyed by what it is and never changes. History (which samples a
source had, how a run judged them, where they went) is keyed by the digest of that version, so that an earlier run is
not overwritten and writing a run twice adds nothing. `store.migrate` updates older files.
"""

from dataclasses import dataclass

SCHEMA_VERSION = 8


@dataclass(frozen=True, slots=True)
class TableSchema:
    """A table's columns (name -> DuckDB type) and the columns that identify a row.

    `keeps_first`: a row with an existing key is ignored; otherwise it replaces the old one.
    """

    columns: dict[str, str]
    key: tuple[str, ...]
    keeps_first: bool = False

    def ddl(self, name: str) -> str:
        columns = ", ".join(f'"{column}" {kind}' for column, kind in self.columns.items())
        return f'CREATE TABLE IF NOT EXISTS "{name}" ({columns})'


def _table(columns: str, *, key: str, keeps_first: bool = False) -> TableSchema:
    """A table whose columns are written as in SQL."""
    pairs = (column.split() for column in columns.split(","))
    return TableSchema({name: kind for name, kind in pairs}, tuple(key.split(", ")), keeps_first)


# `run_id` is the run that wrote a row first where the table keeps the first, otherwise the last one
TABLES: dict[str, TableSchema] = {
    # samples by content; the id is a digest of images and texts
    "samples": _table(
        """dataset VARCHAR, sample_id VARCHAR, num_images INTEGER, caption VARCHAR, caption_sha256 VARCHAR,
        label VARCHAR, run_id VARCHAR""",
        key="dataset, sample_id",
        keeps_first=True,
    ),
    # which samples each version of the source had, in its order, and where they were found
    "sample_versions": _table(
        """dataset VARCHAR, raw_digest VARCHAR, sample_id VARCHAR, row_index BIGINT, source_location VARCHAR,
        source_id VARCHAR, source_detail VARCHAR, run_id VARCHAR""",
        key="dataset, raw_digest, sample_id",
        keeps_first=True,
    ),
    # which images a sample holds, in order
    "images": _table(
        "dataset VARCHAR, sample_id VARCHAR, image_index INTEGER, image_sha256 VARCHAR, run_id VARCHAR",
        key="dataset, sample_id, image_index",
        keeps_first=True,
    ),
    # measurements of an image's bytes in any dataset; replaced where a higher limit allows more of them
    "image_quality": _table(
        """image_sha256 VARCHAR, probe_version INTEGER, num_bytes BIGINT, defect VARCHAR, format VARCHAR,
        mode VARCHAR, width_px INTEGER, height_px INTEGER, num_frames INTEGER, orientation INTEGER,
        passes_through BOOLEAN, is_grayscale BOOLEAN, brightness_p5 DOUBLE, brightness_p99 DOUBLE,
        blur_edge_std DOUBLE, gray_histogram_std DOUBLE, entropy_bits DOUBLE, phash_64 UBIGINT, color_48 VARCHAR,
        run_id VARCHAR""",
        key="image_sha256, probe_version",
    ),
    # measurements of a caption in any dataset
    "caption_quality": _table(
        """caption_sha256 VARCHAR, probe_version INTEGER, caption_num_chars INTEGER, caption_num_words INTEGER,
        caption_num_unique_words INTEGER, caption_num_tokens INTEGER, caption_repeated_share DOUBLE,
        caption_ascii_share DOUBLE, run_id VARCHAR""",
        key="caption_sha256, probe_version",
        keeps_first=True,
    ),
    # one row for each run that assessed a dataset: its thresholds and what it found
    "assessments": _table(
        """dataset VARCHAR, run_id VARCHAR, quality_digest VARCHAR, raw_digest VARCHAR, probe_version INTEGER,
        thresholds JSON, num_samples BIGINT, num_rejected BIGINT, num_duplicates BIGINT, written_at TIMESTAMP""",
        key="dataset, run_id",
    ),
    # how each sample was judged
    "verdicts": _table(
        """dataset VARCHAR, quality_digest VARCHAR, sample_id VARCHAR, row_index BIGINT, reject_reason VARCHAR,
        flags VARCHAR[], duplicate_group VARCHAR, group_size BIGINT, run_id VARCHAR""",
        key="dataset, quality_digest, sample_id",
        keeps_first=True,
    ),
    # pairs of samples that share an image or hold near-duplicates
    "duplicate_pairs": _table(
        """dataset VARCHAR, quality_digest VARCHAR, sample_a VARCHAR, sample_b VARCHAR, kind VARCHAR,
        distance_bits INTEGER, color_distance DOUBLE, run_id VARCHAR""",
        key="dataset, quality_digest, sample_a, sample_b",
        keeps_first=True,
    ),
    # where every sample of a version went: train, val, unused or rejected, with the reason
    "split_membership": _table(
        """dataset VARCHAR, split_digest VARCHAR, split_key VARCHAR, sample_id VARCHAR, duplicate_group VARCHAR,
        split VARCHAR, reason VARCHAR, position INTEGER, run_id VARCHAR, written_at TIMESTAMP""",
        key="dataset, split_digest, split_key, sample_id",
    ),
    # `metrics` has this sample's metrics by name, as in `eval_metrics`
    "predictions": _table(
        """run_id VARCHAR, recipe VARCHAR, checkpoint_digest VARCHAR, model VARCHAR, entry VARCHAR, sample_id VARCHAR,
        row_index BIGINT, prompt VARCHAR, reference VARCHAR, label VARCHAR, answer VARCHAR, loss_nats DOUBLE,
        loss_shuffled_nats DOUBLE, num_supervised_tokens INTEGER, num_answer_tokens INTEGER, latency_s DOUBLE,
        metrics JSON""",
        key="recipe, checkpoint_digest, model, entry, row_index",
    ),
    "eval_metrics": _table(
        """run_id VARCHAR, recipe VARCHAR, checkpoint_digest VARCHAR, model VARCHAR, entry VARCHAR, metric VARCHAR,
        value DOUBLE, num_samples BIGINT""",
        key="recipe, checkpoint_digest, model, entry, metric",
    ),
    # which training rows are to be looked at first, and why; position 1 is the most suspicious
    "label_issues": _table(
        """dataset VARCHAR, issues_digest VARCHAR, sample_id VARCHAR, position INTEGER, score DOUBLE,
        is_suspect BOOLEAN, given VARCHAR, suggested VARCHAR, reason VARCHAR, recipe VARCHAR, run_id VARCHAR,
        written_at TIMESTAMP""",
        key="dataset, issues_digest, sample_id",
    ),
    "runs": _table(
        "run_id VARCHAR, asset VARCHAR, digest VARCHAR, created_at TIMESTAMP, metadata JSON",
        key="run_id, asset",
    ),
}
