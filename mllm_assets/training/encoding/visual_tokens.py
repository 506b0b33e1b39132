"""The tokens that stand for pictures and videos in a model's text, and what surrounds them."""

from typing import TYPE_CHECKING, Any, NoReturn

from mllm_assets.errors import DataError, ModelError, RecipeError
from mllm_assets.families.family import families_with_videos, processor_family
from mllm_assets.families.image_slots import ImageSlots
from mllm_assets.families.video_slots import VideoSlots
from mllm_assets.recipe.asking import TurnSettings

if TYPE_CHECKING:
    from mllm_assets.data.sharegpt.rows import Row


def image_slots(processor: Any, settings: TurnSettings) -> ImageSlots:
    """Return what represents a picture in the text.

    Raises:
        RecipeError: The model's family does not show parts of pictures.
    """
    family, keys = processor_family(processor), settings.crop_keys
    if not keys:
        return family.slots(processor, family.image_token)
    if family.crop_slots is None or keys != (family.crop_key,):
        shown = {
            "image_do_pan_and_scan": "Gemma 3 parts of long pictures",
            "crop_to_patches": "InternVL parts of pictures",
        }
        wrong = next(key for key in keys if family.crop_slots is None or key != family.crop_key)
        raise RecipeError(f"{wrong} shows {shown[wrong]}, and the model is {family.name}. Delete the line.")
    return family.crop_slots(processor, family.image_token)


def image_token_id(processor: Any) -> int:
    """Return the id of the token that represents an image's features.

    Raises:
        ModelError: The tokenizer does not have it as one token.
    """
    if not processor_family(processor).is_described:
        return processor.image_token_id
    token, tokenizer = processor_family(processor).image_token, processor.tokenizer
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(
            f"The tokenizer does not know the image token {token}, so it belongs to a model without images. "
            f"Use the tokenizer files of {processor_family(processor).example} or of a model made from it."
        )
    return ids[0]


def video_slots(processor: Any) -> VideoSlots | None:
    """What represents a video in the text; None where the family takes none."""
    family = processor_family(processor)
    return None if family.video_slots is None else family.video_slots(processor, str(family.video_token))


def video_token_id(processor: Any) -> int | None:
    """The id of the token that represents a video's features; None where the family, or the tokenizer, has none."""
    token = processor_family(processor).video_token
    ids = [] if token is None else processor.tokenizer.encode(token, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


def refuse_videos(row: "Row", processor: Any) -> NoReturn:
    """Raise a DataError for a row with videos, of which the model's family takes none."""
    raise DataError(
        f"Row {row.id} has videos, and of {processor_family(processor).name} only pictures are trained here. Train a "
        f"model that takes them ({families_with_videos()}), or show some frames as images."
    )
