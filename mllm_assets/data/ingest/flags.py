"""The quality probes: each flags images by a score, computed from their measurements, and a limit.

Scores and limits are cleanvision 0.3.7's (`issue_managers/image_property.py`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mllm_assets import plugins


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One flag of a picture; probes with `sql` are in the saved views and the report as well.

    A probe uses existing measurements. A new measurement is a field of `probes.ImageMeasurement`, a column
    of `schema.TABLES["image_quality"]` and a step of `store.STEPS`.

    Attributes:
        name: The flag, for example `image_dark`.
        score: From a `probes.ImageMeasurement`, 0 bad to 1 good; None where it depends on the other images.
        limit: Below it an image is flagged.
        setting: The field of `QualitySpec` that replaces `limit` for a dataset.
        sql: `score` over the columns of DuckDB's `image_quality`.
        title: Title of its histogram in the report.
    """

    name: str
    score: Callable[[Any], float] | None
    limit: float = 0.5
    setting: str | None = None
    sql: str | None = None
    title: str = ""

    def limit_of(self, spec: Any) -> float:
        """The limit of a `QualitySpec`."""
        return getattr(spec, self.setting) if self.setting else self.limit


PROBES: dict[str, Probe] = {}


def register(probe: Probe) -> Probe:
    """Add a probe: images are flagged by it, `reject_flags` can name it, and the report shows it.

    Raises:
        RecipeError: Another has its name.
    """
    plugins.add(PROBES, probe.name, probe, "quality probe")
    return probe


def _sharpness(image: Any) -> float:
    gray_score = 1 - math.exp(-image.gray_histogram_std * 0.01)
    return 1 - math.exp(-image.blur_edge_std * 0.01) + (gray_score if gray_score > 0.18 else 0.0)


for _entry in (
    Probe(
        name="image_dark",
        score=lambda image: image.brightness_p99,
        setting="max_dark_brightness",
        sql="brightness_p99",
        title="dark: 99th percentile of brightness",
    ),
    Probe(
        name="image_light",
        score=lambda image: 1 - image.brightness_p5,
        setting="max_light_headroom",
        sql="1 - brightness_p5",
        title="light: 1 - 5th percentile of brightness",
    ),
    Probe(
        name="image_low_information",
        score=lambda image: image.entropy_bits * 0.1,
        setting="max_low_information",
        sql="least(entropy_bits * 0.1, 1)",
        title="information: entropy / 10",
    ),
    Probe(
        name="image_blurry",
        score=_sharpness,
        setting="max_blurry",
        sql="least(1 - exp(-blur_edge_std * 0.01) + CASE WHEN 1 - exp(-gray_histogram_std * 0.01) > 0.18 "
        "THEN 1 - exp(-gray_histogram_std * 0.01) ELSE 0 END, 1)",
        title="sharpness",
    ),
    Probe(
        name="image_odd_aspect_ratio",
        score=lambda image: min(image.width_px / image.height_px, image.height_px / image.width_px),
        setting="max_odd_aspect_ratio",
        sql="least(width_px / height_px, height_px / width_px)",
        title="shorter / longer edge",
    ),
    Probe(name="image_odd_size", score=None),  # see `verdicts.odd_size_limits`
    Probe(name="image_grayscale", score=lambda image: 0.0 if image.is_grayscale else 1.0),
):
    register(_entry)
