"""What a dataset's YAML says: frozen specs that check themselves and name the field that must change."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mllm_assets.artifacts import slug
from mllm_assets.data.tokens import find_control_token
from mllm_assets.errors import RecipeError

SOURCE_KINDS = ("huggingface", "parquet", "arrow", "image_folder", "webdataset", "llamafactory")
STRATEGIES = ("grouped", "guide")
OUTPUT_FORMATS = ("json", "jsonl", "parquet")
# larger images are not decoded, neither of a dataset (unless its YAML says otherwise) nor of a question to a model
MAX_IMAGE_BYTES = 50 * 2**20
MAX_PIXELS = 89_478_485  # Pillow's own decompression-bomb limit (Image.MAX_IMAGE_PIXELS)
AUGMENTATIONS = ("flip", "crop", "color")
FLAGS = (
    "image_dark",
    "image_light",
    "image_low_information",
    "image_blurry",
    "image_odd_aspect_ratio",
    "image_odd_size",
    "image_grayscale",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


def _require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    _require(
        value in known,
        f"{name}: expected one of {', '.join(known)}, got {value!r}. Correct it in the dataset's YAML.",
    )


def _require_positive(spec: Any, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(
                f"{name}: expected a whole number of at least 1, got {value!r}. Change it in the dataset's YAML."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """Where the samples come from and which columns hold what.

    `path` (all kinds but huggingface) is a file, folder or pattern, or several files; relative to the project root,
    or absolute; `package:emoji.parquet` is the embedded dataset. `revision` (kind huggingface) is a branch, tag or
    commit; the commit it stands for is recorded. `subset` is a Hub dataset's configuration. `split` is the Hub's
    split, an image folder's subfolder or a LLaMA-Factory entry. With `val_split` the source is split already, and
    stays so.
    """

    kind: str
    repo: str = ""
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    val_split: str | None = None
    path: str | tuple[str, ...] = ""
    image_column: str = "image"
    caption_column: str | None = "text"
    label_column: str | None = None
    messages_column: str | None = None

    def __post_init__(self) -> None:
        _require_one_of("source.kind", self.kind, SOURCE_KINDS)
        if not isinstance(self.path, str):
            object.__setattr__(self, "path", tuple(self.path))
        needed = "repo" if self.kind == "huggingface" else "path"
        _require(
            bool(self.repo) if needed == "repo" else bool(self.paths) and all(self.paths),
            f"source.{needed} is empty, but a source of kind {self.kind!r} needs it. Add it to the dataset's YAML.",
        )
        _require(bool(self.image_column), "source.image_column is empty. Name the column that holds the images.")
        _require(
            self.val_split is None or self.kind in ("image_folder", "llamafactory"),
            f"source.val_split: a source of kind {self.kind!r} has no validation part of its own here. Remove it, and "
            "let `split` choose the validation samples.",
        )

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def has_conversations(self) -> bool:
        """Whether the source's rows are whole conversations, so that no prompt and no answer is put together."""
        return self.messages_column is not None or self.kind == "llamafactory"


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSpec:
    """How many samples train and how many validate; `seed` chooses which.

    The strategy "grouped" keeps near-duplicates on one side and stays stable when samples are added. "guide" is the
    shuffle of the original guide: the first samples train, the next validate, whatever they show.
    """

    num_train: int = 500
    num_val: int = 50
    seed: int = 42
    strategy: str = "grouped"

    def __post_init__(self) -> None:
        _require_positive(self, "num_train", "num_val")
        _require_one_of("split.strategy", self.strategy, STRATEGIES)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSpec:
    """How the splits are written. Without `image_prefix` images are named by their content."""

    format: str = "json"
    image_prefix: str | None = None

    def __post_init__(self) -> None:
        _require_one_of("output.format", self.format, OUTPUT_FORMATS)
        _require(
            self.image_prefix is None or self.image_prefix == slug(self.image_prefix),
            f"output.image_prefix: {self.image_prefix!r} must be of lower-case letters, digits and '_'.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class QualitySpec:
    """Limits that reject a sample, limits that only flag it, and what counts as a near-duplicate.

    The flag thresholds are cleanvision 0.3.7's defaults (`image_property_issue_manager.py`, `get_default_params`);
    they only mark rows, because they depend on the dataset: low information alone flags 85 of the 800 emoji.
    `reject_flags` turns chosen flags into rejects.
    """

    min_edge_px: int = 16  # below SigLIP's patch of 14 px there is nothing to see
    max_pixels: int = MAX_PIXELS
    max_image_bytes: int = MAX_IMAGE_BYTES
    max_frames: int = 1000  # of an animation, of which the first is used; counting them walks the whole file
    max_decode_s: float = 10.0  # CPU time for one image; 89 million pixels of PNG take about 2 s
    max_caption_chars: int = 8192  # LLaMA-Factory's cutoff_len of 2048 tokens at about 4 characters a token
    # Measured on 200 emoji: finds 98.5 % of JPEG copies (quality 50), 99.5 % at half the size, 100 % at twice it;
    # colours of such copies differ by at most 2.5, those of a blue and a brown heart by 46.
    duplicate_distance_bits: int = 4
    duplicate_color_distance: float = 8.0  # mean absolute difference of a 4x4 RGB thumbnail, 0..255
    max_dark_brightness: float = 0.32
    max_light_headroom: float = 0.05
    max_low_information: float = 0.3
    max_blurry: float = 0.29
    max_odd_aspect_ratio: float = 0.35
    max_odd_size_iqr: float = 3.0  # interquartile ranges beyond the quartiles of the dataset's own sizes
    reject_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_positive(self, "min_edge_px", "max_pixels", "max_image_bytes", "max_frames", "max_caption_chars")
        _require(
            0 < self.max_decode_s < float("inf"),
            f"quality.max_decode_s: expected seconds above 0, got {self.max_decode_s!r}. 10 is the default.",
        )
        _require(
            0 <= self.duplicate_distance_bits <= 16,
            f"quality.duplicate_distance_bits: expected 0 to 16 of 64 bits, got {self.duplicate_distance_bits}. "
            "Unrelated images lie about 32 bits apart; 4 is the default.",
        )
        object.__setattr__(self, "reject_flags", tuple(self.reject_flags))
        for flag in self.reject_flags:
            _require_one_of("quality.reject_flags", flag, FLAGS)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """One dataset: source, questions, answer, splits, limits.

    `answer` is a template with `{caption}` and `{label}`; a label's "_" is shown as a space. Prompts are used in
    turn. The `<image>` placeholder is put before each prompt, once per image. Where the source holds conversations,
    they are taken as they are; `system` is then for those without a system message. `augment` adds a changed copy of
    each training sample per operation.
    """

    name: str
    source: SourceSpec
    prompts: tuple[str, ...] = ()
    answer: str = "{caption}"
    system: str | None = None
    train_entry: str = ""
    val_entry: str = ""
    split: SplitSpec = field(default_factory=SplitSpec)
    quality: QualitySpec = field(default_factory=QualitySpec)
    output: OutputSpec = field(default_factory=OutputSpec)
    augment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(
            self.name == slug(self.name),
            f"name: {self.name!r} must be of lower-case letters, digits and '_'. Use {slug(self.name)!r}.",
        )
        object.__setattr__(self, "prompts", _as_texts(self.prompts))
        if not self.source.has_conversations:
            self._require_question_and_answer()
        object.__setattr__(self, "augment", tuple(self.augment))
        for operation in self.augment:
            _require(
                operation in AUGMENTATIONS,
                f"Dataset {self.name!r}: augment holds {operation!r}. Use {', '.join(AUGMENTATIONS)}.",
            )
        for text in (*self.prompts, self.answer, self.system or ""):
            token = find_control_token(text)
            _require(
                token is None,
                f"Dataset {self.name!r}: {text!r} holds the control token {token!r}, which the chat template "
                "writes itself. Remove it.",
            )
        object.__setattr__(self, "train_entry", self.train_entry or f"{self.name}_train")
        object.__setattr__(self, "val_entry", self.val_entry or f"{self.name}_val")
        _require(
            self.train_entry != self.val_entry,
            f"Dataset {self.name!r}: the training and validation entries are both {self.train_entry!r}. "
            "Give them different names.",
        )

    @property
    def split_is_given(self) -> bool:
        """Whether the split is not ours to choose, so that duplicates may lie on both of its sides."""
        return self.split.strategy == "guide" or self.source.val_split is not None

    def _require_question_and_answer(self) -> None:
        _require(bool(self.prompts), f"Dataset {self.name!r} has no prompts. Give at least one question to its YAML.")
        _require(
            "{caption}" in self.answer or "{label}" in self.answer,
            f"Dataset {self.name!r}: the answer {self.answer!r} holds neither {{caption}} nor {{label}}, so every "
            "sample would have the same answer. Put one of them into it.",
        )
        for placeholder, column in (("{caption}", "caption_column"), ("{label}", "label_column")):
            _require(
                placeholder not in self.answer or getattr(self.source, column) is not None,
                f"Dataset {self.name!r}: the answer uses {placeholder}, but source.{column} is not set. "
                "Name the column.",
            )


def _as_texts(value: Sequence[str]) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    for index, text in enumerate(texts):
        _require(
            isinstance(text, str) and bool(text.strip()),
            f"prompts[{index}]: expected a text, got {text!r}. Correct or remove it.",
        )
    return texts


def as_json(spec: Any) -> dict[str, Any]:
    """A spec as JSON-able values, for manifests and digests."""
    values = {}
    for item in fields(spec):
        value = getattr(spec, item.name)
        if isinstance(value, SourceSpec | SplitSpec | QualitySpec | OutputSpec):
            value = as_json(value)
        values[item.name] = list(value) if isinstance(value, tuple) else value
    return values
