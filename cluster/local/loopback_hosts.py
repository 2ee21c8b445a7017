"""The provider that Ray's autoscaler starts hosts of cluster.py with: nodes on this machine, each with its own loopback address
and its own folder of Ray's.

It is Ray's own for tests, whose nodes would all have the machine's outer address, and the head's node type as their label.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

NETWORK = "127.77"
"""Addresses are 127.77.a.b; 127.77.0.1 is the head's. Of 127.0.0.1 Ray makes the machine's outer address."""


def address(number: int) -> str:
    """number: from 0, the head's."""
    high, low = divmod(number + 1, 256)
    return f"{NETWORK}.{high % 256}.{low}"


class LoopbackHosts(FakeMultiNodeProvider):
    def _create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels) -> None:
        left: dict[str, Any] = copy.deepcopy(resources)
        with self.lock:
            node_id = self._next_hex_node_id()
            os.environ["RAY_NODE_TYPE_NAME"] = tags[TAG_RAY_USER_NODE_TYPE]  # Ray makes the label ray.io/node-group of it
            params = RayParams(
                node_ip_address=address(self._next_node_id),
                gcs_address=self._gcs_address,
                redis_address=self._gcs_address,
                # In a folder that they share, a host that unpacks a job's working_dir first removes it from under the others.
                temp_dir=str(Path(self.provider_config["folder"]) / f"h{self._next_node_id}"),
                min_worker_port=0,
                max_worker_port=0,
                dashboard_agent_listen_port=0,
                num_cpus=left.pop("CPU", 0),
                num_gpus=left.pop("GPU", 0),
                object_store_memory=left.pop("object_store_memory", None),
                resources=left,
                labels=labels,
                env_vars={
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id,
                    "RAY_CLOUD_INSTANCE_ID": node_id,
                    "RAY_NODE_TYPE_NAME": tags[TAG_RAY_USER_NODE_TYPE],
                    "RAY_OVERRIDE_RESOURCES": json.dumps(left),
                    "RAY_OVERRIDE_LABELS": json.dumps(labels),
                },
            )
            node = Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)
            known = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_NODE_NAME: node_id, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
            self._nodes[node_id] = {"tags": known | tags, "node": node}
