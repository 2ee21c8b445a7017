import json

import numpy as np
import pytest

from ssl_ray.config import canonical_hash
from ssl_ray.evaluate.protocol import PROTOCOL, evaluate_features
from ssl_ray.evaluate.readout import knn_accuracy, linear_readout
from ssl_ray.evaluate.spectrum import alpha, rankme

KEYS = {
    "linear_accuracy",
    "linear_l2",
    "knn_accuracy",
    "alpha",
    "alpha_fit_range",
    "rankme",
    "spectrum",
    "num_train",
    "num_test",
    "protocol",
}


def a_set(n, seed, dims=32):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    return (rng.normal(size=(n, dims)) + np.eye(3, dims)[y] * 2).astype(np.float32), y


def test_the_record_holds_each_measure_and_survives_json():
    train, test = a_set(200, 0), a_set(100, 1)
    record = evaluate_features(*train, *test, seed=3)
    linear = linear_readout(*train, *test, seed=3)
    assert set(record) == KEYS
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["linear_accuracy"], record["linear_l2"]) == (linear.accuracy, linear.l2)
    assert record["knn_accuracy"] == knn_accuracy(*train, *test, k=20)
    assert record["alpha"] == alpha(test[0]).alpha
    assert record["alpha_fit_range"] == [3, 16]
    assert record["rankme"] == rankme(test[0])
    assert (record["num_train"], record["num_test"]) == (200, 100)


@pytest.mark.parametrize("lacks", ["train", "test", "both", "classes"])
def test_without_labels_or_with_one_class_the_readouts_are_null_and_the_spectrum_stands(lacks):
    (train_h, train_y), (test_h, test_y) = a_set(60, 0), a_set(50, 1)
    record = evaluate_features(
        train_h,
        {"train": None, "both": None, "classes": np.full(60, 4)}.get(lacks, train_y),
        test_h,
        None if lacks in ("test", "both") else test_y,
        seed=0,
    )
    assert record["linear_accuracy"] is record["linear_l2"] is record["knn_accuracy"] is None
    assert record["rankme"] == rankme(test_h)
    assert set(record) == KEYS


def test_too_few_dimensions_make_alpha_null_not_nan():
    record = evaluate_features(*a_set(60, 0, dims=4), *a_set(50, 1, dims=4), seed=0)
    assert record["alpha"] is record["alpha_fit_range"] is None
    json.dumps(record, allow_nan=False)


def test_protocol_version_1_never_changes():
    assert PROTOCOL["version"] == 1
    assert canonical_hash(PROTOCOL) == "39e562b88f4720df07d2e6931399fc472acb405617445951e43409f152d56709"
