"""The weights of a GGUF file of the Llama family, read and dequantized one tensor at a time.

They go by Hugging Face's names, so that the table of huggingface/weights.py serves for them, too.
llama.cpp rotates neighbouring channels of a head together, Hugging Face channel h with h + H/2; so
llama.cpp's converter interleaves the rows of q and k of each head, and here they are put back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.gguf_files.header import GgufHeader, TensorEntry
from selfrag_jax.models.llama import LlamaConfig

ROPE_FACTORS = "rope_freqs.weight"  # belongs to the architecture
# GGUF's name -> Hugging Face's, without ".weight" and ".bias"
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
# Types whose values numpy has; the others are dequantized to f32.
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_DEQUANTIZED_BYTES = 2**24  # of f32 values at a time: the library makes several copies of them


class GgufWeights:
    """The weights of a GGUF file by tensor name, as huggingface/weight_files.py has them.

    Raises UserError for a tensor that the model has no place for.
    """

    def __init__(self, header: GgufHeader, config: LlamaConfig):
        self.folder, self._path, self._config = header.path.parent, header.path, config
        self._entries: dict[str, TensorEntry] = {}  # by Hugging Face's name
        self._stored: dict[str, str] = {}  # Hugging Face's name -> GGUF's
        for name, entry in header.tensors.items():
            if name == ROPE_FACTORS:
                continue
            ours = _hugging_face_name(name, config.num_layers)
            if ours is None:
                raise UserError(
                    f"{header.path}: tensor {name!r} has no place in a Llama of "
                    f"{config.num_layers} layers"
                )
            self._entries[ours], self._stored[ours] = entry, name
        self.file_of = dict.fromkeys(self._entries, header.path.name)

    def dtype(self, names: Sequence[str]) -> str:
        """The dtype that holds some tensors without loss, by numpy's name; f32 for quantized ones.

        Raises UserError when one is missing.
        """
        types = {np.dtype(_PLAIN.get(self._entry(name).type, np.float32)) for name in names}
        return types.pop().name if len(types) == 1 else "float32"

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor, dequantized.

        Raises UserError when it is missing, has another shape, or holds a value that is not finite.
        """
        entry = self._entry(name)
        if entry.shape != shape:
            raise UserError(
                f"{self._path}: tensor {self._stored[name]!r} has shape {entry.shape}; by the "
                f"metadata it should be {shape}"
            )
        c = self._config
        heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads}.get(name.split(".")[-2], 0)
        value = read_values(self._path, entry, heads)
        if not np.isfinite(value).all():
            raise UserError(
                f"{self._path}: tensor {self._stored[name]!r} holds NaN or infinite values"
            )
        return value

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise UserError(f"{self._path}: tensor {gguf_name(name)!r} is missing")
        return self._entries[name]


def read_values(path: Path, entry: TensorEntry, heads: int = 0) -> np.ndarray:
    """The values of a tensor, in f32 if it is quantized, else in its own dtype.

    heads: puts back the rows of that many heads which llama.cpp interleaved; 0 for none.
    """
    count = entry.rows * entry.row_bytes
    data = np.fromfile(path, np.uint8, count, offset=entry.start)
    if data.size < count:  # cut off since the header was read
        raise UserError(f"{path}: is cut off; copy or download it again")
    if heads:
        rows = entry.shape[0]
        # Each head's rows are 0, H/2, 1, H/2 + 1, ...
        pairs = data.reshape(heads, rows // heads // 2, 2, -1)
        data = pairs.swapaxes(1, 2).reshape(-1)
    if entry.type in _PLAIN:
        return data.view(_PLAIN[entry.type]).reshape(entry.shape)
    return _dequantized(data.reshape(entry.rows, entry.row_bytes), entry)


def _dequantized(data: np.ndarray, entry: TensorEntry) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind, columns = GGMLQuantizationType[entry.type], entry.shape[-1]
    out = np.empty((entry.rows, columns), np.float32)
    step = max(1, _DEQUANTIZED_BYTES // (4 * columns))
    for start in range(0, entry.rows, step):
        with np.errstate(all="ignore"):  # a scale that is not finite: the caller refuses it
            out[start : start + step] = dequantize(data[start : start + step], kind)
    return out.reshape(entry.shape)


# ---- names -----------------------------------------------------------------------------------
def _hugging_face_name(name: str, num_layers: int) -> str | None:
    """None for a tensor that a Llama does not have."""
    if not (match := _NAME.fullmatch(name)):
        return None
    layer, module, kind = match.groups()
    if layer is None:
        return f"{_TOP[module]}.{kind}" if module in _TOP else None
    if module not in _LAYER or int(layer) >= num_layers:
        return None
    return f"model.layers.{int(layer)}.{_LAYER[module]}.{kind}"


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor, from Hugging Face's."""
    module, _, kind = name.rpartition(".")
    for theirs, ours in _TOP.items():
        if module == ours:
            return f"{theirs}.{kind}"
    _, _, layer, module = module.split(".", 3)
    theirs = next(theirs for theirs, ours in _LAYER.items() if ours == module)
    return f"blk.{layer}.{theirs}.{kind}"
