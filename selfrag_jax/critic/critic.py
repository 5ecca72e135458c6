"""The critic's forward pass: critique queries in, distributions over reflection tokens out.

The answer is the distribution over the tokens of the asked group after the prompt, from one forward
pass; so a token of another group cannot come out, and nothing is generated.

All prompts of a group begin with the same tokens, its heading and its question. Those are read once
for each group into a cache (models/cache.py), which all prompts of a batch then read as their
prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from selfrag_jax import artifacts
from selfrag_jax.checkpoints import loading
from selfrag_jax.engine.programs import read_tokens
from selfrag_jax.engine.segments import group_distribution
from selfrag_jax.engine.shapes import bucket, padded
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.files import read_json
from selfrag_jax.models import sharding
from selfrag_jax.models.cache import Cache
from selfrag_jax.records import Passage
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.prompts import CritiqueQuery

# A full batch holds prompts of up to this many tokens; of longer ones it holds fewer.
_FULL_BATCH_TOKENS = 512
# A prefix is shared by prompts of up to this many times its length. For longer ones it saves little
# and they are better off with the attention kernels of whole sequences.
_LONGEST_SHARING = 16
_SMALL_BATCH = 1 / 8  # of a full one; for what is left, such as the last segments of long outputs


@dataclass(frozen=True)
class CriticConfig:
    batch: int  # queries judged together
    length_bucket: int  # prompts are padded to a multiple of it
    brief: bool  # the prompt's wording; must match the critic's training data
    # A group's common prefix is read once if it has so many tokens; 0: never. Models of a width of
    # 64 are faster without: there attention takes the time, and it does not become less.
    min_shared: int = 16

    def __post_init__(self):
        for name, least in (("batch", 1), ("length_bucket", 1), ("min_shared", 0)):
            if getattr(self, name) < least:
                raise UserError(
                    f"config critic: {name}={getattr(self, name)}: must be {least} or more"
                )


@dataclass(frozen=True)
class CritiquePrompt:
    """A query as the critic reads it."""

    group: str
    ids: tuple[int, ...]


class PromptTooLong(UserError):
    """Queries that do not fit the critic's context, even without evidence.

    reasons: what to say of each, by its index among the queries.
    """

    def __init__(self, reasons: dict[int, str]):
        super().__init__(next(iter(reasons.values())))
        self.reasons = reasons


def trained_brief(folder: str | Path) -> bool | None:
    """Returns the wording that a critic was trained with; None where its folder does not say."""
    manifest = artifacts.manifest_path(folder)
    return read_json(manifest).get("config", {}).get("brief") if manifest.is_file() else None


def check_wording(folder: str | Path, brief: bool) -> None:
    """Raises UserError if a critic was trained with the other wording of prompts."""
    trained = trained_brief(folder)
    if trained not in (None, brief):
        raise UserError(
            f"{folder}: was trained with other prompts; give --config.label.critic.brief="
            f"{str(trained).lower()}"
        )


class Critic:
    """A trained critic. `judge` returns distributions over the tokens of a query's group.

    On several local devices, batch and parameters are split over all of them.
    """

    def __init__(self, loaded: loading.LoadedModel, config: CriticConfig):
        self.loaded, self.config = loaded, config
        self._cut: set[int] = set()  # hashes of the prompts whose evidence was cut
        self.ids = loaded.tokenizer.reflection_ids()
        devices = jax.local_devices()
        self._num_devices = len(devices)
        self._mesh = None
        if len(devices) > 1:
            self._mesh = sharding.make_mesh(fsdp=len(devices), devices=devices)
        # Once, not on every call.
        params = loaded.model.rounded(loaded.params)
        self.params = (
            jax.device_put(params)
            if self._mesh is None
            else jax.device_put(params, sharding.shardings(self._mesh, params))
        )
        self._forward = jax.jit(partial(_distributions, loaded.model, self.ids))
        self._read_prefix = jax.jit(partial(_read_prefix, loaded.model))
        self._forward_after = jax.jit(partial(_distributions_after, loaded.model, self.ids))
        self._prefixes: dict[str, tuple[tuple[int, ...], Cache | None]] = {}  # by group

    # ---- queries to prompts ------------------------------------------------------------------
    def judge(self, queries: Sequence[CritiqueQuery]) -> list[Float[np.ndarray, " n"]]:
        """Returns, for each query, the distribution over its group in reflection.GROUPS' order.

        Raises PromptTooLong, before anything is judged, as `prompts` does.
        """
        return self.judge_prompts(self.prompts(queries))

    def judge_fitting(
        self, queries: Sequence[CritiqueQuery]
    ) -> list[Float[np.ndarray, " n"] | str]:
        """As `judge`, but for a query that is too long, returns the reason."""
        try:
            return list(self.judge(queries))
        except PromptTooLong as e:
            reasons = e.reasons
        fitting = iter(self.judge([q for i, q in enumerate(queries) if i not in reasons]))
        return [reasons[i] if i in reasons else next(fitting) for i in range(len(queries))]

    def prompts(self, queries: Sequence[CritiqueQuery]) -> list[CritiquePrompt]:
        """Encodes queries. Evidence that exceeds the model's context is cut, and counted.

        Raises PromptTooLong if instruction and output alone do not fit, since those are never cut.
        """
        out, reasons = [], {}
        encoded: dict[CritiqueQuery, tuple[int, ...]] = {}  # variants of a row ask the same
        for i, query in enumerate(queries):
            if query not in encoded:
                encoded[query] = tuple(self._fitting(query))
            ids = encoded[query]
            if len(ids) > self._context:
                without = "" if query.evidence is None else " without evidence"
                reasons[i] = (
                    f"the critic's {query.group} prompt has {len(ids):,} tokens{without}; "
                    f"the model reads {self._context:,}"
                )
            out.append(CritiquePrompt(query.group, ids))
        if reasons:
            raise PromptTooLong(reasons)
        return out

    @property
    def num_cut(self) -> int:
        """Different prompts so far whose evidence was cut."""
        return len(self._cut)

    @property
    def _context(self) -> int:
        return self.loaded.model.config.max_length

    def _fitting(self, query: CritiqueQuery) -> list[int]:
        """The prompt's ids with as much of the evidence's text as fits, or with none of it."""
        ids = self._encode(query)
        if len(ids) <= self._context or query.evidence is None:
            return ids
        evidence = query.evidence
        ids, low, high = self._encode(_with_text(query, evidence, 0)), 0, len(evidence.text)
        if len(ids) > self._context:
            return ids
        while low < high:  # the most characters that fit
            middle = (low + high + 1) // 2
            longer = self._encode(_with_text(query, evidence, middle))
            if len(longer) <= self._context:
                low, ids = middle, longer
            else:
                high = middle - 1
        self._cut.add(hash((query.group, *ids)))
        return ids

    def _encode(self, query: CritiqueQuery) -> list[int]:
        tokenizer, parts = self.loaded.tokenizer, prompts.critique(query, self.config.brief)
        return [tokenizer.bos_id, *tokenizer.encode(parts, before_control=True)]

    # ---- prompts to distributions ------------------------------------------------------------
    def judge_prompts(self, queries: Sequence[CritiquePrompt]) -> list[Float[np.ndarray, " n"]]:
        """Returns the distribution over each prompt's group. Equal prompts are judged once."""
        whole: list[CritiquePrompt] = []
        after: dict[str, list[CritiquePrompt]] = {}
        for prompt in dict.fromkeys(queries):
            shares = self._shares_prefix(prompt)
            (after.setdefault(prompt.group, []) if shares else whole).append(prompt)
        judged: dict[CritiquePrompt, np.ndarray] = {}
        with nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            self._judge_batches(whole, 0, judged)
            for group, some in after.items():
                self._judge_batches(some, len(self.shared_prefix(group)), judged)
        return [judged[prompt] for prompt in queries]

    def shared_prefix(self, group: str) -> tuple[int, ...]:
        """The tokens with which all prompts of a group begin; () if too few to be shared.

        It is the longest common prefix of encoded prompts whose instructions begin differently,
        not the encoding of a text: tokens may join across the place where the instruction begins.
        """
        if group not in self._prefixes:
            starts = ("Who", "1", "\n- x", "«é", "中")
            probes = [
                self._encode(CritiqueQuery(group, s, evidence=Passage("", s, s), output=s))
                for s in starts
            ]
            common = _common_prefix(probes)
            enough = 0 < self.config.min_shared <= len(common)
            self._prefixes[group] = (tuple(common) if enough else (), None)
        return self._prefixes[group][0]

    def _shares_prefix(self, prompt: CritiquePrompt) -> bool:
        prefix = self.shared_prefix(prompt.group)
        n = len(prefix)
        short = n < len(prompt.ids) <= (1 + _LONGEST_SHARING) * n
        return short and prompt.ids[:n] == prefix

    def _judge_batches(
        self, queries: list[CritiquePrompt], start: int, judged: dict[CritiquePrompt, np.ndarray]
    ) -> None:
        """Adds the distributions of prompts to `judged`.

        start: tokens of the shared prefix; where it is not 0, all prompts are of one group.
        """
        # Longest first: the first prompt of a batch decides its shape.
        queries = sorted(queries, key=lambda prompt: -len(prompt.ids))
        prefix = self._prefix_cache(queries[0].group) if start and queries else None
        at = 0
        while at < len(queries):
            rows = self._rows(len(queries[at].ids) - start, len(queries) - at)
            chosen = queries[at : at + rows]
            tokens, valid = self._pad([p.ids[start:] for p in chosen], rows)
            if prefix is None:
                result = self._forward(self.params, tokens, valid)
            else:
                result = self._forward_after(self.params, prefix, tokens, valid)
            distributions = {group: np.asarray(p) for group, p in result.items()}
            if not all(np.isfinite(p[: len(chosen)]).all() for p in distributions.values()):
                raise StageFailed("the critic's probabilities are not finite; its weights are bad")
            for row, prompt in enumerate(chosen):
                judged[prompt] = distributions[prompt.group][row]
            at += rows

    def _rows(self, tokens: int, left: int) -> int:
        """Rows of a batch whose longest prompt has that many tokens, of `left` prompts.

        Every bucket of lengths has two sizes, a full batch and a small one.
        """
        length = bucket(tokens, self.config.length_bucket)
        full = self.config.batch * _FULL_BATCH_TOKENS / max(length, _FULL_BATCH_TOKENS)
        small = max(1, int(full * _SMALL_BATCH))
        rows = small if left <= small else max(1, int(full))
        return -(-rows // self._num_devices) * self._num_devices

    def _prefix_cache(self, group: str) -> Cache:
        ids, cache = self._prefixes[group]
        if cache is None:
            # A mesh splits rows over its devices, so there is one for each.
            tokens, valid = self._pad([ids] * self._num_devices, self._num_devices)
            cache = self._read_prefix(self.params, tokens, valid)
            self._prefixes[group] = ids, cache
        return cache

    def _pad(
        self, rows: Sequence[Sequence[int]], num_rows: int
    ) -> tuple[Int[Any, "B T"], Bool[Any, "B T"]]:
        """Pads prompts to a full batch and to a bucket, and splits them over the devices."""
        length = bucket(max(map(len, rows)), self.config.length_bucket)
        tokens, valid = padded(rows, (num_rows, length), self.loaded.tokenizer.pad_id)
        valid[:, 0] = True  # unused rows too: each needs a last position
        if self._mesh is None:
            return tokens, valid
        by_row = jax.sharding.NamedSharding(self._mesh, sharding.BATCH)
        return jax.device_put(tokens, by_row), jax.device_put(valid, by_row)


def _with_text(query: CritiqueQuery, evidence: Passage, characters: int) -> CritiqueQuery:
    return replace(query, evidence=replace(evidence, text=evidence.text[:characters]))


def _common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    common: list[int] = []
    for ids in zip(*rows, strict=False):
        if len(set(ids)) > 1:
            break
        common.append(ids[0])
    return common


# ---- device programs -----------------------------------------------------------------------------
def _distributions(
    model,
    ids: reflection.ReflectionIds,
    params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> dict[str, Float[Array, "B n"]]:
    """For each group, the distribution over its tokens after the last valid position."""
    positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    hidden, _ = model.hidden(params, tokens, positions, valid.astype(jnp.int32))
    last = jnp.take_along_axis(hidden, (valid.sum(1) - 1)[:, None, None], axis=1)[:, 0]
    return _of_groups(model, ids, params, last)


def _read_prefix(model, params, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> Cache:
    """A cache of one row with the tokens of the first row; all rows are the same."""
    start = jnp.zeros(tokens.shape[0], jnp.int32)
    _, cache = read_tokens(model, params, None, tokens, valid, start)
    k, v = (jax.tree.map(lambda x: x[:, :1], x) for x in (cache.k, cache.v))
    return replace(cache, k=k, v=v, valid=cache.valid[:1], positions=cache.positions[:1])


def _distributions_after(
    model,
    ids: reflection.ReflectionIds,
    params,
    prefix: Cache,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> dict[str, Float[Array, "B n"]]:
    """As `_distributions`, for what follows a prefix that all rows share."""
    start = jnp.broadcast_to(prefix.valid.sum(1), tokens.shape[0])
    last, _ = read_tokens(model, params, prefix, tokens, valid, start)
    return _of_groups(model, ids, params, last)


def _of_groups(
    model, ids: reflection.ReflectionIds, params, last: Float[Array, "B D"]
) -> dict[str, Float[Array, "B n"]]:
    logits = model.logits(params, last)
    return {group: group_distribution(logits, ids.group(group)) for group in reflection.GROUPS}
