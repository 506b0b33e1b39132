"""The two resources that the assets use: where things lie, and what runs the model."""

import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from mllm_assets.components.mirroring import send
from mllm_assets.components.progress import ProgressRelay, describe_cancelled, local_session
from mllm_assets.components.ray_launcher import run_on_ray
from mllm_assets.components.reporting import CHECK_FAILED, MADE, facts_text
from mllm_assets.components.slots import name_host
from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout
from mllm_assets.mirror import Mirror
from mllm_assets.quality.store import QualityStore, table_for, utc_now
from mllm_assets.redaction import holds_secret, redacted, redacted_value
from mllm_assets.store import Store
from mllm_assets.training.launch import WorkerCrashed, run_worker
from mllm_assets.training.ray_jobs import DEFAULT_ADDRESS, Cluster

SHARED_TASKS = ("vision_features", "evaluate")  # those that take a `part` of the work, and put `parts` together


@contextmanager
def failures_for_people() -> Iterator[None]:
    """Turn our errors into step failures that show the message alone and are not retried.

    Of any other error whose text holds a secret, Dagster keeps the redacted traceback only.
    """
    try:
        yield
    except MllmAssetsError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from None
    except Exception as error:  # of whatever class: Dagster would write its text into the event log
        if not holds_secret(text := "".join(traceback.format_exception(error))):
            raise
        failure = dg.Failure(description=redacted(text), allow_retries=False)
        raise failure from None


def _redacted(value: Any) -> Any:
    """A metadata value without secrets."""
    match value:
        case dg.TextMetadataValue(text=text):
            return dg.MetadataValue.text(redacted(text or ""))
        case dg.MarkdownMetadataValue(md_str=text):
            return dg.MetadataValue.md(redacted(text or ""))
        case dg.JsonMetadataValue(data=data):
            return dg.MetadataValue.json(redacted_value(data))
        case _:
            return redacted_value(value)


class ProjectResource(dg.ConfigurableResource):
    """The folders of the project and its quality database."""

    root: str = Field(description="Folder that holds data/, pretrains/, outputs/, releases/ and cache/.")
    store: str = Field(
        default="", description="Mirrors what is made, for other machines: s3://bucket/prefix or file:///folder."
    )

    @property
    def layout(self) -> Layout:
        return Layout(Path(self.root).resolve())

    @property
    def quality_store(self) -> QualityStore:
        return QualityStore(self.layout.quality_db)

    def mirror(self, context: dg.AssetExecutionContext) -> Mirror | None:
        """The artefact store, where there is one."""
        layout = self.layout
        return Mirror(Store(self.store, layout.root), layout, context.log.info) if self.store else None

    def recorded(self, context: dg.AssetExecutionContext, result: dg.MaterializeResult) -> dg.MaterializeResult:
        """Redact a materialisation, mirror what was made, write it into the table `runs` of DuckDB, hand it on."""
        result = result._replace(metadata={name: _redacted(value) for name, value in (result.metadata or {}).items()})
        key = dg.AssetKey.from_coercible(result.asset_key) if result.asset_key else context.asset_key
        plain = {name: value for name, value in (result.metadata or {}).items() if isinstance(value, str | int | float)}
        row = {
            "run_id": context.run.run_id,
            "asset": key.to_user_string(),
            "digest": result.data_version.value if result.data_version else None,
            "created_at": utc_now(),
            "metadata": json.dumps(plain),
        }
        with failures_for_people():
            if mirror := self.mirror(context):
                send(mirror, key, result)
            self.quality_store.write({"runs": table_for("runs", [row])})
        context.log.info(f"{MADE}{row['asset']}: {facts_text(result.metadata or {})}")
        for check in result.check_results or ():
            if not check.passed:
                context.log.warning(f"{CHECK_FAILED}{check.check_name}: {redacted(check.description or '')}")
        return result


class RayCluster(dg.Config):
    """The Ray cluster of `launcher: ray`. Its machines must see the project's folder under the same path."""

    address: str = Field(
        default=DEFAULT_ADDRESS, description="The cluster's dashboard. The variable RAY_ADDRESS wins over it."
    )
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs that each job reserves.")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs that each job reserves, and the only ones it sees.")
    num_workers: int = Field(
        default=1, ge=1, description="Jobs over which feature extraction and predictions are spread."
    )
    jobs_dir: str = Field(
        default="cache/ray_jobs", description="Where requests and results are exchanged; seen by all machines."
    )
    python: str = Field(default=sys.executable, description="The Python of the cluster's machines.")


class AcceleratorResource(dg.ConfigurableResource):
    """The device that models run on. Each call runs in a process tree of its own, which ends with the step."""

    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        default="auto", description="auto takes CUDA, then MPS, then the CPU; a named device must be there."
    )
    num_processes: int = Field(default=1, ge=1, description="Processes on one machine; above 1 torchrun starts them.")
    num_threads: int | None = Field(default=None, description="CPU threads of each process; by default one per core.")
    grace_s: float = Field(
        default=10.0, description="Seconds between asking a cancelled worker to stop and killing it."
    )
    launcher: Literal["local", "ray"] = Field(
        default="local", description="Where workers run: on this machine, or as jobs of a Ray cluster."
    )
    ray: RayCluster = Field(default_factory=RayCluster, description="Used by the launcher ray only.")
    max_retries: int = Field(
        default=2,
        ge=0,
        description="How often a step is started again whose worker was killed or whose machine was lost. It resumes. "
        "A mistake in recipe, data or settings is never tried again.",
    )
    retry_delay_s: float = Field(default=10.0, ge=0, description="Seconds before it is started again.")

    def run(self, context: dg.AssetExecutionContext, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run one worker task, with its progress as observations of the step's assets.

        Raises:
            dg.Failure: The task failed; a mistake in the input, a cancellation or a defect is not retried.
            dg.RetryRequested: The worker was killed, or its machine is lost.
        """
        name_host(context.instance, context.run_id)
        key = next(iter(context.selected_asset_keys))
        request = {**request, "accelerator": self.settings(request["task"])}
        relay: ProgressRelay | None = None
        try:
            with failures_for_people():
                if self.launcher == "ray":
                    return self._run_on_ray(context, key, request)
                with local_session(context) as session:
                    relay = ProgressRelay(context, key, session)
                    return run_worker(
                        request,
                        env=session.get_bootstrap_env_vars(),
                        on_poll=relay.relay,
                        grace_s=self.grace_s,
                    )
        except dg.DagsterExecutionInterruptedError:
            # a RetryPolicy would start a bare interrupt again
            raise dg.Failure(description=describe_cancelled(request, relay), allow_retries=False) from None
        except WorkerCrashed as crash:
            failure = dg.Failure(description=str(crash), allow_retries=False)
            if not crash.is_transient:
                raise failure from None
            context.log.warning(str(crash))  # of a retry's event Dagster's own log shows no cause
            raise dg.RetryRequested(self.max_retries, self.retry_delay_s) from failure

    def settings(self, task: str) -> dict[str, Any]:
        """What the worker is told; only training is spread over processes."""
        num_processes = self.num_processes if task == "train" else 1
        return {"device": self.device, "num_processes": num_processes, "num_threads": self.num_threads}

    def _run_on_ray(
        self, context: dg.AssetExecutionContext, key: dg.AssetKey, request: Mapping[str, Any]
    ) -> dict[str, Any]:
        cluster = Cluster(
            address=self.ray.address,
            jobs_dir=Path(self.ray.jobs_dir),
            num_cpus=self.ray.num_cpus,
            num_gpus=self.ray.num_gpus,
            python=self.ray.python,
        )
        num_workers = self.ray.num_workers if request["task"] in SHARED_TASKS else 1
        if num_workers > 1:
            parts = [{**request, "part": [index, num_workers]} for index in range(num_workers)]
            request = {**request, "parts": run_on_ray(context, key, parts, cluster, grace_s=self.grace_s)}
        [result] = run_on_ray(context, key, [request], cluster, grace_s=self.grace_s)
        return result
