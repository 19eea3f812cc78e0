"""Items as they travel to whoever reads them: images stay encoded until they are looked at."""

import logging
from dataclasses import dataclass

from mllm_msr.data.images import BrokenImage, decode
from mllm_msr.modeling.inputs import Candidate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedItem:
    """An item whose image is a file's content, or None."""

    item_id: str
    title: str = ""
    text: str = ""
    image: bytes | None = None

    def decoded(self) -> Candidate:
        """The item with its image, without its id.

        An image that cannot be decoded is left out: prepared images are sound, and one that is not must not stop a
        million others.
        """
        try:
            image = decode(self.image) if self.image else None
        except BrokenImage:
            logger.warning("item %s is read without its image, which cannot be decoded", self.item_id)
            image = None
        return Candidate(title=self.title, text=self.text, image=image)
