"""Searches many questions on one device: continuous batching (Orca, Yu et al., 2022), by segment.

Each question's search runs at its own pace in a slot of its own; the next question takes the slot
as soon as the search ends. A search is a generator of requests (requests.py), which `run_searches`
carries out on the device (programs.py). Each compilation is logged, and kept in `compiled`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from selfrag_jax.engine import programs
from selfrag_jax.engine.requests import (
    FindPassages,
    Generate,
    KeepBranches,
    ReadTokens,
    SegmentsFinal,
)
from selfrag_jax.engine.segments import GeneratedSegments, TokenRules
from selfrag_jax.engine.shapes import Shapes
from selfrag_jax.models.llama import Cache, Model
from selfrag_jax.models.params import Params
from selfrag_jax.models.sharding import platform
from selfrag_jax.records import Passage

log = logging.getLogger(__name__)

STEPS_BESIDE_RETRIEVAL = 8  # tokens that other questions generate while passages are looked for

compiled: list[tuple[str, float]] = []  # programs compiled in this process, and seconds each took
_seen: set[tuple] = set()  # programs and shapes that have run in this process


# ---- the device's side ---------------------------------------------------------------------------
class Engine:
    """The slots on the device: prefixes, branches, and what the host knows of their lengths.

    Parameters may be given layer by layer (Model.per_layer). sampling: (temperature, top_p), or
    None for the most likely token.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        rules: TokenRules,
        shapes: Shapes,
        sampling: tuple[float, float] | None = None,
    ):
        self.model, self.params, self.rules, self.shapes = model, params, rules, shapes
        self.sampling = None if sampling is None else tuple(np.float32(x) for x in sampling)
        self.per_layer = isinstance(params["layers"], tuple)

        num_beams = shapes.num_slots * shapes.beam_width
        self.prefix_capacity = shapes.first_prefix_capacity
        self.fed_capacity, self.generated_capacity = 0, shapes.generated_capacity(0)
        self.prefixes: Cache = self._run(
            programs.empty_prefixes, model, num_beams, self.prefix_capacity, self.per_layer
        )
        self.branches: programs.Branches | None = None  # allocated when the first are fed

        slot_branches = shapes.beam_width * shapes.num_passages
        self.prefix_lengths = np.zeros((shapes.num_slots, shapes.beam_width), int)
        self.num_fed = np.zeros((shapes.num_slots, slot_branches), int)
        # Per slot, the most that a branch which has not ended has generated.
        self.num_generated = np.zeros(shapes.num_slots, int)

    def read(self, jobs: list[tuple[int, ReadTokens]]) -> dict[int, Any]:
        """Carries out (slot, request) pairs with the same number of beams.

        Returns by slot what programs.read does, of its beams.
        """
        beams, after_nothing = len(jobs[0][1].tokens), jobs[0][1].parents is None
        longest = max(len(row) for _, job in jobs for row in job.tokens)
        length = self.shapes.bucket(longest)
        slots, results = [], []  # of each batch
        for batch in self.shapes.batches(jobs, beams * length):
            new_lengths = {}
            for slot, job in batch:
                before = np.zeros(beams, int)
                if job.parents is not None:
                    before = self.prefix_lengths[slot, np.asarray(job.parents)]
                new_lengths[slot] = before + [len(row) for row in job.tokens]
            self._grow_prefixes(max(lengths.max() for lengths in new_lengths.values()))
            tokens, valid = self._padded([row for _, job in batch for row in job.tokens], length)
            self.prefixes, result = self._run(
                programs.read,
                self.model,
                self.params,
                self.rules,
                self.prefixes,
                _int32(slot for slot, _ in batch),
                _int32(p for _, job in batch for p in job.parents or [0] * beams),
                tokens,
                valid,
                _int32(s for _, job in batch for s in job.start),
                self.shapes.beam_width,
                after_nothing,
            )
            for slot, lengths in new_lengths.items():
                self.prefix_lengths[slot, :beams] = lengths
            slots.append([slot for slot, _ in batch])
            results.append(result)
        out = {}
        for batch_slots, result in zip(slots, jax.device_get(results), strict=True):
            for i, slot in enumerate(batch_slots):
                rows = slice(i * beams, (i + 1) * beams)
                out[slot] = result and tuple(x[rows] for x in result)
        return out

    def start(self, jobs: list[tuple[int, Generate]]) -> None:
        """Feeds the branches of (slot, request) pairs with the same number of beams."""
        beams, P = len(jobs[0][1].branches), self.shapes.num_passages
        longest = max(len(row) for _, job in jobs for beam in job.branches for row in beam)
        length = self.shapes.bucket(longest)
        branches = self._branches_with_room_for(length)
        no_keys = np.zeros((beams, P, 2), np.uint32)
        for batch in self.shapes.batches(jobs, beams * P * length):
            rows = [
                row
                for _, job in batch
                for beam in job.branches
                for row in [*beam, *[[]] * (P - len(beam))]
            ]
            tokens, valid = self._padded(rows, length)
            keys = [no_keys if job.keys is None else job.keys for _, job in batch]
            branches = self._run(
                programs.start_branches,
                self.model,
                self.params,
                self.rules,
                self.prefixes,
                branches,
                _int32(slot for slot, _ in batch),
                tokens,
                valid,
                np.repeat(_int32(s for _, job in batch for s in job.start), P),
                np.repeat(_int32(job.limit for _, job in batch), beams * P),
                np.concatenate(keys).reshape(-1, 2),
            )
            num_fed = valid.sum(1).reshape(len(batch), beams * P)
            for i, (slot, _) in enumerate(batch):
                self.num_generated[slot] = 0
                self.num_fed[slot, : beams * P] = num_fed[i]
        self.branches = branches

    def decode(self, steps: int) -> None:
        """Begins to generate; returns before the device is done, where it runs asynchronously."""
        most = self.num_generated.max()
        if most >= self.generated_capacity:
            self._resize(self.fed_capacity, self.shapes.generated_capacity(most))
        self.branches = self._run(
            programs.decode,
            self.model,
            self.params,
            self.rules,
            self.prefixes,
            self.branches,
            np.int32(steps),
            self.sampling,
        )

    def results(self) -> tuple[np.ndarray, GeneratedSegments]:
        """Which slots have ended all of their branches [Q], and all segments [Q, W, P, ...]."""
        b, shapes = self._fed_branches(), self.shapes
        done, steps, segments = jax.device_get((b.done, b.steps_since_fed, b.segments))
        self.num_generated = np.where(done, 0, steps).reshape(shapes.num_slots, -1).max(1)

        def by_slot(x):
            return x.reshape(shapes.num_slots, shapes.beam_width, -1, *x.shape[1:])

        return by_slot(done).all((1, 2)), jax.tree.map(by_slot, segments)

    def keep(self, jobs: list[tuple[int, KeepBranches]], generated: list[np.ndarray]) -> None:
        """Carries out (slot, request) pairs. generated: [W, P] tokens of each pair's segments."""
        num_generated = {slot: n for (slot, _), n in zip(jobs, generated, strict=True)}
        for batch in self.shapes.batches(jobs, self.shapes.beam_width * self.fed_capacity):
            new_lengths = {}
            for slot, job in batch:
                lengths = self.num_fed[slot] + num_generated[slot].reshape(-1)
                parents, kept = np.asarray(job.parents), np.asarray(job.branches)
                new_lengths[slot] = self.prefix_lengths[slot, parents] + lengths[kept]
            self._grow_prefixes(max(lengths.max() for lengths in new_lengths.values()))
            self.prefixes = self._run(
                programs.keep,
                self.prefixes,
                self._fed_branches().cache,
                _int32(slot for slot, _ in batch),
                _int32(p for _, job in batch for p in job.parents),
                _int32(b for _, job in batch for b in job.branches),
            )
            for slot, lengths in new_lengths.items():
                self.prefix_lengths[slot] = lengths

    def _fed_branches(self) -> programs.Branches:
        if self.branches is None:
            raise RuntimeError("no branch has been fed yet")
        return self.branches

    # ---- capacities ----------------------------------------------------------------------------
    def _grow_prefixes(self, tokens: int) -> None:
        if tokens > self.prefix_capacity:
            capacity = self.shapes.bucket(tokens)
            self.prefixes = self._run(programs.grow_prefixes, self.prefixes, capacity)
            self.prefix_capacity = capacity

    def _branches_with_room_for(self, fed: int) -> programs.Branches:
        """The branches, allocated or resized so that each can be fed that many tokens."""
        shapes = self.shapes
        if self.branches is None:
            self.fed_capacity = shapes.first_fed_capacity(fed)
            self.branches = self._run(
                programs.empty_branches,
                self.model,
                self.rules,
                shapes.num_slots,
                shapes.beam_width,
                shapes.num_passages,
                self.fed_capacity,
                self.generated_capacity,
                shapes.max_new_tokens,
                self.per_layer,
            )
        else:
            needed = shapes.generated_capacity(self.num_generated.max())
            generated = self.generated_capacity
            if needed > generated or 2 * needed <= generated:
                generated = needed
            fed = self.fed_capacity if fed <= self.fed_capacity else shapes.bucket(fed)
            self._resize(fed, generated)
        return self.branches

    def _resize(self, fed: int, generated: int) -> None:
        if (fed, generated) == (self.fed_capacity, self.generated_capacity):
            return
        branches = self._fed_branches()
        cache = self._run(
            programs.resize_branches, branches.cache, self.fed_capacity, fed, generated
        )
        self.branches = replace(branches, cache=cache, fed_capacity=fed)
        self.fed_capacity, self.generated_capacity = fed, generated

    def _padded(self, rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, valid), [rows, length] each."""
        tokens = np.full((len(rows), length), self.rules.pad, np.int32)
        valid = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], valid[i, : len(row)] = row, True
        return tokens, valid

    def _run(self, program, *args):
        """Calls a program. Logs its compilation, if it has not run with these shapes before."""
        s = self.shapes
        sizes = (
            s.num_slots, s.beam_width, s.num_passages, s.max_new_tokens,
            self.prefix_capacity, self.fed_capacity, self.generated_capacity, self.per_layer,
        )  # fmt: skip
        placement = jax.sharding.get_abstract_mesh(), jax.typeof(self.params["norm"]["scale"])
        inputs = map(_shape_of, args)
        key = (program.__name__, self.model, self.rules, placement, sizes, *inputs)
        if key in _seen:
            return program(*args)
        begin = time.perf_counter()
        out = program(*args)
        seconds = time.perf_counter() - begin
        _seen.add(key)
        compiled.append((program.__name__, seconds))
        log.info(
            "compiled %s in %.1f s (%d slots x %d beams x %d passages, capacities: prefix %d, fed "
            "%d, generated %d); program %d",
            program.__name__, seconds, s.num_slots, s.beam_width, s.num_passages,
            self.prefix_capacity, self.fed_capacity, self.generated_capacity, len(compiled),
        )  # fmt: skip
        return out


def _shape_of(arg: Any) -> Any:
    """Shapes of host arrays, values of static numbers. The engine's own arrays have its sizes."""
    if isinstance(arg, np.ndarray):
        return arg.shape
    return arg if isinstance(arg, int) else arg is None


def _int32(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, np.int32)


def _shapes_of(arg: Any) -> Any:
    """What a program is compiled for: shapes and types of arrays, values of everything else."""
    if isinstance(arg, (int, bool, Model, TokenRules)):
        return arg
    leaves, structure = jax.tree.flatten(arg)
    return structure, *((jax.numpy.shape(x), jax.numpy.result_type(x)) for x in leaves)


def place_params(model: Model, params: Params) -> Params:
    """The parameters on the device, as the programs read them fastest.

    Parameters that are spread over a mesh stay where they are.
    """
    if isinstance(params["layers"], tuple):
        return params
    on_one_device = all(
        len(x.devices()) == 1 for x in jax.tree.leaves(params) if isinstance(x, jax.Array)
    )
    unstack = on_one_device and unstack_layers(platform(), 1)
    return jax.device_put(model.per_layer(params) if unstack else params)


def unstack_layers(platform: str, devices: int) -> bool:
    """Whether to hold layers one by one: on a CPU and on GPUs, where XLA copies a layer of a stack
    to read it.

    A TPU reads it in place; so do several devices that one CPU emulates in tests.
    """
    return platform == "gpu" or (platform == "cpu" and devices == 1)


# ---- the searches' side --------------------------------------------------------------------------
@dataclass
class _Running:
    """The search in a slot."""

    name: Any
    search: Generator[Any, Any, Any]  # returns its outcome
    request: Any = None  # what it waits for; None while its branches generate
    generated: Any = None  # [W, P]: tokens of its last segments


def run_searches(
    engine: Engine,
    searches: Iterable[tuple[Any, Generator[Any, Any, Any]]],
    find_passages: Callable[[list[tuple[Any, list[str]]]], Sequence[Sequence[Passage] | Exception]],
    overlap: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """Runs searches, as many at once as the engine has slots.

    Yields (name, event) as they come: a SegmentsFinal, the exception that a search raised, or what
    it returned. find_passages: takes (name, texts of the segments so far) pairs; returns passages
    for each, or an exception to raise in its search. overlap: that takes long, so other questions
    generate meanwhile. The order of events depends on the questions alone, never on time.
    """
    waiting = iter(searches)
    running: dict[int, _Running] = {}  # by slot

    def resume(slot: int, result: Any) -> Iterator[tuple[Any, Any]]:
        """Sends a search its result, and runs it up to its next request."""
        one = running[slot]
        try:
            failed = _first_exception(result)
            one.request = one.search.throw(failed) if failed else one.search.send(result)
            while isinstance(one.request, SegmentsFinal):
                yield one.name, one.request
                one.request = one.search.send(None)
        except StopIteration as end:
            del running[slot]
            yield one.name, end.value
        except Exception as e:
            del running[slot]
            yield one.name, e

    def requests(kind: type) -> list[tuple[int, Any]]:
        return [
            (slot, running[slot].request)
            for slot in sorted(running)
            if isinstance(running[slot].request, kind)
        ]

    while True:
        # 1. Free slots take the next questions.
        for slot in range(engine.shapes.num_slots):
            while slot not in running and (new := next(waiting, None)) is not None:
                running[slot] = _Running(*new)
                yield from resume(slot, None)
        if not running:
            return

        # 2. One kind of request is carried out at a time. Generating comes last, so that as many
        #    questions as possible generate together.
        if reads := _same_shape(requests(ReadTokens), lambda r: (len(r.tokens), r.parents is None)):
            for slot, distributions in engine.read(reads).items():
                yield from resume(slot, distributions)
        elif keeps := requests(KeepBranches):
            engine.keep(keeps, [running[slot].generated for slot, _ in keeps])
            for slot, _ in keeps:
                yield from resume(slot, None)
        elif starts := _same_shape(requests(Generate), lambda r: len(r.branches)):
            engine.start(starts)
            for slot, _ in starts:
                running[slot].request = None
        else:
            # 3. Generate; look for passages at the same time, or first.
            generating = [slot for slot in running if running[slot].request is None]
            asking = requests(FindPassages)
            decodes = bool(generating) and (overlap or not asking)
            if decodes:
                engine.decode(STEPS_BESIDE_RETRIEVAL if asking else engine.shapes.max_new_tokens)
            queries = [(running[slot].name, texts) for slot, r in asking for texts in r.previous]
            found = iter(find_passages(queries) if asking else [])
            if decodes:
                ended, segments = engine.results()
                for slot in generating:
                    if ended[slot]:
                        own = segments.at(slot)
                        running[slot].generated = own.length
                        yield from resume(slot, own)
            for slot, request in asking:
                yield from resume(slot, [next(found) for _ in request.previous])


def _first_exception(result: Any) -> Exception | None:
    if not isinstance(result, list):
        return None
    return next((x for x in result if isinstance(x, Exception)), None)


def _same_shape(jobs: list[tuple[int, Any]], shape: Callable[[Any], Any]) -> list[tuple[int, Any]]:
    """The jobs that can be batched with the first."""
    return [job for job in jobs if shape(job[1]) == shape(jobs[0][1])]
