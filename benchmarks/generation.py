"""Generation as an evaluation does it against one question at a time, as a script with plain transformers does it.

    python benchmarks/generation.py [--rounds 3] [--vocabulary 8k]

Same model (that of `train_speed.py`), pictures and question, greedy, float32, one thread. "one by one": for each
picture the processor, the chat template and `model.generate` of transformers. "batched": `Answerer` in left-padded
batches from cached vision features; the features are there, as training leaves them, and the time to load the model
and make them is printed beside. A batch is 16 pictures; one by one only the first 8 of them (4 with the large
vocabulary) are asked, since a rate does not depend on their number, and their answers are compared. The two take
turns; figures are rates, medians over the rounds, and gains are their ratios. The model's weights are random, so that
it never ends its turn: both say as many tokens.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from speed_case import PROMPT, make_data, make_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.file_digests import FileDigests
from mllm_assets.inference.answerer import Answerer, use_cached_images
from mllm_assets.inference.batches import Pass, in_batches
from mllm_assets.recipe.asking import Sampling
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.models.device import pick_device
from mllm_assets.worker.protocol import Reporter

VOCABULARIES = {"8k": 8_192, "262k": 262_208}
NUM_ROWS = BATCH_SIZE = 16  # one whole batch
NUM_ONE_BY_ONE = {"8k": 8, "262k": 4}  # pictures that are asked one by one: each costs the same
NUM_NEW_TOKENS = (16, 64)
HEADER = "| vocabulary | new tokens | how | tokens/s | samples/s | gain | CPU gain | other answers |"


def one_by_one(model_dir: Path) -> Callable[[Sequence[Row], int], list[str]]:
    """Plain transformers, a picture at a time."""
    processor: Any = AutoProcessor.from_pretrained(model_dir)
    model: Any = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(rows: Sequence[Row], num_new_tokens: int) -> list[str]:
        said = []
        for row in rows:
            with Image.open(row.images[0]) as image:
                content = [{"type": "image", "image": image.convert("RGB")}, {"type": "text", "text": PROMPT}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            output = model.generate(**inputs, max_new_tokens=num_new_tokens, do_sample=False)
            new_ids = output[0][inputs["input_ids"].shape[1] :]
            assert len(new_ids) == num_new_tokens
            said.append(processor.decode(new_ids, skip_special_tokens=True).strip())
        return said

    return answer


def batched(model_dir: Path, rows: Sequence[Row], features_root: Path) -> Callable[[Sequence[Row], int], list[str]]:
    """This project's way, from cached features."""
    answerer = Answerer(model_dir, dtype=torch.float32)
    prompts = {row.id: answerer.encoder.encode_prompt(row) for row in rows}
    spec = TrainSpec(model_name_or_path="model", dataset="bench", template="gemma3", do_train=True)
    use_cached_images(
        answerer, EncodedRows.of(prompts.values()), features_root, spec, pick_device("cpu"), Reporter(), FileDigests()
    )

    def answer(rows: Sequence[Row], num_new_tokens: int) -> list[str]:
        said: dict[int, str] = {}
        encoded = EncodedRows.of(answerer.encoder.encode_prompt(row) for row in rows)
        sampling = Sampling(max_new_tokens=num_new_tokens)
        asked = Pass(
            name="answers", rows=encoded, collator=answerer.asking_collator, size=BATCH_SIZE,
            run=lambda some, batch: answerer.answers(some, sampling, batch=batch),
        )  # fmt: skip
        for _, positions, answers in in_batches([asked]):
            assert all(answer.num_tokens == num_new_tokens for answer in answers)
            said |= {position: answer.text for position, answer in zip(positions, answers, strict=True)}
        return [said[position] for position in range(len(rows))]

    return answer


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what came of it, wall seconds and CPU-seconds."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall_s, time.process_time() - cpu_s


def compare(vocabulary: str, num_rounds: int) -> list[str]:
    """One line for each way and answer length."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        model_dir, data_dir = Path(folder, "model"), Path(folder, "data")
        make_model(model_dir, vocab_size=VOCABULARIES[vocabulary])
        make_data(data_dir, num_rows=NUM_ROWS)
        rows = Dataset(data_dir).entry("bench").rows
        ways: dict[str, Callable[[Sequence[Row], int], list[str]]] = {"one by one": one_by_one(model_dir)}
        ways["batched"], wall_s, cpu_s = timed(lambda: batched(model_dir, rows, Path(folder, "features")))
        print(f"{vocabulary}: loading and the features of {NUM_ROWS} pictures took {wall_s:.1f} s, {cpu_s:.1f} CPU-s")
        for num_new_tokens in NUM_NEW_TOKENS:
            walls: dict[str, list[float]] = {way: [] for way in ways}
            cpus: dict[str, list[float]] = {way: [] for way in ways}
            said: dict[str, list[str]] = {}
            for answer in ways.values():
                answer(rows[:2], 4)  # the first call of each allocates
            for _ in range(num_rounds):
                for way, answer in ways.items():
                    asked = rows[: NUM_ONE_BY_ONE[vocabulary]] if way == "one by one" else rows
                    said[way], wall_s, cpu_s = timed(partial(answer, asked, num_new_tokens))
                    walls[way].append(wall_s / len(asked))
                    cpus[way].append(cpu_s / len(asked))
            num_other = sum(a != b for a, b in zip(*said.values(), strict=False))  # of those that both were asked
            for way in ways:
                wall_s, cpu_s = statistics.median(walls[way]), statistics.median(cpus[way])
                gain = statistics.median(walls["one by one"]) / wall_s
                cpu_gain = statistics.median(cpus["one by one"]) / cpu_s
                lines.append(
                    f"| {vocabulary} | {num_new_tokens} | {way} | {num_new_tokens / wall_s:.0f} "
                    f"| {1 / wall_s:.2f} | {gain:.2f}x | {cpu_gain:.2f}x "
                    f"| {num_other if way == 'batched' else ''} |"
                )
                print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", choices=VOCABULARIES, action="append", help="only these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [line for name in arguments.vocabulary or VOCABULARIES for line in compare(name, arguments.rounds)]
    print(
        f"A batch of {BATCH_SIZE} pictures, {arguments.rounds} rounds, float32; one by one: "
        f"{', '.join(f'{number} pictures at {name}' for name, number in NUM_ONE_BY_ONE.items())}.\n"
    )
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
