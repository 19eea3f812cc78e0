"""Pictures from anywhere -> small RGB pictures that every backbone takes, or a reason why not."""

import io
import warnings
from functools import cache

from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 50_000_000  # about what a full-frame camera makes; more is a mistake or an attack
MAX_EDGE = 672  # LLaVA-NeXT's largest; finer detail never reaches a backbone of this kind
MIN_EDGE = 32  # two patches of 14 or 16 pixels; some image processors fail below that
MAX_ASPECT = 8  # wider than this is padded: processors that keep the aspect ratio reject or explode on ribbons
THUMBNAIL = 96  # longer edge of the pictures in a report
SMALL = 128  # pictures up to this edge are stored lossless


class BrokenImage(ValueError):
    """These bytes are no usable picture; the message is a reason short enough to count by."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS, max_edge: int = MAX_EDGE) -> Image.Image:
    """Decode ``data`` into an RGB picture with edges of MIN_EDGE to ``max_edge`` pixels and aspect of at most 8:1.

    The format is read from the bytes, never from a name. EXIF rotation is applied, transparency is laid on white, an
    animation gives its first frame, 16-bit grey is scaled, CMYK and palettes are converted, tiny or ribbon-shaped
    pictures are padded with white. Raises :class:`BrokenImage` for what is no picture, is cut short, has more than
    ``max_pixels`` pixels (before they are decoded), or is the one-pixel placeholder of a tracking link.
    """
    return _fit(_to_rgb(_load(data, max_pixels, max_edge)), max_edge)


def encode(image: Image.Image) -> bytes:
    """Bytes to store: PNG up to 128 x 128 pixels, where JPEG would spoil most and saves least; JPEG above."""
    buffer = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def normalise(data: bytes, max_pixels: int = MAX_PIXELS, max_edge: int = MAX_EDGE) -> bytes:
    """Bytes to store for ``data``: unchanged if it is a plain RGB JPEG or PNG of a fitting size, else encoded anew."""
    image = decode(data, max_pixels, max_edge)
    with Image.open(io.BytesIO(data)) as original:
        plain = original.format in ("JPEG", "PNG") and original.mode == "RGB" and not original.has_transparency_data
        if plain and original.size == image.size and _orientation(original) == 1:
            return data
    return encode(image)


def thumbnail(data: bytes) -> bytes:
    """A small JPEG of an image for reports, transparency laid on white; :class:`BrokenImage` if it is none."""
    small = _to_rgb(_load(data, MAX_PIXELS, 2 * THUMBNAIL))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF is not in every Pillow


def _load(data: bytes, max_pixels: int, max_edge: int) -> Image.Image:
    if not data:
        raise BrokenImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own pixel limit below is stricter than Pillow's warning
            image = Image.open(io.BytesIO(data), formats=_formats())
            if image.size == (1, 1):
                raise BrokenImage("one-pixel placeholder")
            if image.width * image.height > max_pixels:
                raise BrokenImage(f"more than {max_pixels:,} pixels")
            image.draft(None, (max_edge, max_edge))  # lets JPEG decode at half or quarter size
            image.load()
            return image
    except BrokenImage:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"more than {max_pixels:,} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise BrokenImage("not an image") from error
    except Exception as error:  # decoders fail in many ways on damaged data: OSError, SyntaxError, struct.error, ...
        reason = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise BrokenImage(reason) from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # unreadable EXIF: the picture itself was fine
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if _orientation(image) in range(2, 9):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
        return image.point(lambda value: value / 257, "F").convert("L").convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


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
