"""Reads the scalars of a training's TensorBoard event files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from selfrag_jax.storage.paths import as_path


def read_scalars(workdir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Returns (step, value) points by tag from the event files under `workdir/logs`.

    A later file wins over an earlier one for the same step, as after a restart. Returns nothing
    where there are no logs; a file that was cut off, or is damaged, gives what precedes the damage.
    """
    points: dict[str, dict[int, float]] = {}
    for file in sorted((as_path(workdir) / "logs").glob("events.*")):
        for record in _records(file.read_bytes()):
            for step, tag, value in _scalars(record):
                points.setdefault(tag, {})[step] = value
    return {tag: sorted(by_step.items()) for tag, by_step in points.items()}


def _records(data: bytes) -> Iterator[bytes]:
    """Yields the records of a TFRecord file: length (8), its CRC (4), the data, its CRC (4)."""
    at = 0
    while at + 16 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 16 + length > len(data):
            return
        yield data[at + 12 : at + 12 + length]
        at += 16 + length


def _scalars(record: bytes) -> Iterator[tuple[int, str, float]]:
    from google.protobuf.message import DecodeError
    from tensorboardX.proto import event_pb2

    try:
        event = event_pb2.Event.FromString(record)
    except DecodeError:
        return
    for value in event.summary.value:
        if value.HasField("simple_value"):
            yield event.step, value.tag, value.simple_value
