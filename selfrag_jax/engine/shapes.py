"""The shapes of the device programs (programs.py), and how they grow.

A program is compiled once for each combination of shapes that it meets, so there are few: lengths
are padded to buckets, one slot or a fixed number of slots is changed at a time, and capacities grow
in steps. The engine and the ahead-of-time compiler both take them from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

FIRST_GENERATED_CAPACITY = 128  # where segments may be longer; most are not
BATCH_TOKENS = 4096  # in one call: enough to be bound by arithmetic, few enough to be short
MIN_BATCH_SLOTS = 8


def bucket(n: int, least: int) -> int:
    """The length that n tokens are padded to: a multiple of `least`, at most four per doubling.

    A single token is not padded.
    """
    if n <= 1:
        return max(n, 1)
    step = least
    while 8 * step < n:
        step *= 2
    return -(-n // step) * step


def padded(
    rows: Sequence[Sequence[int]], shape: tuple[int, int], pad: int
) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Returns rows of token ids as an array of `shape`, and which of its places they fill."""
    tokens, valid = np.full(shape, pad, np.int32), np.zeros(shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], valid[i, : len(row)] = row, True
    return tokens, valid


@dataclass(frozen=True)
class Shapes:
    """What determines the shapes of a search. A slot holds one question."""

    num_slots: int
    beam_width: int
    num_passages: int  # branches of a beam
    max_new_tokens: int  # of a branch
    length_bucket: int
    longest_prompt: int  # in tokens
    prefix_grows: bool  # prefixes take in segments, and become longer than prompts

    # ---- lengths and capacities --------------------------------------------------------------
    def bucket(self, n: int) -> int:
        return bucket(n, self.length_bucket)

    def smaller_bucket(self, length: int) -> int:
        """The bucket below `length`, which is a bucket itself; 0 if there is none."""
        return next((n for n in range(length - 1, 0, -1) if self.bucket(n) < length), 0)

    @property
    def first_prefix_capacity(self) -> int:
        """Holds a prompt; where prefixes grow, a passage of a few buckets and a segment too."""
        if not self.prefix_grows:
            return self.bucket(self.longest_prompt)
        return self.bucket(
            self.longest_prompt + 4 * self.length_bucket + self.generated_capacity(0)
        )

    def first_fed_capacity(self, tokens: int) -> int:
        """Holds passages of a few buckets, even if the first questions come without any."""
        least = 4 * self.length_bucket if self.num_passages > 1 else 1
        return max(self.bucket(tokens), least)

    def generated_capacity(self, num_generated: int) -> int:
        """Buffer size for a branch that has generated that many tokens: 128, then doubling.

        Every step reads the whole buffer. A size that saves less than a third of the largest is
        not worth a compilation.
        """
        size = FIRST_GENERATED_CAPACITY
        while size <= num_generated:
            size *= 2
        return size if 3 * size < 2 * self.max_new_tokens else self.max_new_tokens

    # ---- how many slots are changed at once --------------------------------------------------
    def batch_slots(self, tokens: int) -> int:
        """Slots of a full batch, where each has that many tokens: enough work for the device."""
        size = min(self.num_slots, BATCH_TOKENS // tokens)
        return size if size >= MIN_BATCH_SLOTS else 1

    def batches(self, jobs: list, tokens: int) -> Iterator[list]:
        """Batches jobs, one slot each, into the two compiled sizes: 1 and `batch_slots(tokens)`.

        A short batch repeats its last job, which is a no-op.
        """
        size, i = self.batch_slots(tokens), 0
        while i < len(jobs):
            left = len(jobs) - i
            n = size if 2 * left > size else 1
            yield jobs[i : i + n] + [jobs[-1]] * (n - min(left, n))
            i += n

    # ---- the largest calls, for the ahead-of-time compiler -----------------------------------
    def longest_prefix(self, max_input: int, max_segments: int) -> int:
        """Capacity under the last of `max_segments` segments; max_input: tokens of a passage."""
        if max_segments == 1:
            return self.first_prefix_capacity
        longest = self.longest_prompt + (max_segments - 1) * (max_input + self.max_new_tokens)
        return max(self.first_prefix_capacity, self.bucket(longest))

    def largest_calls(self, max_input: int, max_segments: int, keep_passages: bool) -> list[Call]:
        """The calls of each program that need most memory."""
        fed = self.first_fed_capacity(max_input)
        prefix = self.longest_prefix(max_input, max_segments)
        room, new, per_slot = self.bucket(max_input), self.max_new_tokens, self.beam_width
        calls = self._largest_batches("prompt", "read", 1, 1, room)
        branches = self.beam_width * self.num_passages
        calls += self._largest_batches("passages", "start_branches", branches, 1, room)
        calls.append(Call("segment", "decode", self.num_slots, 0))
        if before := self._largest_growth(fed):
            calls.append(Call("grow_branches", "resize_branches", self.num_slots, fed, before))
        if max_segments > 1 and keep_passages:
            shortest = self.first_fed_capacity(1)
            calls += self._largest_batches("keep", "keep", per_slot, shortest, fed)
        elif max_segments > 1:
            longest = self.bucket(new + 1)
            calls += self._largest_batches("read_again", "read", per_slot, 1, longest)
        if max_segments > 1:
            before = self.smaller_bucket(prefix), 0
            calls.append(Call("grow_prefixes", "grow_prefixes", self.num_slots, prefix, before))
        return calls

    def _largest_batches(
        self, label: str, program: str, rows: int, shortest: int, longest: int
    ) -> list[Call]:
        """The longest call; and the call that changes most slots, if that is another.

        rows: of each slot; shortest, longest: tokens of a row.
        """
        lengths = {self.bucket(n) for n in range(shortest, longest + 1)}
        sizes = {length: self.batch_slots(rows * length) for length in lengths}
        most = max(sizes.values())
        calls = [Call(label, program, sizes[longest], longest)]
        if most > sizes[longest]:
            length = max(n for n, size in sizes.items() if size == most)
            calls.append(Call(f"{label}_together", program, most, length))
        return calls

    def _largest_growth(self, fed: int) -> tuple[int, int] | None:
        """The largest (fed, generated) capacity that grows to (fed, max_new_tokens), if any."""
        new, smaller = self.max_new_tokens, self.smaller_bucket(fed)
        generated = {self.generated_capacity(n) for n in range(new)} - {new}
        candidates = [(smaller, new)] if smaller >= self.first_fed_capacity(1) else []
        candidates += [(fed, max(generated))] if generated else []
        return max(candidates, key=sum, default=None)


@dataclass(frozen=True)
class Call:
    """A call of a device program."""

    label: str
    program: str  # its name in programs.py
    num_slots: int  # that it changes
    length: int  # tokens of each row; of a program that grows a cache, the new (fed) capacity
    before: tuple[int, int] = (0, 0)  # the capacities that it grows from: fed or prefix, generated
