"""Read-outs of a trained encoder: features, linear classifier, nearest neighbours, spectrum."""

from ssl_ray.evaluate.features import calibrate_batch_norm, features
from ssl_ray.evaluate.protocol import PROTOCOL, evaluate_features
from ssl_ray.evaluate.readout import Readout, knn_accuracy, linear_readout
from ssl_ray.evaluate.spectrum import Alpha, alpha, rankme, spectrum

__all__ = [
    "PROTOCOL",
    "Alpha",
    "Readout",
    "alpha",
    "calibrate_batch_norm",
    "evaluate_features",
    "features",
    "knn_accuracy",
    "linear_readout",
    "rankme",
    "spectrum",
]
