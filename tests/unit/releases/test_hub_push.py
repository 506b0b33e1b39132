"""What would go to the Hub, before anything is sent."""

from pathlib import Path

import pytest

from mllm_assets.errors import GateError, RecipeError, SourceError
from mllm_assets.layout import Layout
from mllm_assets.releases.hub_push import PushSpec, files_to_push, push, require_current
from mllm_assets.releases.versions import roll_back
from tests.unit.releases.test_publish import make_run, release


def test_a_push_is_private_and_dry_unless_said_otherwise() -> None:
    spec = PushSpec(repo_id="me/pets")
    assert (spec.private, spec.dry_run, spec.revision) == (True, True, None)


@pytest.mark.parametrize("repo_id", ["pets", "me/pets/v1", "me/", "https://huggingface.co/me/pets", "../me/pets"])
def test_what_is_no_id_of_the_hub_is_refused(repo_id: str) -> None:
    with pytest.raises(RecipeError, match="push_to_hub.repo_id is .*: expected owner/name, for example me/my-model."):
        PushSpec(repo_id=repo_id)


def test_the_texts_of_the_data_and_the_manifest_stay_here(tmp_path: Path) -> None:
    made = release(make_run(tmp_path / "run"), tmp_path)
    names = list(files_to_push(made.directory))
    assert {"README.md", "model.safetensors", "adapter/adapter_model.safetensors", "config.json"} <= set(names)
    assert not {"predictions.parquet", "manifest.json"} & set(names)


def test_what_was_rolled_back_is_not_pushed(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    release(make_run(tmp_path / "one"), tmp_path)
    newest = release(make_run(tmp_path / "two", b"2"), tmp_path)
    require_current(layout, "pets", newest.directory)
    roll_back(layout, "pets")
    with pytest.raises(GateError, match="v2 of pets is not pushed: it is not the current release, which is v1. Make"):
        require_current(layout, "pets", newest.directory)


def test_without_a_token_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    made = release(make_run(tmp_path / "run"), tmp_path)
    with pytest.raises(SourceError, match="Pushing to me/pets needs a token. Set HF_TOKEN to one that may write"):
        push(made.directory, PushSpec(repo_id="me/pets", dry_run=False))
