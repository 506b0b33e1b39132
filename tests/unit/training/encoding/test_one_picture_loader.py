"""One way to open a picture: what training sees is what ingest publishes, check-data judges and a chat gets."""

import base64
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_assets.data.curate.checks import check_directory
from mllm_assets.data.ingest.images import PictureError, open_picture, plain_picture, published_bytes
from mllm_assets.data.ingest.spec import DecodeLimits
from mllm_assets.data.quality.report import thumbnail
from mllm_assets.errors import DataError
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.image_files import image_size, load_image
from mllm_assets.training.encoding.inputs import check_pictures
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.worker.protocol import Reporter

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n0 0 moveto 64 64 lineto stroke\n%%EOF\n"
RAMP = np.arange(64, dtype=np.float64).reshape(8, 8) / 63


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(np.uint8(np.dstack([RAMP * 255] * 3))).resize((40, 24)), "JPEG", exif=exif)


DEPARTING = {
    "more than 8 bits": saved(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
    "more than 8 bits a channel": saved(Image.fromarray((RAMP * 255).astype(np.float32)), "TIFF"),
    "an EXIF orientation": rotated_jpeg(),
}


def data_directory(folder: Path, pictures: list[bytes]) -> Path:
    """A hand-written entry with one row a picture."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, data in enumerate(pictures):
        (folder / "images" / f"{number}.png").write_bytes(data)
        turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "a"}]
        rows.append({"messages": turns, "images": [f"images/{number}.png"]})
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    entry = {"file_name": "e.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "e.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"e": entry}))
    return folder


def row_of(path: Path) -> EncodedRow:
    return EncodedRow.of_picture(path, "r1")


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in `gs` on PATH; the file appears when anything runs it."""
    ran = tmp_path / "GS_RAN"
    script = tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\ntouch "{ran}"\nexit 1\n')
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return ran


@pytest.mark.attack("pictures")
def test_eps_is_refused_at_every_door_and_ghostscript_is_never_run(ghostscript: Path, tmp_path: Path) -> None:
    """A hand-written entry whose picture was EPS, named `.png`, started ghostscript during training."""
    folder = data_directory(tmp_path / "data", [EPS])
    path = folder / "images" / "0.png"
    for use in (
        lambda: load_image(path, row_id="r1"),
        lambda: image_size(path, max_pixels=100, min_pixels=1, row_id="r1"),
        lambda: check_pictures(EncodedRows.of([row_of(path)]), Reporter()),
    ):
        with pytest.raises(DataError, match=r"0\.png of row r1 cannot be used: it is EPS, which is not opened"):
            use()
    for use in (lambda: thumbnail(path, 32), lambda: published_bytes(EPS)):
        with pytest.raises(PictureError, match="it is EPS"):
            use()
    [report] = check_directory(folder)
    assert [problem.split(": ")[1] for problem in report.problems] == [
        "image_format_unsupported (EPS). Training would end there"
    ]
    assert not ghostscript.exists()


@pytest.mark.parametrize("why", DEPARTING)
def test_training_sees_the_picture_that_ingest_would_publish(why: str, tmp_path: Path) -> None:
    """A 16-bit grey PNG was trained as white, a float TIFF as black, and a phone's picture lying on its side."""
    path = tmp_path / "picture"
    path.write_bytes(DEPARTING[why])
    published = tmp_path / "published.png"
    published.write_bytes(published_bytes(DEPARTING[why])[0])
    seen, expected = (np.asarray(load_image(one, max_pixels=10**6, min_pixels=1)) for one in (path, published))
    assert np.array_equal(seen, expected) and seen.std() > 10
    height, width = seen.shape[:2]
    assert image_size(path, max_pixels=10**6, min_pixels=1) == (width, height)


def test_a_run_and_check_data_say_once_how_many_pictures_differ_from_llamafactory(tmp_path: Path) -> None:
    plain = saved(Image.new("RGB", (20, 20), "red"), "PNG")
    folder = data_directory(tmp_path / "data", [*DEPARTING.values(), plain])
    reporter = Reporter()
    rows = [row_of(folder / "images" / f"{number}.png") for number in range(4)] * 2
    check_pictures(EncodedRows.of(rows), reporter)
    [report] = check_directory(folder)
    expected = [
        "2 pictures have more than 8 bits a channel, scaled to 8",
        "1 picture has an EXIF orientation, applied",
    ]
    for warnings in (reporter.warnings, report.warnings):
        assert [text.split(". LLaMA-Factory")[0] for text in warnings] == expected
    assert not report.problems


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA"])
def test_an_upright_picture_of_8_bits_is_resized_in_its_own_mode(mode: str, tmp_path: Path) -> None:
    """LLaMA-Factory resizes before it converts to RGB, and drops alpha; its losses depend on it."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / "picture"
    path.write_bytes(saved(image, "TIFF" if mode == "CMYK" else "PNG"))
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        path.write_bytes(saved(image, "PNG"))
    with Image.open(path) as opened:
        expected = opened.resize((20, 30)).convert("RGB")
    assert np.array_equal(np.asarray(load_image(path, max_pixels=600, min_pixels=1)), np.asarray(expected))


@pytest.mark.attack("pictures")
@pytest.mark.parametrize(("limits", "defect"), [
    ({"max_bytes": 100}, "image_too_many_bytes"),
    ({"max_pixels": 1000}, "image_too_many_pixels"),
    ({"max_frames": 2}, "image_too_many_frames"),
    ({"max_decode_s": 0.0}, "image_decode_too_slow"),
])  # fmt: skip
def test_bytes_pixels_frames_and_seconds_are_limited(limits: dict[str, Any], defect: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(np.uint8(np.random.default_rng(k).integers(0, 255, (200, 200)))) for k in range(3)]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    path = tmp_path / "picture.gif"
    path.write_bytes(data)
    for file in (data, path):
        with pytest.raises(PictureError) as refused, open_picture(file, limits=DecodeLimits(**limits)) as image:
            image.load()
        assert refused.value.defect == defect


@pytest.mark.attack("pictures")
@pytest.mark.parametrize(("data", "name"), [
    (b"\0\0\0\x18ftypheic" + bytes(200), "HEIF"), (b"%PDF-1.4", "PDF"), (b"<?xml?><svg xmlns='x'/>", "SVG"),
])  # fmt: skip
def test_a_format_that_is_not_opened_is_named(data: bytes, name: str) -> None:
    with pytest.raises(PictureError, match=f"it is {name}, which is not opened") as refused, open_picture(data):
        pass
    assert (refused.value.defect, refused.value.format) == ("image_format_unsupported", name)


@pytest.mark.parametrize("format", ["AVIF", "PPM", "JPEG2000", "ICO"])
def test_formats_of_phones_cameras_and_laboratories_are_read(format: str) -> None:
    image = Image.new("RGB", (32, 32), (200, 30, 30))
    with open_picture(saved(image, format)) as opened:
        opened.load()
        assert np.abs(np.asarray(plain_picture(opened).convert("RGB"), dtype=int) - (200, 30, 30)).max() < 12


def test_a_chat_gets_the_picture_that_training_sees(tmp_path: Path) -> None:
    chat_request = pytest.importorskip("mllm_assets.inference.chat_request", reason="needs the extra serve")
    for data in DEPARTING.values():
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        (tmp_path / "picture").write_bytes(data)
        limits = {"max_pixels": 10**6, "min_pixels": 1}
        seen = chat_request.picture(url, "messages[0]", **limits)
        assert np.array_equal(np.asarray(seen), np.asarray(load_image(tmp_path / "picture", **limits)))
    with pytest.raises(chat_request.RequestError, match="the image cannot be used: it is EPS"):
        chat_request.picture("data:image/png;base64," + base64.b64encode(EPS).decode(), "m", max_pixels=9, min_pixels=1)
