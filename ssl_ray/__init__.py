"""Ray-distributed self-supervised vision pretraining with many views and small projectors."""

__version__ = "0.1.0"
