"""Self-RAG on JAX: retrieve on demand, generate from each passage in parallel, then critique.

The critique is expressed in reflection tokens, which the generator itself predicts. The public
names are imported on first use, so that `import selfrag_jax` stays instant.
"""

from importlib import import_module

from selfrag_jax import moved

__version__ = "0.1.0"

_PUBLIC = {
    "SelfRAG": "answering.selfrag",
    "AnswerConfig": "answering.config",
    "Answer": "answering.records",
    "SegmentDone": "answering.records",
    "draw_tree": "answering.tree_plot",
    "Question": "records",
    "Passage": "records",
    "UserError": "errors",
}

moved.install()


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(f"selfrag_jax.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'selfrag_jax' has no attribute {name!r}")
