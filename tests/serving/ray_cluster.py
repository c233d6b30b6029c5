"""Runs where Ray is: a cluster of three nodes on this machine, told what to do by lines on standard input.

`ray_cluster.py ARTIFACT REST_PORT GRPC_PORT` serves the artifact as `fake` and `twin`. It answers each line by one:
`kill` ends one of the nodes that have replicas, all of its processes at once; `replicas` tells how many of `fake` run.
"""

# mypy: ignore-errors
from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

from tests.serving.fake_model import OPENER
from trilevel.serving import ray as own


def running() -> int:
    deployments = serve.status().applications[own.NAME].deployments
    return deployments["model-fake"].replica_states.get("RUNNING", 0)


def processes(node: Any) -> set[psutil.Process]:
    parents = [psutil.Process(one.process.pid) for kind in node.all_processes.values() for one in kind]
    return {child for parent in parents for child in (parent, *parent.children(recursive=True))}


def kill(nodes: list[Any]) -> None:
    """As if the power of a node with a replica of `fake` failed: nothing of it can say a word to anybody."""
    titles = {node: [" ".join(one.cmdline()) for one in processes(node)] for node in nodes}
    node = next(node for node in nodes if any("model-fake" in title for title in titles[node]))
    for one in processes(node):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)


def main() -> None:
    artifact, rest_port, grpc_port = sys.argv[1], *map(int, sys.argv[2:])
    # a front end on each node; two replicas of each model on each of the last two
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=5) for _ in range(2)]
    ray.init(address=cluster.address, configure_logging=False, log_to_driver=False)
    grpc_options = {"port": grpc_port, "grpc_servicer_functions": ["trilevel.serving.ray:add_to_server"]}
    # no other proxy could have the same ports on this machine
    serve.start(proxy_location="HeadOnly", http_options={"port": rest_port}, grpc_options=grpc_options)
    arguments = {
        "artifacts": f"fake={artifact},twin={artifact}",
        "opener": OPENER,
        "max_batch": "4",
        "min_replicas": "2",
        "max_replicas": "3",
        "num_ingresses": "3",
    }
    serve.run(own.app(arguments), name=own.NAME)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        said = ""
        if line == "kill\n":
            kill(nodes)
        elif line == "replicas\n":
            said = str(running())
        sys.stdout.write(f"{said}\n")
        sys.stdout.flush()
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
