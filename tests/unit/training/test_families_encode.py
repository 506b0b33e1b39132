"""Each family's rows become LLaMA-Factory's token ids and labels, and the same parts train."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mllm_assets.data.sharegpt import Message, Row
from mllm_assets.errors import ModelError, RecipeError
from mllm_assets.training import freezing
from mllm_assets.training.collate import Collator
from mllm_assets.training.encode import EncodedRow, Encoder
from mllm_assets.training.families import FAMILIES, processor_family, require_template
from mllm_assets.training.image_files import load_image
from mllm_assets.training.model import batch_loss, load_config, load_model, load_processor, model_on_meta
from mllm_assets.training.spec import TrainSpec
from tests import tiny_families
from tests.golden.record_families import GOLDEN, METHODS, ROWS, TEMPLATES, turns_of, write_images

RECORDED = json.loads(GOLDEN.read_text(encoding="utf-8"))
# golden's name -> the model whose tokenizer it was recorded with
MODEL_OF = {name: model for model, names in TEMPLATES.items() for name in names}


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
    template, _, thinking = name.partition(":enable_thinking=")
    processor = load_processor(model_dir(root, MODEL_OF[template]))
    enable_thinking = {"": True, "None": None, "False": False}[thinking]
    encoder = Encoder(processor, template=template, enable_thinking=enable_thinking)
    collator = Collator(processor, pad_to_multiple_of=1)
    for index, expected in enumerate(RECORDED["rows"][name]):
        encoded = encoder.encode(make_row(root, index, template))
        assert list(encoded.input_ids) == expected["input_ids"], index
        assert list(encoded.labels) == expected["labels"], index
        batch = collator([encoded])
        for key in ("token_type_ids", "mm_token_type_ids", "image_grid_thw"):
            if key in expected:
                assert batch[key].tolist() == expected[key], (index, key)
        if encoded.grids_thw:
            assert [list(grid) for grid in encoded.grids_thw] == expected["image_grid_thw"]


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

    alone = [loss([row], pad_to_multiple_of=1) for row in rows]
    counts = torch.tensor([sum(label >= 0 for label in row.labels) for row in rows], dtype=torch.float)
    together = float((torch.tensor(alone) * counts).sum() / counts.sum())
    assert loss(rows) == pytest.approx(together, abs=2e-6)
    assert loss(rows, select_logits=False) == pytest.approx(together, abs=2e-6)


@pytest.mark.parametrize("model_type", tiny_families.FAMILIES)
def test_the_loss_depends_on_the_image(root: Path, model_type: str) -> None:
    directory = model_dir(root, model_type)
    processor, model = load_processor(directory), load_model(directory)
    encoded = Encoder(processor).encode(make_row(root, 0))
    batch = Collator(processor)([encoded])
    assert batch_loss(model, batch) != batch_loss(model, batch | {"pixel_values": batch["pixel_values"].flip(-1) + 1})


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
