"""Record what LLaMA-Factory makes of each family: token ids, labels, what goes with the pixels, what trains.

    python -m tests.golden.record_families PYTHON_OF_AN_ENVIRONMENT_WITH_LLAMAFACTORY_0.9.5

builds the tiny models with this environment, runs itself with the other one on them, and writes
tests/golden/families.json. torchaudio may be missing there: it is imported, and used for sound only.
"""

import importlib
import importlib.machinery
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("families.json")
# Sizes in pixels: landscape, tall, below Qwen's shortest side, above image_max_pixels, thin
SIZES = {"a.png": (80, 60), "b.png": (40, 120), "c.png": (20, 20), "d.png": (1000, 800), "e.png": (400, 30)}
ROWS: list[dict[str, Any]] = [
    {"system": None, "turns": ["<image>What is this?", "A red heart."], "images": ["a.png"]},
    {"system": "Answer in one word.",
     "turns": ["<image>What is this?", "A car.", "Which colour?", "Blue, it's blue."], "images": ["b.png"]},
    {"system": None, "turns": ["Compare <image> with <image>.", "Both smile.\n\nYes."], "images": ["c.png", "d.png"]},
    {"system": None, "turns": ["<image><image>Two?", "Two.", "Sure?", "Sure."], "images": ["e.png", "a.png"]},
    {"system": None, "turns": ["No picture: what is 1 + 1?", "2"], "images": []},
    {"system": None, "turns": ["And 2 + 2?", "{reasoning}4", "Sure?", "Yes."], "images": []},
]  # fmt: skip
# LLaMA-Factory's templates per tiny model; it has none for SmolVLM
TEMPLATES = {
    "gemma4": ["gemma4"],
    "gemma4_moe": [],
    "qwen2_vl": [],
    "qwen2_5_vl": ["qwen2_vl"],
    "qwen3_vl": ["qwen3_vl", "qwen3_vl_nothink"],
    "qwen3_vl_moe": [],
    "qwen3_5": ["qwen3_5", "qwen3_5_nothink"],
    "internvl": ["intern_vl", "intern_s1"],
    "llava": ["llava"],
    "paligemma": ["paligemma", "paligemma_chat"],
}
THOUGHT = "<think>\nTwice two.\n</think>\n\n"
REASONING = {"gemma4": "<|channel>thought\nTwice two.<channel|>", "qwen3_vl": THOUGHT, "qwen3_5": THOUGHT}
METHODS: dict[str, dict[str, Any]] = {
    "projector": {"finetuning_type": "full", "freeze_multi_modal_projector": False, "freeze_language_model": True},
    "language_model": {"finetuning_type": "full"},
    "everything": {
        "finetuning_type": "full", "freeze_multi_modal_projector": False, "freeze_vision_tower": False,
    },
    "last_layer": {
        "finetuning_type": "freeze", "freeze_trainable_layers": 1, "freeze_multi_modal_projector": False,
    },
    "lora": {"finetuning_type": "lora"},
    "lora_with_tower": {"finetuning_type": "lora", "freeze_vision_tower": False},
}  # fmt: skip


def turns_of(row: dict[str, Any], template: str) -> list[str]:
    """Return a row's questions and answers in turn, reasoning as the template writes it."""
    return [text.replace("{reasoning}", REASONING.get(template, "")) for text in row["turns"]]


def write_images(directory: Path) -> None:
    """Write the rows' images; their content does not matter."""
    from PIL import Image

    for index, (name, size) in enumerate(SIZES.items()):
        Image.new("RGB", size, (40 * index, 90, 200 - 40 * index)).save(directory / name)


def main() -> None:
    from tests import tiny_families

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root)
        for model_type in TEMPLATES:
            (root / model_type).mkdir()
            tiny_families.build(model_type, root / model_type)
        command = [sys.argv[1], __file__, "--there", str(root)]
        subprocess.run(command, check=True, env={"PATH": "/usr/bin:/bin", "DISABLE_VERSION_CHECK": "1"})
        GOLDEN.write_bytes((root / "families.json").read_bytes())


def record_there(root: Path) -> None:
    """Run inside LLaMA-Factory's environment."""
    without_torchaudio()
    from importlib.metadata import version

    for model_type in TEMPLATES:  # transformers 5.6 does not know the name of the towers' position embedding yet
        path = root / model_type / "config.json"
        config = json.loads(path.read_text())
        if config["vision_config"].get("rope_parameters", {}).get("rope_type") == "axial":
            del config["vision_config"]["rope_parameters"]
            path.write_text(json.dumps(config))
    recorded: dict[str, Any] = {
        "recorded_with": {name: version(name) for name in ("llamafactory", "transformers")},
        "rows": {},
        "trains": {model_type: _trains(root / model_type) for model_type in TEMPLATES},
    }
    for model_type, templates in TEMPLATES.items():
        for template in templates:
            for thinking in (True, None, False) if template in REASONING else (True,):
                name = template if thinking is True else f"{template}:enable_thinking={thinking}"
                recorded["rows"][name] = _rows(root, model_type, template, thinking)
    recorded["rows"]["intern_vl:crop_to_patches=True"] = _rows(root, "internvl", "intern_vl", True, crops=True)
    (root / "families.json").write_text(json.dumps(recorded, sort_keys=True, indent=None) + "\n")


def without_torchaudio() -> None:
    """Put an empty module in its place where it is missing."""
    if importlib.machinery.PathFinder.find_spec("torchaudio") is None:
        module = types.ModuleType("torchaudio")
        module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = module


def _rows(
    root: Path, model_type: str, template_name: str, thinking: bool | None, *, crops: bool = False
) -> list[dict[str, Any]]:
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / model_type, padding_side="right")
    processor = read_processor(root / model_type, tokenizer)
    processor.crop_to_patches = crops
    arguments = DataArguments(template=template_name, cutoff_len=2048, enable_thinking=thinking)
    template = get_template_and_fix_tokenizer(tokenizer, arguments)
    encoder = SupervisedDatasetProcessor(template, tokenizer, processor, arguments)
    rows = []
    for row in ROWS:
        messages = [
            {"role": "assistant" if index % 2 else "user", "content": text}
            for index, text in enumerate(turns_of(row, template_name))
        ]
        images = [str(root / name) for name in row["images"]]
        input_ids, labels = encoder._encode_data_example(
            messages[:-1], messages[-1:], row["system"] or "", "", images, [], []
        )
        made = template.mm_plugin.get_mm_inputs(images, [], [], [len(images)], [0], [0], [input_ids], processor)
        kept = {key: _plain(made[key]) for key in ("image_grid_thw", "token_type_ids", "mm_token_type_ids")
                if key in made and images}  # fmt: skip
        rows.append({"input_ids": input_ids, "labels": labels, **kept})
    return rows


def read_processor(directory: Path, tokenizer: Any) -> Any:
    """What LLaMA-Factory reads of a processor; whole ones of Gemma 4 and Qwen need torchvision."""
    config = json.loads((directory / "processor_config.json").read_text()) if (
        directory / "processor_config.json").is_file() else {}  # fmt: skip
    images = config.get("image_processor") or json.loads((directory / "preprocessor_config.json").read_text())
    kind = images["image_processor_type"].removesuffix("ImageProcessor")
    folder = {
        "CLIP": "clip",
        "Siglip": "siglip",
        "Qwen2VL": "qwen2_vl",
        "Gemma4": "gemma4",
        "Gemma3": "gemma3",
        "GotOcr2": "got_ocr2",
    }[kind]
    # the automatic class asks for torchvision
    module = importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}")
    image_processor = getattr(module, f"{kind}ImageProcessorPil")(**images)
    special = {name: getattr(tokenizer, name, None) for name in
               ("boi_token", "eoi_token", "image_token", "boa_token", "eoa_token", "audio_token")}  # fmt: skip
    llava = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
    read = {name: config[name] for name in llava if name in config}
    image_token_id = tokenizer.convert_tokens_to_ids("<|image|>")
    return types.SimpleNamespace(
        tokenizer=tokenizer, image_processor=image_processor, video_processor=image_processor, video_token="<|video|>",
        image_seq_length=config.get("image_seq_length", images.get("image_seq_length")),
        create_mm_token_type_ids=lambda rows: [[int(token == image_token_id) for token in row] for row in rows],
        **special, **read,
    )  # fmt: skip


def _trains(directory: Path) -> dict[str, Any]:
    from llamafactory.hparams import FinetuningArguments, ModelArguments
    from llamafactory.model.adapter import init_adapter
    from transformers import AutoConfig, AutoModelForImageTextToText

    found: dict[str, Any] = {}
    for name, values in METHODS.items():
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(directory))
        arguments = FinetuningArguments(stage="sft", **values)
        try:
            model = init_adapter(
                model.config, model, ModelArguments(model_name_or_path=str(directory)), arguments, True
            )
        except ValueError as error:  # PEFT 0.18 cannot wrap the linear layers of Gemma 4's tower
            found[name] = f"LLaMA-Factory fails: {str(error).split('(')[0]}"
            continue
        found[name] = sorted(n for n, parameter in model.named_parameters() if parameter.requires_grad)
    return found


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


if __name__ == "__main__":
    if sys.argv[1] == "--there":
        record_there(Path(sys.argv[2]))
    else:
        main()
