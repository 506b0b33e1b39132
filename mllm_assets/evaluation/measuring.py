"""What one model gives for each evaluation sample: how likely it finds the right answer, and what it says.

The loss is taken twice: with the sample's own images, and with those of another sample of the same entry. A model
that looks at the image is worse the second time.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_assets.artifacts import digest_json
from mllm_assets.data.sharegpt import Row, load_rows
from mllm_assets.evaluation.request import EvaluateRequest
from mllm_assets.evaluation.shuffling import shuffled_partners
from mllm_assets.inference.answerer import Answerer, Sampling, in_batches
from mllm_assets.inference.cached_images import use_cached_images
from mllm_assets.training.device import Device
from mllm_assets.training.encode import EncodedRow

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter

SHUFFLE_SEED = 42


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One row of an entry and its images' stand-ins; `partner_images` is None where there are none."""

    entry: str
    index: int
    row: Row
    partner_images: tuple[Path, ...] | None


def load_samples(spec: EvaluateRequest) -> list[Sample]:
    """Read the entries' rows and give each row with images a partner whose images stand in for its own."""
    samples = []
    for entry in spec.entries:
        rows = load_rows(spec.data_dir, entry, max_samples=spec.max_samples)
        partners = shuffled_partners([row.images for row in rows], seed=SHUFFLE_SEED)
        samples += [
            Sample(entry=entry, index=index, row=row, partner_images=None if p is None else tuple(rows[p].images))
            for index, (row, p) in enumerate(zip(rows, partners, strict=True))
        ]
    return samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one model gave, by the sample's position as text, so that it passes through JSON as it is.

    Attributes:
        losses: Loss in nats and number of supervised tokens.
        shuffled_losses: The same with the partner's images, of samples that have one.
        answers: Text, number of tokens, and seconds.
    """

    losses: dict[str, tuple[float, int]]
    shuffled_losses: dict[str, tuple[float, int]]
    answers: dict[str, tuple[str, int, float]]

    @classmethod
    def together(cls, parts: Sequence[dict[str, Any]]) -> "Measured":
        """Join what the parts of one evaluation gave."""
        return cls(
            **{name: {key: value for part in parts for key, value in part[name].items()} for name in cls.__slots__}
        )


def measure(
    model: str,
    directory: Path,
    samples: Sequence[Sample],
    spec: EvaluateRequest,
    device: Device,
    reporter: "Reporter",
) -> Measured:
    """Score and answer every sample with one model, or those in the batches of `spec.part`."""
    answerer = Answerer(
        directory,
        device=device.kind,
        system=spec.system,
        cutoff_len=spec.cutoff_len,
        image_max_pixels=spec.image_max_pixels,
        image_min_pixels=spec.image_min_pixels,
        template=spec.template,
        enable_thinking=spec.enable_thinking,
    )
    encoded = [answerer.encoder.encode(sample.row) for sample in samples]
    paired = [index for index, sample in enumerate(samples) if sample.partner_images is not None]
    # encoded again: an image of another size may take another number of tokens
    swapped = [
        answerer.encoder.encode(replace(samples[index].row, images=samples[index].partner_images)) for index in paired
    ]
    prompts = [answerer.encoder.encode_prompt(sample.row) for sample in samples]

    if spec.features_root is not None and spec.recipe is not None:
        use_cached_images(answerer, prompts, spec.features_root, spec.recipe, device, reporter)
    part = spec.part or (0, 1)
    num_rows = (len(encoded) + len(swapped) + len(prompts)) // part[1]
    progress = _Progress(reporter, f"evaluate {model} model", num_rows)

    def answer(rows: Sequence[EncodedRow]) -> Sequence[Any]:
        # a seed of the batch's own: the same answers however many workers share the batches
        seed = int(digest_json([spec.seed, [row.id for row in rows]])[:12], 16)
        sampling = Sampling(do_sample=spec.do_sample, temperature=spec.temperature, top_p=spec.top_p, seed=seed)
        return answerer.answers(rows, max_new_tokens=spec.max_new_tokens, sampling=sampling)

    losses = progress.follow(in_batches(encoded, spec.batch_size, answerer.losses, part=part))
    shuffled = progress.follow(in_batches(swapped, spec.batch_size, answerer.losses, part=part))
    answers = progress.follow(in_batches(prompts, spec.batch_size, answer, part=part))
    return Measured(
        losses={str(index): value for index, value in losses},
        shuffled_losses={str(paired[i]): value for i, value in shuffled},
        answers={str(index): (said.text, said.num_tokens, said.latency_s) for index, said in answers},
    )


class _Progress:
    """Counts finished rows over several passes."""

    def __init__(self, reporter: "Reporter", stage: str, total: int) -> None:
        self._reporter, self._stage, self._total, self._done = reporter, stage, total, 0
        self._started = time.perf_counter()

    def follow(self, batches: Iterator[tuple[list[int], Sequence[Any]]]) -> Iterator[tuple[int, Any]]:
        """Yield (position, value) of every row, telling the reporter after each batch."""
        for positions, values in batches:
            self._done += len(positions)
            rows_per_s = self._done / max(time.perf_counter() - self._started, 1e-9)
            self._reporter.progress(self._stage, self._done, self._total, rows_per_s=round(rows_per_s, 1))
            yield from zip(positions, values, strict=True)
