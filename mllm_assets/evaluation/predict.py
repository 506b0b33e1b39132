"""What the base and the tuned model say for each evaluation sample, and how likely they find the right answer.

The loss is taken twice: with the sample's own images, and with those of another sample of the same entry. A model
that looks at the image is worse the second time.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import torch

from mllm_assets.artifacts import digest_json, is_complete, read_manifest, staged_directory, write_manifest
from mllm_assets.data.sharegpt import Row, load_rows
from mllm_assets.evaluation.gallery import write_gallery
from mllm_assets.evaluation.shuffling import shuffled_partners
from mllm_assets.evaluation.table import PREDICTIONS_FILE, predictions_digest, to_table
from mllm_assets.inference.answerer import Answerer, Sampling, in_batches
from mllm_assets.inference.cached_images import use_cached_images
from mllm_assets.inference.generate import find_model
from mllm_assets.training.device import Device, pick_device
from mllm_assets.training.encode import IMAGE_PLACEHOLDER, EncodedRow
from mllm_assets.training.spec import TrainSpec

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter

SHUFFLE_SEED = 42


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRequest:
    """The request of `evaluate_task`, read."""

    recipe_name: str
    model_dir: Path
    base_model_dir: Path
    data_dir: Path
    entries: tuple[str, ...]
    directory: Path
    models: tuple[str, ...] = ("base", "tuned")
    max_samples: int | None = None
    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 42
    batch_size: int = 16
    features_root: Path | None = None
    recipe: TrainSpec | None = None
    system: str | None = None
    cutoff_len: int = 2048
    image_max_pixels: int = 768 * 768
    image_min_pixels: int = 32 * 32
    template: str | None = None
    enable_thinking: bool | None = True
    part: tuple[int, int] | None = None
    parts: tuple[dict[str, dict[str, Any]], ...] = ()
    device: str = "auto"
    num_threads: int | None = None

    @classmethod
    def parse(cls, request: dict[str, Any]) -> "EvaluateRequest":
        """Read the JSON form; what is absent takes its default."""
        known = {name: request[name] for name in cls.__dataclass_fields__ if name in request}
        accelerator = request.get("accelerator") or {}
        paths = {name: Path(known[name]) for name in ("model_dir", "base_model_dir", "data_dir", "directory")}
        return cls(
            **{
                **known,
                **paths,
                "entries": tuple(known["entries"]),
                "models": tuple(known.get("models") or ("base", "tuned")),
                "part": tuple(known["part"]) if known.get("part") else None,
                "parts": tuple(known.get("parts") or ()),
                "features_root": Path(root) if (root := known.get("features_root")) else None,
                "recipe": TrainSpec.from_dict(recipe) if (recipe := known.get("recipe")) else None,
                "device": accelerator.get("device") or "auto",
                "num_threads": accelerator.get("num_threads"),
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One row of an entry and its images' stand-ins; `partner_images` is None where there are none."""

    entry: str
    index: int
    row: Row
    partner_images: tuple[Path, ...] | None


def evaluate_task(request: dict[str, Any], reporter: "Reporter") -> dict[str, Any]:
    """Worker entry: write `predictions.parquet` and the galleries, and return the manifest.

    Args:
        request: `recipe_name`, `model_dir`, `base_model_dir`, `data_dir`, `entries`, `directory` (the target; a
            complete one is returned as it is) and optionally `models` (of "base" and "tuned", by default both),
            `max_samples` (per entry), `max_new_tokens`, `do_sample`, `temperature`, `top_p`,
            `seed`, `batch_size`, `system`, `cutoff_len`, `image_max_pixels`,
            `image_min_pixels`, `template`, `enable_thinking`, `features_root` and `recipe` (to answer from the vision
            tower's cached output, which training shares), `accelerator` (`device`, `num_threads`). With `part` (index,
            count) nothing is written: the result is what that part of the batches gave, by model. The request without
            it, with those results as `parts`, puts them together.
        reporter: Told after each batch.

    Raises:
        RecipeError: No such entry; names the nearest.
        DataError: A row cannot be used or an image is damaged. Names the row.
        ModelError: One of the models cannot be loaded.
        MachineError: The device asked for is not there.
    """
    spec = EvaluateRequest.parse(request)
    if is_complete(spec.directory):
        return read_manifest(spec.directory)
    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    started = time.perf_counter()
    samples = load_samples(spec)
    device = pick_device(spec.device)
    directories = {"base": spec.base_model_dir, "tuned": spec.model_dir}
    models = {name: directories[name] for name in spec.models}
    if not spec.parts:
        measured = {name: measure(name, find_model(path), samples, spec, device, reporter)
                    for name, path in models.items()}  # fmt: skip
    else:
        measured = {name: Measured.together([part[name] for part in spec.parts]) for name in models}
    if spec.part:
        return {name: asdict(some) for name, some in measured.items()}
    table = to_table([row for name, some in measured.items() for row in rows_of(name, some, samples, spec.data_dir)])
    with staged_directory(spec.directory) as staging:
        pq.write_table(table, staging / PREDICTIONS_FILE)
        write_gallery(staging, table, data_dir=spec.data_dir, title=spec.recipe_name)
        payload = {
            "recipe": spec.recipe_name,
            "digest": predictions_digest(table),
            "entries": {entry: sum(s.entry == entry for s in samples) for entry in spec.entries},
            "num_predictions": len(table),
            "max_new_tokens": spec.max_new_tokens,
            "batch_size": spec.batch_size,
            "device": asdict(device),
            **({"num_answers_by_worker": _num_answers(spec.parts)} if spec.parts else {}),
            "wall_s": round(time.perf_counter() - started, 2),
        }
        return write_manifest(staging, payload)


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


def rows_of(model: str, measured: Measured, samples: Sequence[Sample], data_dir: Path) -> list[dict[str, Any]]:
    """Return the table's rows of one model, in the samples' order."""
    data_dir, rows = data_dir.resolve(), []
    for index, sample in enumerate(samples):
        loss_nats, num_supervised_tokens = measured.losses[str(index)]
        text, num_answer_tokens, latency_s = measured.answers[str(index)]
        shuffled = measured.shuffled_losses.get(str(index))
        rows.append(
            {
                **_question(model, sample, data_dir),
                "answer": text,
                "loss_nats": loss_nats,
                "loss_shuffled_nats": shuffled[0] if shuffled else None,
                "num_supervised_tokens": num_supervised_tokens,
                "num_answer_tokens": num_answer_tokens,
                "latency_s": latency_s,
            }
        )
    return rows


def _num_answers(parts: Sequence[dict[str, dict[str, Any]]]) -> list[int]:
    return [sum(len(measured["answers"]) for measured in part.values()) for part in parts]


def _question(model: str, sample: Sample, data_dir: Path) -> dict[str, Any]:
    """The columns that say who was asked what, and what would have been right."""
    return {
        "model": model,
        "entry": sample.entry,
        "sample_id": sample.row.id,
        "row_index": sample.index,
        "images": [path.resolve().relative_to(data_dir).as_posix() for path in sample.row.images],
        "prompt": _last(sample.row, "user").replace(IMAGE_PLACEHOLDER, "").strip(),
        "reference": _last(sample.row, "assistant"),
        "label": sample.row.label,
    }


def _last(row: Row, role: str) -> str:
    return next(message.content for message in reversed(row.messages) if message.role == role)


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
