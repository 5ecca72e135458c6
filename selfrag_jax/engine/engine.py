"""Answers many questions on one device program: each question's search runs at its own pace in a slot of its own, and its slot is
taken by the next question as soon as it is done (continuous batching, as in Orca, Yu et al., 2022, by segments).

A search is a generator (beam_search.py, released.py). It yields what it wants, and is sent what came of it:

    Read      tokens into prefixes             -> Retrieve distributions
    Passages  queries                          -> passages
    Generate  branches on the prefixes         -> their segments
    Keep      branches as the new prefixes     -> None
    Settled   segments that nothing can change -> None; handed to the caller

Shapes are few: lengths are padded to buckets, one or a fixed number of slots are changed at a time, and room grows and
shrinks in steps.
Each compilation is logged, and kept in `compiled`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from selfrag_jax.engine import programs
from selfrag_jax.engine.segments import Segment, TokenRules
from selfrag_jax.models.attention import platform
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params
from selfrag_jax.records import Passage

log = logging.getLogger(__name__)

FIRST_RING = 128  # generated tokens that branches have room for at first, where they may generate many more
GROUP_TOKENS = 4096  # read at once: enough to be bound by arithmetic, few enough that the others do not wait long
SMALLEST_GROUP = 8  # slots
STEPS_BESIDE_RETRIEVAL = 8  # tokens that other questions generate while passages are looked for
compiled: list[tuple[str, float]] = []  # each program that was, in this process, and the seconds that it took


# ---- what a search asks for ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Read:
    """Tokens of each lane, read behind the prefix of its parent lane (parents=None: behind nothing)."""

    tokens: Sequence[Sequence[int]]
    start: Sequence[int]  # position of each lane's first token
    parents: Sequence[int] | None = None


@dataclass(frozen=True)
class Passages:
    previous: Sequence[list[str]]  # for each beam that retrieves, the texts of its segments so far


@dataclass(frozen=True)
class Generate:
    """Branches of each lane, by tokens to be fed; a lane may have none."""

    branches: Sequence[Sequence[Sequence[int]]]
    start: Sequence[int]  # position of each lane's first token
    limit: int  # tokens to generate at most
    keys: np.ndarray | None = None  # [lanes, P, 2] uint32, for sampling


@dataclass(frozen=True)
class Keep:
    """Lane i goes on from lane parents[i] with branch branches[i] of the slot; [W] each."""

    parents: Sequence[int]
    branches: Sequence[int]


@dataclass(frozen=True)
class Settled:
    segments: Any


def bucket(n: int, least: int) -> int:
    """The length that n tokens are padded to: a multiple of `least`, of which each doubling has four at most."""
    if n <= 1:
        return max(n, 1)
    step = least
    while 8 * step < n:
        step *= 2
    return -(-n // step) * step


def ring(n: int, limit: int) -> int:
    """Places for a branch of n generated tokens to go on: most segments are far shorter than the longest may be, and every step
    reads all places. Not worth a size of its own where less than a third of them is spared."""
    size = FIRST_RING
    while size <= n:
        size *= 2
    return size if 3 * size < 2 * limit else limit


def group_size(slots: int, tokens: int) -> int:
    """How many slots are changed at once where many are waiting: so many as give the device enough work. tokens: of each."""
    size = min(slots, GROUP_TOKENS // tokens)
    return size if size >= SMALLEST_GROUP else 1  # else another shape is not worth its compilation


def first_room(prompt: int, new: int, grows: bool, least: int) -> int:
    """What prefixes have room for at first: a first segment too, where they grow."""
    return bucket(prompt + 4 * least + ring(0, new) if grows else prompt, least)


def first_feed(tokens: int, branches: int, least: int) -> int:
    """What branches have room for at first: passages, even if the first questions to come this far go without."""
    return max(bucket(tokens, least), 4 * least if branches > 1 else 1)


# ---- the device's side -----------------------------------------------------------------------------------------------
@dataclass
class Engine:
    """Slots, and the shapes in which they are changed.

    Q, W, P, M: slots, lanes of each, branches of a lane, tokens generated at most. bucket: see `SearchConfig.length_bucket`.
    sampling: (temperature, top_p) or None. Parameters may be given by layers (Model.by_layers).
    """

    model: Model
    params: Params
    rules: TokenRules
    Q: int
    W: int
    P: int
    M: int
    bucket: int
    prompt: int  # tokens of the longest prompt
    grows: bool  # prefixes will be longer than prompts
    sampling: tuple[float, float] | None = None
    lengths: np.ndarray = field(init=False)  # [Q, W]: tokens in each lane's prefix
    fed: np.ndarray = field(init=False)  # [Q, W * P]: tokens that each branch was fed
    ages: np.ndarray = field(init=False)  # [Q]: tokens that a branch which has not ended has generated at most
    slots: programs.Slots | None = field(init=False, default=None)

    def __post_init__(self):
        self.by_layers = isinstance(self.params["layers"], tuple)
        self.lengths, self.fed = np.zeros((self.Q, self.W), int), np.zeros((self.Q, self.W * self.P), int)
        self.ages = np.zeros(self.Q, int)
        self.space = first_room(self.prompt, self.M, self.grows, self.bucket)
        self.fed_space, self.ring = 0, ring(0, self.M)
        self.prefix = self._run(programs.empty_prefix, self.model, self.Q * self.W, self.space, self.by_layers)

    def _run(self, program, *args):
        """Calls a program of slots.py; one that has not run in this process with such shapes is compiled, which is logged."""
        shapes = [x.shape if isinstance(x, np.ndarray) else x if isinstance(x, int) else x is None for x in args]
        sizes = (self.Q, self.W, self.P, self.M, self.space, self.fed_space, self.ring, self.by_layers)
        where = jax.sharding.get_abstract_mesh(), jax.typeof(self.params["norm"]["scale"])
        key = (program.__name__, self.model, self.rules, where, sizes, *shapes)
        if key in _seen:
            return program(*args)
        begin = time.perf_counter()
        out = program(*args)
        seconds = time.perf_counter() - begin
        _seen.add(key)
        compiled.append((program.__name__, seconds))
        shape = f"{self.Q} slots x {self.W} x {self.P}, prefixes of {self.space}, {self.fed_space} + {self.ring} tokens of their own"
        log.info("compiled %s in %.1f s (%s); program %d", program.__name__, seconds, shape, len(compiled))
        return out

    def _grow_prefix(self, tokens: int) -> None:
        if tokens > self.space:
            longer = bucket(tokens, self.bucket)
            self.prefix = self._run(programs.longer_prefix, self.prefix, longer)
            self.space = longer
            if self.slots is not None:
                self.slots.prefix = None  # the old one is let go

    def _resize(self, fed: int, places: int) -> None:
        if (fed, places) != (self.fed_space, self.ring):
            own = self._run(programs.resize, self.slots.own, self.fed_space, fed, places)
            self.slots, self.fed_space, self.ring = replace(self.slots, own=own, fed_space=fed), fed, places

    def _make_room(self, tokens: int) -> None:
        """For branches that will be fed so many tokens."""
        if self.slots is not None:
            needed = ring(self.ages.max(), self.M)
            places = needed if needed > self.ring or 2 * needed <= self.ring else self.ring
            return self._resize(self.fed_space if tokens <= self.fed_space else bucket(tokens, self.bucket), places)
        self.fed_space = first_feed(tokens, self.P, self.bucket)
        sizes = (self.P, self.fed_space, self.ring, self.M, self.W)
        self.slots = self._run(programs.empty, self.model, self.rules, self.prefix, *sizes, self.by_layers)
        self.prefix = self.slots.prefix

    def groups(self, jobs: list, rows: int, tokens: int) -> Iterator[list]:
        """Jobs of `rows` rows of `tokens` tokens each, in the numbers in which they are done: one or `group_size`, the last one
        again and again where there are fewer (which changes nothing)."""
        size, at = group_size(self.Q, rows * tokens), 0
        while at < len(jobs):
            left = len(jobs) - at
            n = size if 2 * left > size else 1
            yield jobs[at : at + n] + [jobs[-1]] * (n - min(left, n))
            at += n

    def padded(self, rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, valid = np.full((len(rows), length), self.rules.pad, np.int32), np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], valid[i, : len(row)] = row, True
        return tokens, valid

    def read(self, jobs: list[tuple[int, Read]]) -> dict[int, Any]:
        """The same number of lanes in all jobs. Returns by slot what `slots.read` does, of its lanes."""
        slots, found = [], []  # of each group
        lanes, fresh = len(jobs[0][1].tokens), jobs[0][1].parents is None
        longest = bucket(max(len(row) for _, job in jobs for row in job.tokens), self.bucket)
        for group in self.groups(jobs, lanes, longest):
            tokens, valid = self.padded([row for _, job in group for row in job.tokens], longest)
            before = [[0] * lanes if fresh else [self.lengths[q, p] for p in job.parents] for q, job in group]
            after = [
                [b + len(row) for b, row in zip(bs, job.tokens, strict=True)]
                for bs, (_, job) in zip(before, group, strict=True)
            ]
            self._grow_prefix(max(map(max, after)))
            parent = np.array([0] * (lanes * len(group)) if fresh else [p for _, job in group for p in job.parents], np.int32)
            where, start = np.array([q for q, _ in group], np.int32), np.array([s for _, j in group for s in j.start], np.int32)
            new = (where, parent, tokens, valid, start)
            self.prefix, out = self._run(programs.read, self.model, self.params, self.rules, self.prefix, *new, self.W, fresh)
            for (q, _), length in zip(group, after, strict=True):
                self.lengths[q, :lanes] = length
            slots.append([q for q, _ in group])
            found.append(out)
        at = lambda i: slice(i * lanes, (i + 1) * lanes)  # noqa: E731
        told = zip(slots, jax.device_get(found), strict=True)
        return {q: out and tuple(x[at(i)] for x in out) for qs, out in told for i, q in enumerate(qs)}

    def generate(self, jobs: list[tuple[int, Generate]]) -> None:
        """The same number of lanes in all jobs. `decode` makes progress with them."""
        lanes, P = len(jobs[0][1].branches), self.P
        longest = bucket(max(len(b) for _, job in jobs for lane in job.branches for b in lane), self.bucket)
        self._make_room(longest)
        for group in self.groups(jobs, lanes * P, longest):
            rows = [[*lane, *[[]] * (P - len(lane))] for _, job in group for lane in job.branches]
            tokens, valid = self.padded([b for lane in rows for b in lane], longest)
            start = np.repeat(np.array([s for _, job in group for s in job.start], np.int32), P)
            limit = np.repeat(np.array([job.limit for _, job in group], np.int32), lanes * P)
            none = np.zeros((lanes, P, 2), np.uint32)
            key = np.concatenate([none if job.keys is None else job.keys for _, job in group]).reshape(-1, 2)
            where = np.array([q for q, _ in group], np.int32)
            self.slots.prefix = self.prefix
            self.slots = self._run(
                programs.feed, self.model, self.params, self.rules, self.slots, where, tokens, valid, start, limit, key
            )
            self.prefix = self.slots.prefix
            for i, (q, _) in enumerate(group):
                self.ages[q] = 0
                self.fed[q, : lanes * P] = valid.sum(1)[i * lanes * P : (i + 1) * lanes * P]

    def decode(self, steps: int) -> None:
        """Begins to generate; returns at once where the device works by itself."""
        if self.ages.max() >= self.ring:
            self._resize(self.fed_space, ring(self.ages.max(), self.M))
        sampling = None if self.sampling is None else tuple(np.float32(x) for x in self.sampling)
        self.slots.prefix = self.prefix
        self.slots = self._run(programs.decode, self.model, self.params, self.rules, self.slots, np.int32(steps), sampling)
        self.prefix = self.slots.prefix

    def ended(self) -> tuple[np.ndarray, Segment]:
        """Which slots have ended all of their branches [Q], and all segments [Q, W, P, ...]."""
        done, age, segment = jax.device_get((self.slots.done, self.slots.age, self.slots.segment))
        by_slot = lambda x: x.reshape(self.Q, self.W, self.P, *x.shape[1:])  # noqa: E731
        self.ages = np.where(done, 0, age).reshape(self.Q, -1).max(1)
        return done.reshape(self.Q, -1).all(1), jax.tree.map(by_slot, segment)

    def keep(self, jobs: list[tuple[int, Keep]], generated: dict[int, np.ndarray]) -> None:
        """generated: [W, P] tokens of each slot's segments."""
        for group in self.groups(jobs, self.W, self.fed_space):
            lengths = {}
            for q, job in group:
                more = self.fed[q] + generated[q].reshape(-1)
                lengths[q] = [self.lengths[q, p] + more[b] for p, b in zip(job.parents, job.branches, strict=True)]
            self._grow_prefix(max(map(max, lengths.values())))
            where = np.array([q for q, _ in group], np.int32)
            parents, branches = (
                np.array([x for _, job in group for x in getattr(job, n)], np.int32) for n in ("parents", "branches")
            )
            self.prefix = self._run(programs.keep, self.prefix, self.slots.own, where, parents, branches)
            for q, length in lengths.items():
                self.lengths[q] = length


_seen: set[tuple] = set()  # programs and shapes that have run in this process


def on_device(model: Model, params: Params) -> Params:
    """The parameters as the programs read them fastest. Those that lie on a mesh stay as they are."""
    if isinstance(params["layers"], tuple):
        return params
    return jax.device_put(model.by_layers(params) if _alone(params) and one_by_one(platform(), 1) else params)


def one_by_one(platform: str, devices: int) -> bool:
    """Whether layers are held one by one: on a CPU and on GPUs, where XLA copies a layer of a stack to read it. A TPU reads it where
    it lies; and so do, for tests, several devices that one CPU pretends to be."""
    return platform == "gpu" or (platform == "cpu" and devices == 1)


def _alone(params: Params) -> bool:
    return all(len(x.devices()) == 1 for x in jax.tree.leaves(params) if isinstance(x, jax.Array))


# ---- the searches' side ----------------------------------------------------------------------------------------------
@dataclass
class _Running:
    name: Any
    search: Generator[Any, Any, Any]  # returns its outcome
    wants: Any = None
    generated: np.ndarray | None = None  # [W, P] tokens of its last segments


def drive(
    engine: Engine,
    searches: Iterable[tuple[Any, Generator[Any, Any, Any]]],
    retrieve: Callable[[list[tuple[Any, list[str]]]], list[list[Passage] | Exception]],
    overlap: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """Runs searches, as many at once as the engine has slots. Yields (name, event) as they come: a `Settled`, the exception that
    a search died of, or what it returned.

    retrieve: (name, texts of the segments so far) pairs -> passages for each, or what its search shall die of. overlap: it takes
    long, so other questions go on meanwhile. The order of all that happens depends on what is answered alone, never on time.
    """
    waiting, slots = iter(searches), {}

    def send(q: int, value: Any) -> Iterator[tuple[Any, Any]]:
        """Goes on with a search until it wants something of the device or the index."""
        running = slots[q]
        try:
            failed = next((v for v in value if isinstance(v, Exception)), None) if isinstance(value, list) else None
            running.wants = running.search.throw(failed) if failed else running.search.send(value)
            while isinstance(running.wants, Settled):
                yield running.name, running.wants
                running.wants = running.search.send(None)
        except StopIteration as e:
            del slots[q]
            yield running.name, e.value
        except Exception as e:
            del slots[q]
            yield running.name, e

    def wanting(kind) -> list[int]:
        return [q for q in sorted(slots) if isinstance(slots[q].wants, kind)]

    while True:
        for q in range(engine.Q):
            while q not in slots and (found := next(waiting, None)) is not None:
                slots[q] = _Running(*found)
                yield from send(q, None)
        if not slots:
            return
        if reads := _alike([(q, slots[q].wants) for q in wanting(Read)], lambda r: (len(r.tokens), r.parents is None)):
            for q, out in engine.read(reads).items():
                yield from send(q, out)
        elif keeps := wanting(Keep):
            engine.keep([(q, slots[q].wants) for q in keeps], {q: slots[q].generated for q in keeps})
            for q in keeps:
                yield from send(q, None)
        elif feeds := _alike([(q, slots[q].wants) for q in wanting(Generate)], lambda g: len(g.branches)):
            engine.generate(feeds)
            for q, _ in feeds:
                slots[q].wants = None  # it generates
        else:
            generating = [q for q in slots if slots[q].wants is None]
            asking = wanting(Passages)
            decodes = generating and (overlap or not asking)
            if decodes:
                engine.decode(STEPS_BESIDE_RETRIEVAL if asking else engine.M)
            found = retrieve([(slots[q].name, texts) for q in asking for texts in slots[q].wants.previous]) if asking else []
            if decodes:
                ended, segments = engine.ended()
                for q in generating:
                    if ended[q]:
                        mine = segments.at(q)
                        slots[q].generated = mine.length
                        yield from send(q, mine)
            rest = iter(found)
            for q in asking:
                yield from send(q, [next(rest) for _ in slots[q].wants.previous])


def _alike(jobs: list, kind: Callable) -> list:
    """Those jobs that can be done together with the first."""
    return [job for job in jobs if kind(job[1]) == kind(jobs[0][1])]
