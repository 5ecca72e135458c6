"""Self-RAG on JAX: retrieve on demand, generate from each passage in parallel, then critique.

The critique is expressed in reflection tokens, which the generator itself predicts.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    # Imported on first use, so that `import selfrag_jax` stays instant.
    if name == "SelfRAG":
        from selfrag_jax.answering.selfrag import SelfRAG

        return SelfRAG
    raise AttributeError(f"module 'selfrag_jax' has no attribute {name!r}")
