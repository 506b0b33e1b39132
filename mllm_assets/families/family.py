"""A model family: everything in which it differs from the others, as one object; the registry, and who fits whom.

Those that this package brings are in `described`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mllm_assets import plugins
from mllm_assets.errors import ModelError, RecipeError
from mllm_assets.families.image_slots import (
    ImageSlots,
    full_sequence,
)
from mllm_assets.families.turn_format import (
    AUTO,
    Template,
)
from mllm_assets.families.video_slots import VideoSlots

SUPPORTED = "5.23"  # the oldest transformers that this package runs with


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model family. Code that needs torch is named as `module:name` and imported by the worker.

    Attributes:
        name: For messages.
        model_type: `model_type` in config.json.
        templates: Turn formats that fit, by name, the usual one first.
        example: A model of it on the Hub.
        processor: Class name of its processor.
        image_token: The token that represents one row of image features.
        slots: What represents an image in the text, made from processor and image token.
        video_token: The token that represents one row of a video's features; None refuses rows with videos.
        times_videos: Whether the model is told how long a step in time of a video lasts.
        video_slots: What represents a video in the text, made from processor and video token.
        crop_slots: The same where parts of images are shown beside the whole; None refuses that.
        crop_key: The recipe's key that shows parts.
        vision_keys: Fragments of the names of what `freeze_vision_tower` freezes.
        projector_keys: Fragments for `freeze_multi_modal_projector`.
        language_keys: Fragments for `freeze_language_model`.
        lora_conflict_keys: Fragments of the names of what LoRA cannot wrap.
        vision_layers_key: Name of the number of the tower's layers in its configuration.
        token_types: What the model's mask depends on: the key of the batch, and its meaning ("images": 1 at image
            tokens; "answers": 0 in the prompt, which is seen in both directions, and 1 from the first answer on).
        overflows_in_fp16: Whether its activations are too large for float16 (transformers#36822).
        sees_ahead: Whether some tokens see what comes after them, which FlashAttention's kernels cannot compute.
        sees_each_alone: Whether the pixels of an image are of one size, whatever other images are in its batch.
        loads_whole_processor: Whether its processor needs no video part, which transformers has only with torchvision.
        vision_cut: Its `vision_cuts.VisionCut`, where the frozen tower's output is kept; None computes it at each step.
        packed_masks: What `neat_packing` masks attention with, of `packed_rows`; None refuses to pack rows.
        packed_positions: What makes the positions of packed rows where they are not those of the tokens in their row.
        caches_hidden_states: Whether what enters the lowest layer that trains is kept; needs `vision_cut`.
        is_described: Whether it is one of those here; of others the model's own files and modules say all.
        transformers_since: The oldest transformers that computes the same from the same files. 4.57 has other positions
            for SmolVLM's patches, and its logits of PaliGemma differ by up to 0.002.
    """

    name: str
    model_type: str
    templates: Mapping[str, Template]
    example: str
    processor: str
    image_token: str
    slots: Callable[[Any, str], ImageSlots] = full_sequence
    video_token: str | None = None
    video_slots: Callable[[Any, str], VideoSlots] | None = None
    times_videos: bool = False
    crop_slots: Callable[[Any, str], ImageSlots] | None = None
    crop_key: Literal["image_do_pan_and_scan", "crop_to_patches"] = "image_do_pan_and_scan"
    vision_keys: tuple[str, ...] = ("vision_tower",)
    projector_keys: tuple[str, ...] = ("multi_modal_projector",)
    language_keys: tuple[str, ...] = ("language_model", "lm_head")
    lora_conflict_keys: tuple[str, ...] = ()
    vision_layers_key: str = "num_hidden_layers"
    token_types: tuple[str, Literal["images", "answers"]] | None = None
    overflows_in_fp16: bool = False
    sees_ahead: bool = False
    sees_each_alone: bool = False
    loads_whole_processor: bool = True
    vision_cut: str | None = None
    packed_masks: str | None = None
    packed_positions: str | None = None
    caches_hidden_states: bool = False
    is_described: bool = True
    transformers_since: str = SUPPORTED

    @property
    def in_transformers_4(self) -> bool:
        return self.transformers_since.startswith("4.")


FAMILIES: dict[str, Family] = {}  # by `model_type`


# of all families; what `auto` writes is the chat template's
TEMPLATES: dict[str, Template] = {}


def register(family: Family) -> Family:
    """Add a model family.

    Raises:
        RecipeError: Another family has its `model_type`, or another turn format one of its names.
    """
    plugins.add(FAMILIES, family.model_type, family, "model family of type")
    for name, template in family.templates.items():
        plugins.add(TEMPLATES, name, template, "turn format")
    return family


def known_families() -> str:
    """Return the families in words, for messages: `Gemma 3 (gemma3), ...`."""
    return ", ".join(f"{family.name} ({family.model_type})" for family in FAMILIES.values())


def families_with_videos() -> str:
    """Return those that take videos, for messages."""
    return ", ".join(family.name for family in FAMILIES.values() if family.video_slots is not None)


def require_images(model_type: object, loadable: Collection[str], where: str) -> None:
    """Refuse a `model_type` that is of no family, and that the library does not load as a model of pictures and text.

    Raises:
        ModelError: Lists the families.
    """
    if model_type not in FAMILIES and model_type not in loadable:
        raise ModelError(
            f"{where} holds a model of type {model_type!r}: expected one of {known_families()}, or another one that "
            "transformers' AutoModelForImageTextToText loads. "
            "Use a model of one of these families with images, for example google/gemma-3-4b-it."
        )


def family_of(model_type: str) -> Family:
    """Return the family of a `model_type` that `require_images` let pass."""
    return FAMILIES.get(model_type) or Family(
        name=model_type,
        model_type=model_type,
        templates={AUTO: TEMPLATES[AUTO]},
        example="",
        processor="",
        image_token="",
        is_described=False,
    )


def note_on_own_files(family: Family) -> tuple[str, ...]:
    """What is said of a run of a family that is not described here."""
    if family.is_described:
        return ()
    return (
        f"{family.name} is no family that is described here: the model's own chat template, processor and loss are "
        "used. Pictures are processed anew for each batch, nothing is cached, and a row longer than cutoff_len is "
        "refused, not cut.",
    )


def processor_family(processor: Any) -> Family:
    """Return the family whose processor this is.

    Raises:
        ModelError: No family has it, although the model's type may be known, as for a LLaVA with a Pixtral tower.
    """
    if (own := getattr(processor, "family", None)) is not None:
        return own
    name = type(processor).__name__
    by_processor = {family.processor: family for family in FAMILIES.values()}
    if name not in by_processor:
        raise ModelError(
            f"The model's processor is a {name}: expected one of {', '.join(by_processor)}. "
            f"Use a model of {known_families()} with its usual vision tower."
        )
    return by_processor[name]


def require_template(template: str, family: Family, where: str) -> None:
    """Refuse a turn format of another family.

    Raises:
        RecipeError: Names the format, the model's family and what fits it.
    """
    if template not in family.templates:
        fitting = " or ".join(family.templates)
        raise RecipeError(
            f"template is {template!r}, and the model in {where} is {family.name} ({family.model_type}), whose turns "
            f"it does not fit. Set template: {fitting}, or name another model."
        )


def require_attention(flash_attn: str, family: Family) -> None:
    """Refuse kernels that would compute another attention than the family's.

    Raises:
        RecipeError: Names what computes it.
    """
    if flash_attn == "fa2" and not family.is_described:
        raise RecipeError(
            f"flash_attn is fa2, whose kernels let a token see only what is before it, and whether that is so in "
            f"{family.name} is not known here. Set flash_attn: auto."
        )
    if flash_attn == "fa2" and family.sees_ahead:
        raise RecipeError(
            f"flash_attn is fa2, whose kernels let a token see only what is before it, and in {family.name} the tokens "
            "of an image, or of a question, see each other. Set flash_attn: auto."
        )


def find_template(name: str | None, family: Family) -> Template:
    """Return a turn format by name; without a name, the family's usual one."""
    return TEMPLATES[name or next(iter(family.templates))]
