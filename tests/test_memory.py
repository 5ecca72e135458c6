"""Memory that is freed stays with a process that computes on a CPU."""

import os
import subprocess
import sys

import pytest

from selfrag_jax import allocator

CALLS = """
import sys
from selfrag_jax import memory
if sys.argv[1] == "kept":
    assert memory.keep_freed()
import resource
import jax
import jax.numpy as jnp
@jax.jit
def f(x):
    y = x @ x.T  # 36 MB, beyond what malloc keeps by itself; turned upside down, as many again
    return (y[::-1] @ x).sum() + jnp.square(y).sum()
x = jnp.ones((3072, 64))
assert f.lower(x).compile().memory_analysis().temp_size_in_bytes > 2 * 3072 * 3072 * 4
def call():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# Now and then, and most of all at first, a small allocation settles in the hole of a freed block, and the next one is put elsewhere.
print(sorted(call() for _ in range(200))[150])
"""


@pytest.mark.slow
def test_a_program_called_again_finds_its_memory_mapped():
    def faults(how: str) -> int:
        environment = dict(os.environ, JAX_PLATFORMS="cpu")
        return int(
            subprocess.run(
                [sys.executable, "-c", CALLS, how], env=environment, capture_output=True, check=True
            ).stdout
        )

    pages = 2 * 3072 * 3072 * 4 // os.sysconf("SC_PAGE_SIZE")
    assert faults("given back") > pages / 2
    assert faults("kept") < pages / 50


def test_hosts_of_accelerators_and_other_c_libraries_are_left_alone(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(allocator, "_ACCELERATORS", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(allocator, "_ACCELERATORS", ())
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()
