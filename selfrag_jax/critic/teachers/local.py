"""Asks a model that runs here: any Llama-family checkpoint, through our own model code.

The answer is the label that is the most likely continuation of the prompt, among those of the asked
group, so nothing else can come out. A model with reflection tokens, such as a critic, is asked for
their distribution directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from selfrag_jax import artifacts
from selfrag_jax.checkpoints import loading
from selfrag_jax.critic.critic import Critic, CriticConfig, trained_brief
from selfrag_jax.critic.teachers.prompting import Templates
from selfrag_jax.critic.teachers.settings import LocalConfig
from selfrag_jax.critic.teachers.teacher import LABELS, Request, Verdict, kind_of
from selfrag_jax.engine.shapes import padded
from selfrag_jax.errors import StageFailed
from selfrag_jax.huggingface import hub
from selfrag_jax.models.cache import Cache
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.text.reflection import MissingReflectionTokens

_LABEL = "\n\nLabel:"  # a base model writes no explanation that would help it


def open_local(
    name: str, config: LocalConfig, templates: Templates
) -> CriticTeacher | LocalTeacher:
    """Loads a model as a teacher. name: a training workdir, a Hugging Face folder, a hub name."""
    folder = hub.model_folder(name)
    loaded, fingerprint = loading.load(folder), artifacts.fingerprint(folder)
    try:
        loaded.tokenizer.reflection_ids()
    except MissingReflectionTokens:
        return LocalTeacher(loaded, config, templates, fingerprint)
    trained = trained_brief(folder)
    config = config if trained is None else replace(config, brief=trained)
    return CriticTeacher(loaded, config, fingerprint)


class CriticTeacher:
    """A model with reflection tokens: the likeliest one of the group is its answer."""

    def __init__(self, loaded: loading.LoadedModel, config: LocalConfig, fingerprint: str):
        self.config, self.fingerprint = config, fingerprint
        settings = CriticConfig(config.batch, config.length_bucket, config.brief)
        self.critic = Critic(loaded, settings)

    def identity(self) -> dict[str, Any]:
        return {"teacher": "critic", "model": self.fingerprint, "brief": self.config.brief}

    def prompt(self, query: CritiqueQuery) -> str:
        evidence = query.evidence and (query.evidence.title, query.evidence.text)
        return repr((query.group, query.instruction, query.preceding, evidence, query.output))

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Verdict]]:
        for start in range(0, len(requests), self.config.batch):
            queries = [r.query for r in requests[start : start + self.config.batch]]
            for i, p in enumerate(self.critic.judge_fitting(queries)):
                if isinstance(p, str):  # too long
                    yield start + i, Verdict(None, p)
                    continue
                tokens, labels = reflection.GROUPS[queries[i].group], LABELS[kind_of(queries[i])]
                best = max(labels, key=lambda label: p[tokens.index(label)])
                yield start + i, Verdict(best)


class LocalTeacher:
    """A language model without reflection tokens."""

    def __init__(
        self,
        loaded: loading.LoadedModel,
        config: LocalConfig,
        templates: Templates,
        fingerprint: str,
    ):
        self.loaded, self.config, self.templates = loaded, config, templates
        self.fingerprint = fingerprint
        self.params = jax.device_put(loaded.model.rounded(loaded.params))
        self._likelihoods = jax.jit(partial(_label_likelihoods, loaded.model))

    def identity(self) -> dict[str, Any]:
        return {"teacher": "local", "model": self.fingerprint}

    def prompt(self, query: CritiqueQuery) -> str:
        return self.templates.fill(query) + _LABEL

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Verdict]]:
        """Yields verdicts of one kind after the other, so that a batch shares its labels."""
        for kind in LABELS:
            of_kind = [i for i, r in enumerate(requests) if kind_of(r.query) == kind]
            encoded = {i: self._encode(requests[i].query) for i in of_kind}
            of_kind.sort(key=lambda i: len(encoded[i][0]))
            for start in range(0, len(of_kind), self.config.batch):
                yield from self._judge(of_kind[start : start + self.config.batch], encoded, kind)

    def _judge(
        self, batch: Sequence[int], encoded: dict[int, tuple[list[int], list[list[int]]]], kind: str
    ) -> Iterator[tuple[int, Verdict]]:
        longest = self.loaded.model.config.max_length
        fitting = []
        for i in batch:
            prompt, labels = encoded[i]
            needed = len(prompt) + max(map(len, labels))
            if needed <= longest:
                fitting.append(i)
            else:
                reason = f"the prompt takes {needed} tokens; the model has room for {longest}"
                yield i, Verdict(None, reason)
        if not fitting:
            return
        scores = self.likelihoods([encoded[i] for i in fitting])
        for i, row in zip(fitting, scores, strict=True):
            yield i, Verdict(LABELS[kind][int(row.argmax())])

    def likelihoods(
        self, encoded: Sequence[tuple[list[int], list[list[int]]]]
    ) -> Float[np.ndarray, "B L"]:
        """Returns the log-likelihood of each label as a continuation of each prompt.

        encoded: pairs of a prompt and the labels of its kind, as token ids; one kind for all.
        """
        pad, bucket = self.loaded.tokenizer.pad_id, self.config.length_bucket
        length = -(-max(len(prompt) for prompt, _ in encoded) // bucket) * bucket
        labels = encoded[0][1]
        # Room for the labels of any kind, so that all kinds share their compiled programs.
        places, width = max(map(len, LABELS.values())), -(-max(map(len, labels)) // 16) * 16
        tokens, valid = padded([prompt for prompt, _ in encoded], (self.config.batch, length), pad)
        valid[:, 0] = True  # unused rows too: each needs a last position
        continuations, is_label = padded(labels, (places, width), pad)
        out = self._likelihoods(self.params, tokens, valid, continuations, is_label)
        found = np.asarray(out)[: len(encoded), : len(labels)]
        if not np.isfinite(found).all():
            raise StageFailed("the model's likelihoods are not finite; its weights are bad")
        return found

    def _encode(self, query: CritiqueQuery) -> tuple[list[int], list[list[int]]]:
        """The ids of the prompt, and of each label after it."""
        tokenizer = self.loaded.tokenizer
        prompt = self.prompt(query)
        ids: list[int] = []
        labels = []
        for label in LABELS[kind_of(query)]:
            spans = tokenizer.encode_spans([[prompt], [f" {label}"]])
            ids, of_label = ([i for part, _ in span for i in part] for span in spans)
            labels.append(of_label)
        return [tokenizer.bos_id, *ids], labels


def _label_likelihoods(
    model,
    params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    labels: Int[Array, "L t"],
    is_label: Bool[Array, "L t"],
) -> Float[Array, "B L"]:
    """Reads each prompt once; the labels are branches that share its keys and values."""
    B, T, (L, t) = tokens.shape[0], tokens.shape[1], labels.shape
    positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    empty = Cache.empty(model.config, B, T)
    hidden, prefix = model.hidden(params, tokens, positions, valid.astype(jnp.int32), empty)
    lengths = valid.sum(1)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    branches = jnp.tile(labels, (B, 1))
    at = jnp.repeat(lengths, L)[:, None] + jnp.arange(t)
    marks = jnp.tile(is_label, (B, 1)).astype(jnp.int32)
    own = Cache.empty(model.config, B * L, t)
    after, _ = model.hidden(params, branches, at, marks, own, prefix)
    # The hidden state before each token of a label: the prompt's last, then the label's own.
    before = jnp.concatenate([jnp.repeat(last, L, axis=0), after[:, :-1]], axis=1)
    log_p = jax.nn.log_softmax(model.logits(params, before), axis=-1)
    chosen = jnp.take_along_axis(log_p, branches[..., None], axis=-1)[..., 0]
    return jnp.where(marks > 0, chosen, 0.0).sum(1).reshape(B, L)
