"""What a training says of its memory, and how it keeps it small."""

import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from selfrag_jax import allocator
from selfrag_jax.checkpoints import fingerprints
from selfrag_jax.progress import waiting
from selfrag_jax.training import memory


@pytest.fixture
def programs():
    fields = dict(is_cpu=True, state_bytes=2 * 10**9, temp_bytes=3 * 10**9, saved_bytes=10**9)
    return SimpleNamespace(**fields)


def test_memory_is_said_before_training_and_a_lack_of_it_is_a_warning(
    programs, monkeypatch, capsys
):
    monkeypatch.setattr(memory, "used_memory", lambda: 10**9)
    # 5.0 GB are needed beside what the process has, of which it gives back 0.5.
    for free, warns in ((4.6e9, False), (4.4e9, True), (None, False)):
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        memory.report("generator", programs, 0, 5 * 10**8, True)
        err = capsys.readouterr().err
        text = "takes about 5.5 GB of memory: 2.0 weights and optimizer, 3.0 while computing"
        assert text in err and "0.5 the process" in err
        assert ("warning: only 4.4 GB are free; remat=full, fewer rows" in err) == warns
    programs.state_bytes = programs.temp_bytes = 10**6
    memory.report("generator", programs, 0, 0, True)
    assert capsys.readouterr().err == ""  # fits anywhere


def test_fingerprints_take_no_memory_of_their_own():
    """The mixed bits of an array are as large as the array."""
    x = jnp.ones((16, 256, 256))
    program = fingerprints._fingerprint_all.lower([x], row_by_row=True).compile()
    assert program.memory_analysis().temp_size_in_bytes < x.nbytes / 8
    whole = fingerprints._fingerprint_all([x])
    assert jax.device_get(whole) == jax.device_get(program([x]))


def test_a_kept_block_holds_its_place_between_calls(monkeypatch):
    calls, heap = [], iter([100, 100, 300])
    glibc = SimpleNamespace(
        malloc=lambda size: calls.append("malloc") or next(heap),
        free=lambda address: calls.append(f"free {address}"),
        malloc_trim=lambda pad: calls.append("trim"),
    )
    monkeypatch.setattr(allocator, "_glibc", glibc)
    block = allocator.KeptBlock(10**9)
    for _ in range(3):
        with block:
            calls.append("run")
        block.hold()
    place = ["run", "malloc", "trim"], ["free 100", "run", "malloc"]
    moved = ["free 100", "run", "malloc", "trim"]  # what was held before goes back
    assert calls == [*place[0], *place[1], *moved]
    calls.clear()
    block.give_up()
    assert calls == ["free 300", "trim"]
    with allocator.KeptBlock(0) as nothing:
        assert nothing is None
    assert calls == ["free 300", "trim"]


def test_long_work_is_named_and_short_work_is_not(capsys):
    with waiting("generator", "compiles"):
        pass
    assert capsys.readouterr().err == ""
    with waiting("generator", "compiles"):
        time.sleep(1.2)
    lines = capsys.readouterr().err.splitlines()
    words = ["generator", "compiles"]
    assert [line.split() for line in lines] == [words, [*words, "0:01"]]
