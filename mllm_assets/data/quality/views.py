"""The saved views of the DuckDB file: questions about the newest assessment and split of every dataset.

Every view of `ASKED` has `dataset`, every one of `ASKED_OF_RECIPES` has `recipe`, and all have `rank`, 1 for the row to
look at first. A dataset's own limits come from its assessment. `view_sql` fills in `{scores}` and `{limits}` of the
registered quality probes.
"""

from dataclasses import fields

from mllm_assets.data.ingest.flags import PROBES
from mllm_assets.data.ingest.spec import QualitySpec

MAX_REPEATED_SHARE = 0.2
MAX_LENGTH_RATIO = 4
# of an answer to a sample without a label: true where it is the very reference, NULL where it need not be wrong
IS_RIGHT = """coalesce((metrics->>'label_accuracy')::DOUBLE = 1,
                CASE WHEN (metrics->>'exact_match')::DOUBLE = 1 THEN true END)"""

VIEWS: dict[str, str] = {
    "latest_assessments": """
        SELECT * FROM assessments
        QUALIFY row_number() OVER (PARTITION BY dataset ORDER BY written_at DESC, run_id) = 1""",
    "latest_verdicts": """
        SELECT verdicts.*, found.source_location, found.source_id, found.source_detail
        FROM verdicts JOIN latest_assessments USING (dataset, quality_digest)
        LEFT JOIN sample_versions found ON (found.dataset, found.raw_digest, found.sample_id) =
            (verdicts.dataset, latest_assessments.raw_digest, verdicts.sample_id)""",
    "latest_splits": """
        WITH newest AS (
            SELECT DISTINCT ON (dataset) dataset, split_digest, split_key FROM split_membership
            ORDER BY dataset, written_at DESC, split_digest)
        SELECT split_membership.* FROM split_membership JOIN newest USING (dataset, split_digest, split_key)""",
    # the dataset's own limits; a score below is flagged
    "score_limits": "{limits}",
    # one row for each image and issue, 0 bad to 1 good; images with a defect have none
    "image_scores": """
        WITH newest AS (
            SELECT * FROM image_quality WHERE defect IS NULL AND brightness_p99 IS NOT NULL
            QUALIFY row_number() OVER (PARTITION BY image_sha256 ORDER BY probe_version DESC) = 1),
        wide AS (
            SELECT image_sha256,
                {scores}
            FROM newest)
        UNPIVOT wide ON COLUMNS(* EXCLUDE image_sha256) INTO NAME issue VALUE score""",
    # each sample once, by the measure that is lowest relative to its limit; below 1 it is flagged
    "worst": """
        WITH of_sample AS (
            SELECT v.dataset, v.sample_id, i.image_sha256, s.issue, s.score, l.score_limit,
                s.score / nullif(l.score_limit, 0) AS margin, v.flags, v.reject_reason, v.source_location
            FROM latest_verdicts v JOIN images i USING (dataset, sample_id)
            JOIN image_scores s USING (image_sha256) JOIN score_limits l USING (dataset, issue)
            QUALIFY row_number() OVER (PARTITION BY v.dataset, v.sample_id ORDER BY margin, issue) = 1)
        SELECT dataset, row_number() OVER (PARTITION BY dataset ORDER BY margin, sample_id) AS rank,
            sample_id, source_location, issue, round(score, 4) AS score, score_limit, round(margin, 3) AS margin,
            flags, reject_reason, image_sha256
        FROM of_sample""",
    # a validation or test sample whose duplicate group, or an identical look in another dataset, is trained on
    "leaks": """
        WITH used AS (
            SELECT m.*, hash(q.phash_64, q.color_48) AS look, i.image_sha256
            FROM latest_splits m JOIN images i USING (dataset, sample_id)
            JOIN image_quality q USING (image_sha256)
            WHERE m.split IN ('train', 'val', 'test') AND q.phash_64 IS NOT NULL
            QUALIFY row_number() OVER (
                PARTITION BY m.dataset, m.sample_id, i.image_index ORDER BY q.probe_version DESC) = 1),
        found AS (
            SELECT v.dataset, v.sample_id AS held_out_sample, v.split, t.dataset AS train_dataset,
                t.sample_id AS train_sample,
                CASE WHEN v.image_sha256 = t.image_sha256 THEN 'exact' ELSE 'near' END AS kind
            FROM used v JOIN used t ON v.split <> 'train' AND t.split = 'train' AND v.dataset = t.dataset
                AND v.duplicate_group = t.duplicate_group
            UNION ALL
            SELECT v.dataset, v.sample_id, v.split, t.dataset, t.sample_id,
                CASE WHEN v.image_sha256 = t.image_sha256 THEN 'exact' ELSE 'near' END
            FROM used v JOIN used t ON v.split <> 'train' AND t.split = 'train' AND v.look = t.look
                AND (v.dataset <> t.dataset OR v.duplicate_group IS DISTINCT FROM t.duplicate_group)),
        pairs AS (
            SELECT dataset, held_out_sample, split, train_dataset, train_sample, min(kind) AS kind
            FROM found GROUP BY ALL)
        SELECT pairs.dataset, row_number() OVER (
                PARTITION BY pairs.dataset ORDER BY kind, held_out_sample, train_dataset, train_sample) AS rank,
            held_out_sample, split, v.source_location AS held_out_location, train_dataset, train_sample,
            t.source_location AS train_location, kind
        FROM pairs
        LEFT JOIN latest_verdicts v ON (v.dataset, v.sample_id) = (pairs.dataset, held_out_sample)
        LEFT JOIN latest_verdicts t ON (t.dataset, t.sample_id) = (train_dataset, train_sample)""",
    "duplicates": """
        SELECT p.dataset,
            row_number() OVER (
                PARTITION BY p.dataset ORDER BY kind, distance_bits, color_distance, sample_a, sample_b) AS rank,
            sample_a, va.source_location AS location_a, sample_b, vb.source_location AS location_b, kind,
            distance_bits, color_distance, ma.split AS split_a, mb.split AS split_b, a.caption AS caption_a,
            b.caption AS caption_b
        FROM duplicate_pairs p JOIN latest_assessments USING (dataset, quality_digest)
        LEFT JOIN samples a ON (a.dataset, a.sample_id) = (p.dataset, sample_a)
        LEFT JOIN samples b ON (b.dataset, b.sample_id) = (p.dataset, sample_b)
        LEFT JOIN latest_verdicts va ON (va.dataset, va.sample_id) = (p.dataset, sample_a)
        LEFT JOIN latest_verdicts vb ON (vb.dataset, vb.sample_id) = (p.dataset, sample_b)
        LEFT JOIN latest_splits ma ON (ma.dataset, ma.sample_id) = (p.dataset, sample_a)
        LEFT JOIN latest_splits mb ON (mb.dataset, mb.sample_id) = (p.dataset, sample_b)""",
    # first the captions that the most samples share, then those that repeat themselves (from Gopher's limit of 0.2,
    # Rae et al. 2021, table A1), then those whose length differs most from the median, as a ratio
    "captions": f"""
        WITH of_sample AS (
            SELECT v.dataset, v.sample_id, v.source_location, s.caption, q.caption_num_chars AS num_chars,
                q.caption_num_words AS num_words, q.caption_num_tokens AS num_tokens,
                q.caption_repeated_share AS repeated_share,
                count(*) OVER (PARTITION BY v.dataset, lower(trim(s.caption))) AS num_with_this_caption,
                v.reject_reason
            FROM latest_verdicts v JOIN samples s USING (dataset, sample_id)
            LEFT JOIN caption_quality q USING (caption_sha256)
            WHERE s.caption IS NOT NULL
            QUALIFY row_number() OVER (PARTITION BY v.dataset, v.sample_id ORDER BY q.probe_version DESC) = 1),
        against_usual AS (
            SELECT *, CASE num_chars WHEN 0 THEN 1 ELSE num_chars END
                / greatest(median(num_chars) OVER (PARTITION BY dataset), 1) AS length_ratio
            FROM of_sample),
        judged AS (
            SELECT *, CASE WHEN num_with_this_caption > 1 THEN 'shared'
                WHEN repeated_share > {MAX_REPEATED_SHARE} THEN 'repetitive'
                WHEN length_ratio < {1 / MAX_LENGTH_RATIO} THEN 'short'
                WHEN length_ratio > {MAX_LENGTH_RATIO} THEN 'long' END AS issue
            FROM against_usual)
        SELECT dataset,
            row_number() OVER (PARTITION BY dataset ORDER BY num_with_this_caption DESC,
                CASE issue WHEN 'shared' THEN lower(trim(caption)) END,
                CASE issue WHEN 'repetitive' THEN repeated_share ELSE 0 END DESC,
                abs(ln(length_ratio)) DESC, lower(trim(caption)), sample_id) AS rank,
            sample_id, source_location, issue, num_with_this_caption, repeated_share,
            round(length_ratio, 3) AS length_ratio, num_tokens, num_words, num_chars, caption, reject_reason
        FROM judged""",
    "rejects": """
        SELECT v.dataset, row_number() OVER (PARTITION BY v.dataset ORDER BY v.row_index, v.sample_id) AS rank,
            v.source_location, v.reject_reason AS reason, v.source_detail AS looked_for, s.caption, v.sample_id,
            v.source_id, v.row_index, v.quality_digest, v.run_id
        FROM latest_verdicts v LEFT JOIN samples s USING (dataset, sample_id)
        WHERE v.reject_reason IS NOT NULL""",
    "latest_label_issues": """
        WITH newest AS (
            SELECT DISTINCT ON (dataset) dataset, issues_digest FROM label_issues
            ORDER BY dataset, written_at DESC, issues_digest)
        SELECT label_issues.* FROM label_issues JOIN newest USING (dataset, issues_digest)""",
    # what a recipe's models answered in its newest evaluation
    "latest_predictions": """
        WITH newest AS (
            SELECT run_id, asset FROM runs WHERE asset LIKE '%/predictions'
            QUALIFY row_number() OVER (PARTITION BY asset ORDER BY created_at DESC, run_id) = 1)
        SELECT predictions.* FROM predictions JOIN newest
            ON newest.run_id = predictions.run_id AND newest.asset = predictions.recipe || '/predictions'""",
    # what the tuned model finds least likely: mislabelled samples are among the first. A sample that two datasets hold
    # is shown once, with the quality of the one whose name comes first.
    "hardest": f"""
        WITH of_sample AS (
            SELECT dataset, sample_id, source_location, flags,
                row_number() OVER (PARTITION BY sample_id ORDER BY dataset) AS number
            FROM latest_verdicts),
        said AS (
            SELECT t.*, b.loss_nats AS base_loss_nats FROM latest_predictions t
            LEFT JOIN latest_predictions b ON b.model = 'base' AND (b.recipe, b.entry, b.row_index, b.run_id) =
                (t.recipe, t.entry, t.row_index, t.run_id)
            WHERE t.model = 'tuned')
        SELECT said.recipe,
            row_number() OVER (PARTITION BY said.recipe ORDER BY said.loss_nats DESC, said.entry, said.row_index)
                AS rank,
            entry, row_index, said.sample_id, of_sample.source_location, said.loss_nats,
            base_loss_nats - said.loss_nats AS gain_nats, said.reference, said.answer,
            {IS_RIGHT} AS is_right,
            worst.issue AS worst_issue, worst.margin AS worst_margin, of_sample.flags, worst.image_sha256
        FROM said LEFT JOIN of_sample ON of_sample.sample_id = said.sample_id AND of_sample.number = 1
        LEFT JOIN worst ON (worst.dataset, worst.sample_id) = (of_sample.dataset, of_sample.sample_id)""",
}
ASKED_OF_RECIPES = ("hardest",)
ASKED = ("worst", "leaks", "duplicates", "captions", "rejects")


def view_sql(name: str) -> str:
    """The query of a saved view."""
    defaults = {item.name: item.default for item in fields(QualitySpec)}
    probes = [probe for probe in PROBES.values() if probe.sql]
    limits = [
        f"SELECT dataset, '{probe.name}' AS issue, "
        + (
            f"coalesce((thresholds->>'{probe.setting}')::DOUBLE, {defaults[probe.setting]})"
            if probe.setting
            else str(probe.limit)
        )
        + " AS score_limit FROM latest_assessments"
        for probe in probes
    ]
    scores = ", ".join(f"{probe.sql} AS {probe.name}" for probe in probes)
    return VIEWS[name].replace("{limits}", " UNION ALL ".join(limits)).replace("{scores}", scores)
