"""What a command declares: an example, flags, and the function that runs it."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, TypeVar

from ml_collections import ConfigDict

from selfrag_jax import config
from selfrag_jax.errors import UserError

T = TypeVar("T")

# Headings of --help, in this order; those that are not named here come after INPUT.
REQUIRED, INPUT = "Required", "Input"
MODEL, SEARCH, SAMPLING = "Model and index", "Search", "Sampling"
OUTPUT, SETTINGS = "Output", "Settings"


@dataclass(frozen=True)
class Flag:
    """A flag of a command.

    `selfrag COMMAND --help` adds the default to the help, unless the help has the word in it.
    """

    name: str
    help: str
    default: str | int | float | bool | None = None  # None: optional, or `required`
    required: bool = False
    type: type = str  # str, int, float, bool, or tuple: text with commas
    group: str = ""  # the heading of --help under which it stands; see `heading`
    choices: tuple[str, ...] = ()  # for shell completion; the command itself checks the value
    is_folder: bool = False  # for shell completion
    is_model: bool = False  # the same: a folder, or a GGUF file
    field: str = ""  # the config's field that it replaces: there is its default
    field_default: Any = None  # where the config lacks the field
    is_url: bool = False  # an address of the web, not a file
    # Where the value may be a file in a bucket (commands/remote_files.py):
    writes: bool = False  # the command writes it
    in_place: bool = False  # it is used through its address, not through a copy
    default_beside: tuple[str, ...] = ()  # without it, it lies beside these flags' files
    folders_beside: tuple[str, ...] = ()  # folders that are written beside it
    # Of what the command writes: the names, as fnmatch has them, that every process of a job sends
    # to a bucket. All else is sent by process 0 alone.
    each_sends: str = ""

    @property
    def heading(self) -> str:
        """The group in which --help lists the flag."""
        if self.required:
            return REQUIRED
        return self.group or (OUTPUT if self.writes else SETTINGS)


@dataclass(frozen=True)
class Command:
    example: str  # several, one a line, where a command has several uses
    flags: tuple[Flag, ...]
    run: Callable[[dict[str, Any], list[str]], None]  # takes flag values, positional arguments
    positional: str = ""  # positional arguments as the usage shows them: FILE, [QUESTION]
    positional_help: str = ""  # what they are, where the names do not tell
    positional_paths: bool = False  # whether they are files
    positional_choices: tuple[str, ...] = ()
    default_config: str = ""  # where --config has no default: whose numbers --help shows
    saves_on_sigterm: bool = False  # of several processes, all save when one gets SIGTERM

    @property
    def examples(self) -> list[str]:
        return self.example.splitlines()


DISTRIBUTED = Flag(
    "distributed",
    "several processes do the work together: auto (TPU slices, Slurm, MPI), or "
    "HOST:PORT,PROCESSES,INDEX; run the same command on every host",
)


def config_flag(
    default: str | None = "tiny", note: str = "", examples: str = "tiny, tiny:smoke"
) -> Flag:
    return Flag(
        "config",
        f"an installed config ({examples}) or a path; "
        f"--config.section.field=value changes a field{note}",
        default,
    )


def load_config(values: dict[str, Any]) -> ConfigDict:
    """The config that --config names, with the --config.x.y=z assignments applied."""
    return config.override(config.load(values["config"]), values["overrides"])


def config_section(values: dict[str, Any], cls: type[T], name: str) -> T:
    """A section of the config as a dataclass. Raises UserError if there is no such section."""
    loaded = load_config(values)
    if name not in loaded:
        raise UserError(
            f"--config={values['config']}: has no section {name!r}; "
            f"sections: {', '.join(sorted(loaded))}"
        )
    return config.build(cls, loaded[name], name)


def flags_of(cls: type, section: str, group: str = "") -> tuple[Flag, ...]:
    """One flag for each field of a settings dataclass that carries help (see config.setting).

    Nested dataclasses contribute theirs in place. section: the config's section that `cls` is made
    from, such as answer.search; "" for none. group: of the flags whose setting names none.
    """
    hints = typing.get_type_hints(cls)
    flags: list[Flag] = []
    for f in fields(cls):
        kind = _without_none(hints[f.name])
        if is_dataclass(kind):
            flags += flags_of(typing.cast(type, kind), f"{section}.{f.name}", group)
        elif text := f.metadata.get("help"):
            flags.append(
                Flag(
                    f.name,
                    text,
                    type=typing.get_origin(kind) or kind,
                    group=f.metadata["group"] or group,
                    choices=f.metadata["choices"],
                    field=f"{section}.{f.name}" if section else "",
                    field_default=None if f.default is MISSING else f.default,
                )
            )
    return tuple(flags)


def given(values: dict[str, Any], flags: Iterable[Flag]) -> dict[str, Any]:
    """The values of those flags that the user set."""
    return {f.name: values[f.name] for f in flags if values[f.name] is not None}


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(k for k in typing.get_args(hint) if k is not types.NoneType)
    return hint
