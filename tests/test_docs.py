"""The examples of the docstrings run."""

import doctest

import pytest

from nca_kernels import dispatch, functional, linear_functional, losses


@pytest.mark.parametrize("module", [dispatch, functional, linear_functional, losses], ids=lambda module: module.__name__)
def test_docstring_examples(module, default_dispatch):
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS, extraglobs={"torch": __import__("torch")})
    assert results.failed == 0 and results.attempted > 0
