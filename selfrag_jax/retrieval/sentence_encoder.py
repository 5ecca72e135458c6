"""BERT-family encoders over batches of text: sorted by length, few shapes, all local devices."""

from __future__ import annotations

import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from selfrag_jax.errors import UserError
from selfrag_jax.files import read_object, write_json
from selfrag_jax.huggingface.encoder_weights import bert_config_from_json
from selfrag_jax.huggingface.hub import encoder_folder
from selfrag_jax.huggingface.sentence_encoder import (
    EncoderSettings,
    encoder_files,
    load_encoder,
    read_settings,
)
from selfrag_jax.huggingface.weights import CONFIG
from selfrag_jax.models import sharding
from selfrag_jax.retrieval.hashed import ENCODER

# Token lengths that batches are padded to: one compiled program each.
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# Rows of a batch that is not full, such as a few queries.
_FEW_ROWS = (1, 8, 32)
_TEXTS_AT_ONCE = 1024  # tokenized at once: the tokenizer's own records are large
# In a batch, on each device. On a CPU, a layer's activations should stay in its caches.
_CPU_TOKENS, ACCELERATOR_TOKENS = 1024, 32_768
_IN_FLIGHT = 2  # batches that the devices work on while the host prepares the next


class SentenceEncoder:
    """An encoder model with its tokenizer, on all devices of this process."""

    def __init__(
        self, folder: Path, settings: EncoderSettings, dtype: str, batch_tokens: int | None
    ):
        """folder: of the model's files. batch_tokens: on each device; None: by the platform.

        Raises UserError if the folder is not that of a supported encoder.
        """
        self.folder, self.settings, self.dtype = folder, settings, dtype
        loaded = load_encoder(folder, dtype, settings)
        model, params, self.tokenizer = loaded.encoder, loaded.params, loaded.tokenizer
        self.dim, self.max_positions = model.config.embed_dim, model.config.max_length
        self.mesh = sharding.make_mesh(data=-1, devices=jax.local_devices())
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        self.batch_tokens = (
            batch_tokens or (_CPU_TOKENS if on_cpu else ACCELERATOR_TOKENS)
        ) * self.mesh.size
        self.params = jax.device_put(params, jax.NamedSharding(self.mesh, PartitionSpec()))
        run = partial(model.embed, pooling=settings.pooling, normalize=settings.normalize)
        self._embed = jax.jit(run)

    @classmethod
    def from_model(
        cls, name: str, changes: dict[str, Any], dtype: str, batch_tokens: int | None
    ) -> SentenceEncoder:
        """Loads a folder or hub name, with some of its EncoderSettings changed.

        Raises UserError for a max_length above the positions of the model.
        """
        folder = encoder_folder(name)
        positions = bert_config_from_json(folder / CONFIG, dtype).max_length
        settings = read_settings(folder, name, positions)
        changed = "".join(f"; {key}={value!r}, as asked" for key, value in changes.items())
        print(f"{name}: {settings.notice}{changed}", file=sys.stderr)
        if changes.get("max_length", 0) > positions:
            raise UserError(
                f"max_length={changes['max_length']}: {name} takes at most {positions} tokens"
            )
        return cls(folder, replace(settings, **changes), dtype, batch_tokens)

    def save(self, folder: Path) -> None:
        for file in encoder_files(self.folder):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            # A copy: the user may train or convert this model further, in place.
            shutil.copyfile(self.folder / file, folder / file)
        made = {"dtype": self.dtype, "settings": asdict(self.settings)}
        write_json(folder / ENCODER, {"kind": "bert"} | made)

    @classmethod
    def load(cls, folder: Path, batch_tokens: int | None) -> SentenceEncoder:
        row = read_object(folder / ENCODER, ("settings", "dtype"))
        return cls(folder, EncoderSettings(**row["settings"]), row["dtype"], batch_tokens)

    # ---- batches ---------------------------------------------------------------------------------
    def prepare(self, texts: Sequence[str], query: bool) -> tuple[list[np.ndarray], int]:
        """Tokenizes texts behind the prefix of queries or passages; counts those that were cut."""
        prefix = self.settings.query_prefix if query else self.settings.passage_prefix
        tokens: list[np.ndarray] = []
        num_cut = 0
        for i in range(0, len(texts), _TEXTS_AT_ONCE):
            some = [prefix + text for text in texts[i : i + _TEXTS_AT_ONCE]]
            ids, cut = self.tokenizer.encode(some, self.settings.max_length)
            tokens += ids
            num_cut += cut
        return tokens, num_cut

    def embed(
        self,
        prepared: list[np.ndarray],
        out: Float[np.ndarray, "n dim"],
        advance: Callable[[int], None],
    ) -> None:
        """Writes the vectors of tokenized texts into `out`.

        The batches depend on these texts alone, so the same texts give the same vectors.
        """
        pending: deque[tuple[np.ndarray, jax.Array]] = deque()

        def collect() -> None:
            rows, vectors = pending.popleft()
            out[rows] = np.asarray(vectors)[: len(rows)]
            advance(len(rows))

        for rows, length, num_rows in self._batches(np.array([len(t) for t in prepared])):
            tokens = np.zeros((num_rows, length), np.int32)
            lengths = np.zeros(num_rows, np.int32)
            for i, row in enumerate(rows):
                lengths[i] = len(prepared[row])
                tokens[i, : lengths[i]] = prepared[row]
            batch = (sharding.put_on_mesh(self.mesh, x, sharding.BATCH) for x in (tokens, lengths))
            pending.append((rows, self._embed(self.params, *batch)))
            if len(pending) > _IN_FLIGHT:
                collect()
        while pending:
            collect()

    def _batches(
        self, lengths: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[Int[np.ndarray, " rows"], int, int]]:
        """Yields (texts, padded length, padded rows), from short texts to long ones."""
        order = np.argsort(lengths, kind="stable")
        i = 0
        while i < len(order):
            length = self._padded_length(lengths[order[i]])
            while True:
                rows = self._full_rows(length)
                last = lengths[order[min(i + rows, len(order)) - 1]]
                if last <= length:
                    break
                length = self._padded_length(last)
            batch = order[i : i + rows]
            yield batch, length, self._padded_rows(len(batch), rows)
            i += rows

    def _padded_length(self, n: int) -> int:
        most = self.max_positions
        return min(next((length for length in LENGTHS if length >= n), most), most)

    def _full_rows(self, length: int) -> int:
        devices = self.mesh.size
        return max(1, self.batch_tokens // (length * devices)) * devices

    def _padded_rows(self, n: int, full: int) -> int:
        sizes = (size * self.mesh.size for size in _FEW_ROWS)
        return next((size for size in sizes if n <= size < full), full)
