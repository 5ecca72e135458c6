"""What a training run writes to TensorBoard."""

import struct
import time
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from test_training import run_training, source  # noqa: F401 (a fixture)

from selfrag_jax.data.batches import LOSS_GROUPS
from selfrag_jax.models import roofline
from selfrag_jax.training import log


def read_scalars(folder):
    """Returns {step: {name: value}} of the only event file.

    Its records are length, checksum of the length, event, checksum of the event.
    """
    [path] = folder.glob("*tfevents*")
    data, at, scalars = path.read_bytes(), 0, {}
    while at < len(data):
        [length] = struct.unpack_from("<Q", data, at)
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            scalars.setdefault(event.step, {})[value.tag] = value.simple_value
    return scalars


def test_steps_are_averaged_by_group(tmp_path, monkeypatch):
    clock = iter([0.0, 4.0, 4.0])  # created, reported, started again
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: next(clock), time=time.time))
    training_log = log.TrainingLog(tmp_path, peak_seconds_per_token=0.002)
    first = np.eye(len(LOSS_GROUPS))[0]  # only the first group has targets
    for loss, norm, tokens in ((6.0, 1.0, 300), (2.0, 3.0, 100)):
        sums = {"loss": loss * first, "correct": 1 * first, "count": 2 * first}
        training_log.add(sums | {"gradient_norm": norm}, tokens)
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
    assert read_scalars(tmp_path / "logs") == {7: pytest.approx(expected)}
    assert line == f"loss: {group} 2.00; 100 tokens/s, MFU 20.0%"


def test_a_run_on_a_known_chip_logs_its_mfu(tiny_model, source, tmp_path, monkeypatch):  # noqa: F811
    """MFU is throughput times FLOPs per token over peak. 48 of 2 x 32 positions have logits."""
    peak = roofline.Chip("test", 1e9, 1, 1, 0)
    monkeypatch.setattr(roofline, "chip", lambda kind: peak)
    run_training(tiny_model, source, tmp_path, steps=4, save_every=4, log_every=2)
    c = tiny_model.model.config
    cost = roofline.train_flops_per_token(c, 32) - 6 * c.vocab_size * c.embed_dim * (1 - 48 / 64)
    reports = read_scalars(tmp_path / "logs")
    assert len(reports) >= 2
    for scalars in reports.values():
        expected = scalars["tokens_per_second"] * cost / 1e9
        assert scalars["mfu"] == pytest.approx(expected, rel=1e-5)
        assert {"loss/text", "loss/retrieve", "loss/isuse", "gradient_norm"} <= set(scalars)
