"""Encoded images to uint8 views; device.py, which needs torch, makes them or a part of that on a device."""

from ssl_ray.views.decode import UndecodableImage, decode, decode_many, from_pillow, in_parts
from ssl_ray.views.make import crops_only, load, make_views, plain
from ssl_ray.views.params import ViewParams, draw, least_size
from ssl_ray.views.preview import preview

__all__ = [
    "UndecodableImage",
    "ViewParams",
    "crops_only",
    "decode",
    "decode_many",
    "draw",
    "from_pillow",
    "in_parts",
    "least_size",
    "load",
    "make_views",
    "plain",
    "preview",
]
