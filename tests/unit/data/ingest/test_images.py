"""Images as bytes: what is published, and at what cost."""

from collections.abc import Callable

import pytest
from PIL import Image, ImageFile

from mllm_assets.data.ingest.images import PictureError, open_picture, published_bytes, upright_rgb
from tests.unit.data.made_datasets import encode, picture


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


def test_an_error_of_the_code_that_uses_a_picture_is_not_called_damage_of_the_picture() -> None:
    with pytest.raises(KeyError, match="a bug"), open_picture(encode(picture(1))) as image:
        image.load()
        raise KeyError("a bug")


@pytest.mark.attack("pictures")
@pytest.mark.parametrize("use", [lambda image: image.load(), lambda image: image.convert("L"), upright_rgb])
def test_damage_that_shows_only_when_the_picture_is_decoded_is_damage(use: Callable[[Image.Image], object]) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        data = encode(Image.effect_noise((64, 64), 80).convert("RGB"), kind)
        with pytest.raises(PictureError, match="it is (damaged|not a picture)"), open_picture(data[:-200]) as image:
            use(image)
