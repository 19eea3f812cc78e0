"""Workers wherever they are asked for: in this process, or on a cluster."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec

from mllm_msr.processing.workers import Folder, InProcess, Piece, Result, Workers
from mllm_msr.records.cluster import Cluster


@contextmanager
def joined(cluster: Cluster) -> Iterator[None]:
    """For the block this process may belong to a cluster: to one that is there at once, so that a wrong address is
    refused before any work; to one of this machine alone from when workers are needed first.

    Raises:
        ValueError: Ray is not installed, or no cluster answers at its address.
    """
    if find_spec("ray") is None:
        raise ValueError("--ray: Ray is not installed: `pip install 'mllm-msr[ray]'`")
    was_in_one = _is_in_one()
    try:
        if cluster.address != "local":
            from mllm_msr.processing.ray_workers import connect

            connect(cluster.address)
        yield
    finally:
        if _is_in_one() and not was_in_one:
            sys.modules["ray"].shutdown()


def _is_in_one() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def open_workers(
    cluster: Cluster | None,
    make: Callable[..., Callable[[Piece], Result]],
    folders: Sequence[Folder] = (),
) -> AbstractContextManager[Workers[Piece, Result]]:
    """Workers for the block, on ``cluster`` or in this process.

    Args:
        make: makes what does a piece, from the paths of ``folders``; it and all pieces and results are pickled.

    Raises:
        ValueError: no cluster answers at its address.
    """
    if cluster is None or cluster == Cluster("local", workers=1):  # who would be this process over again
        return nullcontext(InProcess(lambda: make(*(folder.path for folder in folders))))
    from mllm_msr.processing.ray_workers import RayWorkers

    return RayWorkers(cluster, make, folders)
