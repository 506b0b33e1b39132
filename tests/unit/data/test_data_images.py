"""Images as bytes: what is published, and at what cost."""

import pytest
from made_datasets import encode, picture
from PIL import Image, ImageFile

from mllm_assets.data.images import published_bytes


def test_a_png_is_published_without_decoding_it_unless_a_chunk_may_turn_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's getexif() decodes a whole PNG, because EXIF may come last."""
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.format) or load(self))
    plain = encode(picture(1))
    assert published_bytes(plain) == (plain, "png")
    assert decoded == []
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(picture(1), exif=exif)
    content, _ = published_bytes(turned)
    assert content != turned
    assert decoded
