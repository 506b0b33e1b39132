"""The files of a release: those of the run's model and adapter, byte for byte, and what makes them usable elsewhere."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mllm_assets.artifacts import MANIFEST, write_json_atomic, write_text_atomic
from mllm_assets.errors import IntegrityError
from mllm_assets.families.family import TEMPLATES
from mllm_assets.file_digests import FileDigests
from mllm_assets.recipe.asking import VIDEO_KEYS, TurnSettings

ADAPTER = "adapter"
PARTS = {"model": "", ADAPTER: f"{ADAPTER}/"}  # folder of the run -> where it goes in the release
LLAMAFACTORY_FILE = "llamafactory_inference.yaml"
LLAMAFACTORY_ADAPTER_FILE = "llamafactory_adapter.yaml"
_LINK_ABOVE_BYTES = 1 << 20  # larger files (weights) share their blocks with the run's directory
_REPLACED = {"model/README.md", "adapter/README.md", "adapter/adapter_config.json"}
_LLAMAFACTORY_HEAD = """\
# For LLaMA-Factory, from the folder that holds releases/: llamafactory-cli chat {path}
# {what}
"""


def model_files(run_dir: Path, run: Mapping[str, Any]) -> dict[str, str]:
    """The digests of what is released, by path within the run.

    Raises:
        IntegrityError: The run holds no model.
    """
    names = [name for name in run["files"] if name.split("/")[0] in PARTS and Path(name).name != MANIFEST]
    if "model/config.json" not in names:
        raise IntegrityError(f"{run_dir} holds no model/config.json. Materialise the checkpoint again.")
    return {name: run["files"][name]["sha256"] for name in names}


def has_adapter(run: Mapping[str, Any]) -> bool:
    """Whether the run trained LoRA, so that its release holds the adapter next to the merged model."""
    return f"{ADAPTER}/adapter_config.json" in run["files"]


def copy_files(run_dir: Path, files: Mapping[str, str], staging: Path, digests: FileDigests) -> None:
    """Put the run's files into a release; the large ones are linked, because they never change again.

    A file with two names is read once: `digests` knows it by the second one too.

    Raises:
        IntegrityError: One is missing.
    """
    for name in files:
        source, target = run_dir / name, staging / released_name(name)
        if not source.is_file():
            raise IntegrityError(f"{source} is missing. Materialise the checkpoint again.")
        if name in ("model/README.md", "adapter/README.md"):
            continue  # left by a library; the card says it all
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.stat().st_size > _LINK_ABOVE_BYTES:
            digest = digests.link(source, target)
            if target.samefile(source):
                digests.take(target, digest)
        else:
            shutil.copyfile(source, target)


def require_same_bytes(run_dir: Path, files: Mapping[str, str], manifest: Mapping[str, Any]) -> None:
    """Compare what was copied with the digests of the run.

    Raises:
        IntegrityError: Names the file that differs.
    """
    for name in files.keys() - _REPLACED:
        if manifest["files"][released_name(name)]["sha256"] != files[name]:
            raise IntegrityError(f"{run_dir / name} does not match its digest. Materialise the checkpoint again.")


def name_base_model(staging: Path, base_model: Mapping[str, Any]) -> None:
    """Let a released adapter name its base model as others can find it, not by a folder of this machine."""
    path = staging / ADAPTER / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    hub_id = base_model.get("hub_id")
    config["base_model_name_or_path"] = hub_id or base_model["name"]
    config["revision"] = base_model.get("revision") if hub_id else None
    write_json_atomic(path, config)


def write_llamafactory(staging: Path, place: str, run: Mapping[str, Any], base_model: str) -> None:
    """Write what LLaMA-Factory needs to answer with the release, in its own keys.

    `place` is where the release will be, relative to the project's root, `base_model` the `model_name_or_path`.
    """
    spec = run["recipe"]
    if not TEMPLATES[spec["template"]].in_llamafactory:
        return
    common = {
        "template": spec["template"],
        "image_max_pixels": spec["image_max_pixels"],
        "infer_backend": "huggingface",
    }
    defaults = TurnSettings()
    common |= {n: spec[n] for n in VIDEO_KEYS if spec.get(n, getattr(defaults, n)) != getattr(defaults, n)}
    if spec.get("enable_thinking") is not None:
        common["enable_thinking"] = spec["enable_thinking"]
    merged = {"model_name_or_path": place, **common}
    _write_yaml(staging, place, LLAMAFACTORY_FILE, "The complete model.", merged)
    if has_adapter(run):
        adapter = {
            "model_name_or_path": base_model,
            "adapter_name_or_path": f"{place}/{ADAPTER}",
            "finetuning_type": spec.get("finetuning_type", "lora"),
            **common,
            "export_dir": f"outputs/merged_{Path(place).parent.name}",
        }
        what = "The adapter on its base model; `llamafactory-cli export` merges them into export_dir."
        _write_yaml(staging, place, LLAMAFACTORY_ADAPTER_FILE, what, adapter)


def released_name(name: str) -> str:
    """The path in the release of a file of the run."""
    part, _, rest = name.partition("/")
    return PARTS[part] + rest


def _write_yaml(staging: Path, place: str, name: str, what: str, values: Mapping[str, Any]) -> None:
    head = _LLAMAFACTORY_HEAD.format(path=f"{place}/{name}", what=what)
    write_text_atomic(staging / name, head + yaml.safe_dump(dict(values), sort_keys=False))
