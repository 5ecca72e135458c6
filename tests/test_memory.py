"""Memory that is freed stays with a process that computes on a CPU."""

import os
import subprocess
import sys

import pytest

from selfrag_jax import memory

CALLS = """
import sys
from selfrag_jax import memory
if sys.argv[1] == "kept":
    assert memory.keep_freed()
import resource
import jax
import jax.numpy as jnp
f = jax.jit(lambda x: jnp.sort(x, 0).sum())  # one temporary of 64 MB
x = jnp.ones((4096, 4096))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
seen = []
for _ in range(6):
    before = faults()
    f(x).block_until_ready()
    seen.append(faults() - before)
print(min(seen[3:]))
"""


@pytest.mark.slow
def test_a_program_called_again_finds_its_memory_mapped():
    def faults(how: str) -> int:
        environment = dict(os.environ, JAX_PLATFORMS="cpu")
        return int(subprocess.run([sys.executable, "-c", CALLS, how], env=environment, capture_output=True, check=True).stdout)

    pages = 4096 * 4096 * 4 // os.sysconf("SC_PAGE_SIZE")
    assert faults("given back") > pages / 2
    assert faults("kept") < pages / 50


def test_hosts_of_accelerators_and_other_c_libraries_are_left_alone(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(memory, "_ACCELERATORS", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert not memory.keep_freed()
    monkeypatch.setattr(memory, "_ACCELERATORS", ())
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed()
