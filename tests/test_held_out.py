"""Rows that are held out: which they are, their loss, and the checkpoint that it chooses."""

import os
import signal
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_training import WEIGHTS, assert_same_arrays, config, number_rows

from selfrag_jax.allocator import KeptBlock
from selfrag_jax.checkpoints import workdirs
from selfrag_jax.commands.training_rows import held_out_share, hold_out
from selfrag_jax.data.batches import LOSS_GROUPS, Packer
from selfrag_jax.data.generator_examples import GeneratorSource
from selfrag_jax.data.held_out import all_rows, questions_in_common
from selfrag_jax.data.held_out import hold_out as split
from selfrag_jax.errors import UserError
from selfrag_jax.records import GeneratorExample
from selfrag_jax.training import held_out, step
from selfrag_jax.training.event_files import read_scalars
from selfrag_jax.training.train import train

PASSAGE = "[Retrieval]<paragraph>T\nP</paragraph>[Relevant]"


@pytest.fixture(scope="module")
def source(tokenizer):
    return GeneratorSource(number_rows(12), tokenizer, WEIGHTS)


@pytest.fixture(scope="module")
def others(tokenizer):
    """Seven rows of several lengths and all groups; the longest has 29 tokens."""
    rows = [
        GeneratorExample(str(i), f"Say {i}.", f"{start}It is{' so' * i}.[Utility:{i % 5 + 1}]")
        for i, start in enumerate(("", PASSAGE, "", PASSAGE, "", PASSAGE, ""))
    ]
    return GeneratorSource(rows, tokenizer, WEIGHTS)


# ---- which rows ----------------------------------------------------------------------------------
def test_a_share_is_held_out_by_what_rows_ask(tokenizer):
    """Rows about one instruction stay together, in whatever order and with whatever ids."""
    rows = [
        GeneratorExample(f"{i}.{j}", f"Say {i}.", f"{j}", input="here" if i % 2 else "")
        for i in range(200)
        for j in range(2)
    ]
    source = GeneratorSource(rows, tokenizer, WEIGHTS)
    kept, held = split(source, 0.2, seed=3)
    asks = [{rows[i].instruction for i in part.rows} for part in (kept, held)]
    assert asks[0].isdisjoint(asks[1]) and len(asks[0] | asks[1]) == 200
    assert 0.1 < held.size / source.size < 0.3
    again = split(GeneratorSource(rows[::-1], tokenizer, WEIGHTS), 0.2, seed=3)[1]
    assert {rows[::-1][i].instruction for i in again.rows} == asks[1]
    assert {rows[i].instruction for i in split(source, 0.2, seed=4)[1].rows} != asks[1]
    # An epoch of training has every other row once.
    packer = Packer(kept, 2, 32, None, seed=0)
    assert sorted(packer.source_rows(0, kept.size)) == sorted(kept.rows)
    assert packer.source_rows(0, kept.size) != packer.source_rows(kept.size, 2 * kept.size)
    assert Packer(held, 2, 32, None, 0).source_rows(0, held.size) == list(held.rows)


def test_held_out_rows_are_a_file_or_a_share(source, others, capsys):
    assert held_out_share("rows.jsonl") is None and held_out_share("0.1") == 0.1
    for bad in ("0", "1", "-0.5", "nan", "20"):
        with pytest.raises(UserError, match=f"--held_out={bad}: must be a file, or a share"):
            held_out_share(bad)
    with pytest.raises(UserError, match=r"none of the 12 rows would be held out"):
        split(source, 1e-9, 0)
    with pytest.raises(UserError, match=r"all of the 12 rows would be held out"):
        split(source, 1 - 1e-9, 0)
    kept, held = hold_out(source, "rows.jsonl", 0, lambda path: others, "generator")
    assert kept is source and held.size == 7 and questions_in_common(source, others) == 7
    err = capsys.readouterr().err
    assert "7 rows of rows.jsonl are held out" in err
    assert "warning: 7 of the 7 rows of rows.jsonl ask what a row of the training data asks" in err
    hold_out(source, "0.3", 0, lambda path: others, "generator")
    assert (
        "of 12 rows are held out, by a hash of what they ask and seed 0" in capsys.readouterr().err
    )


# ---- the loss ------------------------------------------------------------------------------------
def plain_sums(tiny_model, source):
    """Returns the sums per group, from the probabilities of each row by itself."""
    sums = {name: np.zeros(len(LOSS_GROUPS)) for name in ("loss", "correct", "count")}
    model, params = tiny_model.model, tiny_model.params

    @jax.jit
    def log_probabilities(tokens):
        hidden, _ = model.hidden(params, tokens[None], np.arange(32)[None], None)
        return jax.nn.log_softmax(model.logits(params, hidden)[0])

    for i in range(source.size):
        e = source.example(i)
        n = len(e.tokens)
        rows = np.asarray(log_probabilities(np.pad(e.tokens, (0, 32 - n))))
        for t in range(n - 1):
            if e.weight[t + 1] > 0:
                group = e.group[t + 1]
                sums["loss"][group] -= rows[t, e.tokens[t + 1]]
                sums["correct"][group] += rows[t].argmax() == e.tokens[t + 1]
                sums["count"][group] += 1
    return sums


@pytest.mark.parametrize(
    ("rows", "changes"), [(1, {}), (3, dict(packed=False)), (2, dict(length=64, max_targets=8))]
)
def test_the_held_out_loss_is_exact_whatever_the_batches(tiny_model, others, rows, changes):
    """max_targets=8 is fewer than a row may have: it would cost a training batch targets."""
    c = config(rows=rows, **({"max_targets": None} | changes))
    evaluate = partial(step.evaluate, model=tiny_model.model, chunk=None)
    programs = SimpleNamespace(evaluate=evaluate, kept_block=KeptBlock(0))
    state, mesh = {"params": tiny_model.params}, c.make_mesh()
    found = held_out.evaluate(state, all_rows(others), c, programs, mesh, lambda: False)
    expected = plain_sums(tiny_model, others)
    assert (expected["count"] > 0).sum() >= 4
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)
    mean = expected["loss"].sum() / expected["count"].sum()
    assert held_out.mean_loss(found) == pytest.approx(mean, rel=1e-5)
    assert held_out.evaluate(state, all_rows(others), c, programs, mesh, lambda: True) is None


# ---- in training ---------------------------------------------------------------------------------
def losses(workdir):
    return {
        step: workdirs.read_loss(workdir / "checkpoints" / str(step) / "metrics" / "metrics")
        for step in workdirs.saved_steps(workdir)
    }


def test_the_best_checkpoint_is_that_of_the_held_out_loss(
    tiny_model, source, others, tmp_path, monkeypatch, capsys
):
    """At this rate the training loss falls and the held-out loss rises. SIGTERM comes while the
    rows are measured; the next run measures them, and ends as one that was not interrupted."""
    c = config(rate=0.05, name="adamw", keep_last=3)

    def run(workdir):
        arguments = c, tiny_model.model, tiny_model.params, source, tiny_model.tokenizer, workdir
        return train(*arguments, held_out_source=all_rows(others))["params"]

    whole = run(tmp_path / "whole")
    assert "lowest held-out loss" in (err := capsys.readouterr().err) and "held out: text" in err
    measured = losses(tmp_path / "whole")
    assert list(measured) == [4, 8, 12]
    [best] = workdirs.candidate_steps(tmp_path / "whole", "best")
    assert measured[best] == min(measured.values())
    last = plain_sums(SimpleNamespace(model=tiny_model.model, params=whole), others)
    assert measured[12] == pytest.approx(last["loss"].sum() / last["count"].sum(), rel=1e-4)
    scalars = read_scalars(tmp_path / "whole")
    for i, group in enumerate(LOSS_GROUPS):
        if last["count"][i]:
            mean = last["loss"][i] / last["count"][i]
            assert scalars[f"held_out/loss/{group}"][-1] == (12, pytest.approx(mean, rel=1e-4))

    evaluate, calls = held_out.evaluate, []

    def terminated(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(held_out, "evaluate", terminated)
    with pytest.raises(SystemExit, match="143"):
        run(tmp_path / "parts")
    assert losses(tmp_path / "parts")[8] == workdirs.NO_LOSS
    assert_same_arrays(run(tmp_path / "parts"), whole)
    assert losses(tmp_path / "parts") == measured and len(calls) == 4
