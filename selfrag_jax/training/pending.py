"""The metrics of a step that the device may still be computing."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from selfrag_jax.allocator import KeptBlock
from selfrag_jax.training.log import TrainingLog


class PendingMetrics:
    """Metrics of the last step. They are read when the next one has been dispatched, or later.

    Thus a device never waits for the host.
    """

    def __init__(self, log: TrainingLog, workdir: str | Path, kept_block: KeptBlock):
        self._log, self._workdir, self._kept_block = log, workdir, kept_block
        self._last: tuple[int, list[int], int, dict[str, jax.Array]] | None = None

    def put(self, step: int, rows: list[int], tokens: int, metrics: dict[str, jax.Array]) -> None:
        """Logs the step before, and keeps this one's metrics.

        rows: of the data, in the step's batch. tokens: in the batch, without padding.
        """
        self.flush()
        self._last = step, rows, tokens, metrics

    def flush(self) -> None:
        """Waits for the metrics, if there are any, and logs them.

        Raises FloatingPointError if the loss or the gradient norm is not finite.
        """
        if self._last is None:
            return
        step, rows, tokens, on_device = self._last
        self._last = None
        metrics = jax.device_get(on_device)
        self._kept_block.hold()
        for what, key in (("loss", "total"), ("gradient norm", "gradient_norm")):
            if not np.isfinite(metrics[key]):
                raise FloatingPointError(
                    f"{self._workdir}: the {what} of step {step} is {float(metrics[key])}; its "
                    f"batch holds the rows {', '.join(map(str, rows))} of the data, counted from "
                    "0. Earlier checkpoints are kept. Fix the rows or lower the learning rate, and "
                    "train in another workdir."
                )
        self._log.add({k: v for k, v in metrics.items() if k != "total"}, tokens)
