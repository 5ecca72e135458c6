"""The arrays of a saved tree, opened but not read: what needs one item of several, or one layer at a time, reads no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers


class _Handler(type_handlers.NumpyHandler):
    """Opens arrays instead of reading them, whatever they were saved from. kind: under which name Orbax finds them."""

    _array_metadata_store = None  # Orbax warns where none is named; chunks are found without

    def __init__(self, kind: str):
        super().__init__()
        self._kind = kind

    def typestr(self) -> str:
        return self._kind

    async def deserialize(self, infos, args=None):
        import tensorstore as ts
        from orbax.checkpoint._src.serialization import tensorstore_utils

        out = []
        for info in infos:
            spec = tensorstore_utils.build_array_read_spec(
                info, use_ocdbt=info.is_ocdbt_checkpoint, metadata_key=None
            ).json
            out.append(await ts.open(ts.Spec(spec), open=True, context=info.ts_context))
        return out


def handler(*types: tuple[type, Any]) -> ocp.PyTreeCheckpointHandler:
    """Orbax's own, with these handlers of types in place of its usual ones."""
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=type_handlers.create_type_handler_registry(*types)
    )


def open_tree(folder: Path) -> Any:
    """The tree of a folder that Orbax wrote, of unread tensorstore arrays."""
    lazy = ((np.ndarray, _Handler("np.ndarray")), (jax.Array, _Handler("jax.Array")))
    return handler(*lazy).restore(folder.absolute(), args=ocp.args.PyTreeRestore())
