"""What a training run writes to TensorBoard."""

import struct
import time
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from test_training import run, source  # noqa: F401

from selfrag_jax.data.batches import LOSS_GROUPS
from selfrag_jax.models import roofline
from selfrag_jax.training import log


def scalars(folder):
    """step -> name -> value, read from the records of the only event file: length, its checksum, event, its checksum."""
    [path] = folder.glob("*tfevents*")
    data, at, found = path.read_bytes(), 0, {}
    while at < len(data):
        [length] = struct.unpack_from("<Q", data, at)
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            found.setdefault(event.step, {})[value.tag] = value.simple_value
    return found


def test_steps_are_averaged_by_group(tmp_path, monkeypatch):
    clock = iter([0.0, 4.0, 4.0])  # made, reported, begun anew
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: next(clock), time=time.time))
    training_log = log.TrainingLog(tmp_path, share_per_rate=0.002)
    n = len(LOSS_GROUPS)
    one = np.eye(n)[0]  # the first group has targets, the others none
    training_log.add(
        {"loss": 6.0 * one, "correct": 1 * one, "count": 2 * one, "gradient_norm": 1.0}, 300
    )
    training_log.add(
        {"loss": 2.0 * one, "correct": 1 * one, "count": 2 * one, "gradient_norm": 3.0}, 100
    )
    line = training_log.report(7)
    training_log.close()
    group = LOSS_GROUPS[0]
    expected = {
        "tokens_per_second": 100,
        "gradient_norm": 2,
        "mfu": 0.2,
        f"loss/{group}": 2,
        f"accuracy/{group}": 0.5,
    }
    assert scalars(tmp_path / "logs") == {7: pytest.approx(expected)}
    assert line == f"loss: {group} 2.00; 100 tokens/s, MFU 20.0%"


def test_a_run_on_a_known_chip_logs_its_share_of_the_peak(
    tiny_model, source, tmp_path, monkeypatch
):  # noqa: F811
    """The rate times what a token costs, over the chip's peak. Of 2 x 32 positions 48 have logits."""
    peak = roofline.Chip("test", 1e9, 1, 1, 0)
    monkeypatch.setattr(roofline, "chip", lambda kind: peak)
    run(tiny_model, source, tmp_path, steps=4, save_every=4, log_every=2)
    c = tiny_model.model.config
    cost = roofline.train_flops_per_token(c, 32) - 6 * c.vocab_size * c.embed_dim * (1 - 48 / 64)
    found = scalars(tmp_path / "logs")
    assert len(found) >= 2
    for one in found.values():
        assert one["mfu"] == pytest.approx(one["tokens_per_second"] * cost / 1e9, rel=1e-5)
        assert {"loss/text", "loss/retrieve", "loss/isuse", "gradient_norm"} <= set(one)
