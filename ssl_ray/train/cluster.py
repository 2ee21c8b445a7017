"""Joining or starting a Ray cluster."""

import logging
import os
import tempfile
from typing import Any

from ssl_ray.errors import ResourceError


def start_ray() -> None:
    """Joins the cluster that RAY_ADDRESS names, else starts a local one with token authentication, without dashboard.

    Raises ResourceError if the cluster cannot be reached or started.
    """
    # Ray reads these when it is imported.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    import ray

    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**common)
        else:
            # Ray makes sockets below this folder, whose paths may have 107 characters.
            folder = tempfile.mkdtemp(prefix="ssl-ray-", dir="/tmp")
            ray.init(_node_ip_address="127.0.0.1", include_dashboard=False, _temp_dir=folder, **common)
    except (RuntimeError, ConnectionError, TimeoutError) as error:
        message = " ".join(str(error).split())
        raise ResourceError(
            f"Ray did not start or cannot be reached ({message}). Check RAY_ADDRESS, the token and free memory, "
            "or set train.workers=0 to train in this process."
        ) from error
