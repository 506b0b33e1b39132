"""The models of an evaluation, one after another: what was trained goes into the base that is in memory already.

Base and tuned model share the weights that did not train. A finished run says which of its weight files are its base's
(`base_weights`), so only the others are read: 12 MB, where the projector of gemma-3-4b trained. Tokenizer and image
settings are the tuned model's own.
"""

from collections.abc import Mapping
from pathlib import Path

from mllm_assets.artifacts import is_complete, read_manifest
from mllm_assets.file_digests import FileDigests
from mllm_assets.inference.answerer import Answerer, free_memory
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.training.models.device import Device
from mllm_assets.training.models.load import weights_digest
from mllm_assets.training.models.load_parts import places_in, put_in
from mllm_assets.training.models.value_head import VALUE_HEAD_FILE


class InTurn:
    """Loads one model at a time, to be asked in the format of `turns`; `digests` remembers what was read."""

    def __init__(self, turns: TurnSettings, device: Device, digests: FileDigests) -> None:
        self._turns, self._device, self.digests = turns, device, digests
        self._asked: tuple[Path, Answerer] | None = None
        self._places: Mapping[str, Mapping[str, str]] | None = None

    def announce(self, directory: Path) -> None:
        """Find out how a model will be loaded; of files that are not read the digests count that their run recorded."""
        self._places, linked = self._find_places(directory)
        for name, digest in linked.items():
            self.digests.take(directory / name, digest)

    def load(self, directory: Path) -> Answerer:
        """Load the model that was announced; the one before cannot be asked any longer."""
        model, features = None, None
        if self._asked is not None and self._places is not None:
            before = self._asked[1]
            model, features = before.model, before.collator.features
            put_in(model, self._places, directory)
            self.digests.require_unchanged()
        self._asked = None  # one is in memory at a time
        if model is None:
            free_memory()  # where features are cached, some families' models refer to themselves
        answerer = Answerer(directory, self._turns, device=self._device.kind, digests=self.digests, model=model)
        if features is not None:
            answerer.answer_from(features)
        self._asked = directory, answerer
        return answerer

    def _find_places(self, directory: Path) -> tuple[Mapping[str, Mapping[str, str]] | None, dict[str, str]]:
        """Where each tensor that is not the base's goes, by file, and the digests of the files that are the base's."""
        run_dir = directory.parent
        if self._asked is None or directory.name != "model" or not is_complete(run_dir):
            return None, {}
        base_dir, base = self._asked
        manifest = read_manifest(run_dir)
        shared = manifest.get("base_weights") or {"linked": []}
        if not shared["linked"] or shared["digest"] != weights_digest(base_dir, self.digests.of):
            return None, {}
        written = {path.name for path in directory.glob("*.safetensors")} - {*shared["linked"], VALUE_HEAD_FILE}
        places = places_in(base.model, directory, written)
        if places is None:  # the tower trained, and its output is cached
            return None, {}
        files = manifest["files"]
        return places, {name: files[f"{directory.name}/{name}"]["sha256"] for name in shared["linked"]}
