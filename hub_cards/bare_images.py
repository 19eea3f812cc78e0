"""Published images hold pixels and nothing else: no place, camera, comment, preview, or bytes behind their end."""

import io

import pyarrow as pa
from PIL import Image

from mllm_msr.data.images import normalise

ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
PLAIN = {  # what Pillow says of the coding, not of the image
    *("jfif", "jfif_version", "jfif_unit", "jfif_density", "progressive", "progression"),
    *("adobe", "adobe_transform", "transparency"),
}
JFIF_BYTES = 14  # of a header without a thumbnail


def bare_images(rows: pa.Table) -> pa.Table:
    """The column ``image`` without metadata and file names; an image that has any is encoded anew."""
    place = rows.schema.get_field_index("image")
    if place < 0:
        return rows
    column = rows.column(place)
    images = [
        image if image is None or image["bytes"] is None else {"bytes": bare(image["bytes"]), "path": None}
        for image in column.to_pylist()
    ]
    return rows.set_column(place, rows.schema.field(place), pa.array(images, column.type))


def bare(data: bytes) -> bytes:
    """An image's bytes as they may be published.

    Raises:
        BrokenImage: it cannot be read.
    """
    return data if is_bare(data) else normalise(data)


def is_bare(data: bytes) -> bool:
    """Whether these are a JPEG or PNG image's pixels and nothing else."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # what stands behind the pixels is read only then
            end = ENDS.get(image.format or "")
            # 0xff in the pixels of a JPEG is never followed by the second byte of its end
            if end is None or image.info.keys() - PLAIN or data.find(end) + len(end) != len(data):
                return False
            segments = dict(getattr(image, "applist", ()))
            return (
                segments.keys() <= {"APP0", "APP14"}
                and len(segments.get("APP0", b"")) <= JFIF_BYTES
                and not getattr(image, "private_chunks", ())
            )
    except (OSError, ValueError, SyntaxError):
        return False
