"""Build `emoji.parquet` again from Debian's `fonts-noto-color-emoji` and `unicode-cldr-core`.

    apt-get install fonts-noto-color-emoji=2.042-0+deb12u1 unicode-cldr-core=41-0.1
    python -m mllm_assets.sample_data.rebuild --check

The pictures are drawn from the font's bitmaps, names and keywords are CLDR's; `emoji_groups.tsv` lists
the 800 emoji in order, with their groups. Shaping sequences needs a Pillow with libraqm (its wheels have it).
"""

import argparse
import csv
import io
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont, features

from mllm_assets.errors import DataError, MachineError

HERE = Path(__file__).parent
GROUPS_FILE = HERE / "emoji_groups.tsv"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
FONT_SIZE = 109  # the only size of the font's bitmaps, 136x128 px
EDGE_PX = 136
TOP_PX = 4
VARIATION_SELECTOR = "\ufe0f"  # CLDR's annotations leave it out


@dataclass(frozen=True, slots=True)
class Selected:
    """One emoji of the dataset and its group in Unicode's emoji charts."""

    emoji: str
    group: str
    subgroup: str


def read_selection(path: Path = GROUPS_FILE) -> list[Selected]:
    """The emoji of the dataset in order; code points are written in hex, joined by "-"."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return [
            Selected(
                "".join(chr(int(code, 16)) for code in row["code_points"].split("-")), row["group"], row["subgroup"]
            )
            for row in rows
        ]


def read_annotations(cldr: Path) -> dict[str, tuple[str, list[str]]]:
    """CLDR's English name and keywords (without the name) of each emoji."""
    found: dict[str, dict[str, str]] = {}
    for folder in ("annotations", "annotationsDerived"):
        path = cldr / folder / "en.xml"
        if not path.is_file():
            raise DataError(
                f"{path} does not exist. Install Debian's unicode-cldr-core, or name its folder with --cldr."
            )
        for element in ElementTree.parse(path).iter("annotation"):
            kind = element.get("type") or "keywords"
            found.setdefault(element.get("cp", ""), {})[kind] = element.text or ""
    annotations = {}
    for emoji, texts in found.items():
        name = texts.get("tts", "")
        keywords = [keyword.strip() for keyword in texts.get("keywords", "").split("|")]
        annotations[emoji] = name, [keyword for keyword in keywords if keyword and keyword != name]
    return annotations


def draw(emoji: str, font: ImageFont.FreeTypeFont) -> bytes:
    """An emoji on white, 136x136 px, as PNG."""
    layer = Image.new("RGBA", (EDGE_PX, EDGE_PX), (0, 0, 0, 0))
    left, top, *_ = font.getbbox(emoji)
    ImageDraw.Draw(layer).text((-left, TOP_PX - top), emoji, font=font, embedded_color=True)
    picture = Image.new("RGBA", layer.size, "white")
    picture.alpha_composite(layer)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def build(font_path: Path, cldr: Path) -> pa.Table:
    """The dataset as a table with the features that `datasets` reads."""
    if not features.check("raqm"):
        raise MachineError("This Pillow has no libraqm, which joins emoji sequences. Install Pillow from its wheel.")
    if not font_path.is_file():
        raise DataError(
            f"{font_path} is missing. Install Debian's fonts-noto-color-emoji, or name the file with --font."
        )
    font = ImageFont.truetype(str(font_path), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    annotations = read_annotations(cldr)
    selection = read_selection()
    group_names = sorted({item.group for item in selection})
    rows = []
    for item in selection:
        bare = item.emoji.replace(VARIATION_SELECTOR, "")
        name, keywords = annotations[bare]
        file_name = "-".join(f"{ord(char):x}" for char in bare) + ".png"
        rows.append(
            {
                "image": {"bytes": draw(item.emoji, font), "path": file_name},
                "text": f"{name}: {', '.join(keywords)}" if keywords else name,
                "name": name,
                "keywords": keywords,
                "group": group_names.index(item.group),
                "subgroup": item.subgroup,
                "emoji": item.emoji,
            }
        )
    return pa.Table.from_pylist(rows, schema=_schema(group_names))


def _schema(group_names: Sequence[str]) -> pa.Schema:
    text = {"dtype": "string", "_type": "Value"}
    described = {
        "image": {"_type": "Image"},
        "text": text,
        "name": text,
        "keywords": {"feature": text, "_type": "List"},
        "group": {"names": list(group_names), "_type": "ClassLabel"},
        "subgroup": text,
        "emoji": text,
    }
    columns = [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("text", pa.string()),
        ("name", pa.string()),
        ("keywords", pa.list_(pa.string())),
        ("group", pa.int64()),
        ("subgroup", pa.string()),
        ("emoji", pa.string()),
    ]
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": described}})})


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the dataset, or with --check compare it with the existing one."""
    parser = argparse.ArgumentParser(prog="python -m mllm_assets.sample_data.rebuild", description=__doc__)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--cldr", type=Path, default=CLDR, help="folder with annotations/ and annotationsDerived/")
    parser.add_argument("--output", type=Path, default=HERE / "emoji.parquet")
    parser.add_argument("--check", action="store_true", help="compare with --output, write nothing")
    options = parser.parse_args(arguments)
    table = build(options.font, options.cldr)
    if not options.check:
        pq.write_table(table, options.output)
        print(f"{options.output}: {table.num_rows} rows written")
        return 0
    shipped = pq.read_table(options.output)
    differing = [f"{table.num_rows} rows rebuilt, {shipped.num_rows} shipped"]
    if table.num_rows == shipped.num_rows:
        pairs = zip(table.to_pylist(), shipped.to_pylist(), strict=True)
        differing = [new["name"] for new, old in pairs if new != old]
    print(f"{options.output}: {table.num_rows} rows rebuilt, {len(differing)} differ {differing[:5] or ''}".rstrip())
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
