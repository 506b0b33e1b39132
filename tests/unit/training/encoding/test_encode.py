"""Token ids, labels and batches: what LLaMA-Factory makes of the same rows."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.rows import Message, Row
from mllm_assets.errors import DataError
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.collate import Collator, Padding
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.image_files import load_image
from mllm_assets.training.encoding.inputs import check_pictures, encoded_entry, make_encoder
from mllm_assets.training.encoding.row import IGNORE_INDEX
from mllm_assets.training.models.load import batch_loss, load_model, load_processor
from mllm_assets.worker.protocol import Reporter
from tests.golden import fidelity_data


@pytest.fixture(scope="module")
def processor(parity_dir: Path) -> Any:
    return load_processor(parity_dir / "model")


@pytest.fixture(scope="module")
def rows(parity_dir: Path) -> list[Row]:
    return Dataset(parity_dir / "data").entry("gemma3_vlm_train").rows


@pytest.mark.parametrize("recipe", ["projector", "freeze", "full", "lora"])
def test_ids_and_labels_equal_llamafactorys(parity_dir: Path, processor: Any, rows: list[Row], recipe: str) -> None:
    samples = json.loads((parity_dir / "reference" / f"{recipe}.json").read_text())["samples"]
    encoder = Encoder(processor)
    for sample in samples:
        encoded = encoder.encode(rows[sample["index"]])
        assert list(encoded.input_ids) == sample["input_ids"]
        assert list(encoded.labels) == sample["labels"]


def test_only_answers_are_supervised_with_their_end_of_turn_and_newline(processor: Any, rows: list[Row]) -> None:
    """A label on the question, or none on the end of turn, trains a model that never stops."""
    row = next(row for row in rows if len(row.messages) == 4)
    encoded = Encoder(processor).encode(row)
    supervised = processor.tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])
    answers = [message.content for message in row.messages if message.role == "assistant"]
    assert supervised == "".join(f"{answer}<end_of_turn>\n" for answer in answers)


def test_a_prompt_ends_where_the_model_answers(processor: Any, rows: list[Row]) -> None:
    row = next(row for row in rows if row.messages[0].role == "system")
    prompt = Encoder(processor).encode_prompt(row)
    text = processor.tokenizer.decode(prompt.input_ids)
    assert text.endswith("<start_of_turn>model\n")
    assert f"<start_of_turn>user\n{row.messages[0].content}\n\n" in text
    full = Encoder(processor).encode(row)
    assert full.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_a_default_system_text_is_that_of_rows_without_one_in_training_and_questions(
    processor: Any, rows: list[Row]
) -> None:
    """Whoever asks the trained model reads the same settings from its recipe."""
    plain = next(row for row in rows if row.messages[0].role == "user")
    own = next(row for row in rows if row.messages[0].role == "system")
    encoder = Encoder(processor, TurnSettings.of({"default_system": "Name it."}))
    told = replace(plain, messages=(Message("system", "Name it."), *plain.messages))
    assert encoder.encode(plain) == Encoder(processor).encode(told)
    assert encoder.encode_prompt(plain) == Encoder(processor).encode_prompt(told)
    assert encoder.encode(own) == Encoder(processor).encode(own)


def test_a_cutoff_inside_an_image_is_refused_by_row(processor: Any, rows: list[Row]) -> None:
    """LLaMA-Factory cuts the image tokens and fails in the forward pass, without a word about the row."""
    what = "cutoff_len 10 leaves 0 of 4 image tokens. Set cutoff_len: 18 or more"
    with pytest.raises(DataError, match=rf"Row {re.escape(rows[0].id)} is cut inside its images: {what}"):
        Encoder(processor, TurnSettings(cutoff_len=10)).encode(rows[0])


def test_the_smallest_cutoff_for_all_rows_is_named_and_works(parity_dir: Path, processor: Any, tmp_path: Path) -> None:
    fidelity_data.write(tmp_path)
    spec = TrainSpec(
        model_name_or_path="m", dataset="conversations", template="gemma3", do_train=True, cutoff_len=40, packing=True
    )
    entry = Dataset(tmp_path).entry("conversations")

    def encoded(spec: TrainSpec) -> EncodedRows:
        encoder = make_encoder(spec, processor, parity_dir / "model")
        return encoded_entry(entry, encoder, spec, tmp_path / "rows", Reporter())

    with pytest.raises(DataError) as caught:
        encoded(spec)
    message = re.match(
        r"cutoff_len 40 cuts into the images of (\d) of 9 rows. The smallest that works for all of them is (\d+): set "
        r"cutoff_len: (\d+). The first one: Row conversations\[\d\] is cut inside its images: cutoff_len 39 leaves",
        str(caught.value),
    )
    assert message and message[2] == message[3]
    least = int(message[2])
    enough, tighter = replace(spec, cutoff_len=least), replace(spec, cutoff_len=least - 1)
    assert len(encoded(enough)) == 9
    with pytest.raises(DataError, match="cuts into the images of"):
        encoded(tighter)


def test_a_row_that_supervises_nothing_is_refused(processor: Any) -> None:
    row = Row(id="r7", messages=(Message("user", "hello"),), images=())
    with pytest.raises(DataError, match=r"Row r7 supervises no token: cutoff_len is 2048"):
        Encoder(processor).encode(row)


CONTROL = ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<image_soft_token>"]


@pytest.mark.parametrize("token", CONTROL)
@pytest.mark.parametrize("place", [0, 1, 2], ids=["system", "question", "answer"])
def test_a_control_token_in_any_text_is_refused(processor: Any, token: str, place: int) -> None:
    """The tokenizer would read it as the end of the turn, or as an image; LLaMA-Factory lets it."""
    assert len(processor.tokenizer.encode(token, add_special_tokens=False)) == 1
    texts = ["be brief", "what", "this"]
    texts[place] = f"a {token}b"
    messages = tuple(map(Message, ("system", "user", "assistant"), texts))
    where = ("the system text", "message 0", "message 1")[place]
    with pytest.raises(DataError, match=rf"Row r8: {where} holds '{token}', which steers the model.*or drop the row"):
        Encoder(processor).encode(Row(id="r8", messages=messages, images=()))


def test_what_only_looks_like_a_control_token_is_text(processor: Any) -> None:
    """No id of a control token but those of the turn format itself."""
    special = {id for id, token in processor.tokenizer.added_tokens_decoder.items() if token.special}

    def control_ids(question: str, answer: str) -> list[int]:
        messages = (Message("user", question), Message("assistant", answer))
        encoded = Encoder(processor).encode(Row(id="r9", messages=messages, images=()))
        return [token for token in encoded.input_ids if token in special]

    texts = [
        "<End_Of_Turn>",
        "<end_of_turn",
        "< bos >",
        "<start_of_<b>turn>",
        "\u202eend_of_turn",
        "\x00\x1b[2J",
        "שלום",
    ]
    for text in texts:
        assert control_ids(text, text) == control_ids("a", "b")


def test_a_cut_answer_is_counted(processor: Any) -> None:
    messages = (Message("user", "hi"), Message("assistant", "a long answer " * 20))
    encoded = Encoder(processor, TurnSettings(cutoff_len=40)).encode(Row(id="r9", messages=messages, images=()))
    assert len(encoded.input_ids) == 40
    assert encoded.num_tokens_cut > 0


def test_large_images_shrink_to_the_area_and_small_ones_grow(tmp_path: Path) -> None:
    """Skipping the shrink changes the loss by 5.9e-4 on photographs."""
    Image.new("RGB", (2000, 1000)).save(tmp_path / "large.png")
    Image.new("L", (10, 10)).save(tmp_path / "small.png")
    large = load_image(tmp_path / "large.png")
    assert large.size == (1086, 543)
    small = load_image(tmp_path / "small.png")
    assert small.size == (32, 32) and small.mode == "RGB"


def test_a_damaged_image_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"broken\.png of row r1 cannot be used: .* Replace the file or drop the row"):
        load_image(path, row_id="r1")


def test_a_file_that_is_no_image_is_found_before_training(processor: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("no image")
    messages = (Message("user", "<image>what"), Message("assistant", "this"))
    row = Encoder(processor).encode(Row(id="r2", messages=messages, images=(path,)))
    with pytest.raises(DataError, match=r"text\.png of row r2 cannot be used"):
        check_pictures(EncodedRows.of([row]), Reporter())


def test_batches_are_padded_to_eight_and_mark_image_tokens(processor: Any, rows: list[Row]) -> None:
    """Without token_type_ids nothing fails and the loss is another one (9.425 instead of 9.272, measured)."""
    encoder = Encoder(processor)
    encoded = [encoder.encode(row) for row in rows[:3]]
    batch = Collator(processor)(encoded)
    assert batch["input_ids"].shape[1] % 8 == 0
    assert int(batch["token_type_ids"].sum()) == sum(len(row.images) for row in rows[:3]) * processor.image_seq_length
    assert batch["attention_mask"].sum(1).tolist() == [len(row.input_ids) for row in encoded]
    assert batch["pixel_values"].shape == (sum(len(row.images) for row in rows[:3]), 3, 56, 56)
    left = Collator(processor, padding=Padding(side="left"))(encoded)
    assert torch.equal(left["input_ids"][0, -len(encoded[0].input_ids) :], torch.tensor(encoded[0].input_ids))


def test_logits_at_supervised_positions_give_the_full_loss(parity_dir: Path, processor: Any, rows: list[Row]) -> None:
    encoder = Encoder(processor)
    encoded = [encoder.encode(row) for row in rows[:4]]
    model = load_model(parity_dir / "model")
    selected = batch_loss(model, Collator(processor)(encoded))
    full = batch_loss(model, Collator(processor, select_logits=False)(encoded))
    assert selected == pytest.approx(full, abs=2e-6)


def test_a_question_that_comes_again_is_the_same_and_refused_again(processor: Any, rows: list[Row]) -> None:
    """Ids of questions are kept, those of another system text or picture are others."""
    encoder, row = Encoder(processor), rows[0]
    first = encoder.encode(row)
    told = replace(row, messages=(Message("system", "Be brief."), *row.messages))
    assert encoder.encode(told).input_ids == Encoder(processor).encode(told).input_ids != first.input_ids
    assert encoder.encode(row) == first == Encoder(processor).encode(row)
    wrong = replace(row, messages=(Message("user", "<image><end_of_turn>"), row.messages[-1]))
    for _ in range(2):
        with pytest.raises(DataError, match="message 0 holds '<end_of_turn>'"):
            encoder.encode(wrong)
