"""A loaded model that answers and scores encoded rows in batches, in the turn format it was trained on.

Shape suffixes: B rows, T tokens, S supervised positions of the row that has most, V vocabulary.
"""

import gc
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from mllm_assets.errors import DataError, MachineError
from mllm_assets.families.family import processor_family, require_template
from mllm_assets.file_digests import FileDigests
from mllm_assets.recipe.asking import Sampling, TurnSettings
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.recipe.vocabulary_keys import TOKENS_IN_TEXTS
from mllm_assets.training.caches import features, tower
from mllm_assets.training.encoding.collate import ImageFeatures, Padding
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.rendered import collator_of, encoder_of
from mllm_assets.training.encoding.row import IGNORE_INDEX, EncodedRow
from mllm_assets.training.loop.checkpoints import base_of, load_checkpoint
from mllm_assets.training.models import value_head
from mllm_assets.training.models.device import Device, Precision, out_of_memory_is_an_error, pick_precision
from mllm_assets.training.models.load import load_model, load_processor, quiet_libraries, with_pixels_as
from mllm_assets.training.runs.models import is_checkpoint

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

ASK_ELSEWHERE = "End other programs, or ask it on a larger device, or on the CPU: MLLM_ASSETS_DEVICE=cpu, --device cpu."
ASK_FEWER = (
    "Ask fewer at once: a lower batch_size of the recipe's evaluation, or --batch-size. With one row, ask for fewer "
    "tokens, or give fewer or smaller images."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A model's answer; `num_tokens` without the token that ends the turn, `latency_s` its share of the batch."""

    text: str
    num_tokens: int
    latency_s: float


@dataclass(frozen=True, slots=True)
class Drawn:
    """An answer that was drawn: its tokens, the one that ends its turn included where it `ended`, and its text."""

    ids: tuple[int, ...]
    text: str
    ended: bool


class Answerer:
    """Answers and scores rows with one model: of a Hugging Face directory, or of a run's `checkpoint-<step>`.

    `turns` are those of the training; reasoning is not part of an answer's text. `dtype` None keeps the directory's.
    With `digests` what changed since its digest was taken is refused. A `model` is one that was loaded already.

    Raises:
        ModelError: The directory holds no usable model.
        IntegrityError: A checkpoint is damaged, or does not fit the model that it was trained from.
        RecipeError: The template is of another family than the model.
    """

    def __init__(
        self,
        directory: Path,
        turns: TurnSettings = TurnSettings(),
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        digests: FileDigests | None = None,
        model: Any = None,
    ) -> None:
        quiet_libraries()
        is_delta = is_checkpoint(directory)
        # weights that were loaded already may be stored in any way
        processor = load_processor(base_of(directory) if is_delta else directory, of_plain_weights=model is None)
        if turns.template is not None:
            require_template(turns.template, processor_family(processor), str(directory))
        self.device = torch.device(device)
        with out_of_memory_is_an_error(f"loading {directory}", ASK_ELSEWHERE):
            if model is None:
                model = load_checkpoint(directory, digests=digests) if is_delta else load_model(directory, dtype=dtype)
            if digests is not None:
                digests.require_unchanged()
            cast = {"dtype": dtype} if is_delta and dtype is not None else {}  # a quantised model refuses any
            self.model: Any = model.to(device=self.device, **cast).eval()
        self.processor, self.tokenizer = processor, processor.tokenizer
        vocab_size = self.model.config.get_text_config().vocab_size
        self.encoder = encoder_of(processor)(processor, turns, num_embeddings=vocab_size)
        kind = collator_of(processor)
        self.collator = kind(processor, turns)
        self.asking_collator = kind(processor, turns, padding=Padding(side="left", multiple_of=1), select_logits=False)
        self.collator.digests = self.asking_collator.digests = digests
        self.stop_ids = self._find_stop_ids()
        # text models without a maximum length, such as those without attention, do not have it
        self.context_len: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def room_for_answer(self, num_prompt_tokens: int) -> int:
        """Return how many tokens an answer may have, so that it and the prompt are within the model's context.

        Raises:
            DataError: There is no room. Says how long the prompt is and how long it may be.
        """
        if self.context_len is None:
            return sys.maxsize
        if num_prompt_tokens >= self.context_len:
            raise DataError(
                f"The prompt has {num_prompt_tokens:,} tokens, its images included, and the model's context holds "
                f"{self.context_len:,} with the answer. Shorten the prompt, or give fewer images."
            )
        return self.context_len - num_prompt_tokens

    @torch.inference_mode()
    def losses(
        self, rows: Sequence[EncodedRow], *, batch: dict[str, torch.Tensor] | None = None
    ) -> list[tuple[float, int]]:
        """Mean loss in nats over each row's supervised tokens, and their number.

        `batch` is what `collator` made of the rows, where that was done elsewhere.

        Raises:
            DataError: An image is damaged. Names row and file.
            OutOfMemoryError: There is not enough memory for so many rows.
        """
        with out_of_memory_is_an_error(f"scoring {len(rows)} rows at once", ASK_FEWER):
            return self._losses(self.collator(rows) if batch is None else batch)

    def _losses(self, batch: dict[str, torch.Tensor]) -> list[tuple[float, int]]:
        learnt_BS = shifted_labels(batch) != IGNORE_INDEX
        losses_BS = token_losses(self.model, self._to_device(batch)).double().cpu()
        return [
            (float(row_S[learnt_S].mean()), int(learnt_S.sum()))
            for row_S, learnt_S in zip(losses_BS, learnt_BS.cpu(), strict=True)
        ]

    @torch.inference_mode()
    def pair_losses(
        self, rows: Sequence[EncodedRow], *, batch: dict[str, torch.Tensor] | None = None
    ) -> list[tuple[float, int]]:
        """The loss in nats of each pair, below log 2 where the preferred answer is ahead, and 1, as `losses`.

        A reward model's head says what is ahead, and of any other model what is likelier a token.
        """
        with out_of_memory_is_an_error(f"scoring {len(rows)} pairs at once", ASK_FEWER):
            there = self._to_device(self.collator(rows) if batch is None else batch)
            if hasattr(self.model, value_head.NAME):
                value_head.take_output_layer(self.model)
                scores_B = value_head.scores(self.model, self.model, there)
                value_head.put_back(self.model)
            else:
                counts_B = (there["shift_labels"] != IGNORE_INDEX).sum(dim=1)
                scores_B = -token_losses(self.model, there).sum(dim=1) / counts_B
            chosen_P, rejected_P = scores_B.double().chunk(2)
            return [(loss, 1) for loss in functional.softplus(rejected_P - chosen_P).tolist()]

    @torch.inference_mode()
    def answers(
        self,
        rows: Sequence[EncodedRow],
        sampling: Sampling,
        *,
        batch: dict[str, torch.Tensor] | None = None,
        streamer: BaseStreamer | None = None,
    ) -> list[Answer]:
        """Continue prompts (`Encoder.encode_prompt`) until the model ends its turn or `max_new_tokens` are reached.

        `batch` is what `asking_collator` made of the rows, where that was done elsewhere. A `streamer` is given the
        tokens of a single row as they come.

        Raises:
            DataError: An image is damaged. Names row and file.
            OutOfMemoryError: There is not enough memory for so many rows.
        """
        started = time.perf_counter()
        with out_of_memory_is_an_error(f"answering {len(rows)} rows at once", ASK_FEWER):
            generated = self._generated(self.asking_collator(rows) if batch is None else batch, sampling, streamer)
        latency_s = (time.perf_counter() - started) / len(rows)
        return [
            Answer(
                text=self._text(self._without_thought(ids)),
                num_tokens=len(ids),
                latency_s=latency_s,
            )
            for ids in generated
        ]

    @torch.no_grad()
    def drawn(self, rows: Sequence[EncodedRow], max_new_tokens: int, *, never: Sequence[int]) -> list[Drawn]:
        """Continue prompts by tokens as likely as the model finds them, but for those that `never` come.

        What the model's directory says of drawing (temperature, top-k, penalties) does not count.

        Raises:
            DataError: An image is damaged. Names row and file. Or a prompt leaves no room for an answer.
        """
        room = self.room_for_answer(max(len(row.input_ids) for row in rows))
        batch = self._to_device(self.asking_collator(rows))
        del batch["labels"]
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            output_BT = self.model.generate(
                **batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=min(max_new_tokens, room),
                use_cache=True,
                eos_token_id=self.stop_ids,
                pad_token_id=self.asking_collator.pad_id,
                suppress_tokens=[*never],
            )
        finally:
            self.model.generation_config = own
        found = []
        for ids in output_BT[:, batch["input_ids"].shape[1] :].tolist():
            told = self._until_stop(ids)
            ended = len(told) < len(ids)
            found.append(Drawn(tuple(ids[: len(told) + ended]), self._text(self._without_thought(told)), ended))
        return found

    @property
    def never_drawn(self) -> list[int]:
        """Special tokens that no answer has: an image's would stand for a picture that is not there."""
        thought = "".join(self.encoder.template.thought or ())
        allowed = {*self.stop_ids, *self.tokenizer.encode(thought, add_special_tokens=False)}
        allowed |= {*self.tokenizer.convert_tokens_to_ids(self.tokenizer.init_kwargs.get(TOKENS_IN_TEXTS) or [])}
        named = {*self.tokenizer.all_special_ids, self.encoder.image_token_id} - allowed
        num_tokens = self.model.config.get_text_config().vocab_size  # a tokenizer may know more
        return sorted(token for token in named if token < num_tokens)

    def _generated(
        self, batch: dict[str, torch.Tensor], sampling: Sampling, streamer: BaseStreamer | None
    ) -> list[list[int]]:
        batch = self._to_device(batch)
        del batch["labels"]
        options: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
        if sampling.do_sample:
            options = {"temperature": sampling.temperature, "top_p": sampling.top_p}
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
        output_BT = self.model.generate(
            **batch,
            **options,
            do_sample=sampling.do_sample,
            max_new_tokens=sampling.max_new_tokens,
            use_cache=True,
            eos_token_id=self.stop_ids,
            pad_token_id=self.asking_collator.pad_id,
            streamer=streamer,
        )
        return [self._until_stop(row) for row in output_BT[:, batch["input_ids"].shape[1] :].tolist()]

    def answer_from(self, features: ImageFeatures) -> None:
        """From now on read image features from a cache; the model must be prepared for it (`tower.install`)."""
        self.collator.features = self.asking_collator.features = features

    def _find_stop_ids(self) -> list[int]:
        configured = self.model.generation_config.eos_token_id
        ids = set(configured if isinstance(configured, list) else [configured] if configured is not None else [])
        stop = self.encoder.template.stop
        ids |= set(self.tokenizer.encode(stop, add_special_tokens=False)) if stop else {self.tokenizer.eos_token_id}
        return sorted(ids)

    def _without_thought(self, ids: list[int]) -> list[int]:
        """Return what comes after the reasoning, everything if there is none."""
        thought = self.encoder.template.thought
        closing = self.tokenizer.encode(thought[1].strip(), add_special_tokens=False) if thought else []
        ends = [
            end for end in range(len(closing), len(ids) + 1) if closing and ids[end - len(closing) : end] == closing
        ]
        return ids[ends[-1] :] if ends else ids

    def _text(self, ids: list[int]) -> str:
        """An answer's text: without the tokens that steer the model, and with those that a recipe added for texts."""
        wanted = self.tokenizer.init_kwargs.get(TOKENS_IN_TEXTS)
        if wanted:
            skipped = {*self.tokenizer.all_special_ids} - {*self.tokenizer.convert_tokens_to_ids(wanted)}
            ids = [id_ for id_ in ids if id_ not in skipped]
        return self.tokenizer.decode(ids, skip_special_tokens=not wanted).strip()

    def _until_stop(self, ids: list[int]) -> list[int]:
        end = next((index for index, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return ids[:end]

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
        return with_pixels_as(moved, self.model.dtype)


def token_losses(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Loss in nats of each supervised token, losses_BS, of a batch on the model's device."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "shift_labels")}
    logits_BVS = model(**inputs, use_cache=False).logits.float().transpose(1, 2)
    return functional.cross_entropy(logits_BVS, shifted_labels(batch), reduction="none")


def shifted_labels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Labels at the places of the logits that predict them; of a batch whose logits are selected it holds them."""
    if "shift_labels" in batch:
        return batch["shift_labels"]
    return functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)


def use_cached_images(
    answerer: Answerer,
    rows: EncodedRows,
    features_root: Path,
    spec: TrainSpec,
    device: Device,
    reporter: "Reporter",
    digests: FileDigests,
) -> Path | None:
    """Compute the missing features of the rows' images and use them instead of the tower, whose memory is freed.

    From now on the model answers only about these images. `features_root` is shared with training; `digests` are of
    images that were read before. Returns the folder of this tower's features, or None where no row has an image or the
    family's features are not cached.

    Raises:
        DataError: An image is damaged. Names row and file.
        IntegrityError: Cached features are not those of this tower.
    """
    if (
        not any(rows.counted(kind).any() for kind in ("images", "videos"))
        or processor_family(answerer.processor).vision_cut is None
    ):
        return None
    model = answerer.model
    precision = _precision_here(spec, device, model.dtype)
    directory = features_root / tower.tower_fingerprint(model, answerer.processor, spec, precision, device.kind)
    images = features.visuals_by_name(rows, digests)
    maker = features.FeatureMaker(
        model=model, collator=answerer.collator, precision=precision, num_workers=spec.dataloader_num_workers
    )
    store = features.FeatureStore(directory, digests)
    with out_of_memory_is_an_error("while the vision tower's output was cached", features.CURE):
        store.compute(maker, images, reporter)
        store.require_match(maker, rows)
    tower.install(model)
    answerer.answer_from(store)
    return directory


def _precision_here(spec: TrainSpec, device: Device, dtype: torch.dtype) -> Precision:
    """Return the precision of a training step, whose cached features serve here too, or the model's own.

    The model's directory may keep another dtype than the recipe trains in, and the device may be another one than it
    was trained on: without fp16, bf16 or FlashAttention.
    """
    own = Precision(weights=dtype, autocast=None)
    try:
        trained = pick_precision(spec, device)
    except MachineError:
        return own
    return trained if trained.weights == dtype else own


def free_memory() -> None:
    """Give back the memory of models that nothing holds any more, a GPU's too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
