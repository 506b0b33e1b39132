"""What a dataset's YAML says: frozen specs that check themselves and name the field that must change."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from mllm_assets.artifacts import slug
from mllm_assets.data.ingest.flags import PROBES
from mllm_assets.data.ingest.kinds import KINDS
from mllm_assets.data.ingest.split_spec import TEST, TRAIN, VAL, SplitSpec
from mllm_assets.data.ingest.templates import names_in
from mllm_assets.data.sharegpt.conversation import find_control_token
from mllm_assets.errors import RecipeError

OutputFormat = Literal["json", "jsonl", "parquet"]
Augmentation = Literal["flip", "crop", "color"]
Several = Literal["rows", "first", "most"]
SEVERAL, OUTPUT_FORMATS = get_args(Several), get_args(OutputFormat)
AUGMENTATIONS = get_args(Augmentation)
# larger images are not decoded, in a dataset (unless its YAML says otherwise) or in a question to a model
MAX_NAME_CHARS = 100  # a dataset's entries, folders and assets have longer names
MAX_IMAGE_BYTES = 50 * 2**20
MAX_PIXELS = 89_478_485  # Pillow's own decompression-bomb limit (Image.MAX_IMAGE_PIXELS)


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
class DecodeLimits:
    """Limits for decoding untrusted images; see `QualitySpec`."""

    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_IMAGE_BYTES
    max_frames: int = 1000
    max_decode_s: float = 10.0


DEFAULT_LIMITS = DecodeLimits()  # for pictures without a dataset's YAML: external entries, chats, requests


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """Where the samples come from and which columns hold what.

    Attributes:
        kind: A Hugging Face Hub dataset; files of rows (table: JSON, JSON lines, CSV, TSV, Parquet, Arrow, told by
            content); a folder of images with metadata files or captions in text files; COCO or VQA annotations;
            WebDataset tar files; a LLaMA-Factory folder with dataset_info.json.
        repo: Hub id, for example ethz/food101.
        revision: Branch, tag or commit; resolved to a commit and recorded.
        subset: Configuration of a Hub dataset that has several.
        split: Hub split to read; with val_split the training subfolder of an image folder, the word in the names of
            the training files, or the entry of a LLaMA-Factory folder (not needed where it has one only).
        val_split: Validation subfolder, entry, or word in the names of files of a source that is split already. The
            split is kept unchanged; images on both sides are a warning, and a release then needs allow_leakage.
        test_split: The same for test, which judges releases. Without it there is no test split.
        split_column: Column that says train, validation or test of each row, instead of split, val_split, test_split.
        path: File, folder or pattern such as shards/*.tar, or several; relative to the root, or absolute.
            package:emoji.parquet is the embedded dataset.
        media_dir: Folders that the images' paths are relative to, relative to the root or absolute. By default the
            folder of the file that names them. Images outside of these folders are not read, links included.
        image_column: Column of the images: bytes, a path, a data URL, base64, or a list of these.
        question_column: Column of the row's own question, {question} in prompts.
        caption_column: Column or JSON key of the caption; text files fill it too.
        label_column: Class label; names come from the dataset's features, of an image folder from its subfolders.
        messages_column: Column of conversations in any notation in use, instead of prompts and answer; several are put
            together in their order. Without any <image> in them, the images come before the first question.
        choices_column: Column of choices, {choices} in prompts, whose letter, or number from 0, the caption is; or a
            column for each choice.
        system_column: Column of the row's system message.
        history_column: Column of earlier questions and answers, a list of pairs.
        id_column: Column of the rows' own ids, by default id where there is one.
        text_columns: Further columns that are kept; those that prompts and answer name as {column} are anyway.
        several: Of several captions or answers in a row, rows makes each a row of its own, first takes the first, most
            the most frequent.
    """

    kind: str
    repo: str = ""
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    val_split: str | None = None
    test_split: str | None = None
    split_column: str | None = None
    path: str | tuple[str, ...] = ""
    media_dir: str | tuple[str, ...] = ()
    image_column: str = "image"
    question_column: str | None = None
    caption_column: str | None = "text"
    label_column: str | None = None
    messages_column: str | tuple[str, ...] | None = None
    choices_column: str | tuple[str, ...] | None = None
    system_column: str | None = None
    history_column: str | None = None
    id_column: str | None = None
    text_columns: tuple[str, ...] = ()
    several: Several = "rows"

    def __post_init__(self) -> None:
        _require_one_of("source.kind", self.kind, tuple(KINDS))
        _require_one_of("source.several", self.several, SEVERAL)
        kept = (*self.text_columns, *([self.split_column] if self.split_column else []))
        object.__setattr__(self, "text_columns", tuple(dict.fromkeys(kept)))
        for name in ("path", "media_dir", "messages_column", "choices_column"):
            if not isinstance(value := getattr(self, name), str | None):
                object.__setattr__(self, name, tuple(value))
        needed = "repo" if self.is_of_hub else "path"
        _require(
            bool(self.repo) if needed == "repo" else bool(self.paths) and all(self.paths),
            f"source.{needed} is empty, but a source of kind {self.kind!r} needs it. Add it to the dataset's YAML.",
        )
        _require(bool(self.image_column), "source.image_column is empty. Name the column that holds the images.")
        _require(
            self.test_split is None or self.val_split is not None,
            "source.test_split names the test part of a source that is split already. Name its val_split too.",
        )
        _require(
            self.split_column is None or self.val_split is None and KINDS[self.kind].has_sides
            and not KINDS[self.kind].reads_sides,
            "source.split_column is for rows of tables, annotations and tars, and takes the place of val_split. Remove "
            "one of them.",
        )  # fmt: skip
        _require(
            self.val_split is None or KINDS[self.kind].has_sides,
            f"source.val_split: a source of kind {self.kind!r} has no validation part of its own here. Remove it, and "
            "let `split` choose the validation samples.",
        )

    @property
    def is_split(self) -> bool:
        """Whether it has splits of its own."""
        return self.val_split is not None or self.split_column is not None

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def media_dirs(self) -> tuple[str, ...]:
        return ((self.media_dir,) if self.media_dir else ()) if isinstance(self.media_dir, str) else self.media_dir

    @property
    def messages_columns(self) -> tuple[str, ...]:
        columns = self.messages_column or ()
        return (columns,) if isinstance(columns, str) else columns

    @property
    def choices_columns(self) -> tuple[str, ...]:
        columns = self.choices_column or ()
        return (columns,) if isinstance(columns, str) else columns

    @property
    def is_of_hub(self) -> bool:
        return KINDS[self.kind].read is None

    @property
    def has_conversations(self) -> bool:
        """Whether the source's rows are conversations, so that no prompt or answer is rendered."""
        return self.messages_column is not None or KINDS[self.kind].holds_conversations


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSpec:
    """How the splits are written.

    Attributes:
        format: Format of the row files.
        image_prefix: Names images <prefix>_train_000000.png as the original guide does; by default they are named by
            content, so that each is on the disk once.
    """

    format: OutputFormat = "json"
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

    Attributes:
        min_edge_px: Images with a shorter edge are rejected.
        max_pixels: Larger images are rejected before they are decoded.
        max_image_bytes: Larger files are rejected before they are opened.
        max_frames: Animations of more frames are rejected.
        max_decode_s: CPU seconds after which decoding an image is cut.
        max_caption_chars: Longer captions are rejected.
        duplicate_distance_bits: Near-duplicates differ in at most so many of 64 bits of their perceptual hash.
        duplicate_color_distance: And their 4x4 thumbnails by at most so much, 0..255: the hash is colour-blind.
        max_dark_brightness: Flags image_dark where the 99th percentile of brightness, 0..1, is below it.
        max_light_headroom: Flags image_light where 1 - the 5th percentile of brightness is below it.
        max_low_information: Flags image_low_information where entropy / 10 is below it.
        max_blurry: Flags image_blurry where sharpness, 0..1, is below it.
        max_odd_aspect_ratio: Flags image_odd_aspect_ratio where the shorter edge over the longer one is below it.
        max_odd_size_iqr: Flags image_odd_size beyond so many interquartile ranges of the dataset's own sizes.
        reject_flags: Flags that reject, for example image_dark.
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
            "Unrelated images differ in about 32 bits; 4 is the default.",
        )
        object.__setattr__(self, "reject_flags", tuple(self.reject_flags))
        for flag in self.reject_flags:
            _require_one_of("quality.reject_flags", flag, tuple(PROBES))

    @property
    def decode_limits(self) -> DecodeLimits:
        return DecodeLimits(
            max_pixels=self.max_pixels,
            max_bytes=self.max_image_bytes,
            max_frames=self.max_frames,
            max_decode_s=self.max_decode_s,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """One dataset: source, questions, answer, splits, limits.

    `answer` and `prompts` are templates with `{caption}`, `{label}`, `{question}` and any `{column}`; a label's "_" is
    shown as a space. Prompts are used in turn. The `<image>` placeholder is put before each prompt, once per image.
    Where the source holds conversations, they are used unchanged; `system` is then for those without a system message.
    `augment` adds a changed copy of each training sample per operation; not of rows whose words name what the operation
    changes (a side, a place, writing, a box, a number of things, a colour), unless `augment_all_rows` has it as well.
    """

    name: str
    source: SourceSpec
    prompts: tuple[str, ...] = ()
    answer: str = "{caption}"
    system: str | None = None
    train_entry: str = ""
    val_entry: str = ""
    test_entry: str = ""
    split: SplitSpec = field(default_factory=SplitSpec)
    quality: QualitySpec = field(default_factory=QualitySpec)
    output: OutputSpec = field(default_factory=OutputSpec)
    augment: tuple[Augmentation, ...] = ()
    augment_all_rows: tuple[Augmentation, ...] = ()

    def __post_init__(self) -> None:
        _require(
            self.name == slug(self.name),
            f"name: {self.name!r} must be of lower-case letters, digits and '_'. Use {slug(self.name)!r}.",
        )
        _require(
            self.name != "images" and len(self.name) <= MAX_NAME_CHARS,
            f"name: {self.name[:40]!r} is the folder of all pictures, or longer than {MAX_NAME_CHARS} characters. Give "
            "the dataset another name.",
        )
        prompts = self.prompts or (("{question}",) if self.source.question_column else ())
        object.__setattr__(self, "prompts", _as_texts(prompts))
        if not self.source.has_conversations:
            self._require_question_and_answer()
            self._keep_named_columns()
        for name in ("augment", "augment_all_rows"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for operation in getattr(self, name):
                _require(
                    operation in AUGMENTATIONS,
                    f"Dataset {self.name!r}: {name} holds {operation!r}. Use {', '.join(AUGMENTATIONS)}.",
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
        object.__setattr__(self, "test_entry", self.test_entry or f"{self.name}_test")
        names = list(self.entries.values())
        _require(
            len(set(names)) == len(names),
            f"Dataset {self.name!r}: the entries of its splits are {', '.join(names)}. Give them different names.",
        )

    @property
    def entries(self) -> dict[str, str]:
        """Side -> its entry of `dataset_info.json`."""
        return {TRAIN: self.train_entry, VAL: self.val_entry, TEST: self.test_entry}

    @property
    def split_is_given(self) -> bool:
        """Whether the split is given, so that duplicates may be on both of its sides."""
        return self.split.strategy == "guide" or self.source.is_split

    def _require_question_and_answer(self) -> None:
        _require(bool(self.prompts), f"Dataset {self.name!r} has no prompts. Add at least one question to its YAML.")
        _require(
            bool(names_in(self.answer)),
            f"Dataset {self.name!r}: the answer {self.answer!r} holds neither {{caption}} nor {{label}} nor another "
            "column of the row, so every sample would have the same answer. Put one of them into it.",
        )
        for placeholder, column in (("{caption}", "caption_column"), ("{label}", "label_column")):
            _require(
                placeholder not in self.answer or getattr(self.source, column) is not None,
                f"Dataset {self.name!r}: the answer uses {placeholder}, but source.{column} is not set. "
                "Name the column.",
            )

    def _keep_named_columns(self) -> None:
        """Every `{name}` that is not a role of a column is a column, which the source then has to have."""
        source, used = self.source, names_in(self.answer, *self.prompts)
        roles = {"caption", "label"} | ({"question"} if source.question_column else set())
        roles |= {"choices"} if source.choices_column else set()
        columns = tuple(dict.fromkeys((*source.text_columns, *(name for name in used if name not in roles))))
        caption = source.caption_column
        if "caption" not in used and columns and caption == "text":  # the default, which nothing asks for
            caption = None
        if (columns, caption) != (source.text_columns, source.caption_column):
            object.__setattr__(self, "source", replace(source, text_columns=columns, caption_column=caption))


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
    return json.loads(json.dumps(asdict(spec)))
