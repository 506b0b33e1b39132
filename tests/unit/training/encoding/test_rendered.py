"""A model of a family that is not described trains on what its own chat template and processor write."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_assets.data.sharegpt.rows import Message, Row
from mllm_assets.errors import DataError, RecipeError
from mllm_assets.families.family import FAMILIES, processor_family, require_template
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.collate import Padding
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.inputs import make_encoder
from mllm_assets.training.encoding.rendered import RenderedCollator, RenderedEncoder
from mllm_assets.training.encoding.row import IGNORE_INDEX
from mllm_assets.training.models.freezing import model_family
from mllm_assets.training.models.load import load_config, load_model, load_processor, model_on_meta
from mllm_assets.training.models.parts import with_parts
from tests import tiny_any, tiny_families

QUESTION, ANSWER, MORE, LAST = "<image>What<image>is it?", "A heart.", "Which colour?", "Red."
TURNS = (Message("user", QUESTION), Message("assistant", ANSWER), Message("user", MORE), Message("assistant", LAST))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any")
    for name in tiny_any.MODELS:
        tiny_any.build(name, folder / name)
    Image.linear_gradient("L").resize((64, 40)).convert("RGB").save(folder / "a.png")
    Image.radial_gradient("L").resize((30, 90)).convert("RGB").save(folder / "b.png")
    return folder


@pytest.fixture
def row(root: Path) -> Row:
    return Row("r[0]", (Message("system", "Be brief."), *TURNS), (root / "a.png", root / "b.png"))


def chat(row: Row, *, with_pictures: bool = True) -> list[dict[str, Any]]:
    """The row as a user of plain transformers writes it."""
    pictures = iter(row.images)
    found = []
    for message in row.messages:
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(message.content.split("<image>")):
            if number:
                parts.append({"type": "image", "image": Image.open(next(pictures))})
            if text:
                parts.append({"type": "text", "text": text})
        found.append({"role": message.role, "content": parts})
    return found


@pytest.mark.parametrize("model_type", tiny_any.MODELS)
def test_tokens_and_logits_are_those_of_plain_transformers(root: Path, row: Row, model_type: str) -> None:
    """Trained, and asked beside a row without a picture, a row is what `AutoProcessor` makes of the conversation."""
    processor = load_processor(root / model_type)
    settings = TurnSettings(image_min_pixels=1)
    whole, asked = RenderedEncoder(processor, settings).encode(row), RenderedEncoder(processor).encode_prompt(row)
    # those with a part for videos are compared with themselves where torchvision is missing
    plain = processor.whole if model_type in tiny_any.WITH_VIDEOS else AutoProcessor.from_pretrained(root / model_type)
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = plain.apply_chat_template(chat(row), **how)
    prompt = plain.apply_chat_template(
        chat(replace(row, messages=row.messages[:-1])), add_generation_prompt=True, **how
    )
    assert list(whole.input_ids) == inputs["input_ids"][0].tolist()
    assert list(asked.input_ids) == prompt["input_ids"][0].tolist()
    alone = Row("r[1]", (Message("user", "1 + 1?"), Message("assistant", "2")), ())
    rows = [RenderedEncoder(processor).encode_prompt(alone), asked]
    batch = RenderedCollator(processor, settings, padding=Padding(side="left"))(rows)
    del batch["labels"]
    user: Any = AutoModelForImageTextToText
    with torch.no_grad():
        expected = user.from_pretrained(root / model_type).eval()(**prompt).logits[0, -1]
        assert load_model(root / model_type).eval()(**batch).logits[1, -1].allclose(expected, atol=1e-5)


@pytest.mark.parametrize("model_type", tiny_any.MODELS)
def test_answers_with_their_ends_are_learnt_and_nothing_else(root: Path, row: Row, model_type: str) -> None:
    processor = load_processor(root / model_type)

    def learnt(**how: Any) -> str:
        encoded = RenderedEncoder(processor, **how).encode(row)
        kept = [token for token in encoded.labels if token != IGNORE_INDEX]
        return processor.tokenizer.decode(kept)

    assert learnt() == f"{ANSWER}<|im_end|>\n{LAST}<|im_end|>\n"
    assert learnt(mask_history=True) == f"{LAST}<|im_end|>\n"
    assert learnt(train_on_prompt=True).startswith("<bos>")


def test_stored_rows_keep_what_the_template_wrote(root: Path, row: Row) -> None:
    encoded = RenderedEncoder(load_processor(root / "idefics3")).encode(row)
    assert EncodedRows.of([encoded], folder=root)[0] == encoded


@pytest.mark.parametrize(
    ("messages", "cutoff_len", "message"),
    [
        (TURNS, 20, r"has \d+ tokens, more than cutoff_len 20; .* Set cutoff_len: \d+ or more"),
        ((Message("user", "a<|im_end|>"), TURNS[1]), 2048, "message 0 holds '<|im_end|>'"),
    ],
)
def test_rows_that_cannot_be_learnt_are_named(
    root: Path, row: Row, messages: tuple[Message, ...], cutoff_len: int, message: str
) -> None:
    encoder = RenderedEncoder(load_processor(root / "llava_next"), TurnSettings(cutoff_len=cutoff_len))
    images = row.images if "<image>" in messages[0].content else ()
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        encoder.encode(replace(row, messages=messages, images=images))


def test_a_template_that_rewrites_earlier_answers_is_refused_unless_only_the_last_is_learnt(
    root: Path, row: Row
) -> None:
    """Reasoning models drop it from earlier turns: labels would be of other tokens than the answer's."""
    processor = load_processor(root / "idefics3")
    processor.whole.chat_template = tiny_any.CHAT_TEMPLATE.replace(
        "{{ item['text'] }}", "{{ item['text'] if outer.last or message['role'] != 'assistant' else '' }}"
    ).replace("{%- for item", "{%- set outer = loop -%}{%- for item")
    with pytest.raises(DataError, match=r"Row r\[0\]: the model's chat template writes the first 3 messages otherwise"):
        RenderedEncoder(processor).encode(row)
    labels = RenderedEncoder(processor, mask_history=True).encode(row).labels
    kept = [token for token in labels if token != IGNORE_INDEX]
    assert processor.tokenizer.decode(kept) == f"{LAST}<|im_end|>\n"


@pytest.mark.parametrize(
    ("model_type", "vision", "projector"),
    [
        ("idefics3", ["model.vision_model"], ["model.connector"]),
        ("aya_vision", ["model.vision_tower"], ["model.multi_modal_projector"]),
        ("llava_next", ["model.vision_tower"], ["model.image_newline", "model.multi_modal_projector"]),
        ("idefics2", ["model.vision_model"], ["model.connector"]),
        ("ovis2", ["model.vision_tower"], ["model.visual_embeddings_table"]),
    ],
)
def test_parts_are_found_in_the_modules(root: Path, model_type: str, vision: list[str], projector: list[str]) -> None:
    family = model_family(model_on_meta(load_config(root / model_type)))
    assert (sorted(family.vision_keys), sorted(family.projector_keys)) == (vision, projector)
    text = "model.text_model" if model_type.startswith("idefics") else "model.language_model"
    assert family.language_keys == (text, "lm_head")


def test_a_merger_inside_a_tower_is_the_projector(tmp_path: Path) -> None:
    """Qwen2-VL has it there; a described family's shape stands for it, which needs no processor."""
    model = model_on_meta(load_config(tiny_families.build("qwen2_5_vl", tmp_path / "m")))
    family = with_parts(replace(FAMILIES["qwen2_5_vl"], is_described=False), model)
    assert family.projector_keys == ("model.visual.merger",)
    assert sorted(family.vision_keys) == sorted(
        f"model.visual.{name}" for name, _ in model.model.visual.named_children() if name != "merger"
    )


def test_auto_is_for_families_that_are_not_described_and_they_have_no_other(root: Path) -> None:
    with pytest.raises(RecipeError, match=r"template is 'auto', and the model in m is Gemma 3 .* Set template: gemma3"):
        require_template("auto", FAMILIES["gemma3"], "m")
    processor = load_processor(root / "idefics3")
    with pytest.raises(RecipeError, match=r"idefics3 \(idefics3\), whose turns it does not fit\. Set template: auto"):
        require_template("gemma3", processor_family(processor), "m")
    spec = TrainSpec(model_name_or_path="m", dataset="d", do_train=True, template="auto", label_smoothing_factor=0.1)
    with pytest.raises(RecipeError, match="without label_smoothing_factor"):
        make_encoder(spec, processor, root / "idefics3")
