"""What it takes to encode a row: CPU time, and memory that stays.

    python benchmarks/encode_rows.py [--rows 20000]

Rows of one 256-token picture in Gemma 3's turn format, with the tokenizer of the parity model. "captions": one of eight
questions and an answer of its own; "conversations": three turns of texts that no other row has, as in LLaVA's data.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from transformers import AutoTokenizer, Gemma3ImageProcessor, Gemma3Processor

from mllm_assets.data.sharegpt.rows import Message, Row
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.models.tiny import PROMPTS

TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "parity" / "model"
WORDS = "a red cat sits on the old chair near blue water while two birds fly over green trees and small houses".split()
NUM_IMAGE_TOKENS = 256  # gemma-3-4b's


def captions(count: int) -> Iterator[Row]:
    """One of a few questions, and an answer."""
    draw = random.Random(0)
    for index in range(count):
        turns = Message("user", f"<image>{draw.choice(PROMPTS)}"), Message("assistant", _text(draw, 8))
        yield Row(str(index), turns, (Path("images/1.png"),))


def conversations(count: int) -> Iterator[Row]:
    """Three turns of a row's own."""
    draw = random.Random(0)
    for index in range(count):
        turns = [Message("user", f"<image>\n{_text(draw, 12)}"), Message("assistant", _text(draw, 30))]
        for _ in range(2):
            turns += [Message("user", _text(draw, 12)), Message("assistant", _text(draw, 30))]
        yield Row(str(index), tuple(turns), (Path("images/1.png"),))


def _text(draw: random.Random, num_words: int) -> str:
    return " ".join(draw.choices(WORDS, k=num_words))


def main() -> None:
    """Print a line for each kind of rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    num_rows = parser.parse_args().rows
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(),
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        image_seq_length=NUM_IMAGE_TOKENS,
    )
    encoder = Encoder(processor, TurnSettings(template="gemma3", cutoff_len=4096))
    print("| rows | tokens a row | CPU us a row | KB a row |\n| --- | ---: | ---: | ---: |")
    for make in (captions, conversations):
        rows = list(make(num_rows))
        before, began_s = psutil.Process().memory_info().rss, time.process_time()
        encoded = [encoder.encode(row) for row in rows]
        used_s, held = time.process_time() - began_s, psutil.Process().memory_info().rss - before
        tokens = sum(len(row.input_ids) for row in encoded) / num_rows
        print(f"| {make.__name__} | {tokens:.0f} | {used_s / num_rows * 1e6:.0f} | {held / num_rows / 1024:.1f} |")


if __name__ == "__main__":
    main()
