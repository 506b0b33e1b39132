"""Releases as versions of a registered model in MLflow, and the way back: an alias that somebody moved there.

The registry is MLflow's own setting, `MLFLOW_REGISTRY_URI` or `MLFLOW_TRACKING_URI`; without one it is the recipe's
`outputs/<recipe>/mlflow.db`, which holds its runs too. A version's run holds the test metrics.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mllm_assets.artifacts import read_manifest
from mllm_assets.errors import GateError, MachineError, RecipeError, SourceError
from mllm_assets.evaluation.gates import APPROVAL, GateResult, GateSpec, evaluate_gates, failed
from mllm_assets.evaluation.metrics import read_metrics
from mllm_assets.layout import Layout
from mllm_assets.redaction import redacted
from mllm_assets.releases.versions import Release, list_releases, releases_lock, require_intact, roll_back

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

T = TypeVar("T")

SQLITE = "sqlite:///"
RECIPE, VERSION, DIGEST, REFUSED = (f"mllm_assets.{name}" for name in ("recipe", "release", "digest", "refused"))
MAX_TAG_CHARS = 4000  # MLflow's limit is 5,000 bytes
_HTTP = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # MLflow's: 120 s, 7 times


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistrySpec:
    """Where each release becomes a version of a registered model of MLflow.

    Attributes:
        registered_model: Its name; by default the recipe's.
        alias: The alias of the current release. Whoever moves it there makes that release the current one here, if
            its gates hold.
        upload: Copy the files into MLflow's artefact store. A server on another machine needs it; without it the
            version names the release's folder.

    Raises:
        RecipeError: A name that MLflow refuses.
    """

    registered_model: str | None = None
    alias: str = "champion"
    upload: bool = False

    def __post_init__(self) -> None:
        if self.registered_model is not None and not re.fullmatch(r"[A-Za-z0-9][\w .-]{0,249}", self.registered_model):
            raise RecipeError(
                f"mlflow_registry.registered_model is {self.registered_model!r}: expected letters, digits, spaces and "
                "any of _ . -"
            )
        if not re.fullmatch(r"(?!(?i:latest|v\d+)$)[A-Za-z0-9_-]{1,250}", self.alias):
            raise RecipeError(
                f"mlflow_registry.alias is {self.alias!r}: expected letters, digits, '_' and '-', but neither latest "
                "nor v1, v2, ..., which MLflow keeps for itself."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredVersion:
    """A version of a registered model, and what it says it holds.

    Attributes:
        model, number: What MLflow calls it.
        page: Where a person sees it: a page of the server, or the database's file.
        run_id: The MLflow run that holds its metrics.
        recipe, version, digest: Of the release; empty where it was not registered from here.
    """

    model: str
    number: str
    page: str
    run_id: str
    recipe: str
    version: str
    digest: str

    @property
    def uri(self) -> str:
        """What MLflow's clients load it by."""
        return f"models:/{self.model}/{self.number}"


@dataclass(frozen=True, slots=True)
class Registry:
    """The registered model of one recipe."""

    layout: Layout
    recipe_name: str
    spec: RegistrySpec

    @property
    def model(self) -> str:
        return self.spec.registered_model or self.recipe_name

    @property
    def address(self) -> str:
        """The registry's address, as MLflow's variables name it."""
        named = os.environ.get("MLFLOW_REGISTRY_URI") or os.environ.get("MLFLOW_TRACKING_URI")
        database = self.layout.outputs / self.recipe_name / "mlflow.db"
        return named or f"{SQLITE}{database.resolve()}"

    def register(self, release: Release) -> RegisteredVersion:
        """Make a release a version of the registered model and let the alias name it; what is there is kept.

        Raises:
            IntegrityError: A file changed since the release.
            MachineError: MLflow is not installed.
            SourceError: The registry does not take it. Says what it answered.
        """
        require_intact(release.directory)

        def registered(client: "MlflowClient") -> RegisteredVersion:
            version = self._version_of(client, release) or self._create(client, release)
            if self.spec.alias not in version.aliases:
                client.set_registered_model_alias(self.model, self.spec.alias, version.version)
            return self._registered(version)

        with releases_lock(self.layout, self.recipe_name):
            return self._ask(registered)

    def aliased(self) -> RegisteredVersion | None:
        """The version that the alias names; None where there is none.

        Raises:
            MachineError: MLflow is not installed.
            SourceError: The registry cannot be read.
        """
        found = self._ask(self._at_alias)
        return self._registered(found) if found else None

    def follow(self, gates: GateSpec) -> tuple[Release, RegisteredVersion]:
        """Make the release that the alias names the current one.

        Raises:
            GateError: There is no such release, or its gates do not hold. The version has the reason as a tag.
            IntegrityError: A file of it changed since it was released.
            SourceError: The registry cannot be read, or the alias is gone.
        """
        version = self.aliased()
        if version is None:
            raise SourceError(f"{self.model} has no alias {self.spec.alias!r} any more. Set it in MLflow.")
        reason = self._why_not(version, gates)

        def told(client: "MlflowClient") -> None:
            if reason:
                client.set_model_version_tag(self.model, version.number, REFUSED, reason[:MAX_TAG_CHARS])
            elif REFUSED in client.get_model_version(self.model, version.number).tags:
                client.delete_model_version_tag(self.model, version.number, REFUSED)

        self._ask(told)
        if reason:
            raise GateError(
                f"The alias {self.spec.alias} of {self.model} names version {version.number}, which does not become "
                f"the current release of {self.recipe_name}: {reason} Move the alias back, or release again."
            )
        return roll_back(self.layout, self.recipe_name, version.version)[1], version

    def _why_not(self, version: RegisteredVersion, gates: GateSpec) -> str:
        if not version.version:
            return "it was not registered by this project (it has no tag mllm_assets.release)."
        if version.recipe != self.recipe_name:
            return f"it is a release of {version.recipe}."
        found = {release.version: release for release in list_releases(self.layout, self.recipe_name)}
        release = found.get(version.version)
        if release is None:
            return f"this project has no release {version.version} (it has {', '.join(found) or 'none'})."
        if release.digest != version.digest:
            return f"{version.version} here holds another model ({release.digest[:12]}, not {version.digest[:12]})."
        return " ".join(f"{gate.name}: {gate.description}" for gate in failing_gates(release, gates))

    def _create(self, client: "MlflowClient", release: Release) -> "ModelVersion":
        manifest = read_manifest(release.directory)
        tags = {RECIPE: self.recipe_name, VERSION: release.version, DIGEST: release.digest}
        run_id = self._run(client, release, tags)
        for name, value in metric_values(read_metrics(release.directory)).items():
            client.log_metric(run_id, name, value)
        for gate in manifest["gates"]:
            client.set_tag(run_id, f"mllm_assets.gate.{gate['name']}", "passed" if gate["passed"] else "failed")
        source = release.directory.resolve().as_uri()
        if self.spec.upload:
            client.log_artifacts(run_id, str(release.directory), "release")
            source = f"{client.get_run(run_id).info.artifact_uri}/release"
        client.set_terminated(run_id)
        if not client.search_registered_models(f"name='{self.model}'"):
            client.create_registered_model(self.model, tags={RECIPE: self.recipe_name})
        text = f"{self.layout.relative(release.directory)}: weights {manifest['weights_digest'][:16]}"
        return client.create_model_version(self.model, source, run_id, tags=tags, description=text)

    def _run(self, client: "MlflowClient", release: Release, tags: Mapping[str, str]) -> str:
        """The run that holds a release's metrics; one that an interrupted attempt left is taken up again."""
        experiment = client.get_experiment_by_name(self.recipe_name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(self.recipe_name)
        begun = client.search_runs([experiment_id], f"tags.`{DIGEST}` = '{release.digest}'")
        if begun:
            return begun[0].info.run_id
        name = f"{self.recipe_name}/{release.version}"
        return client.create_run(experiment_id, tags=dict(tags), run_name=name).info.run_id

    def _version_of(self, client: "MlflowClient", release: Release) -> "ModelVersion | None":
        versions = client.search_model_versions(f"name='{self.model}'")
        held = (one for one in versions if one.tags.get(DIGEST) == release.digest)
        found = next((one for one in held if one.tags.get(VERSION) == release.version), None)
        return client.get_model_version(self.model, found.version) if found else None  # a search leaves aliases out

    def _at_alias(self, client: "MlflowClient") -> "ModelVersion | None":
        from mlflow.exceptions import MlflowException

        try:
            return client.get_model_version_by_alias(self.model, self.spec.alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def _registered(self, version: "ModelVersion") -> RegisteredVersion:
        is_server = self.address.startswith(("http://", "https://"))
        page = f"{self.address.rstrip('/')}/#/models/{self.model}/versions/{version.version}"
        tags = version.tags or {}
        return RegisteredVersion(
            model=self.model,
            number=str(version.version),
            page=page if is_server else self.address.removeprefix(SQLITE),
            run_id=version.run_id or "",
            recipe=tags.get(RECIPE, ""),
            version=tags.get(VERSION, ""),
            digest=tags.get(DIGEST, ""),
        )

    def _ask(self, work: "Callable[[MlflowClient], T]") -> T:
        """Do something with MLflow's client; what that raises becomes one sentence without credentials."""
        if importlib.util.find_spec("mlflow") is None:
            raise MachineError("mlflow_registry needs MLflow's client: pip install 'mllm-assets[mlflow]'.")
        for variable, value in _HTTP.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        if self.address.startswith(SQLITE):
            Path(self.address.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
        try:
            return work(MlflowClient(tracking_uri=self.address, registry_uri=self.address))
        except (MlflowException, OSError) as error:
            cause = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            message = redacted(
                f"MLflow at {self.address} did not do it ({cause}). Check MLFLOW_TRACKING_URI, and set "
                "mlflow_registry.upload: true where it is a server on another machine."
            )
        raise SourceError(message)  # outside of the block: a chained error would carry the address into a traceback


def failing_gates(release: Release, gates: GateSpec) -> list[GateResult]:
    """The gates of today's settings that a release does not pass, judged by the metrics that it was released by.

    What cannot be judged again (its reload, leaks, a person's yes) counts as it was then.

    Raises:
        IntegrityError: Its manifest or metrics are damaged.
    """
    manifest = read_manifest(release.directory)
    then = {gate["name"]: GateResult(**gate) for gate in manifest["gates"]}
    now = {result.name: result for result in evaluate_gates(read_metrics(release.directory), gates)}
    if gates.approval == "required" and APPROVAL not in then:
        text = "No person approved it: it was released before approval was required."
        now[APPROVAL] = GateResult(name=APPROVAL, passed=False, description=text, observed=None, threshold=None)
    return failed({**then, **now}.values())


def metric_values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The tuned and the base model's metrics and gains, under flat names: `tuned/emoji_test/label_accuracy`."""
    values: dict[str, float] = {}
    for entry, scored in metrics["entries"].items():
        for model, totals in scored["models"].items():
            values |= {f"{model}/{entry}/{name}": value for name, value in totals.items()}
        for gain, measured in scored["gains"].items():
            values |= {f"{gain}/{entry}/{name}": one["mean"] for name, one in measured.items()}
    return {name: float(value) for name, value in values.items() if value is not None}
