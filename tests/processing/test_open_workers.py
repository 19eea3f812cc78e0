"""A cluster that asks for a token, as Ray makes one wherever there is a token."""

import os
import subprocess
import sys
from pathlib import Path

CLUSTER = """
import ray
ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=80_000_000)
print(ray.get_runtime_context().gcs_address, flush=True)
input()
"""
JOIN = """
import sys
from mllm_msr.processing.open_workers import joined
from mllm_msr.records.cluster import Cluster
with joined(Cluster(sys.argv[1])):
    print("joined")
"""


def test_a_cluster_that_asks_for_a_token_is_joined_by_who_has_it(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    env |= {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}  # where a cluster that is made leaves its token
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", CLUSTER], env=env, **pipes) as cluster:
        place = cluster.stdout.readline().strip()
        assert (tmp_path / ".ray/auth_token").is_file()
        env["RAY_AUTH_MODE"] = "token"
        joins = subprocess.run([sys.executable, "-c", JOIN, place], env=env, capture_output=True, text=True)
        nothing = env | {"HOME": str(tmp_path / "none")}
        asks = subprocess.run([sys.executable, "-c", JOIN, place], env=nothing, capture_output=True, text=True)
        cluster.communicate("\n")
    assert joins.stdout == "joined\n", joins.stderr
    assert "the cluster asks for its token: have ~/.ray/auth_token of its head's machine" in asks.stderr
