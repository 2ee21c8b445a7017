"""Ray-distributed self-supervised vision pretraining with many views and small projectors."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`ssl_ray.load`, the encoder of a run: imported when it is asked for, since it takes torch and seconds."""
    from importlib import import_module

    if name == "load":
        return import_module("ssl_ray.loading").load
    raise AttributeError(f"module 'ssl_ray' has no attribute '{name}'")
