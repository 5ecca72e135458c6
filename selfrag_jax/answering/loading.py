"""Loads a generator as an AnswerConfig asks for it, and opens what it retrieves from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.engine.engine import unstack_layers
from selfrag_jax.errors import UserError
from selfrag_jax.models import quantize, sharding
from selfrag_jax.models.llama import Model
from selfrag_jax.retrieval.instant_index import PassageSource, open_passages
from selfrag_jax.retrieval.retriever import IndexRetriever, Retriever


def prepare_model(loaded: LoadedModel, config: AnswerConfig) -> LoadedModel:
    """Casts or quantizes the parameters, and spreads them over devices.

    Raises UserError if there are too few devices, or they do not divide the heads.
    """
    model, params, dtype = loaded.model, loaded.params, config.dtype
    if dtype is not None:
        model = Model(replace(model.config, dtype=dtype))
    if config.product_dtype is not None:
        model = Model(replace(model.config, product_dtype=config.product_dtype))
    if config.quantization == "int8":
        model, params = quantize.quantize(model, params, dtype)
    elif dtype is not None:
        params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)
    if config.tensor == 1:
        return replace(loaded, model=model, params=params)
    num_heads = model.config.num_kv_heads
    if num_heads % config.tensor:
        raise UserError(
            f"--tensor={config.tensor} does not divide the model's {num_heads} key-value heads"
        )
    devices = jax.local_devices()  # of several processes each answers with its own
    if len(devices) < config.tensor:
        raise UserError(
            f"--tensor={config.tensor}: needs {config.tensor} devices; there are {len(devices)}"
        )
    mesh = sharding.make_mesh(tensor=config.tensor, devices=devices)
    if unstack_layers(mesh.devices.flat[0].platform, mesh.size):
        params = model.per_layer(params)
    params = jax.device_put(params, sharding.shardings(mesh, params))
    return replace(loaded, model=model, params=params, mesh=mesh)


def check_retrieval(
    index: str | Path | None,
    retriever: Retriever | None,
    passages: str | Path | PassageSource | None,
) -> None:
    """Raises UserError for more than one source of passages, or a retriever without `search`."""
    given = dict(index=index or None, retriever=retriever, passages=passages or None)
    if len(names := [name for name, value in given.items() if value is not None]) > 1:
        raise UserError(f"give only one of {' and '.join(names)}")
    if retriever is not None and not callable(getattr(retriever, "search", None)):
        raise UserError(f"retriever={retriever!r}: has no method search(queries, k)")


def open_retriever(
    index: str | Path | None,
    retriever: Retriever | None,
    passages: str | Path | PassageSource | None,
) -> Retriever | None:
    """The retriever that was given, or one over an index or over passages; None without any.

    Raises UserError as IndexRetriever and open_passages do.
    """
    if index:
        return IndexRetriever(index)
    if not passages:
        return retriever
    if not isinstance(passages, PassageSource):
        passages = PassageSource(passages)
    return open_passages(passages)


def describe(name: str, loaded: LoadedModel, retriever: Retriever | None, mode: str) -> str:
    """One line about what answers: the model and its device, where passages come from, the mode."""
    if isinstance(retriever, IndexRetriever):
        passages = repr(retriever)
    elif retriever is None:
        passages = "no index"
    else:  # one of the user's own, whose repr may be long
        passages = type(retriever).__name__
    return f"{name}({loaded!r}; {passages}; {mode})"
