"""Releases in MLflow's registry, on a real database, and an alias that somebody moved there."""

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from mllm_assets.components.automation.registry import FOLLOW_JOB, FollowAlias, Followed, follow_job, registry_alias
from mllm_assets.components.resources import ProjectResource
from mllm_assets.errors import GateError, IntegrityError, RecipeError, SourceError
from mllm_assets.evaluation.gates import GateSpec
from mllm_assets.layout import Layout
from mllm_assets.releases.registry import DIGEST, REFUSED, VERSION, Registry, RegistrySpec
from mllm_assets.releases.versions import Release, current_release, roll_back
from mllm_assets.store.objects import Store
from tests.unit.releases.test_publish import make_run, release

pytestmark = [
    pytest.mark.not_fast,
    pytest.mark.skipif(
        importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed: pip install 'mllm-assets[mlflow]'"
    ),
]
ALIAS = "champion"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take seconds to make."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_registered_models()
    return path


@pytest.fixture
def registry(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    for variable in ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    made = Registry(Layout(tmp_path), "pets", RegistrySpec())
    database = Path(made.address.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True)
    shutil.copyfile(empty_database, database)
    return made


@pytest.fixture
def releases(tmp_path: Path) -> list[Release]:
    return [release(make_run(tmp_path / name, name.encode()), tmp_path) for name in ("one", "two")]


@pytest.fixture
def client(registry: Registry) -> Iterator:
    from mlflow import MlflowClient

    yield MlflowClient(registry.address)


def test_a_release_is_a_version_with_its_digest_its_metrics_and_the_alias_once(
    registry: Registry, releases: list[Release], client
) -> None:
    first = registry.register(releases[0])
    assert registry.register(releases[0]) == first, "made again, it is the same version"
    second = registry.register(releases[1])
    assert (first.number, second.number) == ("1", "2") and registry.aliased() == second
    version = client.get_model_version("pets", "2")
    assert version.tags[DIGEST] == releases[1].digest and version.tags[VERSION] == "v2"
    assert version.source == releases[1].directory.as_uri()
    run = client.get_run(version.run_id)
    assert run.info.run_name == "pets/v2" and run.info.status == "FINISHED"
    assert {"tuned/pets_val/loss", "base/pets_val/loss", "tuned_over_base/pets_val/loss"} <= run.data.metrics.keys()
    assert run.data.tags["mllm_assets.gate.beats_base_model"] == "passed"


def test_uploaded_a_version_holds_the_files(registry: Registry, releases: list[Release], client, tmp_path) -> None:
    uploading = replace(registry, spec=RegistrySpec(registered_model="pets of mine", upload=True))
    experiment = client.create_experiment("pets", artifact_location=(tmp_path / "artifacts").as_uri())
    version = uploading.register(releases[0])
    source = Path(client.get_model_version("pets of mine", version.number).source.removeprefix("file://"))
    assert (source / "model.safetensors").read_bytes() == b"one" and client.get_experiment(experiment)


def test_the_alias_makes_its_release_the_current_one(registry: Registry, releases: list[Release], client) -> None:
    for one in releases:
        registry.register(one)
    client.set_registered_model_alias("pets", ALIAS, "1")
    followed, _ = registry.follow(GateSpec())
    assert followed == releases[0] == current_release(registry.layout, "pets")


@pytest.mark.parametrize(
    ("gates", "reason"),
    [
        (GateSpec(min_loss_gain_nats=50.0), "beats_base_model: pets_val: the gain in loss over the base model is"),
        (GateSpec(approval="required"), "a_person_approved: No person approved it"),
    ],
)
def test_an_alias_on_a_release_whose_gates_do_not_hold_is_refused_and_the_version_says_why(
    registry: Registry, releases: list[Release], client, gates: GateSpec, reason: str
) -> None:
    for one in releases:
        registry.register(one)
    client.set_registered_model_alias("pets", ALIAS, "1")
    with pytest.raises(GateError, match=rf"(?s)names version 1, which does not become .* of pets: {reason}"):
        registry.follow(gates)
    assert current_release(registry.layout, "pets") == releases[1]
    assert client.get_model_version("pets", "1").tags[REFUSED].startswith(reason)
    registry.follow(GateSpec())
    assert REFUSED not in client.get_model_version("pets", "1").tags, "it holds now"


def test_an_alias_on_what_is_no_release_of_the_recipe_is_refused(
    registry: Registry, releases: list[Release], client, tmp_path: Path
) -> None:
    for one in releases:
        registry.register(one)
    client.create_model_version("pets", source="file:///somewhere", run_id=None)
    tags = {"mllm_assets.recipe": "pets", VERSION: "v1", DIGEST: "0" * 64}
    client.create_model_version("pets", source="file:///somewhere", run_id=None, tags=tags)
    client.create_model_version("pets", source="f", run_id=None, tags={**tags, VERSION: "v9"})
    client.create_model_version("pets", source="f", run_id=None, tags={**tags, "mllm_assets.recipe": "cars"})
    expected = ["not registered by this project", "v1 here holds another model", "has no release v9", "of cars"]
    for number, reason in enumerate(expected, start=3):
        client.set_registered_model_alias("pets", ALIAS, str(number))
        with pytest.raises(GateError, match=reason):
            registry.follow(GateSpec())
    (releases[0].directory / "config.json").chmod(0o644)
    (releases[0].directory / "config.json").write_text("{ }")
    client.set_registered_model_alias("pets", ALIAS, "1")
    with pytest.raises(IntegrityError, match=r"v1 is not what was released: config\.json"):
        registry.follow(GateSpec())
    assert current_release(registry.layout, "pets") == releases[1]


def test_the_sensor_launches_once_when_the_alias_moved_and_not_for_what_was_there_before(
    registry: Registry, releases: list[Release], client, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    followed = {"pets": Followed(RegistrySpec(), GateSpec())}
    sensor = registry_alias(followed, registry.layout)
    cursor: str | None = None

    def tick() -> dg.SensorResult:
        nonlocal cursor
        context = dg.build_sensor_context(cursor=cursor)
        result = sensor(context)
        assert isinstance(result, dg.SensorResult)
        cursor = result.cursor
        return result

    assert "no version has the alias champion" in str(tick().skip_reason)
    for one in releases:
        registry.register(one)
    assert "champion names v2, the current release" in str(tick().skip_reason)
    roll_back(registry.layout, "pets")
    assert "as before; the current release is v1. Materialise pets/mlflow_model" in str(tick().skip_reason)
    roll_back(registry.layout, "pets", "v2")
    client.set_registered_model_alias("pets", ALIAS, "1")
    (request,) = tick().run_requests or []
    assert request.tags["mllm_assets/reason"] == "champion was moved to models:/pets/1"
    assert not tick().run_requests
    with dg.instance_for_test() as instance:
        done = follow_job(followed).execute_in_process(
            run_config=dg.RunConfig(ops={FOLLOW_JOB: FollowAlias(recipe="pets")}),
            resources={"project": ProjectResource(root=str(registry.layout.root), store=store.as_uri())},
            instance=instance,
        )
        assert done.success
        records = instance.fetch_observations(dg.AssetKey(["pets", "released_model"]), limit=1).records
        assert "v1 is the current release now" in str(records[0].asset_observation)
    assert current_release(registry.layout, "pets") == releases[0]
    pointer = Store(store.as_uri(), registry.layout.root).pointer("releases/pets/current")
    assert pointer and pointer["version"] == "v1", "other machines follow"
    assert "champion names v1, the current release" in str(tick().skip_reason)


def test_a_registry_that_is_not_there_is_one_sentence_without_its_password(
    registry: Registry, releases: list[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SourceError, match="MLflow at http://.*127.0.0.1:9 did not do it") as caught:
        registry.register(releases[0])
    assert "hunter2" not in str(caught.value) and caught.value.__context__ is None


@pytest.mark.parametrize(
    "spec", [{"registered_model": "a/b"}, {"registered_model": "a' or 1"}, {"alias": "v2"}, {"alias": "latest"}]
)
def test_names_that_mlflow_keeps_or_refuses_are_refused_before(spec: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="mlflow_registry"):
        RegistrySpec(**spec)
