"""A split that was given may hold duplicates: a warning in the data, and no release unless that is allowed."""

import json

import pytest
import yaml

from tests.integration.conftest import Project

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_the_guides_split_warns_trains_and_is_released_only_where_leakage_is_allowed(project: Project) -> None:
    defs = project.root / project.package / "defs"
    project.set_split(num_train=680, num_val=120, strategy="guide")
    project.set_defaults(gates={"min_loss_gain_nats": -100.0, "min_answer_gain": -2.0, "min_image_gain_nats": -100.0})
    project.write_recipe("given", max_steps=1, max_samples=8)
    run = project.materialize('key:"emoji/raw"+')
    output, _ = run.communicate(timeout=500)
    assert "splits_share_no_image" in output
    manifest = json.loads((project.layout.data / "emoji" / "manifest.json").read_text())
    assert manifest["spec"]["split"]["strategy"] == "guide"
    assert run.returncode == 1 and "given/eval_metrics: no_leakage" in output, output
    run = project.materialize('key:"given/released_model"')
    output, _ = run.communicate(timeout=500)
    assert run.returncode == 1, output
    assert "given is not released:" in output and "set `allow_leakage: true`" in output
    assert not project.layout.releases("given").exists()

    recipes = yaml.safe_load((defs / "recipes" / "defs.yaml").read_text())
    recipes["attributes"]["settings"] = [
        {"recipe": "given", **recipes["attributes"]["defaults"], "allow_leakage": True}
    ]
    (defs / "recipes" / "defs.yaml").write_text(yaml.safe_dump(recipes))
    project.made('key:"given/eval_metrics"+')
    card = (project.layout.releases("given") / "v1" / "README.md").read_text()
    assert "**These figures may say too much:**" in card
    assert project.metadata("given", "released_model")["leaks"]
