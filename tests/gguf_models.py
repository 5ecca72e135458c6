"""Writes small GGUF files of models in torch, as llama.cpp's converter writes them."""

from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
import transformers
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

LLAMA2_TOKENIZER = Path(__file__).parent / "data" / "llama_tokenizer" / "tokenizer.model"
# Rows of a multiple of 256 values, as the K types need them.
SIZES = dict(
    hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024,
)  # fmt: skip
_MODULES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "output",
}  # fmt: skip
# The places of the f16 scales in a block of the types that the library cannot write.
_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def torch_model(vocab_size, **fields):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | fields, vocab_size=vocab_size)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:  # all norms are 1 and all biases 0, else
                value += 0.1 * torch.randn_like(value)
    return model


def interleaved(rows, heads):
    """The rows of q and k as llama.cpp's converter orders them (LlamaModel.permute)."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def random_blocks(shape, kind, rng):
    """Valid blocks of a quantized type: random bytes, and scales that make small values."""
    size, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // size, num_bytes), np.uint8)
    for at in _SCALES[kind]:
        scales = rng.uniform(1e-5, 1e-4, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def gguf_tensor_name(name):
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        layer, module = module.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{_MODULES[module]}.{kind}"
    return f"{_MODULES[module]}.{kind}"


def write(path, model, kind="F32", tokenizer=None, fields=None, tensors=None, without=()):
    """Writes a model of torch's. kind: of its matrices.

    tokenizer: fields, as of `byte_level` and `sentence_pieces`. fields: replace or extend the
    others; None leaves one out. tensors: extend the model's. without: names of tensors.
    """
    c, rng = model.config, np.random.default_rng(0)
    metadata = {
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.rope.freq_base": c.rope_parameters["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "llama.vocab_size": c.vocab_size,
        "llama.rope.dimension_count": c.head_dim,
        **(tokenizer or {}),
        **(fields or {}),
    }
    architecture = metadata.pop("general.architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, value in model.state_dict().items():
        if name in without or (name == "lm_head.weight" and c.tie_word_embeddings):
            continue
        value, stored = value.numpy(), gguf_tensor_name(name)
        if ".q_proj" in name or ".k_proj" in name:
            is_query = ".q_proj" in name
            heads = c.num_attention_heads if is_query else c.num_key_value_heads
            value = interleaved(value, heads)
        raw = GGMLQuantizationType.F32 if value.ndim == 1 else GGMLQuantizationType[kind]
        if raw.name in _SCALES:
            value = random_blocks(value.shape, kind, rng)
        else:
            value = gguf.quants.quantize(value, raw)
        writer.add_tensor(stored, value, raw_dtype=raw)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key, value):
    add = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
        str: writer.add_string, list: writer.add_array,
    }  # fmt: skip
    if value is not None:
        add[type(value)](key, value)


# ---- tokenizers ------------------------------------------------------------------------------
def byte_level(backend, pre, controls):
    """Fields of a byte-level BPE of the `tokenizers` library; the first two controls begin and
    end a text."""
    import json

    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in controls else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": model["vocab"][controls[0]],
        "tokenizer.ggml.eos_token_id": model["vocab"][controls[1]],
    }


def sentence_pieces():
    """Fields of Llama-2's tokenizer (a small vocabulary of its settings)."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA2_TOKENIZER))
    kinds = [
        (sp.is_unknown, 2), (sp.is_control, 3), (sp.is_unused, 5), (sp.is_byte, 6)
    ]  # fmt: skip
    ids = range(sp.get_piece_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [next((k for f, k in kinds if f(i)), 1) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
