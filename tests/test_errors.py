import copy
import inspect
import pickle

import pytest

from ssl_ray import errors

EXIT_CODES = {
    "SslRayError": 1,
    "UsageError": 2,
    "RunMismatchError": 2,
    "DataError": 3,
    "ResourceError": 4,
    "TrainingError": 1,
    "Stopped": 130,
}
CLASSES = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}


def test_the_tree_of_errors_and_its_exit_codes():
    assert {name: kind.exit_code for name, kind in CLASSES.items()} == EXIT_CODES
    assert all(issubclass(kind, errors.SslRayError) for kind in CLASSES.values())
    assert issubclass(errors.RunMismatchError, errors.UsageError)


@pytest.mark.parametrize("name", EXIT_CODES)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(name, protocol):
    error = CLASSES[name]("data.uri: no manifest under s3://b/train.\nMake one.")
    error.add_note("on worker 1")
    for other in (pickle.loads(pickle.dumps(error, protocol)), copy.deepcopy(error)):
        assert type(other) is CLASSES[name]
        assert str(other) == str(error)
        assert other.args == error.args
        assert other.exit_code == EXIT_CODES[name]
        assert other.__notes__ == ["on worker 1"]


def test_the_docstring_shows_every_error():
    words = set(errors.__doc__.split())
    assert set(EXIT_CODES) <= words
