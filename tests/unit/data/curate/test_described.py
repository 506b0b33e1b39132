"""No changed copy of a picture whose words name what the change makes untrue."""

import json
from pathlib import Path

import pytest

from mllm_assets.data.curate.described import described
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.row_files import read_rows
from mllm_assets.errors import RecipeError
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import made_spec, png, run_line, write_source

SIDES = """A dog to the left of a tree.|The RIGHT shoe|leftmost cup|a left-hand glove|Turn clockwise.|Ein Hund links.
die rechte Hand|Der linke Schuh|le chat à gauche|la main droite|a la izquierda|el lado derecho|à esquerda|a destra
po lewej stronie|слева от дома|правая рука|狗在左边|右の靴|왼쪽|오른쪽에|left_arrow
top-left|bottomright|arrow ➡|ＬＥＦＴ"""
TEXTS = """A sign that says stop.|The word "exit"|«Sortie»|『出口』|STOP|42|12:30|AB 123|the number 7|bus 1408
B52|it reads 'open'|What does the text say?|Ein Schild mit Schrift|le texte écrit|写着什么|a clock at noon"""
BOXES = """the bounding box|<box>(3, 4)|<loc0012>|[12, 34]|0.25 of it|{"bbox_2d": [1, 2]}|at (7"""
FINE = """A dog beside a tree.|3 dogs run.|picture 11|bright colours|two cats|What is this?|an upright piano|a fright
Describe it in one sentence.|ein Bild von einem Hund|un chat noir|狗|It's a dog's toy"""


def lines(text: str) -> list[str]:
    return text.replace("\n", "|").split("|")


@pytest.mark.parametrize(
    ("texts", "what"),
    [(SIDES, "side"), (TEXTS, "text"), (BOXES, "box"), (FINE, None)],
    ids=["side", "text", "box", "fine"],
)
def test_what_a_mirrored_picture_makes_untrue(texts: str, what: str | None) -> None:
    found = {text: described([text], "flip") for text in lines(texts)}
    assert {text: name for text, name in found.items() if (name is None) != (what is None)} == {}
    if what == "side":
        assert set(found.values()) == {"side"}


@pytest.mark.parametrize(
    ("text", "operation", "what"),
    [
        ("a cat on the left", "crop", "side"),
        ("the northwest corner", "flip", "side"),
        ("facing southeast", "flip", "side"),
        ("her L cheek", "flip", "side"),
        ("on the driver's side", "flip", "side"),
        ("an S-shaped curve", "flip", "side"),
        ("till höger", "flip", "side"),
        ("στα αριστερά", "flip", "side"),
        ("bên trái", "flip", "side"),
        ("at x=12 y=30", "flip", "box"),
        ("l'image d'un chat", "flip", None),
        ("in the corner", "crop", "place"),
        ("in the corner", "flip", None),
        ("How many dogs?", "crop", "count"),
        ("3 dogs run", "crop", "count"),
        ("a stop sign", "crop", "text"),
        ("a red ball", "color", "color"),
        ("un chat noir", "color", "color"),
        ("ein dunkles Haus", "color", "color"),
        ("红色的球", "color", "color"),
        ("a bright day", "color", "color"),
        ("a red ball", "flip", None),
        ("a cat on the left", "color", None),
        ("Food is bread.", "color", None),
    ],
)
def test_each_operation_has_words_of_its_own(text: str, operation: str, what: str | None) -> None:
    assert described([text], operation) == what


def test_a_label_or_a_question_counts_as_well_as_an_answer() -> None:
    assert described(["What is left of it?", "A dog.", ""], "flip") == "side"
    assert described(["What is it?", "An arrow.", "arrow_right"], "flip") == "side"


def test_rows_that_name_a_side_are_not_mirrored_and_counted(layout: Layout) -> None:
    """24 of 24 copies in a trial had an answer that was wrong of their picture."""
    captions = ["a dog on the left", "a cat on the right", 'a sign with "EXIT"', "a bird at [3, 4]", "a bird", "a fish"]
    write_source(layout.root, [(png(n), captions[n % 6]) for n in range(36)])
    *_, version = run_line(made_spec(30, 6, augment=("flip",)), layout)
    left_out = {"flip_left_out_side", "flip_left_out_text", "flip_left_out_box"}
    assert version.copies_left_out.keys() == left_out
    assert sum(version.augmentations.values()) == 30
    assert version.num_augmented == version.augmentations["flip"] == 30 - sum(version.copies_left_out.values())
    rows = [row for row in read_rows(version.directory / "train.json") if "source_id" in row]
    assert {row["messages"][1]["content"] for row in rows} == {"a bird", "a fish"}
    assert len(rows) == version.num_augmented
    manifest = json.loads((version.directory / "manifest.json").read_text())
    assert manifest["augmentations"] == version.augmentations
    found = QualityStore(layout.quality_db).query(
        "SELECT count(*) AS n FROM split_membership WHERE split = 'augmented' AND reason LIKE 'flip_left_out%'"
    )
    assert found[0]["n"] == sum(version.copies_left_out.values())


def test_the_yaml_can_say_otherwise(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    write_source(layout.root, [(png(n), "on the left, in red") for n in range(8)])
    *_, version = run_line(made_spec(6, 2, augment=("flip", "color"), augment_all_rows=("flip",)), layout)
    assert version.augmentations == {"color_left_out_color": 6, "flip": 6}
    with pytest.raises(RecipeError, match="augment_all_rows holds 'rotate'. Use flip, crop, color"):
        made_spec(augment_all_rows=("rotate",))
