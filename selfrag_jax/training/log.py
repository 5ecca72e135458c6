"""Training metrics (loss per group, gradient norm, throughput, MFU) for TensorBoard and the bar."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from selfrag_jax.checkpoints.workdirs import NO_LOSS
from selfrag_jax.data.batches import LOSS_GROUPS
from selfrag_jax.storage.paths import as_path, is_remote

_SECONDS_BETWEEN_SENDING = 30.0  # an event file to a bucket


class _EventFile:
    """A TensorBoard event file that is written synchronously.

    tensorboardX's own writer uses a thread, and hangs once a full disk has ended that thread. A
    file in a bucket is written on this machine, and sent twice a minute and at the end.
    """

    def __init__(self, folder: Path):
        from tensorboardX.event_file_writer import EventsWriter

        self._folder = folder
        self._copy = tempfile.TemporaryDirectory() if is_remote(folder) else None
        if self._copy is None:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            self._sent = time.monotonic()
        self._events = EventsWriter(f"{self._copy.name if self._copy else folder}/events")

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Appends one event per scalar. Raises OSError when the disk is full."""
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2

        for name, value in scalars.items():
            event = event_pb2.Event(
                summary=summary.scalar(name, value), step=step, wall_time=time.time()
            )
            self._events.write_event(event)
        self._events.flush()
        if self._copy and time.monotonic() - self._sent > _SECONDS_BETWEEN_SENDING:
            self._send(self._copy.name)

    def close(self) -> None:
        self._events.close()
        if self._copy:
            self._send(self._copy.name)

    def _send(self, copy: str) -> None:
        for file in Path(copy).iterdir():
            (self._folder / file.name).write_bytes(file.read_bytes())
        self._sent = time.monotonic()


class TrainingLog:
    """Averages metrics between reports and writes them to event files under `workdir/logs`.

    Of several processes only the first writes.

    peak_seconds_per_token: time that one token would take at the devices' peak rate, for the MFU;
        None where the peak is unknown.
    since_save: (sum of losses, number of targets) that an interrupted training had accumulated
        since its last call of `loss_since_save`.
    """

    def __init__(
        self,
        workdir: str | Path,
        peak_seconds_per_token: float | None = None,
        since_save: Sequence[float] = (0.0, 0.0),
    ):
        self.writer = _EventFile(as_path(workdir) / "logs") if jax.process_index() == 0 else None
        self.peak_seconds_per_token = peak_seconds_per_token
        # Replaced, never changed in place: checkpoints that hold it are written in the background.
        self.since_save = tuple(since_save)
        self.held_out = ""  # the last losses on held-out rows, for the progress bar
        self.reset()

    def reset(self) -> None:
        """Starts a new interval between reports."""
        self.sums: dict[str, np.ndarray] = {}
        self.tokens, self.steps, self.start = 0, 0, time.monotonic()

    def add(self, step_metrics: dict[str, Any], tokens: int) -> None:
        """Adds the metrics of one step. tokens: those of its batch, without padding."""
        for name, value in step_metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + np.asarray(value, np.float64)
        self.tokens += tokens
        self.steps += 1
        loss, count = self.since_save
        loss += float(np.sum(step_metrics["loss"]))
        count += float(np.sum(step_metrics["count"]))
        self.since_save = loss, count

    def loss_since_save(self) -> float:
        """Returns the mean loss per target since the last call, by which checkpoints compete."""
        loss, count = self.since_save
        self.since_save = 0.0, 0.0
        return loss / count if count else NO_LOSS

    def report(self, step: int) -> str:
        """Writes the averages since the last report; returns a short line for the progress bar."""
        rate = self.tokens / (time.monotonic() - self.start)
        scalars: dict[str, float] = {
            "tokens_per_second": rate,
            "gradient_norm": float(self.sums["gradient_norm"] / self.steps),
        }
        throughput = f"{rate:.0f} tokens/s"
        if self.peak_seconds_per_token is not None:
            scalars["mfu"] = rate * self.peak_seconds_per_token
            throughput += f", MFU {100 * scalars['mfu']:.1f}%"
        by_group, losses = _by_group(self.sums)
        if self.writer:
            self.writer.write(scalars | by_group, step)
        self.reset()
        return f"loss: {losses}; {self.held_out}{throughput}"

    def add_held_out(self, step: int, sums: dict[str, np.ndarray]) -> None:
        """Writes the means of held-out rows (sums over them, as of a step) as `held_out/...`."""
        by_group, losses = _by_group(sums)
        if self.writer:
            self.writer.write({f"held_out/{name}": x for name, x in by_group.items()}, step)
        self.held_out = f"held out: {losses}; "

    def pause(self, seconds: float) -> None:
        """Leaves seconds in which no step ran out of the throughput."""
        self.start += seconds

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def _by_group(sums: dict[str, np.ndarray]) -> tuple[dict[str, float], str]:
    """Returns the mean loss and accuracy of each group with targets, as scalars and in a line."""
    scalars, losses = {}, []
    for i, group in enumerate(LOSS_GROUPS):
        if count := sums["count"][i]:
            scalars[f"loss/{group}"] = loss = sums["loss"][i] / count
            scalars[f"accuracy/{group}"] = sums["correct"][i] / count
            losses.append(f"{group} {loss:.2f}")
    return scalars, ", ".join(losses)
