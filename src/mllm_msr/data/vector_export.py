"""Item vectors as an index of Faiss, for whoever searches elsewhere: cosine by inner product of unit vectors."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from mllm_msr.data.vector_files import vector_matrix
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEM_VECTORS
from mllm_msr.records.storage import write_bytes, write_text

INDEX, IDS = "items.faiss", "items.txt"


def export_index(run: RunFolder, folder: Path) -> int:
    """Write ``items.faiss``, a flat index of inner products over (I, F) unit vectors, and ``items.txt``, the id of each
    of its rows on a line; returns I.

    Raises:
        FileNotFoundError, ValueError: the stage ``vectors`` is not done, or out of date.
        ValueError: faiss is not installed, or an id has a line break.
    """
    if find_spec("faiss") is None:
        raise ValueError("faiss is not installed: `pip install 'mllm-msr[faiss]'`")
    run.require("vectors")
    import faiss

    frame = run.read(ITEM_VECTORS).sort("item_id")
    ids = frame["item_id"].to_list()
    if broken := [item for item in ids if len(item.splitlines()) != 1]:
        raise ValueError(f"item {broken[0]!r} has a line break in its id, and {IDS} has an id a line")
    vectors = vector_matrix(frame)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors.astype(np.float32))
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / INDEX, faiss.serialize_index(index).data)
    write_text(folder / IDS, "\n".join(ids) + "\n")
    return len(ids)
