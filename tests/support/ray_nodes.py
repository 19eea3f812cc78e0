"""A real Ray cluster on this machine: a head where nothing is computed, and nodes of one core each."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster as Nodes

SMALL = {"num_cpus": 1, "object_store_memory": 80_000_000}


@contextmanager
def ray_nodes(count: int, copies: Path) -> Iterator[Nodes]:
    """``count`` nodes beside the head, which this process has joined. What they are sent they keep below ``copies``."""
    watch = {"health_check_period_ms": 300, "health_check_initial_delay_ms": 300}
    head = {**SMALL, "num_cpus": 0, "include_dashboard": False, "_system_config": watch}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # as workers run what is defined here
        patch.setenv("XDG_CACHE_HOME", str(copies))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Nodes(initialize_head=True, head_node_args=head)
        try:
            for _ in range(count):
                nodes.add_node(**SMALL)
            ray.init(nodes.address, log_to_driver=False)
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()
