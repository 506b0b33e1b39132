"""LLaMA-Factory's own example recipes, as a user would bring them."""

import json
import runpy
from pathlib import Path

PAGE = runpy.run_path(str(Path(__file__).parents[3] / "docs" / "hooks" / "examples.py"))
REFUSED = {
    "examples/megatron/qwen2_vl_full.yaml": "Megatron spreads one model over GPUs; here fsdp: true does.",
}


def test_every_example_with_pictures_is_read_or_told_what_to_write_instead() -> None:
    recorded = json.loads(PAGE["RECORDED"].read_text())
    verdicts = {name: PAGE["verdict"](values) for name, values in recorded.items()}
    assert {name for name, (is_read, _) in verdicts.items() if not is_read} == {*REFUSED}
    for name, expected in REFUSED.items():
        assert any(expected in note for note in verdicts[name][1])
    assert all(f"## {name}\n" in PAGE["examples"]() for name in recorded)
