"""Record what LLaMA-Factory makes of rows with videos: token ids, labels, grids, times and some pixels.

    python -m tests.golden.record_videos PYTHON_OF_AN_ENVIRONMENT_WITH_LLAMAFACTORY_0.9.5

builds the clips and the tiny models with this environment, where PyAV is installed, runs itself with the other one on
them, and writes tests/golden/videos. The other one needs PyAV and torchvision.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("videos")
# name, frames, frames a second, size in pixels: the first needs no resizing, the second no even number of frames
CLIPS = [("small.mp4", 30, 10, (48, 32)), ("large.mp4", 14, 4, (160, 120))]
ROWS: list[dict[str, Any]] = [
    {"turns": ["<video>What moves?", "A square."], "videos": ["small.mp4"]},
    {"turns": ["<video>What moves?", "A square."], "videos": ["small.mp4"], "keys": {"video_fps": 1.0}},
    {"turns": ["<video>What moves?", "A square."], "videos": ["small.mp4"], "keys": {"video_maxlen": 4}},
    {"turns": ["What is in <video> here?", "A square.", "Sure?", "Yes."], "videos": ["large.mp4"]},
    {"turns": ["<video>What?", "A square."], "videos": ["large.mp4"], "keys": {"video_max_pixels": 4096}},
    {"turns": ["<image>Is this in <video>?", "No."], "videos": ["small.mp4"], "images": ["a.png"]},
    {"turns": ["Compare <video> and <video>", "Alike."], "videos": ["small.mp4", "large.mp4"]},
]  # fmt: skip
# Qwen3-VL's plugin takes the number of frames from the first video of a row, and the times by the message's number
TEMPLATES = {
    "qwen2_5_vl": ("qwen2_vl", ROWS), "qwen3_vl": ("qwen3_vl_nothink", ROWS[:-1]),
    "qwen3_5": ("qwen3_5_nothink", ROWS[:-1]),
}  # fmt: skip
NUM_PIXELS = 96  # values that are kept, of the first patches


def main() -> None:
    from PIL import Image

    from tests import clips, tiny_families

    FOLDER.mkdir(exist_ok=True)
    for name, num_frames, fps, size in CLIPS:
        if not (FOLDER / name).exists():  # another version of PyAV writes other bytes
            clips.write_clip(FOLDER / name, num_frames=num_frames, fps=fps, size=size)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        Image.new("RGB", (80, 60), (40, 90, 200)).save(root / "a.png")
        for model_type in TEMPLATES:
            (root / model_type).mkdir()
            tiny_families.build(model_type, root / model_type)
        command = [sys.argv[1], __file__, "--there", str(root)]
        subprocess.run(command, check=True, env={"PATH": "/usr/bin:/bin", "DISABLE_VERSION_CHECK": "1"})
        (FOLDER / "llamafactory.json").write_bytes((root / "videos.json").read_bytes())


def record_there(root: Path) -> None:
    """Run inside LLaMA-Factory's environment."""
    from importlib.metadata import version

    from tests.golden.record_families import without_torchaudio

    without_torchaudio()
    recorded: dict[str, Any] = {name: version(name) for name in ("llamafactory", "transformers", "av")}
    for model_type, (template, rows) in TEMPLATES.items():
        recorded[template] = [_row(root, model_type, template, row) for row in rows]
    (root / "videos.json").write_text(json.dumps(recorded, sort_keys=True) + "\n")


def _row(root: Path, model_type: str, template_name: str, row: dict[str, Any]) -> dict[str, Any]:
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(root / model_type)
    for key, value in row.get("keys", {}).items():
        setattr(processor, key, value)
    arguments = DataArguments(template=template_name, cutoff_len=4096)
    template = get_template_and_fix_tokenizer(processor.tokenizer, arguments)
    encoder = SupervisedDatasetProcessor(template, processor.tokenizer, processor, arguments)
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(row["turns"])
    ]
    images = [str(root / name) for name in row.get("images", [])]
    videos = [str(FOLDER / name) for name in row["videos"]]
    input_ids, labels = encoder._encode_data_example(messages[:-1], messages[-1:], "", "", images, videos, [])
    made = template.mm_plugin.get_mm_inputs(
        images, videos, [], [len(images)], [len(videos)], [0], [input_ids], processor
    )
    kept = {"video_grid_thw": made["video_grid_thw"].tolist()}
    if "second_per_grid_ts" in made:
        kept["second_per_grid_ts"] = [float(value) for value in made["second_per_grid_ts"]]
    pixels = made["pixel_values_videos"].flatten()[:NUM_PIXELS].tolist()
    return {"input_ids": input_ids, "labels": labels, "pixels": [round(value, 5) for value in pixels], **kept}


if __name__ == "__main__":
    if sys.argv[1] == "--there":
        sys.path.insert(0, str(Path(__file__).parents[2]))
        record_there(Path(sys.argv[2]))
    else:
        main()
