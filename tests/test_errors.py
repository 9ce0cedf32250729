"""Errors cross processes and can be caught as the built-ins they refine."""

import inspect
import pickle

import pytest

from raymerge import errors

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.RaymergeError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_survives_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("a: what\nand why")))
    assert type(error) is kind
    assert str(error) == "a: what\nand why"


@pytest.mark.parametrize("kind", [c for c in CLASSES if c is not errors.RaymergeError])
def test_is_also_a_built_in(kind):
    assert issubclass(kind, ValueError | OSError | RuntimeError)


def test_an_unknown_name_is_refused_with_the_nearest_and_all_allowed():
    assert (
        errors.unknown("key", "rnk", ["scale", "rank"])
        == "unknown key 'rnk'. Did you mean rank?\nAllowed: rank, scale."
    )
    assert errors.unknown("key", "zz", [], shown="`a.zz`") == "unknown key `a.zz`.\nAllowed: none."
