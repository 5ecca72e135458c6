"""`--profile`: a trace of whole steps with the model's parts by name; results stay the same."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from plain_search import make_rag
from test_training import config, number_rows

from selfrag_jax import cli
from selfrag_jax.commands.answer import answer_file
from selfrag_jax.data.generator_examples import GeneratorSource
from selfrag_jax.profiling import UNTRACED_STEPS, Profile, check_steps
from selfrag_jax.records import write_jsonl
from selfrag_jax.training import programs
from selfrag_jax.training.train import train

WEIGHTS = {"retrieve": 1.0, "isrel": 1.0, "issup": 1.0, "isuse": 1.0}


def trace_in(folder: Path) -> bytes:
    (file,) = folder.rglob("*.xplane.pb")
    return file.read_bytes()


def has_scope(trace: bytes, name: str) -> bool:
    """Whether operations are under a named scope; in gradients it reads jvp(NAME)."""
    return re.search(rb"[/(]%s[/)]" % name.encode(), trace) is not None


def events(trace: bytes) -> list[str]:
    planes = jax.profiler.ProfileData.from_serialized_xspace(trace).planes
    return [event.name for plane in planes for line in plane.lines for event in line.events]


def train_tiny(tiny_model, tokenizer, workdir, profile):
    source = GeneratorSource(number_rows(12), tokenizer, WEIGHTS)
    model, params = tiny_model.model, tiny_model.params
    # The config of test_training.py, whose compiled step is found in the cache.
    return train(config(), model, params, source, tokenizer, workdir, profile=profile)["params"]


@pytest.mark.slow
def test_training_is_traced_by_the_names_of_its_parts(tiny_model, tokenizer, tmp_path, capsys):
    plain = train_tiny(tiny_model, tokenizer, tmp_path / "plain", 0)
    compiled = programs._compile.cache_info().misses
    traced = train_tiny(tiny_model, tokenizer, tmp_path / "traced", 2)
    assert programs._compile.cache_info().misses == compiled
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (plain, traced)))

    folder = tmp_path / "traced" / "profile"
    trace = trace_in(folder)
    assert events(trace).count("step") == 2
    for scope in ("embed", "qkv", "attention", "attention_output", "mlp", "logits", "loss"):
        assert has_scope(trace, scope), scope
    assert has_scope(trace, "optimizer")
    assert f"xprof --logdir={folder}" in capsys.readouterr().err
    assert not (tmp_path / "plain" / "profile").exists()


@pytest.mark.slow
def test_answering_is_traced_by_the_names_of_its_parts(talkative, tmp_path):
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    write_jsonl(questions, [{"id": str(i), "question": "x" * (i + 1)} for i in range(8)])
    answer_file(make_rag(talkative), questions, out, None, {"mode": "no_retrieval"}, profile=3)
    trace = trace_in(tmp_path / "a.jsonl.profile")
    for scope in ("choose_token", "read_critiques", "read_token", "attention"):
        assert has_scope(trace, scope), scope


def test_a_trace_that_a_loop_leaves_early_is_written(tmp_path, capsys):
    with Profile(tmp_path, 100) as traced:
        for i in range(UNTRACED_STEPS + 2):
            with traced.step(i):
                jax.numpy.ones(3).block_until_ready()
    assert trace_in(tmp_path) and "2 steps traced" in capsys.readouterr().err


def test_a_loop_without_further_steps_says_so(tmp_path, capsys):
    with Profile(tmp_path, 1) as traced:
        for i in range(UNTRACED_STEPS):
            traced.step(i)
    assert "nothing was traced" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_negative_number_of_steps_is_refused(capsys):
    argv = ["train", "--role=critic", "--data=none", "--workdir=none", "--profile=-1"]
    assert cli.main(argv) == 2 and "--profile=-1" in capsys.readouterr().err
    assert check_steps(0) == 0
