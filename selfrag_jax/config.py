"""Configs: Python files that return an ml_collections.ConfigDict, converted to frozen dataclasses.

A config names the numbers. An unknown field is an error that suggests the field that was probably
meant. Only the dataclasses have defaults: no function supplies a number that a config omits.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import traceback
import typing
from collections.abc import Collection, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ml_collections import ConfigDict

from selfrag_jax.errors import UserError

T = TypeVar("T")


def setting(help: str, *, group: str = "", choices: Collection[str] = (), **default: Any) -> Any:
    """A dataclass field that is also a command-line flag with this help (commands/command.py).

    group, choices: of the flag. default: what dataclasses.field takes.
    """
    metadata = {"help": help, "group": group, "choices": tuple(choices)}
    return dataclasses.field(metadata=metadata, **default)


# ---- loading ------------------------------------------------------------------------------------
def load(spec: str) -> ConfigDict:
    """Returns the config that `spec` names, locked against new fields.

    spec: an installed config (`tiny`), one of its variants (`tiny:smoke`), or a path with or
    without a variant (`my/config.py:variant`).
    Raises UserError if there is no such file or variant, and lists those that exist; and for what
    the file's own code raises, with its line.
    """
    name, _, variant = spec.partition(":")
    path = _find(name, spec)
    module = import_file(path, spec)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={spec}: {path} has no function get_config(variant)")
    try:
        config = module.get_config(variant) if variant else module.get_config()
    except ValueError as e:
        raise UserError(f"--config={spec}: {e}") from None
    except TypeError as e:
        if not variant or "positional argument" not in str(e):
            raise _error_in(path, spec, e) from e
        raise UserError(
            f"--config={spec}: {path.stem} has no variants; leave {':' + variant!r} out"
        ) from None
    except UserError:  # of another config, that this one begins with
        raise
    except Exception as e:
        raise _error_in(path, spec, e) from e
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={spec}: get_config() of {path} returns a {type(config).__name__}; expected "
            "an ml_collections.ConfigDict"
        )
    config.lock()
    return config


def _error_in(path: Path, spec: str, e: Exception) -> UserError:
    """The error of a config's own code, with the last line of its file that it came through."""
    frames = traceback.extract_tb(e.__traceback__)
    lines = [f":{frame.lineno}" for frame in frames if Path(frame.filename) == path.absolute()]
    said = " ".join(str(e).split())
    return UserError(f"--config={spec}: {path}{''.join(lines[-1:])}: {type(e).__name__}: {said}")


def _find(name: str, spec: str) -> Path:
    """The file of a config, given by its path or by the name of an installed one."""
    path = Path(name)
    may_be_installed = path.parent in (Path("."), Path("configs"))
    if not path.is_file() and may_be_installed:
        path = installed_folder() / f"{path.stem}.py"
    if not path.is_file():
        known = sorted(p.stem for p in installed_folder().glob("*.py") if p.stem != "__init__")
        close = difflib.get_close_matches(Path(name).stem, known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"--config={spec}: no such config{hint} "
            f"(installed: {', '.join(known)}; or a path to a .py file)"
        )
    return path


def import_file(path: Path, spec: str) -> ModuleType:
    module_spec = importlib.util.spec_from_file_location(f"selfrag_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={spec}: {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as e:
        raise UserError(f"--config={spec}: {path} cannot be loaded: {type(e).__name__}: {e}") from e
    return module


def installed_folder() -> Path:
    try:
        import selfrag_jax.configs as installed
    except ImportError:  # run from a checkout without installation
        return Path(__file__).parent.parent / "configs"
    return Path(installed.__file__).parent


# ---- checking and changing ----------------------------------------------------------------------
def require_kind(config: ConfigDict, kind: str, example: str) -> None:
    """Raises UserError if a config was made for another purpose."""
    found = config.kind if "kind" in config else "unknown"
    if found != kind:
        raise UserError(
            f"this config is of kind {found!r}; expected one of kind {kind!r}, such as {example}"
        )


def require(config: ConfigDict, *fields: str) -> None:
    """Raises UserError naming the first of `fields` (`section.field`) that a config lacks."""
    for name in fields:
        node = config
        for part in name.split("."):
            if not isinstance(node, ConfigDict) or part not in node:
                raise UserError(f"config: lacks {name}")
            node = node[part]


def override(config: ConfigDict, assignments: Iterable[str]) -> ConfigDict:
    """Applies `section.field=value` assignments to `config` and returns it.

    Raises UserError for an unknown field or a value of another type.
    """
    for assignment in assignments:
        key, eq, value = assignment.partition("=")
        if not eq:
            raise UserError(f"--config.{assignment}: expected --config.{key}=VALUE")
        node, parts = config, key.split(".")
        for i, part in enumerate(parts):
            if not isinstance(node, ConfigDict) or part not in node:
                unknown = ".".join(parts[: i + 1])
                known = list(node) if isinstance(node, ConfigDict) else []
                raise UserError(f"--config.{key}: no field {unknown!r}{_suggestion(part, known)}")
            if i < len(parts) - 1:
                node = node[part]
        node[parts[-1]] = _parse(f"--config.{key}", value, node[parts[-1]])
    return config


def reseed(config: ConfigDict, seed: int) -> ConfigDict:
    """Adds `seed` to every field named seed, for another run of the same experiment."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            reseed(value, seed)
        elif key == "seed":
            config[key] = value + seed
    return config


def _parse(flag: str, text: str, old: Any) -> Any:
    """The value that `text` stands for, in the type of the field's old value."""
    if text.lower() == "none" and not isinstance(old, ConfigDict):
        return None  # `build` refuses it for a field that must have a value
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False}[text.lower()]
        if old is None:
            return _guess(text)
        if isinstance(old, (int, float)):
            return type(old)(text)
    except (KeyError, ValueError):
        raise UserError(f"{flag}={text}: expected a value like {old!r}") from None
    if isinstance(old, str):
        return text
    raise UserError(f"{flag}: is a section; set its fields one by one")


def _guess(text: str) -> Any:
    """The value of a field whose old value is None: none, a boolean, a number, or else text."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _suggestion(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown field: the closest known one, or all of them."""
    if not known:
        return ""
    close = difflib.get_close_matches(name, known, 1, 0.65)
    return f"; did you mean {close[0]!r}?" if close else f" (fields: {', '.join(sorted(known))})"


# ---- dataclasses --------------------------------------------------------------------------------
def build(cls: type[T], section: Any, name: str) -> T:
    """Builds a frozen dataclass, with its nested dataclasses, from a config section.

    Raises UserError naming a field that is unknown, missing or of the wrong type.
    """
    values = _field_values(cls, section, name)
    try:
        return cls(**values)
    except UserError as e:
        if str(e).startswith(("--", "config ")):
            raise
        raise UserError(f"config {name}: {e}") from None
    except ValueError as e:
        raise UserError(f"config {name}: {e}") from None


def _field_values(cls: type[Any], section: Any, name: str) -> dict[str, Any]:
    section = dict(section.items()) if isinstance(section, ConfigDict) else dict(section)
    types = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in section:
        if key not in fields:
            raise UserError(f"config {name}: unknown field {key!r}{_suggestion(key, fields)}")
    if missing := sorted(n for n, f in fields.items() if n not in section and _is_required(f)):
        raise UserError(f"config {name}: lacks {', '.join(missing)}")
    values = {}
    for key, value in section.items():
        nested = _nested_dataclass(types[key])
        if value is None and fields[key].default == "none":
            value = "none"  # --config.x=none: here a word as any other
        if nested is not None and value is not None:
            values[key] = build(nested, value, f"{name}.{key}")
        else:
            check_type(f"config {name}: {key}", value, types[key])
            values[key] = _freeze(value)
    return values


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _nested_dataclass(annotation: Any) -> type[Any] | None:
    """The dataclass that a field holds, also if it is optional; None for other fields."""
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
    return None


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check_type(what: str, value: Any, annotation: Any) -> None:
    """Raises UserError if a value is not of the annotated type. The message calls it `what`."""
    kinds = set(typing.get_args(annotation) or (annotation,)) - {type(None)}
    if value is None and type(None) not in typing.get_args(annotation):
        raise UserError(f"{what} must not be none")
    if value is None or not kinds <= set(_KINDS):
        return
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if not fits:
        expected = " or ".join(text for kind, text in _KINDS.items() if kind in kinds)
        raise UserError(f"{what}={value!r} must be {expected}")


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, (list, tuple)) else value
