"""Encoded images to uint8 views."""

from ssl_ray.views.decode import UndecodableImage, decode
from ssl_ray.views.make import load, make_views, plain
from ssl_ray.views.params import ViewParams, draw, least_pixels
from ssl_ray.views.preview import preview

__all__ = ["UndecodableImage", "ViewParams", "decode", "draw", "least_pixels", "load", "make_views", "plain", "preview"]
