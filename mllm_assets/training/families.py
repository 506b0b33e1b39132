"""The model families that can be trained: where their parts lie, and which turn formats fit them.

The names of the parts are LLaMA-Factory's (0.9.5, `model/model_utils/visual.py`), because its freezing rules are
written in them; SmolVLM, which it does not have, is described in the same terms.
"""

from dataclasses import dataclass
from typing import Any, Literal

from mllm_assets.errors import ModelError, RecipeError
from mllm_assets.training.templates import TEMPLATES, Template


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model family.

    Attributes:
        name: For messages.
        model_type: `model_type` in config.json.
        templates: Turn formats that fit, the usual one first.
        example: A model of it on the Hub.
        processor: Class name of its processor.
        image_token: The token that stands for one row of image features.
        vision_keys: Fragments of the names of what `freeze_vision_tower` freezes.
        projector_keys: Fragments for `freeze_multi_modal_projector`.
        language_keys: Fragments for `freeze_language_model`.
        lora_conflict_keys: Fragments of the names of what LoRA cannot wrap.
        vision_layers_key: Name of the number of the tower's layers in its configuration.
        token_types: What tells the model which tokens are images: the key of the batch, and its meaning ("images": 1
            at image tokens; "text": 0 at leading image tokens and 1 after them).
        loads_whole_processor: Whether its processor needs no video part, which transformers has only with torchvision.
    """

    name: str
    model_type: str
    templates: tuple[str, ...]
    example: str
    processor: str
    image_token: str
    vision_keys: tuple[str, ...] = ("vision_tower",)
    projector_keys: tuple[str, ...] = ("multi_modal_projector",)
    language_keys: tuple[str, ...] = ("language_model", "lm_head")
    lora_conflict_keys: tuple[str, ...] = ()
    vision_layers_key: str = "num_hidden_layers"
    token_types: tuple[str, Literal["images", "text"]] | None = None
    loads_whole_processor: bool = True


_ALL = (
    Family(
        name="Gemma 3",
        model_type="gemma3",
        templates=("gemma3",),
        example="google/gemma-3-4b-it",
        processor="Gemma3Processor",
        image_token="<image_soft_token>",
        token_types=("token_type_ids", "images"),
    ),
    Family(
        name="Gemma 4",
        model_type="gemma4",
        templates=("gemma4", "gemma4n"),
        example="google/gemma-4-E4B-it",
        processor="Gemma4Processor",
        image_token="<|image|>",
        vision_keys=("vision_tower", "audio_tower"),
        projector_keys=("model.embed_vision", "model.embed_audio"),
        lora_conflict_keys=("per_layer_projection_norm",),
        token_types=("mm_token_type_ids", "images"),
        loads_whole_processor=False,
    ),
    Family(
        name="Qwen2.5-VL",
        model_type="qwen2_5_vl",
        templates=("qwen2_vl",),
        example="Qwen/Qwen2.5-VL-3B-Instruct",
        processor="Qwen2_5_VLProcessor",
        image_token="<|image_pad|>",
        vision_keys=("visual.patch_embed", "visual.blocks"),
        vision_layers_key="depth",
        projector_keys=("visual.merger",),
        lora_conflict_keys=("patch_embed",),
        token_types=("mm_token_type_ids", "images"),
        loads_whole_processor=False,
    ),
    Family(
        name="Qwen3-VL",
        model_type="qwen3_vl",
        templates=("qwen3_vl_nothink", "qwen3_vl"),
        example="Qwen/Qwen3-VL-4B-Instruct",
        processor="Qwen3VLProcessor",
        image_token="<|image_pad|>",
        vision_keys=("visual.pos_embed", "visual.patch_embed", "visual.blocks", "visual.deepstack_merger_list"),
        vision_layers_key="depth",
        projector_keys=("visual.merger",),
        lora_conflict_keys=("patch_embed",),
        token_types=("mm_token_type_ids", "images"),
        loads_whole_processor=False,
    ),
    Family(
        name="LLaVA",
        model_type="llava",
        templates=("llava",),
        example="llava-hf/llava-1.5-7b-hf",
        processor="LlavaProcessor",
        image_token="<image>",
    ),
    Family(
        name="SmolVLM",
        model_type="smolvlm",
        templates=("smolvlm",),
        example="HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        processor="SmolVLMProcessor",
        image_token="<image>",
        vision_keys=("vision_model",),
        projector_keys=("connector",),
        language_keys=("text_model", "lm_head"),
        loads_whole_processor=False,
    ),
    Family(
        name="PaliGemma",
        model_type="paligemma",
        templates=("paligemma", "paligemma_chat"),
        example="google/paligemma2-3b-pt-224",
        processor="PaliGemmaProcessor",
        image_token="<image>",
        token_types=("token_type_ids", "text"),
    ),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
_BY_PROCESSOR = {family.processor: family for family in _ALL}


def known_families() -> str:
    """Return the families in words, for messages: `Gemma 3 (gemma3), ...`."""
    return ", ".join(f"{family.name} ({family.model_type})" for family in _ALL)


def find_family(model_type: str | None, where: str) -> Family:
    """Return the family of a `model_type`.

    Raises:
        ModelError: It is none of the known ones. Lists them.
    """
    family = FAMILIES.get(model_type or "")
    if family is None:
        raise ModelError(
            f"{where} holds a model of type {model_type!r}: expected one of {known_families()}. "
            f"Use a model of one of these families with images, for example google/gemma-3-4b-it."
        )
    return family


def processor_family(processor: Any) -> Family:
    """Return the family whose processor this is.

    Raises:
        ModelError: It is of none, although the model's type may be, as with a LLaVA that has a Pixtral tower.
    """
    name = getattr(processor, "stands_for", type(processor).__name__)
    if name not in _BY_PROCESSOR:
        raise ModelError(
            f"The model's processor is a {name}: expected one of {', '.join(_BY_PROCESSOR)}. "
            f"Use a model of {known_families()} with its usual vision tower."
        )
    return _BY_PROCESSOR[name]


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


def find_template(name: str | None, family: Family) -> Template:
    """Return a turn format by name, the family's usual one where there is no name."""
    return TEMPLATES[name or family.templates[0]]
