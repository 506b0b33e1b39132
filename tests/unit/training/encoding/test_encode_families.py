"""Each family's rows become LLaMA-Factory's token ids and labels, and the same parts train."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mllm_assets.data.sharegpt.rows import Message, Row
from mllm_assets.errors import DataError, ModelError, RecipeError
from mllm_assets.families.family import FAMILIES, processor_family, require_template
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.collate import TOWER_INPUTS, Collator, Padding
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.image_files import load_image
from mllm_assets.training.encoding.inputs import check_reach, make_encoder, warn_of_labels
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.models import freezing
from mllm_assets.training.models.load import (
    batch_loss,
    load_config,
    load_model,
    load_processor,
    model_on_meta,
)
from mllm_assets.training.models.publishing import save_model
from mllm_assets.worker.protocol import Reporter
from tests import tiny_families
from tests.golden.record_families import GOLDEN, METHODS, ROWS, TEMPLATES, turns_of, write_images

RECORDED = json.loads(GOLDEN.read_text(encoding="utf-8"))
# golden's name -> the model whose tokenizer it was recorded with
MODEL_OF = {name: model for model, names in TEMPLATES.items() for name in names}

NOT_LLAMAFACTORYS_MASK = ("paligemma", "paligemma_chat")  # its prompts are causal: hiyouga/LLaMA-Factory#9135


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows' images, and the tiny models as they are asked for."""
    folder = tmp_path_factory.mktemp("families")
    write_images(folder)
    return folder


def model_dir(root: Path, model_type: str) -> Path:
    directory = root / model_type
    if not directory.exists():
        directory.mkdir()
        tiny_families.build(model_type, directory)
    return directory


def make_row(root: Path, index: int, template: str = "") -> Row:
    row = ROWS[index]
    texts = turns_of(row, template)
    turns = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    system = [Message("system", row["system"])] if row["system"] else []
    return Row(f"r[{index}]", (*system, *turns), tuple(root / name for name in row["images"]))


@pytest.mark.parametrize("name", RECORDED["rows"])
def test_token_ids_and_labels_equal_llamafactorys(root: Path, name: str) -> None:
    """One question, several with a system text, two images of different sizes, none, and an answer with reasoning."""
    template, _, setting = name.partition(":")
    key, _, value = setting.partition("=")
    options = {key: {"None": None, "False": False, "True": True}[value]} if setting else {}
    processor = load_processor(model_dir(root, MODEL_OF[template]))
    encoder = Encoder(processor, TurnSettings(template=template, **options))
    collator = Collator(processor, padding=Padding(multiple_of=1))
    for index, expected in enumerate(RECORDED["rows"][name]):
        encoded = encoder.encode(make_row(root, index, template))
        assert list(encoded.input_ids) == expected["input_ids"], index
        assert list(encoded.labels) == expected["labels"], index
        batch = collator([encoded])
        for key in ("token_type_ids", "mm_token_type_ids", "image_grid_thw"):
            if key in expected and template not in NOT_LLAMAFACTORYS_MASK:
                assert batch[key].tolist() == expected[key], (index, key)
        if encoded.grids_thw:
            assert [list(grid) for grid in encoded.grids_thw] == expected["image_grid_thw"]


def plain_inputs(directory: Path, text: str, answer: str, images: list[Path]) -> dict[str, torch.Tensor]:
    """What transformers makes of a prompt and its answer, with labels as its PaliGemma processor defines them.

    Where the whole processor needs torchvision, tokenizer and image processor are called as it would call them.
    """
    pictures = [load_image(path) for path in images]
    family = FAMILIES[load_config(directory).model_type]
    options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": False}
    if family.model_type == "paligemma" and images:
        found = re.fullmatch(r"(?:<image>)+<bos>(.*)\n", text, re.DOTALL)
        assert found
        processor = AutoProcessor.from_pretrained(directory)
        suffix = [answer.removesuffix("<eos>")] if answer else None
        return {**processor([pictures], ["<image>" * len(images) + found[1]], suffix=suffix, **options)}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    made: dict[str, torch.Tensor] = {}
    if family.model_type in ("gemma3", "llava"):
        soft = {"gemma3": r"\n\n<start_of_image>(<image_soft_token>)+<end_of_image>\n\n", "llava": r"(<image>)+"}
        hard = {"gemma3": "<start_of_image>", "llava": "<image>"}[family.model_type]
        text = re.sub(soft[family.model_type], hard, text)
        processor = AutoProcessor.from_pretrained(directory)
        prompt, both = ({**processor(images=[pictures] if pictures else None, text=[t], **options)} for t in (
            text, text + answer))  # fmt: skip
        made, num_prompt = both, prompt["input_ids"].shape[1]
    else:
        made = {**tokenizer(text + answer, **options)}
        num_prompt = tokenizer(text, **options)["input_ids"].shape[1]
        if images:
            slots = family.slots(load_processor(directory), family.image_token)
            arranged = [[picture] for picture in pictures] if slots.by_image else pictures
            pixels = AutoImageProcessor.from_pretrained(directory)(arranged, return_tensors="pt")
            made |= {key: pixels[key] for key in TOWER_INPUTS if key in pixels}
    if family.token_types and family.token_types[0] not in made:
        is_image = made["input_ids"] == tokenizer.convert_tokens_to_ids(family.image_token)
        is_answer = torch.arange(made["input_ids"].shape[1])[None] >= num_prompt
        made[family.token_types[0]] = (is_image if family.token_types[1] == "images" else is_answer).long()
    labels = made["input_ids"].clone()
    labels[:, :num_prompt] = -100
    return {**made, "labels": labels}


@pytest.mark.parametrize("model_type", ["gemma3", *tiny_families.FAMILIES])
@pytest.mark.parametrize("index", [0, 1, 4], ids=["picture", "turns_and_system", "no_picture"])
def test_what_is_trained_is_what_is_asked_here_and_in_transformers(
    root: Path, parity_dir: Path, tmp_path: Path, model_type: str, index: int
) -> None:
    """PaliGemma's prompt was seen causally, so that users of a released model got other answers than were measured."""
    source = parity_dir / "model" if model_type == "gemma3" else model_dir(root, model_type)
    released = tmp_path / "released"
    processor, row = load_processor(source), make_row(root, index)
    save_model(load_model(source), processor, released, source=source)
    stock = AutoModelForImageTextToText.from_pretrained(released).eval()
    encoded, asked = Encoder(processor, mask_history=True).encode(row), Encoder(processor).encode_prompt(row)
    num_prompt, length = len(asked.input_ids), len(encoded.input_ids)
    assert encoded.input_ids[:num_prompt] == asked.input_ids
    decode = processor.tokenizer.decode
    answer = decode(encoded.input_ids[num_prompt:])
    plain = plain_inputs(released, decode(asked.input_ids), answer, list(row.images))
    plain_prompt = plain_inputs(released, decode(asked.input_ids), "", list(row.images))
    trained = Collator(processor, padding=Padding(multiple_of=1), select_logits=False)([encoded])
    other = Encoder(processor).encode_prompt(make_row(root, 5))
    predicted = Collator(processor, padding=Padding(side="left", multiple_of=1), select_logits=False)([asked, other])

    for key in ("input_ids", "labels", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        assert (key in trained) == (key in plain) == (key in predicted)
        if key in trained:
            assert trained[key][0, :length].tolist() == plain[key][0].tolist(), key
            if key != "labels":
                assert predicted[key][0, -num_prompt:].tolist() == plain_prompt[key][0].tolist(), key

    def logits(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return stock(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits[0]

    expected = logits(plain)
    torch.testing.assert_close(logits(trained)[num_prompt - 1 : length], expected[num_prompt - 1 :], atol=2e-5, rtol=0)
    torch.testing.assert_close(logits(predicted)[-1], expected[num_prompt - 1], atol=2e-5, rtol=0)
    torch.testing.assert_close(logits(plain_prompt)[-1], expected[num_prompt - 1], atol=2e-5, rtol=0)


def test_paligemmas_rows_of_several_answers_are_said_and_no_answer_is_seen_before_it_is_learnt(root: Path) -> None:
    processor = load_processor(model_dir(root, "paligemma"))
    encoded = Encoder(processor).encode(make_row(root, 1))
    types = Collator(processor, padding=Padding(multiple_of=1))([encoded])["token_type_ids"][0].tolist()
    first = next(index for index, label in enumerate(encoded.labels) if label >= 0)
    assert types == [0] * first + [1] * (len(types) - first)
    spec, reporter = method_spec("everything"), Reporter()
    rows = EncodedRows.of([encoded, Encoder(processor).encode(make_row(root, 0))])
    warn_of_labels(rows, spec, processor, reporter)
    assert reporter.warnings[0].startswith("1 of 2 rows have several answers. PaliGemma is asked with all that is")


@pytest.mark.parametrize("enable_thinking", [True, None, False])
def test_a_question_alone_is_asked_as_the_question_of_a_row_with_its_answer(
    root: Path, enable_thinking: bool | None
) -> None:
    """In chat a model trained without reasoning was not given the empty one that its training rows have."""
    encoder = Encoder(
        load_processor(model_dir(root, "qwen3_vl")),
        TurnSettings(template="qwen3_vl", enable_thinking=enable_thinking),
    )
    row = make_row(root, 5, "qwen3_vl")
    asked = encoder.encode_prompt(row).input_ids
    assert encoder.encode_prompt(replace(row, messages=row.messages[:-1])).input_ids == asked


def test_train_on_prompt_says_how_many_image_tokens_and_bos_it_learns(root: Path) -> None:
    """LLaMA-Factory learns them too (tests/golden/llamafactory/train_on_prompt.json), so the numbers stay its own."""
    processor = load_processor(model_dir(root, "llava"))
    row = Encoder(processor, train_on_prompt=True).encode(make_row(root, 0))
    reporter = Reporter()
    spec = replace(method_spec("everything"), train_on_prompt=True)
    warn_of_labels(EncodedRows.of([row]), spec, processor, reporter)
    num_labels = len(row.labels)
    assert reporter.warnings == [
        f"train_on_prompt: 16 image tokens and 0 <bos> are among the {num_labels} labels, as in LLaMA-Factory: the "
        "whole question is learnt, not its words alone."
    ]


def test_a_token_that_the_embedding_has_no_row_for_is_named_before_anything_loads(root: Path, tmp_path: Path) -> None:
    """It was an IndexError inside the embedding, and `inspect` said nothing."""
    directory = tmp_path / "m"
    shutil.copytree(model_dir(root, "llava"), directory)
    processor = load_processor(directory)
    processor.tokenizer.add_tokens(["<heart>"], special_tokens=False)
    processor.tokenizer.save_pretrained(directory)
    num_rows = load_config(directory).text_config.vocab_size
    spec = replace(method_spec("everything"), template="llava")
    encoder = make_encoder(spec, load_processor(directory), directory)
    encoder.encode(make_row(root, 0))
    row = Row("r[7]", (Message("user", "What?"), Message("assistant", "A <heart>.")), ())
    with pytest.raises(DataError) as caught:
        encoder.encode(row)
    assert (
        f"Row r[7] needs the token '<heart>' with the id {num_rows}, and the model's embedding has {num_rows} rows"
        in (str(caught.value))
    )
    assert f"model.resize_token_embeddings({num_rows + 1})" in str(caught.value)


def method_spec(name: str) -> TrainSpec:
    return TrainSpec(
        model_name_or_path="m", dataset="d", template="gemma3", do_train=True, **METHODS[name]
    )  # fmt: skip


@pytest.mark.parametrize("model_type", TEMPLATES)
@pytest.mark.parametrize("method", METHODS)
def test_what_trains_is_what_llamafactory_trains(root: Path, model_type: str, method: str) -> None:
    expected = RECORDED["trains"][model_type][method]
    shape = freezing.apply(method_spec(method), model_on_meta(load_config(model_dir(root, model_type))))
    if isinstance(expected, str):  # LLaMA-Factory fails where this engine wraps the layers inside
        assert expected.startswith("LLaMA-Factory fails") and any("vision_tower" in name for name in shape.names)
        return
    assert sorted(shape.names) == expected
    assert shape.tower_trains == (method in ("everything", "lora_with_tower"))


def test_smolvlms_parts_are_frozen_by_the_same_keys(root: Path) -> None:
    directory = model_dir(root, "smolvlm")
    parts = {
        method: {name.split(".")[1] for name in freezing.apply(
            method_spec(method), model_on_meta(load_config(directory))).names if "base_model" not in name}
        for method in ("projector", "language_model", "everything")
    }  # fmt: skip
    assert parts["projector"] == {"connector"}
    assert parts["language_model"] == {"text_model", "weight"}  # lm_head.weight
    assert parts["everything"] == {"vision_model", "connector", "text_model", "weight"}
    lora = freezing.lora_targets(method_spec("lora"), model_on_meta(load_config(directory)))
    assert all(name.startswith("model.text_model.layers") for name in lora)


def test_smolvlms_turns_are_its_own_chat_template(root: Path) -> None:
    """LLaMA-Factory has no template for it."""
    processor = load_processor(model_dir(root, "smolvlm"))
    template = (root / "smolvlm" / "chat_template.jinja").read_text()
    row = make_row(root, 1)
    chat = [{"role": message.role, "content": [{"type": "text", "text": message.content}]} for message in row.messages]
    chat[1]["content"] = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    encoded = Encoder(processor).encode(row)
    decoded = processor.tokenizer.decode(encoded.input_ids)
    begin, end = decoded.index("<fake_token_around_image>"), decoded.rindex("<fake_token_around_image>")
    assert decoded[:begin] + "<image>" + decoded[end + len("<fake_token_around_image>") :] == text
    asked = processor.tokenizer.decode(Encoder(processor).encode_prompt(row).input_ids)
    assert decoded.startswith(asked) and asked.endswith("\nAssistant:")
    answers = [token for token in encoded.labels if token >= 0]
    assert processor.tokenizer.decode(answers) == " A car.<end_of_utterance>\n Blue, it's blue.<end_of_utterance>\n"


@pytest.mark.parametrize("model_type", ["gemma4", "qwen2_5_vl", "smolvlm"])
@pytest.mark.parametrize(
    "size", [(64, 64), (65, 64), (33, 200), (640, 480), (31, 31), (300, 40), (768, 767), (97, 1000), (28, 29), (5, 9)]
)
def test_tokens_are_counted_from_the_header_as_the_processor_counts_them(
    root: Path, tmp_path: Path, model_type: str, size: tuple[int, int]
) -> None:
    """No image is decoded to encode a row; a count that is off by one fails in the middle of training."""
    processor = load_processor(model_dir(root, model_type))
    path = tmp_path / "image.png"
    Image.new("RGB", size, (9, 90, 200)).save(path)
    encoded = Encoder(processor).encode_prompt(Row("r", (Message("user", "<image>?"),), (path,)))
    made = Collator(processor).tower_inputs([encoded])
    found = encoded.input_ids.count(Encoder(processor).image_token_id)
    if model_type == "smolvlm":
        num_tiles = made["pixel_values"].shape[1]
        assert found == 4 * num_tiles and encoded.num_patches == 16 * num_tiles
    elif model_type == "gemma4":
        assert found == int((made["image_position_ids"][..., 0] >= 0).sum()) // 4
    else:
        assert [list(grid) for grid in encoded.grids_thw] == made["image_grid_thw"].tolist()
        assert found == len(made["pixel_values"]) // 4


def test_qwens_smallest_images_are_enlarged_as_llamafactory_enlarges_them(root: Path) -> None:
    processor = load_processor(model_dir(root, "qwen2_5_vl"))
    image = load_image(root / "c.png", min_pixels=1, slots=Collator(processor).slots)
    assert image.size == (28, 28)


@pytest.mark.parametrize("model_type", tiny_families.FAMILIES)
def test_padding_and_selected_logits_do_not_change_the_loss(root: Path, model_type: str) -> None:
    directory = model_dir(root, model_type)
    processor, model = load_processor(directory), load_model(directory)
    rows = [Encoder(processor).encode(make_row(root, index)) for index in (0, 2, 1)]

    def loss(batch: list[EncodedRow], **options: Any) -> float:
        return batch_loss(model, Collator(processor, **options)(batch))

    alone = [loss([row], padding=Padding(multiple_of=1)) for row in rows]
    counts = torch.tensor([sum(label >= 0 for label in row.labels) for row in rows], dtype=torch.float)
    together = float((torch.tensor(alone) * counts).sum() / counts.sum())
    assert loss(rows) == pytest.approx(together, abs=2e-6)
    assert loss(rows, select_logits=False) == pytest.approx(together, abs=2e-6)


@pytest.mark.parametrize("model_type", tiny_families.CONFIGS)
def test_the_loss_depends_on_the_image(root: Path, model_type: str) -> None:
    directory = model_dir(root, model_type)
    processor, model = load_processor(directory), load_model(directory)
    encoded = Encoder(processor).encode(make_row(root, 0))
    batch = Collator(processor)([encoded])
    assert batch_loss(model, batch) != batch_loss(model, batch | {"pixel_values": batch["pixel_values"].flip(-1) + 1})


def test_what_sees_pictures_alone_is_not_trained_without_any(root: Path) -> None:
    """A projector came out as it went in, and was published without a word."""
    config = load_config(model_dir(root, "qwen3_vl"))
    encoder = Encoder(load_processor(model_dir(root, "qwen3_vl")))
    rows = EncodedRows.of(encoder.encode(make_row(root, index)) for index in (0, 4, 5))

    def said(method: str, rows: EncodedRows) -> list[str]:
        reporter = Reporter()
        check_reach(freezing.apply(method_spec(method), model_on_meta(config)), rows, method_spec(method), reporter)
        return reporter.warnings

    with pytest.raises(RecipeError, match=r"only visual trains, which sees pictures alone, and 0 of 2 rows of d have"):
        said("projector", rows[1:])
    assert said("projector", rows) == ["1 of 3 rows of d have a picture: from the others visual learns nothing."]
    assert said("everything", rows[1:]) == ["0 of 2 rows of d have a picture: from the others visual learns nothing."]
    assert not said("projector", rows[:1]) and not said("language_model", rows[1:]) and not said("everything", rows)


def test_a_template_of_another_family_is_refused_with_both_names() -> None:
    with pytest.raises(RecipeError) as caught:
        require_template("qwen2_vl", FAMILIES["paligemma"], "pretrains/p")
    assert str(caught.value) == (
        "template is 'qwen2_vl', and the model in pretrains/p is PaliGemma (paligemma), whose turns it does not fit. "
        "Set template: paligemma or paligemma_chat, or name another model."
    )


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    text = str(caught.value)
    assert "holds a model of type 'llama': expected one of Gemma 3 (gemma3), Gemma 4 (gemma4), Qwen2.5-VL" in text
    assert "Use a model of one of these families with images" in text


def test_a_tokenizer_without_the_image_token_is_refused(root: Path) -> None:
    processor = load_processor(model_dir(root, "qwen2_5_vl"))
    processor.tokenizer = load_processor(model_dir(root, "llava")).tokenizer
    with pytest.raises(ModelError, match=r"does not know the image token <\|image_pad\|>, .* tokenizer files of Qwen/"):
        Encoder(processor)


def test_every_family_is_found_by_its_processor(root: Path) -> None:
    for model_type in tiny_families.FAMILIES:
        assert processor_family(load_processor(model_dir(root, model_type))).model_type == model_type
