"""What runs without a person; the attributes of the components that say whether, when and how long."""

from datetime import timedelta

import dagster as dg
from pydantic import Field

from mllm_assets.components.release_watch import ReleaseWatchSettings
from mllm_assets.components.source_watch import WatchSettings


class Retraining(dg.Model, dg.Resolvable):
    """The schedule that retrains what changed."""

    enabled: bool = Field(default=False, description="Whether it runs without being switched on in the UI.")
    cron_schedule: str = Field(default="0 3 * * 1", description="When; by default at 3 on Mondays, UTC.")
    max_runtime_h: float | None = Field(
        default=24.0, gt=0, description="Hours after which a run is ended and counts as failed; null for no limit."
    )


class ReleaseWatch(dg.Model, dg.Resolvable):
    """The sensor that looks whether released models got worse on what they are evaluated on now."""

    enabled: bool = Field(default=False, description="Whether it runs without being switched on in the UI.")
    every_s: int = Field(default=3600, ge=1, description="Seconds between two looks.")
    max_rise_nats: float = Field(
        default=0.05, ge=0, description="Rise of the loss above which the whole 95 % interval must lie."
    )
    cooldown_h: float = Field(default=24.0, ge=0, description="Hours after an alarm in which none follows it.")
    alert: bool = Field(default=True, description="Post the alarm to MLLM_ASSETS_ALERT_WEBHOOK, where that is set.")
    retrain: bool = Field(default=False, description="Launch a retraining of the recipe's line, if an input changed.")

    def to_domain(self) -> ReleaseWatchSettings:
        return ReleaseWatchSettings(**self.model_dump())


class Freshness(dg.Model, dg.Resolvable):
    """How old results may get before the UI says so; null for any age. Nothing is launched."""

    checkpoint_max_age_days: float | None = Field(default=None, gt=0, description="Of `<recipe>/checkpoint`.")
    metrics_max_age_days: float | None = Field(default=None, gt=0, description="Of `<recipe>/eval_metrics`.")

    def policy_of(self, key: dg.AssetKey) -> dg.FreshnessPolicy | None:
        """The policy of an asset; it warns at three quarters of the age."""
        days = {"checkpoint": self.checkpoint_max_age_days, "eval_metrics": self.metrics_max_age_days}.get(key.path[-1])
        if days is None:
            return None
        return dg.FreshnessPolicy.time_window(timedelta(days=days), warn_window=timedelta(days=days * 0.75))


class Watch(dg.Model, dg.Resolvable):
    """The sensor that makes the dataset again when its source has something new."""

    enabled: bool = Field(default=False, description="Whether it runs without being switched on in the UI.")
    every_s: int = Field(default=600, ge=1, description="Seconds between two looks.")
    settle_s: float = Field(
        default=60.0,
        ge=0,
        description="Seconds in which no file may change before changed files are ingested, so that a folder that is "
        "being copied is not; of a Hub dataset without effect.",
    )
    max_runtime_h: float | None = Field(default=6.0, gt=0, description="Hours after which a run is ended; null: never.")

    def to_domain(self) -> WatchSettings:
        return WatchSettings(**self.model_dump())
