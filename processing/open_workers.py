"""Workers wherever they are asked for: in this process, or on a cluster."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from mllm_msr.processing.workers import Folder, InProcess, Piece, Result, Workers
from mllm_msr.records.cluster import Cluster


def open_workers(
    cluster: Cluster | None,
    make: Callable[..., Callable[[Piece], Result]],
    folders: Sequence[Folder] = (),
) -> AbstractContextManager[Workers[Piece, Result]]:
    """Workers for the block, on ``cluster`` or in this process.

    Args:
        make: makes what does a piece, from the paths of ``folders``; it and all pieces and results are pickled.

    Raises:
        ValueError: Ray is not installed, or no cluster answers at its address.
    """
    if cluster is None:
        return nullcontext(InProcess(lambda: make(*(folder.path for folder in folders))))
    try:
        from mllm_msr.processing.ray_workers import RayWorkers
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError("--ray: Ray is not installed: `pip install 'mllm-msr[ray]'`") from error
    return RayWorkers(cluster, make, folders)
