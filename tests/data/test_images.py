import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mllm_msr.data.images import BrokenImage, decode, encode, normalise


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def near(pixel: object, wanted: tuple[int, int, int], tolerance: int = 12) -> bool:
    assert isinstance(pixel, tuple)
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, wanted, strict=True))


RED = Image.new("RGB", (60, 40), (200, 30, 30))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
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
def test_tiny_and_ribbon_pictures_are_padded(size: tuple[int, int]) -> None:
    image = decode(save(Image.new("RGB", size, "black"), "PNG"), max_edge=256)
    assert min(image.size) >= 32 and max(image.size) <= 256
    assert max(image.size) <= 8 * min(image.size)
    assert min(image.convert("L").getextrema()) < 50  # the picture is still there


def test_large_pictures_shrink_in_proportion() -> None:
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
def test_broken_pictures_have_a_reason(data: bytes, reason: str) -> None:
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


def test_storage_is_lossless_when_small_and_leaves_good_files_alone() -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(decode(encode(small))), np.asarray(small))
    large = encode(Image.new("RGB", (300, 200), "red"))
    assert large[:2] == b"\xff\xd8"
    assert normalise(large) is large
    assert normalise(save(RED.convert("CMYK"), "JPEG"))[:4] == b"\x89PNG"
