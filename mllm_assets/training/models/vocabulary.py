"""New tokens: the model that a run trains where its recipe adds some, written once, into the run's folder.

What is added, in which order, and how embeddings begin are LLaMA-Factory's (0.9.5, `model/patcher.py` and
`model/model_utils/embedding.py`). The draws follow from the recipe's `seed` alone. A described token begins at its own
row, where LLaMA-Factory counts back from the last row, which is another one's if the embedding had room.
"""

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mllm_assets.artifacts import is_complete, staged_directory, write_json_atomic, write_manifest
from mllm_assets.disk import no_space_is_an_error
from mllm_assets.errors import IntegrityError, ModelError
from mllm_assets.file_digests import FileDigests
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.recipe.vocabulary_keys import TOKENS_IN_TEXTS
from mllm_assets.training.models.load import load_config, load_model, load_processor, model_on_meta
from mllm_assets.training.models.older_transformers import add_old_spelling
from mllm_assets.training.models.publishing import ADDED_TOKENS, SENTENCEPIECE, save_model
from mllm_assets.training.models.weight_files import Sharing, share_with
from mllm_assets.training.runs.models import model_fingerprint
from mllm_assets.worker.protocol import is_first_rank

FOLDER = "extended_base"
MULTIPLE = 64  # of rows, where an embedding grows


@dataclass(frozen=True, kw_only=True, slots=True)
class Extension:
    """A processor with the recipe's new tokens in its tokenizer, and how many rows the embeddings need for it.

    `new_ids` are of the tokens that it did not have before; one that was part of words keeps its id and row.
    """

    processor: Any
    new_ids: dict[str, int]
    num_rows: int

    @classmethod
    def of(cls, base: Path, spec: TrainSpec) -> "Extension | None":
        """Add the tokens; None where the model has them, and rows for them, already."""
        processor = load_processor(base)
        tokenizer = processor.tokenizer
        known, before = set(tokenizer.get_vocab()), _split_off(tokenizer)
        tokenizer.add_tokens(list(spec.plain_tokens), special_tokens=False)
        tokenizer.add_tokens(list(spec.special_tokens), special_tokens=True)
        new_special = [token for token in dict.fromkeys(spec.special_tokens) if not before.get(token)]
        in_texts = [*tokenizer.init_kwargs.get(TOKENS_IN_TEXTS, ()), *new_special]
        if in_texts:
            tokenizer.init_kwargs[TOKENS_IN_TEXTS] = in_texts
        new_ids = {token: id_ for token, id_ in tokenizer.get_vocab().items() if token not in known}
        num_rows = load_config(base).get_text_config().vocab_size
        if len(tokenizer) > num_rows:
            num_rows = math.ceil(len(tokenizer) / MULTIPLE) * MULTIPLE
        elif _split_off(tokenizer) == before:
            return None
        return cls(processor=processor, new_ids=new_ids, num_rows=num_rows)

    def resize(self, model: Any, spec: TrainSpec) -> list[str]:
        """Give a model of the base the rows, and return the names of the weights that are others now.

        Raises:
            ModelError: Its embeddings cannot grow.
        """
        num_before = model.get_input_embeddings().weight.shape[0]
        if self.num_rows > num_before and not isinstance(model.get_output_embeddings(), torch.nn.Linear):
            raise ModelError(
                f"The embeddings of a {model.config.model_type} model do not grow. Delete add_tokens, "
                "add_special_tokens, new_special_tokens_config and resize_vocab."
            )
        shapes = {name: p.shape for name, p in model.named_parameters()}
        if self.num_rows > num_before:
            model.resize_token_embeddings(self.num_rows, mean_resizing=False)
        ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        changed = {
            name: p
            for name, p in model.named_parameters()
            if p.shape != shapes[name] or any(p is weight for weight in ends)
        }
        draws = torch.Generator().manual_seed(spec.seed)
        for weight in changed.values():
            if not weight.is_meta:
                self._begin_rows(weight.data, num_before, draws, spec)
        return [*changed]

    def _begin_rows(self, weight_VH: torch.Tensor, num_before: int, draws: torch.Generator, spec: TrainSpec) -> None:
        """Write how new rows begin: the mean of those before with noise, or that of the tokens which describe one."""
        width, old_VH = weight_VH.shape[1], weight_VH[:num_before].float()

        def noise(num_rows: int) -> torch.Tensor:
            return torch.randn(num_rows, width, generator=draws) / math.sqrt(width)

        mean_H = old_VH.mean(dim=0)
        weight_VH[num_before:] = (mean_H + noise(len(weight_VH) - num_before)).to(weight_VH.dtype)
        for row, ids in self._described(spec).items():
            begun_H = old_VH[ids].mean(dim=0) if ids else mean_H
            if spec.init_special_tokens == "desc_init_w_noise":
                begun_H = begun_H + noise(1)[0]
            weight_VH[row] = begun_H.to(weight_VH.dtype)

    def _described(self, spec: TrainSpec) -> dict[int, list[int]]:
        """The ids of each new token's description, those of new tokens left out."""
        if spec.init_special_tokens == "noise_init":
            return {}
        encode, new = self.processor.tokenizer.encode, set(self.new_ids.values())
        texts = {self.new_ids[token]: text for token, text in spec.token_descriptions.items() if token in self.new_ids}
        return {row: [i for i in encode(text, add_special_tokens=False) if i not in new] for row, text in texts.items()}


def _split_off(tokenizer: Any) -> dict[str, bool]:
    """The tokens at which a text is split before the rest is read; whether each is special."""
    return {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}


def extended_base(
    base: Path, spec: TrainSpec, run_dir: Path, digests: FileDigests | None = None, kept: Path | None = None
) -> Path:
    """Return the directory of the model that a run trains: `base`, or that with the recipe's new tokens.

    The latter is below `run_dir`; one that is missing or damaged is written again, the same. `kept` is where frozen
    parts of weight files are kept for all runs.

    Raises:
        ModelError: The model cannot have more tokens.
        MachineError: The disk is full.
    """
    if not spec.changes_vocabulary or (extension := Extension.of(base, spec)) is None:
        return base
    directory, digests = run_dir / FOLDER, digests or FileDigests()
    if not is_first_rank():
        while not is_complete(directory):  # where the first rank fails, torchrun ends this one
            time.sleep(0.1)
        return directory
    if not _is_as_written(directory, digests):
        shutil.rmtree(directory, ignore_errors=True)
        model = load_model(base)
        num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        with (
            no_space_is_an_error(run_dir, "the model with its new tokens", num_bytes),
            staged_directory(directory) as staging,
        ):
            changed = extension.resize(model, spec)
            shared = share_with(base, model, Sharing(trained=changed, kept=kept, digests=digests))
            linked, own = save_model(model, extension.processor, staging, source=base, shared=shared), FileDigests()
            for name, digest in linked.items():
                own.take(staging / name, digest)
            _write_tokenizer(extension, staging)
            facts = {"of": model_fingerprint(base, digests), "new_tokens": extension.new_ids}
            write_manifest(staging, facts, digest=own.of)
    model_fingerprint(directory, digests)  # which know its files from now on
    return directory


def extended_shape(base: Path, spec: TrainSpec, directory: Path) -> Path:
    """As `extended_base`, but without weights, and written anew: what is needed to look at rows and sizes."""
    if not spec.changes_vocabulary or (extension := Extension.of(base, spec)) is None:
        return base
    model = model_on_meta(load_config(base))
    extension.resize(model, spec)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    model.config.save_pretrained(directory)
    extension.processor.save_pretrained(directory)
    _write_tokenizer(extension, directory)
    return directory


def _is_as_written(directory: Path, digests: FileDigests) -> bool:
    """Compare every byte; `digests` learn of a model that is as it was written only."""
    own = FileDigests()
    try:
        if not is_complete(directory) or not model_fingerprint(directory, own):
            return False
    except (IntegrityError, ModelError):
        return False
    digests.take_untouched(own.states())
    return True


def _write_tokenizer(extension: Extension, directory: Path) -> None:
    """Write the tokenizer with its new tokens over the base's files."""
    tokenizer = extension.processor.tokenizer
    tokenizer.save_pretrained(directory)
    add_old_spelling(directory, tokenizer)
    if (directory / SENTENCEPIECE).is_file():  # which stays as it was; llama.cpp's converter reads the others here
        path = directory / ADDED_TOKENS
        known = json.loads(path.read_bytes()) if path.is_file() else {}
        write_json_atomic(path, {**known, **extension.new_ids})
