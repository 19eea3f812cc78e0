"""Where the map-like work of a stage is done: on the workers of a Ray cluster, if it is not done in this process."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """Workers on a Ray cluster.

    Args:
        address: ``local``, a cluster of this machine alone, which ends with the stage; ``auto``, the one that this
            machine belongs to; or ``HOST:PORT`` of a cluster's head.
        workers: how many share its GPUs, or where it has none its cores; None: one a GPU, or one a core.
    """

    address: str
    workers: int | None = None
