"""Old import paths and names, which scripts of earlier versions use."""

import importlib
import sys
import warnings

import pytest

import selfrag_jax
from selfrag_jax import moved
from selfrag_jax.errors import UserError


@pytest.mark.parametrize("old", moved.MOVED)
def test_every_old_path_imports_and_names_the_new_ones(old):
    new = moved.MOVED[old]
    for target in new:
        importlib.import_module(f"selfrag_jax.{target}")
    sys.modules.pop(f"selfrag_jax.{old}", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.import_module(f"selfrag_jax.{old}")
    told = "".join(str(w.message) for w in caught if w.category is DeprecationWarning)
    assert all(f"selfrag_jax.{target}" in told for target in new)


def test_old_names_are_the_new_objects():
    from selfrag_jax.decoding.answer import AnswerConfig
    from selfrag_jax.decoding.answer import SelfRAG as old
    from selfrag_jax.decoding.beam_search import BeamSearch

    from selfrag_jax.answering.selfrag import SelfRAG
    from selfrag_jax.records import BadInput
    from selfrag_jax.search.paper import PaperSearch

    assert old is SelfRAG and AnswerConfig is selfrag_jax.AnswerConfig
    assert BadInput is UserError and BeamSearch is PaperSearch


def test_an_unknown_name_or_path_is_refused():
    with pytest.raises(ImportError, match="nothing_of_the_kind"):
        from selfrag_jax.decoding.answer import nothing_of_the_kind  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("selfrag_jax.decoding.unheard_of")
    with pytest.raises(AttributeError, match="no attribute 'unheard_of'"):
        selfrag_jax.unheard_of  # noqa: B018


def test_public_names_are_at_the_top():
    for name, module in selfrag_jax._PUBLIC.items():
        found = importlib.import_module(f"selfrag_jax.{module}")
        assert getattr(selfrag_jax, name) is getattr(found, name)
