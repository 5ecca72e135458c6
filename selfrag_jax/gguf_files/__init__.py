"""Models in GGUF, the format of llama.cpp: one file with metadata, tokenizer and tensors."""
