"""Images from anywhere -> small RGB images that every backbone takes, without metadata; or a reason why not."""

import io
from collections import defaultdict
from typing import Any

import numpy as np
from PIL import Image

from mllm_msr.records.sections import MAX_EDGE, MAX_PIXELS

MIN_EDGE = 32  # two patches of 14 or 16 pixels; some image processors fail below that
MAX_ASPECT = 8  # wider than this is padded: processors that keep the aspect ratio reject or explode on ribbons
THUMBNAIL = 96  # longer edge of the images in a report
SMALL = 128  # images up to this edge are stored lossless
DEPTHS = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # white of 8 to 16 bits
WHITE: dict[str, tuple[float, ...]] = defaultdict(lambda: DEPTHS, F=(1.0, *DEPTHS))  # of numbers
ORIENTATION = 0x0112  # the EXIF tag
TURNED = {  # its values -> what sets the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImage(ValueError):
    """These bytes are no usable image; the message is a reason short enough to count by."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS, max_edge: int = MAX_EDGE) -> Image.Image:
    """Decode ``data`` into an RGB image with edges of MIN_EDGE to ``max_edge`` pixels and an aspect of at most 8:1.

    The format, any that Pillow decodes by itself, is read from the bytes, never from a name. EXIF rotation is applied,
    transparency is laid on white, an animation gives its first frame, numbers beyond 8 bits are scaled, CMYK and
    palettes are converted, tiny or ribbon-shaped images are padded with white. Metadata does not survive.

    Raises:
        BrokenImage: no image, one that is cut short, has more than ``max_pixels`` pixels (which are not decoded then),
            is the one-pixel placeholder of a tracking link, or has only one colour once transparency or scale are
            applied.
    """
    image = _fit(_rgb(data, max_pixels, max_edge), max_edge)
    image.info = {}  # from where an encoder would take comments and profiles
    return image


def encode(image: Image.Image) -> bytes:
    """Bytes to store: PNG up to 128 x 128 pixels, where JPEG would spoil most and saves least; JPEG above."""
    buffer = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def normalise(data: bytes, max_pixels: int = MAX_PIXELS, max_edge: int = MAX_EDGE) -> bytes:
    """Bytes to store for ``data``: always encoded anew, so that they hold pixels and nothing else (no place, no camera,
    no comment, no earlier state of the image)."""
    return encode(decode(data, max_pixels, max_edge))


def thumbnail(data: bytes) -> bytes:
    """A small JPEG of an image for reports, transparency laid on white; :class:`BrokenImage` if it is none."""
    small = _rgb(data, MAX_PIXELS, 2 * THUMBNAIL)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.info = {}
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def _rgb(data: bytes, max_pixels: int, max_edge: int) -> Image.Image:
    if not data:
        raise BrokenImage("empty file")
    image: Any = None
    try:
        image = Image.open(io.BytesIO(data))
        if image.size == (1, 1):
            raise BrokenImage("one-pixel placeholder")
        if image.width * image.height > max_pixels:
            raise BrokenImage(f"more than {max_pixels:,} pixels")
        if image.format in ("EPS", "WMF"):
            raise BrokenImage(f"{image.format}, which takes another program to decode")
        image.draft(None, (max_edge, max_edge))  # lets JPEG decode at half or quarter size
        image.load()
        return _upright(image, _opaque(image))
    except BrokenImage:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"more than {max_pixels:,} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise BrokenImage("not an image") from error
    except Exception as error:  # decoders fail in many ways on damaged data: OSError, SyntaxError, struct.error, ...
        reason = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise BrokenImage(reason) from error


def _opaque(image: Image.Image) -> Image.Image:
    """As RGB, whatever the mode."""
    if image.mode == "F" or image.mode.startswith("I"):  # numbers, which convert() would clip to white or black
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        low, high = float(values.min()), float(values.max())
        varied, low = low < high, min(0.0, low)
        high = next((white for white in WHITE[image.mode] if high <= white), high)
        made = Image.fromarray(((values - low) * (255 / (high - low)) + 0.5).astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        varied = not _one_colour(image)
        made = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    else:
        return image.convert("RGB")
    if varied and _one_colour(made):
        raise BrokenImage("one colour only, once its transparency or range is applied")
    return made


def _one_colour(image: Image.Image) -> bool:
    return all(low == high for low, high in np.reshape(image.getextrema(), (-1, 2)))


def _upright(image: Image.Image, made: Image.Image) -> Image.Image:
    try:
        turned = TURNED.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # unreadable EXIF: the image itself was fine
        return made
    return made if turned is None else made.transpose(turned)


def _fit(image: Image.Image, max_edge: int) -> Image.Image:
    scale = min(1.0, max_edge / max(image.size))
    if scale < 1:
        width, height = (max(1, round(edge * scale)) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    least = max(min(MIN_EDGE, max_edge), -(-max(image.size) // MAX_ASPECT))
    if min(image.size) < least:
        canvas = Image.new("RGB", (max(image.width, least), max(image.height, least)), "white")
        canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
        return canvas
    return image
