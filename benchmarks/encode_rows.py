"""What it takes to encode a row and to hold it: CPU time, memory, and bytes on disk.

    python -m benchmarks.encode_rows [--rows 20000]

Rows of one 256-token picture in Gemma 3's turn format, with the tokenizer of the parity model. "captions": one of eight
questions and an answer of its own; "conversations": three turns of texts that no other row has, as in LLaVA's data.
They are encoded into files as a run does it, and each is read once more in a random order.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from transformers import AutoTokenizer, Gemma3ImageProcessor, Gemma3Processor

from mllm_assets.data.sharegpt.rows import Message, Row
from mllm_assets.file_digests import FileDigests
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.encoding.row_files import Source, stored_rows
from mllm_assets.training.models.tiny import PROMPTS
from mllm_assets.worker.protocol import Reporter

TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "parity" / "model"
WORDS = "a red cat sits on the old chair near blue water while two birds fly over green trees and small houses".split()
NUM_IMAGE_TOKENS = 256  # gemma-3-4b's


def captions(count: int) -> Iterator[Row]:
    """One of a few questions, and an answer."""
    draw = random.Random(0)
    for index in range(count):
        turns = Message("user", f"<image>{draw.choice(PROMPTS)}"), Message("assistant", _text(draw, 8))
        yield Row(str(index), turns, (Path("/images/1.png"),))


def conversations(count: int) -> Iterator[Row]:
    """Three turns of a row's own."""
    draw = random.Random(0)
    for index in range(count):
        turns = [Message("user", f"<image>\n{_text(draw, 12)}"), Message("assistant", _text(draw, 30))]
        for _ in range(2):
            turns += [Message("user", _text(draw, 12)), Message("assistant", _text(draw, 30))]
        yield Row(str(index), tuple(turns), (Path("/images/1.png"),))


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
    print("| rows | tokens a row | CPU us a row | us to read one | KB a row in memory | on disk |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for make in (captions, conversations):
        rows = list(make(num_rows))
        source = Source(
            count=num_rows,
            rows=lambda rows=rows: rows,
            encode=encoder.encode,
            require_unchanged=lambda: None,
            folder=Path("/images"),
            image_token_id=encoder.image_token_id,
        )
        with tempfile.TemporaryDirectory() as folder:
            before, began_s = psutil.Process().memory_info().rss, time.process_time()
            encoded = stored_rows(Path(folder), source, FileDigests(), Reporter())
            used_s, held = time.process_time() - began_s, psutil.Process().memory_info().rss - before
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.arrow"))
            order = random.Random(0).sample(range(num_rows), num_rows)
            began_s = time.process_time()
            tokens = sum(len(encoded[index].input_ids) for index in order) / num_rows
            read_s = time.process_time() - began_s
        us = " | ".join(f"{seconds / num_rows * 1e6:.0f}" for seconds in (used_s, read_s))
        kb = " | ".join(f"{num_bytes / num_rows / 1024:.2f}" for num_bytes in (held, size))
        print(f"| {make.__name__} | {tokens:.0f} | {us} | {kb} |")


if __name__ == "__main__":
    main()
