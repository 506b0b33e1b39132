"""A small ShareGPT directory with what the parity data lacks, drawn in code: the same pixels on every machine.

Read by the recording command (in LLaMA-Factory's environment) and by the tests, so it imports numpy and Pillow only.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# name -> (width, height, mode); above 768 x 768 pixels LLaMA-Factory shrinks, below 32 x 32 it enlarges
IMAGES = {
    "wide": (1600, 700, "RGB"),
    "tall": (500, 1500, "RGB"),
    "large_gray": (1100, 900, "L"),
    "gray": (70, 40, "L"),
    "gray_alpha": (64, 80, "LA"),
    "rgba": (90, 60, "RGBA"),
    "large_rgba": (1000, 1000, "RGBA"),
    "palette": (48, 64, "P"),
    "bilevel": (64, 64, "1"),
    "tiny": (20, 11, "RGB"),
    "square": (56, 56, "RGB"),
}
TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
WORDS = "face hand heart star moon tree fish bird house boat road rain snow fire stone leaf cup ball ring key".split()


def draw(name: str) -> Image.Image:
    """Waves of a frequency and a phase of each image's own, with detail at all scales: resizing shows in the loss."""
    width, height, mode = IMAGES[name]
    seed = sorted(IMAGES).index(name) + 1
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = [
        127.5 + 127.5 * np.sin((x * (seed + band) + y * (2 * seed - band)) / (3.0 + 2 * band) + seed * band)
        for band in range(1, 5)
    ]
    pixels = np.stack(channels, axis=-1).round().astype(np.uint8)
    if mode in ("RGB", "RGBA"):
        return Image.fromarray(np.ascontiguousarray(pixels[..., : len(mode)]), mode)
    if mode == "P":
        return Image.fromarray(np.ascontiguousarray(pixels[..., :3]), "RGB").quantize(16, dither=Image.Dither.NONE)
    if mode == "1":
        return Image.fromarray(np.ascontiguousarray(pixels[..., 0]), "L").point(lambda value: 255 * (value > 127), "1")
    return Image.fromarray(np.ascontiguousarray(pixels[..., : len(mode)]).squeeze(), mode)


def answer(index: int, num_words: int) -> str:
    return " ".join(WORDS[(index * 7 + k * (index % 5 + 1)) % len(WORDS)] for k in range(num_words))


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    messages = [{"role": roles[k % 2], "content": text} for k, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def rows() -> dict[str, list[dict[str, Any]]]:
    """The entries: name -> rows."""
    names = list(IMAGES)
    every_mode = [
        {"messages": turns("<image>What is shown?", answer(k, 3 + k % 4)), "images": [f"images/{name}.png"]}
        for k, name in enumerate(names)
    ]
    some_without_image = [
        {"messages": turns(f"Name {k} things.", answer(k, 2 + k % 5)), "images": []}
        if k % 3
        else {
            "messages": turns(f"<image>Name {k} things.", answer(k, 4)),
            "images": [f"images/{names[k % len(names)]}.png"],
        }
        for k in range(13)
    ]
    conversations = []
    for k in range(9):
        texts = ["Look: <image>what is it?", answer(k, 5)]
        for turn in range(k % 4):
            texts += [f"And part {turn} of it, in a few words?", answer(k + turn, 2 + 3 * turn)]
        images = [names[(2 * k) % len(names)]]
        if k % 4 == 3:
            texts[2] = "And this one? <image>"
            images.append(names[(2 * k + 1) % len(names)])
        system = "You answer in a few words." if k % 3 == 1 else None
        conversations.append(
            {"messages": turns(*texts, system=system), "images": [f"images/{name}.png" for name in images]}
        )
    one_image = [
        {"messages": turns(f"Word {k}? <image>", answer(3 * k, 1 + k % 3)), "images": ["images/square.png"]}
        for k in range(5)
    ]
    late_image = [
        {
            "messages": turns(
                f"Say {k} words.", answer(k, 6), "And more?", answer(k + 1, 4), "<image>And here?", answer(k + 2, 3 + k)
            ),
            "images": [f"images/{names[k]}.png"],
        }
        for k in range(6)
    ]
    return {
        "late_image": late_image,
        "every_mode": every_mode,
        "some_without_image": some_without_image,
        "conversations": conversations,
        "one_image": one_image,
    }


def write(directory: Path) -> None:
    """Write `images/`, a JSON file an entry and `dataset_info.json` below `directory`."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for name in IMAGES:
        draw(name).save(directory / "images" / f"{name}.png")
    info = {}
    for name, values in rows().items():
        (directory / f"{name}.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        columns = {"messages": "messages", "images": "images"}
        info[name] = {"file_name": f"{name}.json", "formatting": "sharegpt", "columns": columns, "tags": TAGS}
    (directory / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
