"""Reads the pickle that lists the tensors of a file in torch's own format, without running it.

A pickle is a program: it names functions and calls them. This reader is a small interpreter of the
operations that describe tensors. It knows three functions and refuses every other by name, so that
a file from a stranger can run nothing, and it hashes and prints nothing that the file has built.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

MAX_BYTES = 8 * 2**20  # of a pickle; 50,000 tensors
STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Storage:
    """Where numbers lie: a file of the archive, which several tensors may share."""

    dtype: np.dtype
    key: str
    size: int  # numbers


@dataclass(frozen=True)
class TensorView:
    """A tensor as a view of a storage; offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensor_pickle(data: bytes) -> dict[str, TensorView]:
    """Returns the tensors by name. Raises ValueError with the reason if there is anything else."""
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"lists its tensors in over {MAX_BYTES:,} bytes, which is more than they need"
        )
    content = _interpret(data)
    if not isinstance(content, dict) or not all(
        isinstance(t, TensorView) for t in content.values()
    ):
        raise ValueError("holds something beside a dict of tensors")
    return content


# ---- what a pickle may call ------------------------------------------------------------------
def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(n) is int and 0 <= n < 2**48 for n in values):
        raise ValueError("holds a tensor without a shape")
    return values


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any = 0, _hooks: Any = (),
    metadata: Any = None,
) -> TensorView:  # fmt: skip
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise ValueError("holds a tensor without a storage")
    if metadata:  # torch has one for a negated view, whose storage has the other signs
        raise ValueError("holds a tensor of an unknown kind")
    view = TensorView(storage, offset, _counts(shape), _counts(strides))
    if len(view.shape) != len(view.strides):
        raise ValueError("holds a tensor without a shape")
    return view


def _parameter(tensor: Any, *_: Any) -> TensorView:
    if not isinstance(tensor, TensorView):
        raise ValueError("holds a parameter that is no tensor")
    return tensor


def _ordered_dict(*entries: Any) -> dict[str, Any]:
    if entries:
        raise ValueError("holds a dict of an unknown kind")
    return {}


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}
_KNOWN: dict[str, Any] = _FUNCTIONS | {f"torch {name}": d for name, d in STORAGES.items()}


def _look_up(name: str) -> Any:
    """name: module and attribute, with a space between."""
    if name not in _KNOWN:
        shown = name.replace(" ", ".", 1).encode("unicode_escape").decode()[:80]
        raise ValueError(f"asks for {shown}, and only tensors are read")
    return _KNOWN[name]


def _call(function: Any, arguments: Any) -> Any:
    if not any(function is f for f in _FUNCTIONS.values()) or not isinstance(arguments, tuple):
        raise ValueError("calls something that is no function")
    return function(*arguments)


def _storage(reference: Any) -> Storage:
    """What a reference to a storage stands for: ("storage", type, key, device, size)."""
    if not isinstance(reference, tuple) or len(reference) != 5:
        raise ValueError("refers to something beside a storage")
    kind, dtype, key, _, size = reference
    is_storage = isinstance(kind, str) and kind == "storage" and isinstance(dtype, np.dtype)
    if not is_storage or type(key) is not str or type(size) is not int or size < 0:
        raise ValueError("refers to something beside a storage")
    return Storage(dtype, key, size)


# ---- the interpreter -------------------------------------------------------------------------
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_LITERALS = "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE".split()
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _interpret(data: bytes) -> Any:
    """The object that a pickle builds. Raises ValueError for an operation that is not known."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    try:
        for operation, argument, _ in pickletools.genops(data):
            name = operation.name
            if name == "STOP":
                return stack.pop()
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name not in ("PROTO", "FRAME"):
                _step(stack, name, argument)
    except (IndexError, KeyError, TypeError) as e:
        raise ValueError(f"is damaged ({type(e).__name__} in its list of tensors)") from None
    raise ValueError("is damaged (its list of tensors has no end)")


def _step(stack: list[Any], name: str, argument: Any) -> None:
    """Carries out one operation on the stack."""
    if name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in _LITERALS:
        stack.append(argument)
    elif name in ("EMPTY_DICT", "EMPTY_LIST"):
        stack.append({} if name == "EMPTY_DICT" else [])
    elif name in _TUPLES:
        stack.append(tuple(_pop(stack, _TUPLES[name])))
    elif name == "TUPLE":
        stack.append(tuple(_pop_to_mark(stack)))
    elif name == "GLOBAL":
        stack.append(_look_up(argument))
    elif name == "STACK_GLOBAL":
        names = _pop(stack, 2)
        stack.append(_look_up(" ".join(names)))  # a TypeError if they are no text
    elif name == "BINPERSID":
        stack.append(_storage(*_pop(stack, 1)))
    elif name == "REDUCE":
        stack.append(_call(*_pop(stack, 2)))
    elif name == "BUILD":  # attributes of a state dict, such as its _metadata
        _pop(stack, 1)
        _as(dict, stack[-1])
    elif name in ("SETITEM", "SETITEMS"):
        items = _pop(stack, 2) if name == "SETITEM" else _pop_to_mark(stack)
        _set_items(_as(dict, stack[-1]), items)
    elif name in ("APPEND", "APPENDS"):
        items = _pop(stack, 1) if name == "APPEND" else _pop_to_mark(stack)
        _as(list, stack[-1]).extend(items)
    else:
        raise ValueError(f"asks for the operation {name}, and only tensors are read")


def _pop(stack: list[Any], n: int) -> list[Any]:
    """Takes the last n objects off the stack."""
    if len(stack) < n:
        raise IndexError
    items = stack[-n:]
    del stack[-n:]
    return items


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    """Takes what lies above the last mark, and the mark, off the stack."""
    start = len(stack) - 1
    while stack[start] is not _MARK:  # an IndexError if there is none
        start -= 1
        if start < 0:
            raise IndexError
    items = stack[start + 1 :]
    del stack[start:]
    return items


def _as(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"changes something that is no {kind.__name__}")
    return value


def _set_items(target: dict[str, Any], items: list[Any]) -> None:
    if len(items) % 2 or not all(type(key) is str for key in items[::2]):
        raise ValueError("holds something beside a dict of tensors")
    target.update(zip(items[::2], items[1::2], strict=True))
