"""Configs: Python files that return an ml_collections.ConfigDict, turned once into frozen dataclasses.

A config names every number; unknown fields are errors with the field that was probably meant. Nothing here, and no
leaf function, supplies a number that a config left out.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import typing
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from selfrag_jax.errors import UserError

T = TypeVar("T")


def setting(help: str, **default: Any) -> Any:
    """A dataclass field that is also a command-line flag, with this help (see commands/command.py)."""
    return dataclasses.field(metadata={"help": help}, **default)


def load(spec: str) -> ConfigDict:
    """A config from `tiny`, `tiny:smoke` (an installed config and its variant) or a path such as `my/config.py:variant`.

    Raises BadInput when there is no such file or variant, listing those that there are.
    """
    name, _, variant = spec.partition(":")
    path = Path(name)
    bare = path.parent == Path(".") or path.parent == Path("configs")
    if not path.is_file() and bare:
        path = _folder() / f"{path.stem}.py"
    if not path.is_file():
        known = sorted(p.stem for p in _folder().glob("*.py") if p.stem != "__init__")
        close = difflib.get_close_matches(Path(name).stem, known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"--config={spec}: no such config{hint} (installed: {', '.join(known)}; or a path to a .py file)"
        )
    module_spec = importlib.util.spec_from_file_location(f"selfrag_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as e:
        raise UserError(f"--config={spec}: {path} cannot be loaded: {type(e).__name__}: {e}") from e
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={spec}: {path} has no function get_config(variant)")
    try:
        config = module.get_config(variant) if variant else module.get_config()
    except ValueError as e:
        raise UserError(f"--config={spec}: {e}") from None
    except TypeError as e:
        if not variant or "positional argument" not in str(e):
            raise
        raise UserError(
            f"--config={spec}: {path.stem} has no variants; leave {':' + variant!r} out"
        ) from None
    config.lock()
    return config


def _folder() -> Path:
    try:
        import selfrag_jax.configs as installed

        return Path(installed.__file__).parent
    except ImportError:  # run from a checkout without installation
        return Path(__file__).parent.parent / "configs"


def require_kind(config: ConfigDict, kind: str, example: str) -> None:
    """Raises BadInput when a config was made for something else."""
    found = config.kind if "kind" in config else "unknown"
    if found != kind:
        raise UserError(
            f"this config is of kind {found!r}; here one of kind {kind!r} is needed, like {example}"
        )


def require(config: ConfigDict, *fields: str) -> None:
    """Raises BadInput naming a field (`section.field`) that a config lacks."""
    for name in fields:
        node = config
        for part in name.split("."):
            if not isinstance(node, ConfigDict) or part not in node:
                raise UserError(f"config: lacks {name}")
            node = node[part]


def override(config: ConfigDict, assignments: typing.Iterable[str]) -> ConfigDict:
    """Applies `section.field=value` assignments. Raises BadInput on an unknown field or a value of another type."""
    for assignment in assignments:
        key, eq, value = assignment.partition("=")
        if not eq:
            raise UserError(f"--config.{assignment}: expected --config.{key}=VALUE")
        node, parts = config, key.split(".")
        for i, part in enumerate(parts):
            if not isinstance(node, ConfigDict) or part not in node:
                raise UserError(
                    f"--config.{key}: no field {'.'.join(parts[: i + 1])!r}{_meant(part, node)}"
                )
            if i < len(parts) - 1:
                node = node[part]
        node[parts[-1]] = _parse(f"--config.{key}", value, node[parts[-1]])
    return config


def reseed(config: ConfigDict, seed: int) -> ConfigDict:
    """Adds `seed` to every field of that name: another run of the same experiment."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            reseed(value, seed)
        elif key == "seed":
            config[key] = value + seed
    return config


def _parse(flag: str, value: str, old: Any) -> Any:
    if value.lower() == "none" and not isinstance(old, ConfigDict):
        return None  # `build` refuses it where there must be a value
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False}[value.lower()]
        if old is None:
            return _guess(value)
        if isinstance(old, (int, float)):
            return type(old)(value)
    except (KeyError, ValueError):
        raise UserError(f"{flag}={value}: expected a value like {old!r}") from None
    if isinstance(old, str):
        return value
    raise UserError(f"{flag}: set the fields inside this section one by one")


def _guess(value: str) -> Any:
    """What a value means where the config has None: null, a truth value, a number, or else text."""
    word = {"none": None, "true": True, "false": False}
    if value.lower() in word:
        return word[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _meant(name: str, known: Any) -> str:
    known = list(known) if known is not None else []
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else f" (fields: {', '.join(sorted(known))})"


def build(cls: type[T], section: Any, name: str) -> T:
    """A frozen dataclass from a config section, nested dataclasses included.

    Raises BadInput naming an unknown or a missing field, or one of the wrong type.
    """
    values = dict(section.items()) if isinstance(section, ConfigDict) else dict(section)
    types = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"config {name}: unknown field {key!r}{_meant(key, fields)}")
    required = {
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise UserError(f"config {name}: lacks {', '.join(missing)}")
    out = {}
    for key, value in values.items():
        nested = next(
            (k for k in (types[key], *typing.get_args(types[key])) if dataclasses.is_dataclass(k)),
            None,
        )
        if nested and value is not None:
            out[key] = build(nested, value, f"{name}.{key}")
        else:
            check_type(f"config {name}: {key}", value, types[key])
            out[key] = tuple(map(_freeze, value)) if isinstance(value, (list, tuple)) else value
    try:
        return cls(**out)
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"config {name}: {e}") from None


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check_type(what: str, value: Any, annotated: Any) -> None:
    """Raises BadInput where a value, which the message calls `what`, is not of the annotated type."""
    kinds = set(typing.get_args(annotated) or (annotated,)) - {type(None)}
    if value is None and type(None) not in typing.get_args(annotated):
        raise UserError(f"{what} must not be none")
    if value is None or not kinds <= set(_KINDS):
        return
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if not fits:
        raise UserError(
            f"{what}={value!r} must be {' or '.join(text for kind, text in _KINDS.items() if kind in kinds)}"
        )


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, (list, tuple)) else value
