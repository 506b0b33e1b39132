"""The model families that are described here, each with the names and formats in which it differs from the others.

Names of parts and turn formats are LLaMA-Factory's (0.9.5, `model/model_utils/visual.py` and `data/template.py`),
because its freezing rules and recipes are written in them. SmolVLM, which it does not have, is described in the same
terms, with its own chat template.
"""

from dataclasses import replace
from typing import Any

from mllm_assets.families.family import TEMPLATES, Family, register
from mllm_assets.families.image_slots import (
    BudgetSlots,
    GridSlots,
    PanAndScanSlots,
    PatchSlots,
    cut_patches,
    named_tiles,
    repeated_token,
    token_per_patch,
)
from mllm_assets.families.turn_format import (
    AUTO,
    GEMMA4_TURNS,
    INTERN_TURNS,
    QWEN2_TURNS,
    QWEN_THOUGHT,
    Template,
    gemma_turns,
    qwen_turns,
)
from mllm_assets.families.video_slots import GridVideos, TiledVideos, TimedVideos

_CUTS = "mllm_assets.training.caches.vision_cuts"
_PACKED = "mllm_assets.training.loop.packed_rows"
_QWEN3_TURNS = {"qwen3_vl_nothink": qwen_turns(), "qwen3_vl": qwen_turns(thought=QWEN_THOUGHT)}
_QWEN3_VISION = ("visual.pos_embed", "visual.patch_embed", "visual.blocks", "visual.deepstack_merger_list")


_PACKED_GRIDS = {"packed_masks": f"{_PACKED}:causal_masks", "packed_positions": f"{_PACKED}:grid_positions"}


def _qwen(**differences: Any) -> Family:
    return Family(
        image_token="<|image_pad|>",
        slots=GridSlots,
        video_token="<|video_pad|>",
        vision_layers_key="depth",
        projector_keys=("visual.merger",),
        lora_conflict_keys=("patch_embed",),
        token_types=("mm_token_type_ids", "images"),
        loads_whole_processor=False,
        **differences,
    )


for _entry in (
    Family(
        name="Gemma 3",
        model_type="gemma3",
        templates={"gemma3": gemma_turns(system="{content}\n\n")},
        example="google/gemma-3-4b-it",
        processor="Gemma3Processor",
        image_token="<image_soft_token>",
        crop_slots=PanAndScanSlots,
        token_types=("token_type_ids", "images"),
        overflows_in_fp16=True,
        sees_ahead=True,
        sees_each_alone=True,
        vision_cut=f"{_CUTS}:Gemma3Cut",
        transformers_since="4.57",
        packed_masks=f"{_PACKED}:gemma3_masks",
        caches_hidden_states=True,
    ),
    Family(
        name="Gemma 4",
        model_type="gemma4",
        templates={"gemma4": GEMMA4_TURNS, "gemma4n": GEMMA4_TURNS},  # they differ by audio only
        example="google/gemma-4-E4B-it",
        processor="Gemma4Processor",
        image_token="<|image|>",
        slots=BudgetSlots,
        vision_keys=("vision_tower", "audio_tower"),
        projector_keys=("model.embed_vision", "model.embed_audio"),
        lora_conflict_keys=("per_layer_projection_norm",),
        token_types=("mm_token_type_ids", "images"),
        sees_ahead=True,
        loads_whole_processor=False,
        vision_cut=f"{_CUTS}:Gemma4Cut",
        packed_masks=f"{_PACKED}:gemma4_masks",
        transformers_since="5.5",
    ),
    _qwen(
        name="Qwen2.5-VL",
        model_type="qwen2_5_vl",
        templates={"qwen2_vl": QWEN2_TURNS},
        example="Qwen/Qwen2.5-VL-3B-Instruct",
        processor="Qwen2_5_VLProcessor",
        video_slots=GridVideos,
        times_videos=True,
        vision_keys=("visual.patch_embed", "visual.blocks"),
        vision_cut=f"{_CUTS}:Qwen2Cut",
        **_PACKED_GRIDS,
        transformers_since="4.57",
    ),
    _qwen(
        name="Qwen2-VL",
        model_type="qwen2_vl",
        templates={"qwen2_vl": QWEN2_TURNS},
        example="Qwen/Qwen2-VL-2B-Instruct",
        processor="Qwen2VLProcessor",
        video_slots=GridVideos,
        vision_keys=("visual.patch_embed", "visual.blocks"),
        vision_cut=f"{_CUTS}:QwenCut",
        **_PACKED_GRIDS,
    ),
    _qwen(
        name="Qwen3-VL",
        model_type="qwen3_vl",
        templates=_QWEN3_TURNS,
        example="Qwen/Qwen3-VL-4B-Instruct",
        processor="Qwen3VLProcessor",
        video_slots=TimedVideos,
        vision_keys=_QWEN3_VISION,
        vision_cut=f"{_CUTS}:Qwen3Cut",
        **_PACKED_GRIDS,
        transformers_since="4.57",
    ),
    _qwen(
        name="Qwen3-VL MoE",
        model_type="qwen3_vl_moe",
        templates=_QWEN3_TURNS,
        example="Qwen/Qwen3-VL-30B-A3B-Instruct",
        processor="Qwen3VLProcessor",
        video_slots=TimedVideos,
        vision_keys=_QWEN3_VISION,
        vision_cut=f"{_CUTS}:Qwen3Cut",
        **_PACKED_GRIDS,
    ),
    _qwen(
        name="Qwen3.5",
        model_type="qwen3_5",
        templates={
            "qwen3_5_nothink": qwen_turns(tools="qwen3_5"),
            "qwen3_5": qwen_turns(thought=QWEN_THOUGHT, tools="qwen3_5"),
        },
        example="Qwen/Qwen3.5-4B",
        processor="Qwen3VLProcessor",
        video_slots=TimedVideos,
        vision_keys=("visual.pos_embed", "visual.patch_embed", "visual.blocks"),
        vision_cut=f"{_CUTS}:Qwen35Cut",
    ),
    Family(
        name="LLaVA",
        model_type="llava",
        templates={
            "llava": Template(
                user="USER: {content} ASSISTANT:",
                ends_with_eos=True,
                tools="default",
                default_system="A chat between a curious user and an artificial intelligence assistant. "
                "The assistant gives helpful, detailed, and polite answers to the user's questions.",
            )
        },
        example="llava-hf/llava-1.5-7b-hf",
        processor="LlavaProcessor",
        image_token="<image>",
        slots=token_per_patch,
        vision_cut=f"{_CUTS}:LlavaCut",
        packed_masks=f"{_PACKED}:causal_masks",
        transformers_since="4.57",
    ),
    Family(
        name="InternVL",
        model_type="internvl",
        templates={
            "intern_s1": INTERN_TURNS,
            "intern_vl": replace(
                INTERN_TURNS,
                default_system="你是书生·万象，英文名是InternVL，是由上海人工智能实验室、"
                "清华大学及多家合作单位联合开发的多模态大语言模型。",
            ),
        },
        example="OpenGVLab/InternVL3-1B-hf",
        processor="InternVLProcessor",
        image_token="<IMG_CONTEXT>",
        slots=PatchSlots,
        crop_slots=cut_patches,
        crop_key="crop_to_patches",
        loads_whole_processor=False,
        vision_cut=f"{_CUTS}:InternVLCut",
        packed_masks=f"{_PACKED}:causal_masks",
    ),
    Family(
        name="SmolVLM",
        model_type="smolvlm",
        templates={
            "smolvlm": Template(
                prefix="<|im_start|>",
                user="User: {content}<end_of_utterance>\nAssistant:",
                user_image_first="User:{content}<end_of_utterance>\nAssistant:",
                assistant=" {content}<end_of_utterance>\n",
                system="System: {content}<end_of_utterance>\n",
                stop="<end_of_utterance>",
                in_llamafactory=False,
            )
        },
        example="HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        processor="SmolVLMProcessor",
        image_token="<image>",
        slots=named_tiles,
        video_token="<image>",
        video_slots=TiledVideos,
        vision_keys=("vision_model",),
        projector_keys=("connector",),
        language_keys=("text_model", "lm_head"),
        loads_whole_processor=False,
        vision_cut=f"{_CUTS}:SmolVLMCut",
        packed_masks=f"{_PACKED}:causal_masks",
    ),
    Family(
        name="PaliGemma",
        model_type="paligemma",
        templates={
            "paligemma": Template(
                user="{content}\n",
                system_in_user=True,
                starts_with_bos=True,
                ends_with_eos=True,
                images_first=True,
                tools="default",
            ),
            "paligemma_chat": gemma_turns(system="{content}", images_first=True),
        },
        example="google/paligemma2-3b-pt-224",
        processor="PaliGemmaProcessor",
        image_token="<image>",
        slots=repeated_token,
        token_types=("token_type_ids", "answers"),
        sees_ahead=True,
        vision_cut=f"{_CUTS}:VisionCut",
    ),
):
    register(_entry)


TEMPLATES[AUTO] = Template(user="{content}", in_llamafactory=False)
