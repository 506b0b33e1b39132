"""What a dataset's `defs.yaml` may say; `dg utils inspect-component` shows it."""

from typing import Literal

import dagster as dg
from pydantic import Field


class Source(dg.Model, dg.Resolvable):
    """Where the samples come from."""

    kind: Literal["huggingface", "parquet", "arrow", "image_folder", "webdataset", "llamafactory"] = Field(
        description="A Hugging Face Hub dataset; Parquet or Arrow files; a folder of images with metadata.jsonl or "
        "captions in text files; WebDataset tar files; a LLaMA-Factory folder with dataset_info.json."
    )
    repo: str = Field(default="", description="Hub id, for example ethz/food101.")
    revision: str | None = Field(default=None, description="Branch, tag or commit; resolved to a commit and recorded.")
    subset: str | None = Field(default=None, description="Configuration of a Hub dataset that has several.")
    split: str = Field(
        default="train",
        description="Hub split to read; with val_split the training subfolder of an image folder; the entry of a "
        "LLaMA-Factory folder (not needed where it has one only).",
    )
    val_split: str | None = Field(
        default=None,
        description="Validation subfolder or entry of a source that is split already (image_folder, llamafactory). "
        "The split is kept as it is; images on both sides are a warning, and a release then needs allow_leakage.",
    )
    path: str | list[str] = Field(
        default="",
        description="File, folder or pattern such as shards/*.tar, or several; relative to the root, or absolute. "
        "package:emoji.parquet is the embedded dataset.",
    )
    image_column: str = Field(default="image", description="Column of image bytes, one or a list (parquet, arrow).")
    caption_column: str | None = Field(
        default="text", description="Column or JSON key of the caption; text files fill it too."
    )
    label_column: str | None = Field(
        default=None,
        description="Class label; names come from the dataset's features, of an image folder from its subfolders.",
    )
    messages_column: str | None = Field(
        default=None,
        description="Column of whole conversations (role/content or from/value), in place of prompts and answer. "
        "Without any <image> in them, the images stand before the first question.",
    )


class Split(dg.Model, dg.Resolvable):
    """How many samples go where. Groups of near-duplicates stay together."""

    num_train: int = Field(default=500, description="Training samples; fewer in proportion where there are not enough.")
    num_val: int = Field(default=50, description="Validation samples.")
    seed: int = Field(default=42, description="Chooses which samples, and seeds the augmentations.")
    strategy: Literal["grouped", "guide"] = Field(
        default="grouped",
        description="grouped: no image or near-duplicate on both sides, stable when samples are added. guide: the "
        "original guide's shuffle, which reads the whole source and keeps duplicates wherever they fall; a release "
        "then needs allow_leakage.",
    )


class Output(dg.Model, dg.Resolvable):
    """How the splits are written."""

    format: Literal["json", "jsonl", "parquet"] = Field(default="json", description="Format of the row files.")
    image_prefix: str | None = Field(
        default=None,
        description="Names images <prefix>_train_000000.png as the original guide does; by default they are named by "
        "content, so that each is on the disk once.",
    )


class Quality(dg.Model, dg.Resolvable):
    """What rejects a sample, what only flags it, and what counts as a near-duplicate. Null keeps the default."""

    min_edge_px: int | None = None
    max_pixels: int | None = Field(default=None, description="Larger images are rejected before they are decoded.")
    max_image_bytes: int | None = Field(default=None, description="Larger files are rejected before they are opened.")
    max_frames: int | None = Field(default=None, description="Animations of more frames are rejected.")
    max_decode_s: float | None = Field(default=None, description="CPU seconds after which decoding an image is cut.")
    max_caption_chars: int | None = None
    duplicate_distance_bits: int | None = Field(
        default=None, description="Near-duplicates differ in at most so many of 64 bits of their perceptual hash."
    )
    duplicate_color_distance: float | None = Field(
        default=None, description="And their 4x4 thumbnails by at most so much, 0..255: the hash is colour-blind."
    )
    max_dark_brightness: float | None = None
    max_light_headroom: float | None = None
    max_low_information: float | None = None
    max_blurry: float | None = None
    max_odd_aspect_ratio: float | None = None
    max_odd_size_iqr: float | None = None
    reject_flags: list[str] | None = Field(default=None, description="Flags that reject, for example image_dark.")


class Entries(dg.Model, dg.Resolvable):
    """Names in `dataset_info.json`; by default `<dataset>_train` and `<dataset>_val`."""

    train: str = ""
    val: str = ""
