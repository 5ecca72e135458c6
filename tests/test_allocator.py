"""On a CPU, a process keeps freed memory for its next allocations."""

import os
import subprocess
import sys

import pytest

from selfrag_jax import accelerators, allocator

COUNT_PAGE_FAULTS = """
import sys
from selfrag_jax import allocator
if sys.argv[1] == "kept":
    assert allocator.keep_freed_memory()
import resource
import jax
import jax.numpy as jnp
@jax.jit
def f(x):
    y = x @ x.T  # 36 MB, more than malloc keeps by default; the reversed copy takes as much again
    return (y[::-1] @ x).sum() + jnp.square(y).sum()
x = jnp.ones((3072, 64))
assert f.lower(x).compile().memory_analysis().temp_size_in_bytes > 2 * 3072 * 3072 * 4
def call():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# Sometimes, mostly at first, a small allocation settles in the gap of a freed block, and the next
# block is placed elsewhere.
print(sorted(call() for _ in range(200))[150])
"""


@pytest.mark.slow
def test_a_repeated_call_finds_its_memory_already_mapped():
    def page_faults(memory: str) -> int:
        command = [sys.executable, "-c", COUNT_PAGE_FAULTS, memory]
        environment = dict(os.environ, JAX_PLATFORMS="cpu")
        return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    pages = 2 * 3072 * 3072 * 4 // os.sysconf("SC_PAGE_SIZE")
    assert page_faults("returned") > pages / 2
    assert page_faults("kept") < pages / 50


def test_nothing_changes_with_an_accelerator_or_without_glibc(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(accelerators, "_GPU_FILES", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(accelerators, "_GPU_FILES", ())
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()
