"""Counts the bytes that a compiled program sends between chips, by reading its HLO text.

The text lists computations, and the operations of each, one a line. A computation runs as often as
its callers do, times the trip count if it is the body of a loop. So executions are counted first,
then multiplied with the bytes that each collective sends.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

_TOKENS = 'op_name="jit(decode)/while"'  # the loop of slots.decode, as the compiler names it


# ---- what is sent between chips --------------------------------------------------------------------------------------
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
_OPERATION = re.compile(rf"= (\(.*?\)|\S+) ({_KINDS})(?:-start)?\(")
_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
}
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)


@dataclass
class _Computation:
    lines: list[str]
    times: float = 0.0  # how often one run of the program runs it


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Kind -> how often a chip takes part in one, and the bytes that it sends, in one run of a compiled program.

    Loops count as often as they turn, that over generated tokens once. A ring is assumed: of n chips, each sends (n - 1) / n of a gathered or scattered
    array, and twice that of a reduced one.
    """
    computations, entry = _computations(hlo)
    _count(computations, entry)
    everyone = int(known.group(1)) if (known := re.search(r"num_partitions=(\d+)", hlo)) else 1
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    channels = set()
    for one in computations.values():
        for line in one.lines:
            match = _OPERATION.search(line)
            channel = re.search(r"channel_id=(\d+)", line)
            if not match or not one.times or (channel and channel.group(1) in channels):
                continue
            if channel:  # an asynchronous one may be spelled in its beginning and in its end
                channels.add(channel.group(1))
            sent = _sent(
                match.group(2),
                match.group(1),
                _group_size(line, everyone),
                f"{match.group(2)}-start" in line,
            )
            found[match.group(2)][0] += one.times
            found[match.group(2)][1] += one.times * sent
    return {kind: (round(n), round(b)) for kind, (n, b) in found.items()}


def _computations(hlo: str) -> tuple[dict[str, _Computation], str]:
    out, entry, lines = {}, "", None
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            lines = []
            out[head.group(2)] = _Computation(lines)
            entry = head.group(2) if head.group(1) else entry
        elif line == "}":  # lines of a kernel's metadata may begin with one
            lines = None
        elif lines is not None:
            lines.append(line)
    return out, entry


def _count(computations: dict[str, _Computation], entry: str) -> None:
    """Fills in `times`, callers before callees."""
    order, seen = [], set()

    def visit(name: str) -> None:
        if name in seen or name not in computations:
            return
        seen.add(name)
        for line in computations[name].lines:
            for callee in _callees(line):
                visit(callee)
        order.append(name)

    visit(entry)
    computations[entry].times = 1.0
    for name in reversed(order):
        for line in computations[name].lines:
            turns = _turns(computations, line) if " while(" in line else 1
            for callee in _callees(line):
                if callee in computations:
                    computations[callee].times += computations[name].times * turns


def _callees(line: str) -> list[str]:
    names = _CALLS.findall(line)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
        names += [b.strip().lstrip("%") for b in branches.group(1).split(",")]
    return names


def _turns(computations: dict[str, _Computation], line: str) -> float:
    """Of a loop that counts from 0: the number that its condition compares with, over the step by which its body counts. On a GPU
    conditions are kernels, and the compiler notes the number beside the loop. That over generated tokens, which turns for as long as
    they go on, counts as one."""
    if _TOKENS in line:
        return 1
    condition, body = (
        re.search(rf"{name}=%?([\w.-]+)", line).group(1) for name in ("condition", "body")
    )
    text = "\n".join(computations[condition].lines)
    ends = list(map(int, re.findall(r"constant\((\d+)\)", text)))
    if not ends and (known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)):
        return int(known.group(1))
    end = max(ends, default=1)
    counter = re.search(r"get-tuple-element\([^)]*\), index=(\d+)", text)
    return end / _step(computations[body].lines, int(counter.group(1)) if counter else 0)


def _step(body: list[str], counter: int) -> int:
    """What a loop's body adds to element `counter` of its state: more than 1 where the compiler has unrolled it."""
    named = {
        m.group(1): line for line in body if (m := re.match(r"\s*(?:ROOT )?%([\w.-]+) = ", line))
    }
    root = next((line for line in body if "ROOT" in line), "")
    results = re.findall(r"%([\w.-]+)", root[root.rfind(" tuple(") :].split(")", 1)[0])
    if counter < len(results) and " add(" in (add := named.get(results[counter], "")):
        for operand in re.findall(r"%([\w.-]+)", add.split(" add(", 1)[1].split(")", 1)[0]):
            if constant := re.search(r"constant\((\d+)\)", named.get(operand, "")):
                return int(constant.group(1))
    return 1


def _group_size(line: str, everyone: int) -> int:
    """Of how many chips a collective is. Raises ValueError for a spelling that is not known here, rather than count nothing."""
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
        return everyone
    raise ValueError(f"the groups of a collective cannot be read: {line.strip()[:300]}")


def _sent(kind: str, shapes: str, group: int, asynchronous: bool) -> float:
    """Bytes that a chip sends. shapes: of the results, after those of the operands where it only starts there."""
    sizes = []
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        sizes.append(_BYTES.get(dtype, 4) * math.prod(map(int, filter(None, dims.split(",")))))
    if kind == "collective-permute":
        return max(sizes)
    if asynchronous and kind != "all-reduce" and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]
    factor = {"all-reduce": 2, "reduce-scatter": group}.get(kind, 1)
    return factor * sum(sizes) * (group - 1) / group
