"""Counts the bytes that a compiled program sends between chips, by reading its HLO text.

The text lists computations, and the operations of each, one a line. A computation runs as often as
its callers do, times the trip count if it is the body of a loop. So executions are counted first,
then multiplied with the bytes that each collective sends.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

# The loop over generated tokens in engine/programs.py, under the name that the compiler gives it.
_TOKEN_LOOP = 'op_name="jit(decode)/while"'

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
_COLLECTIVE = re.compile(rf"= (?P<shapes>\(.*?\)|\S+) (?P<kind>{_KINDS})(?:-start)?\(")
_DCN_TRANSFER = re.compile(
    r"= \((?P<shape>\w+\[[\d,]*\]).* send\(.*is_host_transfer=true"
    r'.*_xla_megascale_transfer_type="(?P<kind>\w+)"'
)
_CALLEE = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>[\w.-]+) \(.*\{$")
_DTYPE_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8,
}  # fmt: skip


@dataclass
class _Computation:
    lines: list[str] = field(default_factory=list)
    executions: float = 0.0  # in one run of the program


def count_collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Returns by kind how many collectives a chip takes part in, and the bytes that it sends.

    Both are of one run of the program. Loops count with their trip count, except for the loop over
    generated tokens, which counts once. Rings are assumed: each of n chips sends (n - 1) / n of an
    array that is gathered or scattered, and twice that of one that is reduced.
    """
    computations, entry = _parse_computations(hlo)
    _count_executions(computations, entry)
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    num_partitions = int(partitions.group(1)) if partitions else 1
    counts: dict[str, float] = defaultdict(float)
    sent: dict[str, float] = defaultdict(float)
    for executions, line, match in _collectives(computations):
        kind, group_size = match["kind"], _group_size(line, num_partitions)
        asynchronous = f"{kind}-start" in line
        counts[kind] += executions
        sent[kind] += executions * _bytes_sent(kind, match["shapes"], group_size, asynchronous)
    return {kind: (round(counts[kind]), round(sent[kind])) for kind in counts}


def count_dcn_transfers(hlo: str) -> dict[str, tuple[int, int]]:
    """Returns by kind a chip's exchanges with other slices: how many, and the bytes that it sends.

    The TPU compiler takes such a collective apart: one within the slice, which `count_collectives`
    counts, and a transfer by the host's network (DCN), which carries the kind as an attribute. The
    bytes are those that a chip hands to its host; what then goes over the network depends on how
    the runtime reduces them.
    """
    computations, entry = _parse_computations(hlo)
    _count_executions(computations, entry)
    counts: dict[str, float] = defaultdict(float)
    sent: dict[str, float] = defaultdict(float)
    for computation in computations.values():
        for line in computation.lines:
            if (match := _DCN_TRANSFER.search(line)) and computation.executions:
                kind = match["kind"].lower().replace("_", "-")
                counts[kind] += computation.executions
                size = _shape_sizes(match["shape"])[0]
                sent[kind] += computation.executions * size
    return {kind: (round(counts[kind]), round(sent[kind])) for kind in counts}


def _collectives(
    computations: dict[str, _Computation],
) -> Iterator[tuple[float, str, re.Match[str]]]:
    """Yields executions, line and match of each collective that runs.

    The start and the end of an asynchronous collective may both spell it. They share a channel, so
    each channel counts once. Under shard_map all collectives share channel 1; those that differ in
    shape or dtype are told apart.
    """
    channels = set()
    for computation in computations.values():
        for line in computation.lines:
            match = _COLLECTIVE.search(line)
            channel = re.search(r"channel_id=(\d+)", line)
            if not match or not computation.executions:
                continue
            if channel:
                key = channel.group(1), match["kind"], _without_layout(match["shapes"])
                if key in channels:
                    continue
                channels.add(key)
            yield computation.executions, line, match


def _without_layout(shapes: str) -> str:
    return re.sub(r"\{[^}]*\}", "", shapes)


def _parse_computations(hlo: str) -> tuple[dict[str, _Computation], str]:
    """Returns the computations by name, and the name of the entry computation."""
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header["name"]] = _Computation()
            if header["entry"]:
                entry = header["name"]
        elif line == "}":  # a kernel's metadata may have lines that begin with a brace
            current = None
        elif current is not None:
            current.lines.append(line)
    return computations, entry


# ---- executions ----------------------------------------------------------------------------------
def _count_executions(computations: dict[str, _Computation], entry: str) -> None:
    """Fills in `executions`, callers before callees."""
    callees_first: list[str] = []
    seen = set()

    def visit(name: str) -> None:
        if name in seen or name not in computations:
            return
        seen.add(name)
        for line in computations[name].lines:
            for callee in _callees(line):
                visit(callee)
        callees_first.append(name)

    visit(entry)
    computations[entry].executions = 1.0
    for name in reversed(callees_first):
        for line in computations[name].lines:
            trips = _trip_count(computations, line) if " while(" in line else 1
            for callee in _callees(line):
                if callee in computations:
                    computations[callee].executions += computations[name].executions * trips


def _callees(line: str) -> list[str]:
    names = _CALLEE.findall(line)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
        names += [name.strip().lstrip("%") for name in branches.group(1).split(",")]
    return names


def _trip_count(computations: dict[str, _Computation], line: str) -> float:
    """Returns the trip count of a loop that counts up from 0.

    It is the number that the loop's condition compares with, over the step by which its body
    counts. On a GPU the condition is a kernel, and the compiler notes the trip count in the loop's
    line. The loop over generated tokens runs for as long as the text does; it counts once.
    """
    if _TOKEN_LOOP in line:
        return 1
    condition = "\n".join(computations[_called_as("condition", line)].lines)
    constants = [int(n) for n in re.findall(r"constant\((\d+)\)", condition)]
    if not constants and (known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)):
        return int(known.group(1))
    end = max(constants, default=1)
    counter = re.search(r"get-tuple-element\([^)]*\), index=(\d+)", condition)
    body = computations[_called_as("body", line)].lines
    return end / _loop_step(body, int(counter.group(1)) if counter else 0)


def _called_as(role: str, line: str) -> str:
    match = re.search(rf"{role}=%?([\w.-]+)", line)
    if match is None:
        raise ValueError(f"cannot read the {role} of a loop: {line.strip()[:300]}")
    return match.group(1)


def _loop_step(body: list[str], counter: int) -> int:
    """Returns what a loop's body adds to element `counter` of its state.

    It is more than 1 if the compiler has unrolled the loop.
    """
    line_of = {}  # by the name of its result
    for line in body:
        if result := re.match(r"\s*(?:ROOT )?%([\w.-]+) = ", line):
            line_of[result.group(1)] = line
    root = next((line for line in body if "ROOT" in line), "")
    state = re.findall(r"%([\w.-]+)", root[root.rfind(" tuple(") :].split(")", 1)[0])
    if counter < len(state) and " add(" in (add := line_of.get(state[counter], "")):
        operands = add.split(" add(", 1)[1].split(")", 1)[0]
        for operand in re.findall(r"%([\w.-]+)", operands):
            if constant := re.search(r"constant\((\d+)\)", line_of.get(operand, "")):
                return int(constant.group(1))
    return 1


# ---- bytes ---------------------------------------------------------------------------------------
def _group_size(line: str, num_partitions: int) -> int:
    """Returns how many chips take part in a collective.

    Raises ValueError for an unknown notation: a wrong count would go unnoticed.
    """
    if " collective-permute" in line:
        return 2
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(tiled.group(2))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed.group(1).split(","))
    if re.search(r"replica_groups=\{\}", line):
        return num_partitions
    raise ValueError(f"cannot read the groups of a collective: {line.strip()[:300]}")


def _bytes_sent(kind: str, shapes: str, group_size: int, asynchronous: bool) -> float:
    """Returns the bytes that a chip sends.

    shapes: of the results; of an operation that only starts, of its operands and then its results.
    """
    sizes = _shape_sizes(shapes)
    if kind == "collective-permute":
        return max(sizes)
    if asynchronous and kind != "all-reduce" and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]
    factor = {"all-reduce": 2, "reduce-scatter": group_size}.get(kind, 1)
    return factor * sum(sizes) * (group_size - 1) / group_size


def _shape_sizes(shapes: str) -> list[int]:
    """Returns the bytes of each array in a text of shapes."""
    return [
        _DTYPE_BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    ]
