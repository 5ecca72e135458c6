"""What a training step reports: loss per loss group, gradient norm, throughput; to TensorBoard and the progress bar."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from selfrag_jax.checkpoints.workdirs import NO_LOSS
from selfrag_jax.data.batches import LOSS_GROUPS


class _EventFile:
    """A TensorBoard event file, written at once: tensorboardX's own writer has a thread, and waits for it for ever once a full
    disk has ended it."""

    def __init__(self, folder: Path):
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Raises OSError when the disk is full."""
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2

        for name, value in scalars.items():
            seen = summary.scalar(name, value)
            self._events.write_event(
                event_pb2.Event(summary=seen, step=step, wall_time=time.time())
            )
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class TrainingLog:
    """Averages steps between reports and writes them to TensorBoard event files under `workdir/logs`; of several processes
    the first one does.

    share_per_rate: of the devices' peak FLOP/s that one token per second takes (for the MFU), where the peak is known. since_save:
    (sum of the losses, number of learned tokens) that an interrupted training had seen since it last asked `loss_since_save`.
    """

    def __init__(
        self,
        workdir: str | Path,
        share_per_rate: float | None = None,
        since_save: Sequence[float] = (0.0, 0.0),
    ):
        self.writer = _EventFile(Path(workdir) / "logs") if jax.process_index() == 0 else None
        self.share_per_rate = share_per_rate
        self.since_save = tuple(
            since_save
        )  # never changed in place: checkpoints are written in the background
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.tokens, self.steps, self.start = 0, 0, time.monotonic()

    def add(self, step_metrics: dict[str, Any], tokens: int) -> None:
        for name, value in step_metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + np.asarray(value, np.float64)
        self.tokens += tokens
        self.steps += 1
        loss, count = self.since_save
        self.since_save = (
            loss + float(np.sum(step_metrics["loss"])),
            count + float(np.sum(step_metrics["count"])),
        )

    def loss_since_save(self) -> float:
        """Mean loss of all learned tokens since this was last asked for: what checkpoints are compared by."""
        total, count = self.since_save
        self.since_save = 0.0, 0.0
        return total / count if count else NO_LOSS

    def report(self, step: int) -> str:
        """Writes the averages since the last report; returns a short line for the progress bar."""
        count = np.maximum(self.sums["count"], 1)
        loss, accuracy = self.sums["loss"] / count, self.sums["correct"] / count
        rate = self.tokens / (time.monotonic() - self.start)
        scalars = {
            "tokens_per_second": rate,
            "gradient_norm": float(self.sums["gradient_norm"] / self.steps),
        }
        shown = f"{rate:.0f} tokens/s"
        if self.share_per_rate is not None:
            scalars["mfu"] = rate * self.share_per_rate
            shown += f", MFU {100 * scalars['mfu']:.1f}%"
        parts = []
        for i, group in enumerate(LOSS_GROUPS):
            if self.sums["count"][i]:
                scalars[f"loss/{group}"], scalars[f"accuracy/{group}"] = loss[i], accuracy[i]
                parts.append(f"{group} {loss[i]:.2f}")
        if self.writer:
            self.writer.write(scalars, step)
        self.reset()
        return f"loss: {', '.join(parts)}; {shown}"

    def close(self) -> None:
        if self.writer:
            self.writer.close()
