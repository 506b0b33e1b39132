"""The DuckDB schema, version 1: tables, columns and the key that names a row."""

from dataclasses import dataclass

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class TableSchema:
    """A table's columns (name -> DuckDB type) and the columns that identify a row; a later write replaces it."""

    columns: dict[str, str]
    key: tuple[str, ...]

    def ddl(self, name: str) -> str:
        columns = ", ".join(f'"{column}" {kind}' for column, kind in self.columns.items())
        return f'CREATE TABLE IF NOT EXISTS "{name}" ({columns})'


TABLES: dict[str, TableSchema] = {
    # what a sample is; `run_id` is everywhere the run that wrote the row last
    "samples": TableSchema(
        {
            "dataset": "VARCHAR",
            "sample_id": "VARCHAR",
            "raw_digest": "VARCHAR",
            "row_index": "BIGINT",
            "num_images": "INTEGER",
            "caption": "VARCHAR",
            "label": "VARCHAR",
            "run_id": "VARCHAR",
        },
        ("dataset", "raw_digest", "sample_id"),
    ),
    # which images a sample holds, in order
    "images": TableSchema(
        {
            "dataset": "VARCHAR",
            "sample_id": "VARCHAR",
            "image_index": "INTEGER",
            "image_sha256": "VARCHAR",
            "run_id": "VARCHAR",
        },
        ("dataset", "sample_id", "image_index"),
    ),
    # what an image's bytes are, whoever holds them
    "image_quality": TableSchema(
        {
            "image_sha256": "VARCHAR",
            "probe_version": "INTEGER",
            "num_bytes": "BIGINT",
            "defect": "VARCHAR",
            "format": "VARCHAR",
            "mode": "VARCHAR",
            "width_px": "INTEGER",
            "height_px": "INTEGER",
            "orientation": "INTEGER",
            "passes_through": "BOOLEAN",
            "brightness_p5": "DOUBLE",
            "brightness_p99": "DOUBLE",
            "blur_edge_std": "DOUBLE",
            "gray_histogram_std": "DOUBLE",
            "entropy_bits": "DOUBLE",
            "phash_64": "UBIGINT",
            "color_48": "VARCHAR",
            "run_id": "VARCHAR",
        },
        ("image_sha256", "probe_version"),
    ),
    "caption_quality": TableSchema(
        {
            "dataset": "VARCHAR",
            "sample_id": "VARCHAR",
            "caption_num_chars": "INTEGER",
            "caption_num_words": "INTEGER",
            "caption_num_unique_words": "INTEGER",
            "caption_ascii_share": "DOUBLE",
            "run_id": "VARCHAR",
        },
        ("dataset", "sample_id"),
    ),
    # pairs of samples that share an image or hold near-duplicates
    "duplicates": TableSchema(
        {
            "dataset": "VARCHAR",
            "quality_digest": "VARCHAR",
            "sample_a": "VARCHAR",
            "sample_b": "VARCHAR",
            "kind": "VARCHAR",
            "distance_bits": "INTEGER",
            "color_distance": "DOUBLE",
            "run_id": "VARCHAR",
        },
        ("dataset", "quality_digest", "sample_a", "sample_b"),
    ),
    "rejects": TableSchema(
        {
            "dataset": "VARCHAR",
            "quality_digest": "VARCHAR",
            "sample_id": "VARCHAR",
            "row_index": "BIGINT",
            "reason": "VARCHAR",
            "run_id": "VARCHAR",
        },
        ("dataset", "quality_digest", "sample_id"),
    ),
    # where every sample of a version went: train, val, unused or rejected, with the reason
    "split_membership": TableSchema(
        {
            "dataset": "VARCHAR",
            "split_digest": "VARCHAR",
            "split_key": "VARCHAR",
            "sample_id": "VARCHAR",
            "duplicate_group": "VARCHAR",
            "split": "VARCHAR",
            "reason": "VARCHAR",
            "position": "INTEGER",
            "run_id": "VARCHAR",
            "written_at": "TIMESTAMP",
        },
        ("dataset", "split_digest", "split_key", "sample_id"),
    ),
    "predictions": TableSchema(
        {
            "run_id": "VARCHAR",
            "recipe": "VARCHAR",
            "checkpoint_digest": "VARCHAR",
            "model": "VARCHAR",
            "entry": "VARCHAR",
            "sample_id": "VARCHAR",
            "row_index": "BIGINT",
            "prompt": "VARCHAR",
            "reference": "VARCHAR",
            "answer": "VARCHAR",
            "loss_nats": "DOUBLE",
            "loss_shuffled_nats": "DOUBLE",
            "num_supervised_tokens": "INTEGER",
            "latency_s": "DOUBLE",
        },
        ("recipe", "checkpoint_digest", "model", "entry", "row_index"),
    ),
    "eval_metrics": TableSchema(
        {
            "run_id": "VARCHAR",
            "recipe": "VARCHAR",
            "checkpoint_digest": "VARCHAR",
            "model": "VARCHAR",
            "entry": "VARCHAR",
            "metric": "VARCHAR",
            "value": "DOUBLE",
            "num_samples": "BIGINT",
        },
        ("recipe", "checkpoint_digest", "model", "entry", "metric"),
    ),
    "runs": TableSchema(
        {
            "run_id": "VARCHAR",
            "asset": "VARCHAR",
            "digest": "VARCHAR",
            "created_at": "TIMESTAMP",
            "metadata": "JSON",
        },
        ("run_id", "asset"),
    ),
}
