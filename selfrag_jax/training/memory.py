"""What a training needs of memory, said before it starts; a warning if that is not there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax

from selfrag_jax.progress import say
from selfrag_jax.training.programs import Programs

_CGROUP_V2 = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
_CGROUP_V1 = tuple(
    Path("/sys/fs/cgroup/memory") / f"memory.{name}_in_bytes" for name in ("limit", "usage")
)
_LEAST = 2**28  # bytes; what takes less fits anywhere
_CURE = (
    "remat=full, fewer rows at a time (rows, rows_per_device), a shorter length, or LoRA (lora) "
    "take less"
)


def report(name: str, programs: Programs, copied_bytes: int, freed_bytes: int, shown: bool) -> None:
    """Prints what the training will take, and a warning if the machine has less to give.

    copied_bytes: of a checkpoint that is written while training continues, on this host.
    freed_bytes: of what the process holds now, and will have given back when training starts.
    """
    here = len(jax.local_devices()) if programs.is_cpu else 1
    state, temporary = programs.state_bytes * here, programs.temp_bytes * here
    if not shown or not temporary or state + temporary < _LEAST:
        return
    parts = f"{_gb(state)} weights and optimizer, {_gb(temporary)} while computing"
    copies = f", {_gb(copied_bytes)} checkpoints on their way" if copied_bytes else ""
    if programs.is_cpu:
        used, free = max(0, used_memory() - freed_bytes), free_memory()
        needed = used + state + temporary + copied_bytes
        text = f"takes about {_gb(needed)} GB of memory: {parts}, {_gb(used)} the process{copies}"
        is_short, have = free is not None and needed - used - freed_bytes > free, free
    else:
        stats = jax.local_devices()[0].memory_stats() or {}
        have = stats.get("bytes_limit")
        text = f"takes about {_gb(state + temporary)} GB of each device: {parts}"
        text += f"; of the host{copies.removeprefix(',')}" if copies else ""
        is_short = have is not None and state + temporary > have
    say(name, text)
    if is_short:
        print(f"warning: only {_gb(have or 0)} GB are free; {_CURE}", file=sys.stderr)


def used_memory() -> int:
    """Returns the bytes of memory that this process has now; 0 where Linux does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> int | None:
    """Returns the bytes that the machine, or this container, can still give; None if unknown."""
    free = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    for limit, usage in (_CGROUP_V2, _CGROUP_V1):
        try:
            free.append(max(0, int(limit.read_text()) - int(usage.read_text())))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(free, default=None)


def _gb(n: int) -> str:
    return f"{n / 1e9:.1f}"
