import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mllm_msr.data.images import TURNED, BrokenImage, decode, encode, normalise, thumbnail


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def near(pixel: object, wanted: tuple[int, int, int], tolerance: int = 12) -> bool:
    assert isinstance(pixel, tuple)
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, wanted, strict=True))


RED = Image.new("RGB", (60, 40), (200, 30, 30))


MANY = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "DDS", "PCX", "SGI", "QOI", "IM")


@pytest.mark.parametrize("kind", MANY)
def test_formats_are_read_from_the_bytes(kind: str) -> None:
    image = decode(save(RED, kind))
    assert image.mode == "RGB" and image.size == (60, 40)
    assert near(image.getpixel((30, 20)), (200, 30, 30))


def test_cmyk_palette_grey_and_deep_grey() -> None:
    assert near(decode(save(RED.convert("CMYK"), "JPEG")).getpixel((30, 20)), (200, 30, 30))
    assert near(decode(save(RED.convert("P"), "PNG")).getpixel((30, 20)), (200, 30, 30), 30)
    assert near(decode(save(Image.new("1", (40, 40), 1), "PNG")).getpixel((5, 5)), (255, 255, 255))
    deep = Image.fromarray(np.full((40, 40), 32768, dtype=np.uint16))
    assert near(decode(save(deep, "PNG")).getpixel((5, 5)), (128, 128, 128), 1)


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    assert decode(save(clear, "PNG")).getpixel((5, 5)) == (255, 255, 255)
    palette = Image.new("RGB", (40, 40), "black").convert("P")
    assert decode(save(palette, "PNG", transparency=palette.getpixel((0, 0)))).getpixel((5, 5)) == (255, 255, 255)
    half = Image.new("LA", (40, 40), (0, 128))
    assert near(decode(save(half, "PNG")).getpixel((5, 5)), (127, 127, 127), 1)


def test_exif_rotation_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: stored 60 x 40, seen 40 x 60
    data = save(RED, "JPEG", exif=exif)
    assert decode(data).size == (40, 60)
    stored = normalise(data)
    assert stored != data and decode(stored).size == (40, 60)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    data = save(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    assert near(decode(data).getpixel((5, 5)), (255, 0, 0))


@pytest.mark.parametrize("size", [(1, 2), (3, 3), (5000, 2), (2, 5000), (900, 100)])
def test_tiny_and_ribbon_images_are_padded(size: tuple[int, int]) -> None:
    image = decode(save(Image.new("RGB", size, "black"), "PNG"), max_edge=256)
    assert min(image.size) >= 32 and max(image.size) <= 256
    assert max(image.size) <= 8 * min(image.size)
    assert min(image.convert("L").getextrema()) < 50  # the image is still there


def test_large_images_shrink_in_proportion() -> None:
    for kind in ("JPEG", "PNG"):
        assert decode(save(Image.new("RGB", (1600, 1200)), kind), max_edge=400).size == (400, 300)


def noisy() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    return save(Image.fromarray(pixels), "JPEG")


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header promises 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404 Not Found</html>", "not an image"),
        (noisy()[: len(noisy()) // 2], "truncated"),
        (noisy()[:30], "not an image|damaged|truncated"),
        (save(RED, "PNG")[:-30], "truncated|damaged"),
        (save(RED, "PNG").replace(b"IDAT", b"XDAT"), "damaged|truncated|not an image"),
        (bomb(), "more than 50,000,000 pixels"),
        (save(Image.new("RGB", (1, 1)), "GIF"), "one-pixel placeholder"),
    ],
)
def test_broken_images_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenImage, match=reason):
        decode(data)


def test_pixel_limit_is_checked_before_decoding() -> None:
    with pytest.raises(BrokenImage, match="more than 2,000 pixels"):
        decode(save(RED, "PNG"), max_pixels=2_000)


@pytest.mark.parametrize("cut", range(0, 1400, 97))
def test_damage_anywhere_never_raises_anything_else(cut: int) -> None:
    data = bytearray(noisy())
    data[cut : cut + 40] = b"\xff" * 40
    with contextlib.suppress(BrokenImage):
        assert decode(bytes(data)).mode == "RGB"


def test_storage_is_lossless_when_small() -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(decode(encode(small))), np.asarray(small))
    assert encode(Image.new("RGB", (300, 200), "red"))[:2] == b"\xff\xd8"
    assert normalise(save(RED.convert("CMYK"), "JPEG"))[:4] == b"\x89PNG"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "MPO"])
@pytest.mark.parametrize("edge", [60, 300, 2000])
def test_what_is_stored_holds_pixels_and_nothing_else(kind: str, edge: int) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8825).update({1: "N", 2: (10.0, 20.0, 30.0)})  # GPS
    exif[0x010F] = "secret camera"
    text = PngInfo()
    text.add_text("Author", "secret name")
    told: dict[str, Any] = {"exif": exif, "icc_profile": b"secret profile", "xmp": b"secret xmp", "dpi": (301, 301)}
    told |= {"comment": b"secret comment", "pnginfo": text} if kind != "WEBP" else {}
    if kind == "MPO":
        told |= {"save_all": True, "append_images": [Image.new("RGB", (60, 60), "blue")]}
    data = save(RED.resize((edge, edge)), kind, **told) + b"secret trailing bytes"
    assert b"secret" in data
    for stored in (normalise(data), encode(decode(data)), thumbnail(data)):
        assert b"secret" not in stored and b"Exif" not in stored
        with Image.open(io.BytesIO(stored)) as image:
            assert not image.getexif() and not set(image.info) - {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_numbers_are_scaled_whatever_their_range_and_byte_order() -> None:
    for mode, numbers in (
        ("I;16", np.linspace(0, 65535, 4096).astype("<u2")),
        ("I;16B", np.linspace(0, 65535, 4096).astype(">u2")),
        ("I;16", np.linspace(0, 4095, 4096).astype("<u2")),  # of a camera of 12 bits
        ("I", np.linspace(-70_000, 200_000, 4096).astype("i4")),
        ("F", np.linspace(0, 1, 4096).astype("f4")),
    ):
        image = Image.frombytes(mode, (64, 64), numbers.tobytes())
        assert decode(save(image, "TIFF")).convert("L").getextrema() == (0, 255), mode
    eight_bits = Image.frombytes("I;16", (64, 64), (np.arange(4096) % 200).astype("<u2").tobytes())
    assert decode(save(eight_bits, "PNG")).convert("L").getextrema() == (0, 199)
    deep = Image.fromarray(np.array([[np.nan, 0.5], [np.inf, 1.0]], dtype=np.float32)).resize((40, 40), 0)
    with contextlib.suppress(BrokenImage):
        assert decode(save(deep, "TIFF")).mode == "RGB"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_one_colour_because_of_transparency_is_no_image(mode: str) -> None:
    hidden = Image.linear_gradient("L").resize((40, 40)).convert(mode)
    hidden.putalpha(0)
    white = Image.new(mode, (40, 40), "white")
    white.putalpha(Image.linear_gradient("L").resize((40, 40)))
    for image in (hidden, white):
        with pytest.raises(BrokenImage, match="one colour only"):
            decode(save(image, "PNG"))
    plain = Image.new(mode, (40, 40), "white")  # a swatch is what it is
    assert decode(save(plain, "PNG")).getpixel((5, 5)) == (255, 255, 255)


def test_formats_that_take_another_program_are_named() -> None:
    with pytest.raises(BrokenImage, match="EPS, which takes another program"):
        decode(save(RED, "EPS"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_set_upright(orientation: int) -> None:
    upright = Image.new("RGB", (60, 40), "black")
    upright.paste("white", (0, 0, 20, 20))
    turned = upright if orientation == 1 else upright.transpose(INVERSE[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(decode(save(turned, "PNG", exif=exif))), np.asarray(upright))


INVERSE = {**TURNED, 6: TURNED[8], 8: TURNED[6]}
