"""What leaves with an image: its pixels."""

import io

import numpy as np
import polars as pl
import pytest
from hub_run import finish
from PIL import Image, PngImagePlugin

from mllm_msr.data.images import normalise
from mllm_msr.hub_cards.bare_images import bare, is_bare
from mllm_msr.hub_cards.publishing import build_hub
from mllm_msr.records.schema import ITEMS

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8))
SECRET = b"a private note"


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0131] = SECRET.decode()
    exif.get_ifd(0x8825)[1] = "N"
    return exif


def text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", SECRET.decode())
    return info


def late_text() -> bytes:
    """A PNG with a comment behind its pixels."""
    whole = encoded(NOISE, "PNG", pnginfo=text())
    start = whole.index(b"tEXt") - 4
    end = start + 12 + int.from_bytes(whole[start : start + 4], "big")
    last = whole.index(b"IEND") - 4
    return whole[:start] + whole[end:last] + whole[start:end] + whole[last:]


def private_chunk() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add(b"prVt", SECRET)
    return encoded(NOISE, "PNG", pnginfo=info)


def with_segment(marker: int) -> bytes:
    jpeg = encoded(NOISE, "JPEG")
    return jpeg[:2] + bytes((0xFF, marker)) + (len(SECRET) + 2).to_bytes(2, "big") + SECRET + jpeg[2:]


HIDING = {
    "exif": encoded(NOISE, "JPEG", exif=exif()),
    "comment": encoded(NOISE, "JPEG", comment=SECRET),
    "profile": encoded(NOISE, "JPEG", icc_profile=SECRET),
    "xmp": with_segment(0xE1),
    "maker's": with_segment(0xE7),
    "behind": encoded(NOISE, "JPEG") + SECRET,
    "preview behind": encoded(NOISE, "JPEG") + SECRET + encoded(NOISE, "JPEG"),
    "png exif": encoded(NOISE, "PNG", exif=exif()),
    "png text": encoded(NOISE, "PNG", pnginfo=text()),
    "png text behind the pixels": late_text(),
    "png private": private_chunk(),
    "png behind": encoded(NOISE, "PNG") + SECRET,
    "png behind twice": encoded(NOISE, "PNG") + SECRET + encoded(NOISE, "PNG"),
    "webp": encoded(NOISE, "WEBP", exif=exif()),
    "tiff": encoded(NOISE, "TIFF", description=SECRET.decode()),
    "gif": encoded(NOISE, "GIF", comment=SECRET),
}


@pytest.mark.parametrize("name", HIDING)
def test_nothing_but_pixels_is_left(name):
    data = HIDING[name]
    assert SECRET in data and not is_bare(data)
    image = bare(data)
    assert SECRET not in image and is_bare(image)
    with Image.open(io.BytesIO(image)) as kept:
        assert kept.size == NOISE.size


@pytest.mark.parametrize(
    "data",
    [
        normalise(encoded(NOISE, "PNG")),
        normalise(encoded(NOISE.resize((64, 64)), "PNG")),
        encoded(NOISE, "JPEG", progressive=True, optimize=True),
        encoded(NOISE, "JPEG", quality=100, subsampling=0),
        encoded(NOISE.convert("P"), "PNG"),
    ],
)
def test_what_is_bare_stays_as_it_is(data):
    assert bare(data) is data


def test_images_leave_a_run_without_their_secrets_and_names(make_run):
    run = make_run()
    frame, secrets = run.read(ITEMS), list(HIDING.values())
    images = [{"bytes": secrets[row % len(secrets)], "path": "home.jpg"} for row in range(len(frame))]
    images[3] = None
    run.write(ITEMS, frame.with_columns(pl.Series("image", images, dtype=ITEMS.columns["image"])))
    folder = build_hub(finish(run))["dataset"]
    published = pl.read_parquet(folder / "items/*.parquet")["image"]
    assert published.struct.field("path").null_count() == len(frame)
    assert published.is_null().to_list() == [row == 3 for row in range(len(frame))]
    chats = pl.read_parquet(folder / "sft/*.parquet")["images"].explode().drop_nulls()
    for image in [*published.drop_nulls(), *chats]:
        assert is_bare(image["bytes"]) and image["path"] is None
