"""What a cluster has room for: the nodes that are there, those that its autoscaler may add, and which may be used for what.

A run has workers, which train, and streams, whose tasks make the views. Each may be bound to nodes with a label of Ray's; a node
may then be for workers, for streams, for both or for neither.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from ssl_ray.config import Workers
from ssl_ray.errors import ResourceError

ROUNDING = 1e-6
"""Of a worker: sums of shares of CPUs are not exact."""
HEAD = "node:__internal_head__"
"""A resource that Ray gives the head."""
GROUP = "ray.io/node-group"
"""A label that Ray gives the nodes that an autoscaler starts: the name of the node type."""


def selector(label: str | None) -> dict[str, str]:
    """What Ray calls a label selector, of KEY=VALUE or nothing."""
    return {} if label is None else dict([label.split("=", 1)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
    """Labels of the nodes that are for workers and for streams, KEY=VALUE; None: any."""

    train: str | None = None
    data: str | None = None


@dataclasses.dataclass(frozen=True)
class Node:
    resources: dict[str, float]
    """All of them, or those that are free."""
    labels: dict[str, str]

    def has(self, label: str | None) -> bool:
        return selector(label).items() <= self.labels.items()

    @property
    def cpus(self) -> float:
        return self.resources.get("CPU", 0.0)


@dataclasses.dataclass(frozen=True)
class Capacity:
    nodes: list[Node]
    """That are there."""
    coming: list[Node]
    """That the autoscaler may add, each type up to its limit; none where there is no autoscaler."""

    @property
    def most(self) -> list[Node]:
        return self.nodes + self.coming


@dataclasses.dataclass(frozen=True)
class Cpus:
    """Of nodes that are for workers alone, for streams alone, and for both."""

    train: float
    data: float
    both: float

    def __mul__(self, share: float) -> "Cpus":
        return Cpus(self.train * share, self.data * share, self.both * share)

    @property
    def total(self) -> float:
        return self.train + self.data + self.both

    def count(self, worker: float, stream: float) -> float:
        """So many workers with so many CPUs each, and for each a stream with so many more, could share them."""
        each = [(self.train + self.both, worker), (self.data + self.both, stream), (self.total, worker + stream)]
        return min(cpus / need for cpus, need in each if need)

    def left(self, trained: float) -> float:
        """What streams may use when workers have so many; those for workers alone are taken first."""
        return self.data + self.both - max(0.0, trained - self.train)


def cpus_of(nodes: Iterable[Node], where: Where) -> Cpus:
    train = data = both = 0.0
    for node in nodes:
        match node.has(where.train), node.has(where.data):
            case True, True:
                both += node.cpus
            case True, False:
                train += node.cpus
            case False, True:
                data += node.cpus
    return Cpus(train, data, both)


def gpus_of(nodes: Iterable[Node], label: str | None) -> int:
    """Of the nodes that are for workers."""
    return int(sum(node.resources.get("GPU", 0.0) for node in nodes if node.has(label)))


def require_cpus(cpus: Cpus, *, workers: int | Workers, threads: int, where: Where | None = None, grown: bool = False) -> None:
    """Raises ResourceError, saying what is missing and what to set, where half a CPU a worker is not there; where the number
    of workers may change, whole CPUs are counted, as many for data as to train, so that a new machine brings so many workers.

    grown: they are those of a cluster with all nodes that its autoscaler may add.
    """
    elastic = isinstance(workers, Workers)
    each, fewest = (float(threads), workers.min) if isinstance(workers, Workers) else (0.25, workers)
    there = cpus.count(each, each)
    if there + ROUNDING >= fewest:
        return
    has = f"the cluster has {cpus.total:g} free"
    if where is not None and (where.train or where.data):
        place = {"to train": (cpus.train + cpus.both, where.train), "for data": (cpus.data + cpus.both, where.data)}
        parts = [f"{have:g} {what}" + (f" on nodes with {label}" if label else "") for what, (have, label) in place.items()]
        has = f"the cluster has free: {', '.join(parts)}"
    if grown:
        has += ", with all nodes that may be added"
    if elastic:
        raise ResourceError(
            f"train.workers={workers} needs {2 * threads} free CPUs a worker "
            f"(train.threads={threads} to train, as many for data); {has}. "
            "Add nodes, or set train.workers to a number, for which parts of a CPU will do."
        )
    raise ResourceError(
        f"train.workers={workers} needs {0.5 * fewest:g} free CPUs (a quarter to train, a quarter for data, each); {has}. "
        + (f"Set train.workers={int(there + ROUNDING)} or fewer, or add nodes." if there >= 1 else "Add nodes, or wait.")
    )


# Asking Ray -----------------------------------------------------------------------------------------------------------


def of_cluster(*, free: bool) -> Capacity:
    """Of the cluster that is joined; free: without what others use of the nodes that are there."""
    import ray

    there = [node for node in ray.nodes() if node["Alive"]]
    unused = ray._private.state.available_resources_per_node() if free else {}
    nodes = [Node(unused.get(node["NodeID"], {}) if free else node["Resources"], node["Labels"]) for node in there]
    return Capacity(nodes, may_come(_autoscaler_config(ray.get_runtime_context().gcs_address), there))


def may_come(config: dict[str, Any] | None, there: list[dict[str, Any]]) -> list[Node]:
    """The nodes that an autoscaler with this configuration may add to those that are there, as ray.nodes() has them.

    The limit of the whole cluster is taken for each type alone: which type comes is for the work to say.
    """
    if config is None:
        return []
    groups = [node["Labels"].get(GROUP) for node in there if HEAD not in node["Resources"]]
    limit = config.get("max_workers", 0)
    coming = []
    for name, kind in config["available_node_types"].items():
        if name == config.get("head_node_type") or not kind.get("resources"):  # which are not known before it comes
            continue
        more = min(kind.get("max_workers", limit) - groups.count(name), limit - len(groups))
        resources = {key: float(value) for key, value in kind.get("resources", {}).items()}
        coming += [Node(resources, kind.get("labels", {}) | {GROUP: name})] * more
    return coming


@functools.lru_cache(maxsize=1)
def _autoscaler_config(gcs_address: str) -> dict[str, Any] | None:
    """The configuration of the autoscaler of the cluster that is joined; None where there is none.

    Ray has it nowhere but where the autoscaler reads it (2.60; `get_cluster_config` knows of Anyscale's alone): on the head.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def find(port: str) -> dict[str, Any] | None:
        """A function of a function crosses processes whole: the head needs no ssl_ray."""
        import contextlib
        import os

        import psutil
        import yaml

        monitors = ("autoscaler/v2/monitor.py", "autoscaler/_private/monitor.py")
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            named = dict(part.split("=", 1) for part in line if part.startswith("--") and "=" in part)
            if any(part.endswith(monitors) for part in line) and named.get("--gcs-address", "").endswith(f":{port}"):
                path = named.get("--autoscaling-config")
                if not path:
                    return None
                with open(os.path.expanduser(path)) as file:
                    return yaml.safe_load(file)
        if "RAY_CLUSTER_NAME" in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ:  # KubeRay's is in another container
            from ray.autoscaler._private.kuberay import autoscaling_config, node_provider

            with contextlib.suppress(OSError):  # a head that may not ask
                with open("/var/run/secrets/kubernetes.io/serviceaccount/namespace") as file:
                    asked = node_provider.KubernetesHttpApiClient(namespace=file.read().strip())
                resource = asked.get(f"rayclusters/{os.environ['RAY_CLUSTER_NAME']}")
                return autoscaling_config._derive_autoscaling_config_from_ray_cr(resource)
        return None

    port = gcs_address.rpartition(":")[2]
    head = next(node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"])
    if head == ray.get_runtime_context().get_node_id():
        return find(port)
    there = NodeAffinitySchedulingStrategy(head, soft=False)
    return ray.get(ray.remote(find).options(num_cpus=0, scheduling_strategy=there).remote(port), timeout=60)
