"""The command line, `selfrag COMMAND --flags`: finds the command, parses flags, prints errors."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import platform
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from selfrag_jax import __version__, accelerators, allocator
from selfrag_jax.commands import SUMMARIES, load_command, remote_files
from selfrag_jax.commands.command import Command, load_config
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.processes import joining

_DEVICE_IS_FULL = (
    "the device's memory is full; finished work is kept. To continue answering, give a lower "
    "--config.answer.batch=; to continue training, a lower rows_per_device, remat=full, or a mesh "
    "of more devices. A lower --ndocs or --beam_width, or --quantization=int8, takes less memory "
    "too, but starts answering again, since it changes the answers. `selfrag compile` tells "
    "beforehand what fits"
)
MAX_SEED = 2**31  # what JAX, NumPy and torch all take

_STOPPED = "it was told to stop (SIGTERM)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, 1 (failed), 2 (wrong input), 130 (Ctrl-C).

    SIGTERM exits with 143.
    """
    is_whole_process = argv is None
    if is_whole_process and "_ARGCOMPLETE" in os.environ:  # set by the script of a shell
        from selfrag_jax.commands import completion

        completion.answer_shell()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("--help", "-help", "-h", "help"):
        return _help(argv[1:])
    name, arguments = argv[0], argv[1:]
    if name in ("--version", "-V"):
        if arguments:
            print(f"selfrag: {name} takes no argument, found {arguments[0]!r}", file=sys.stderr)
            return 2
        return _print(_versions())
    if name not in SUMMARIES:
        return _unknown(name)
    if any(a in ("--help", "-help", "-h") for a in arguments):
        return _help([name])
    command = load_command(name)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        status, message = _run(command, name, arguments, is_whole_process)
    except SystemExit as e:
        joining.leave(e.code if isinstance(e.code, int) else 1, _STOPPED if e.code == 143 else "")
        raise
    if message:
        from selfrag_jax.answering.printable import printable

        print(printable(message), file=sys.stderr)  # it may quote a file
    joining.leave(status, message.removeprefix(f"selfrag {name}: "))
    return status


def _run(
    command: Command, name: str, arguments: Sequence[str], is_whole_process: bool
) -> tuple[int, str]:
    """Runs a command; returns its exit status, and what to print where it has failed."""
    try:
        values, positional = parse(command, name, arguments)
        accelerators.expect_none()
        _keep_compiled_programs()
        if is_whole_process:
            # Raises SystemExit, so that half-written output is removed. Training replaces this
            # handler with one that saves a checkpoint first.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            if name not in ("convert", "compile"):  # these run no model
                allocator.keep_freed_memory()
        if spec := values.get("distributed"):
            settings = _settings(command, values, positional)
            joining.join(spec, name, settings, command.saves_on_sigterm)
        with remote_files.local_copies(command, values, positional) as (values, positional):
            command.run(values, positional)
    except UserError as e:
        return 2, f"selfrag {name}: {e}"
    except (FloatingPointError, OSError, StageFailed) as e:
        is_unread = isinstance(e, BrokenPipeError) and _stdout_is_unread()
        return 1, "" if is_unread else f"selfrag {name}: {e}"
    except KeyboardInterrupt:
        continues = any(f.writes or (f.in_place and f.required) for f in command.flags)
        then = "; the same command continues where it was" if continues else ""
        return 130, f"\ninterrupted{then}"
    except Exception as e:
        if isinstance(e, RuntimeError) and "RESOURCE_EXHAUSTED" in str(e):
            return 1, f"selfrag {name}: {_DEVICE_IS_FULL} ({str(e).splitlines()[0]})"
        if joining.stopped_for_another(e):  # such as a collective without all of its processes
            return 1, ""
        joining.report_failure(e)
        raise
    return 0, ""


def _settings(
    command: Command, values: dict[str, Any], positional: Sequence[str]
) -> dict[str, Any]:
    """What must be the same in all processes of a job: the flags, and the config that they name."""
    settings: dict[str, Any] = {
        "flags": {f"--{f.name}": values[f.name] for f in command.flags if f.name != "distributed"}
        | {f"--config.{o.partition('=')[0]}": o.partition("=")[2] for o in values["overrides"]},
        "arguments": list(positional),
    }
    if values.get("config"):
        settings["config"] = load_config(values).to_dict()
    return json.loads(json.dumps(settings, default=str))


def _close_names(name: str, names: Sequence[str]) -> list[str]:
    """The name that is closest, and a second one that is as close but for a letter or so."""
    close = difflib.get_close_matches(name, names, 2, 0.5)
    ratios = [difflib.SequenceMatcher(None, name, other).ratio() for other in close]
    return [other for other, r in zip(close, ratios, strict=True) if r > ratios[0] - 0.15]


def parse(
    command: Command, name: str, arguments: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Flag values and positional arguments.

    The value `overrides` holds the --config.x.y=z assignments. Raises UserError for an unknown
    flag, naming a close one, for a bad value, and for a missing flag.
    """
    has_config = any(f.name == "config" for f in command.flags)
    arguments = [_with_home(a) for a in arguments]
    overrides = [a for a in arguments if has_config and a.startswith("--config.")]
    rest = [a for a in arguments if a not in overrides]
    _require_values(command, rest)
    parser = _absl_flags(command)
    try:
        positional = parser([name, *rest])[1:]
    except flags.UnrecognizedFlagError as e:
        names = [f.name for f in command.flags]
        close = _close_names(e.flagname or "", names)
        every = f"flags: {', '.join(f'--{n}' for n in names)}" if names else "it has no flags"
        hint = f"did you mean {' or '.join(f'--{n}' for n in close)}?" if close else every
        raise UserError(f"unknown flag --{e.flagname}; {hint}") from None
    except flags.IllegalFlagValueError as e:
        raise UserError(_bad_value(command, str(e))) from None
    except flags.Error as e:
        message = re.sub(r": \('Non-boolean .*", ": expected true or false", str(e))
        raise UserError(message) from None
    values: dict[str, Any] = {f.name: parser[f.name].value for f in command.flags}
    if missing := [f"--{f.name}" for f in command.flags if f.required and not values[f.name]]:
        raise UserError(f"missing {', '.join(missing)}; for example: {command.examples[0]}")
    if positional and not command.positional:
        raise UserError(
            f"unexpected argument {positional[0]!r}; flags start with --, "
            f"for example: {command.examples[0]}"
        )
    for f in command.flags:
        if f.type is tuple and values[f.name] is not None:
            values[f.name] = tuple(t.strip() for t in values[f.name].split(",") if t.strip())
        is_seed = f.name.endswith("seed") and values[f.name] is not None
        if is_seed and not 0 <= values[f.name] < MAX_SEED:
            raise UserError(f"--{f.name}={values[f.name]}: must be from 0 to {MAX_SEED - 1:,}")
    values["overrides"] = [a.removeprefix("--config.") for a in overrides]
    return values, positional


def _with_home(argument: str) -> str:
    """An argument whose path begins with ~/, as bash leaves it behind `--flag=`, spelt out."""
    name, eq, value = argument.partition("=")
    if name.startswith("--") and value.startswith("~/"):
        return f"{name}{eq}{Path(value).expanduser()}"
    return argument


def _require_values(command: Command, arguments: Sequence[str]) -> None:
    """Raises UserError for `--flag --other`: the other flag would be taken for the value."""
    names = {f.name for f in command.flags if f.type is not bool}
    for argument, following in itertools.pairwise(arguments):
        if argument == "--":
            return
        other = following.lstrip("-").partition("=")[0]
        is_flag = following.startswith("--") and other in {f.name for f in command.flags}
        if argument.startswith("--") and argument[2:] in names and is_flag:
            raise UserError(f"{argument} lacks its value, before {following}; {argument}=VALUE")


_TYPES = {int: "a whole number", float: "a number", bool: "true or false"}


def _bad_value(command: Command, message: str) -> str:
    """What absl says of a value that is not of the flag's type, in our words."""
    found = re.match(r"flag --(\w+)=(.*?): ", message, re.DOTALL)
    kind = next((f.type for f in command.flags if found and f.name == found[1]), str)
    if not found or kind not in _TYPES:
        return message
    return f"--{found[1]}={found[2]}: must be {_TYPES[kind]}"


def _absl_flags(command: Command) -> flags.FlagValues:
    """The flags of a command, in a FlagValues of their own."""
    values = flags.FlagValues()
    define_as: dict[type, Callable[..., Any]] = {
        str: flags.DEFINE_string,
        tuple: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_boolean,
    }
    for f in command.flags:
        define_as[f.type](f.name, f.default, f.help, flag_values=values)
    return values


def _help(arguments: Sequence[str]) -> int:
    """Prints the overview, or the help of the command that `selfrag help` is asked about."""
    from selfrag_jax.commands import help_text

    width = help_text.terminal_width()
    names = [a for a in arguments if a not in ("help", "--help", "-h")]
    if not names:
        return _print(help_text.overview(width))
    if names[0] not in SUMMARIES:
        return _unknown(names[0])
    return _print(help_text.command_help(names[0], load_command(names[0]), width))


def _print(text: str) -> int:
    """Prints a text; returns the exit status, which is 1 if nobody reads it to its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        if not _stdout_is_unread():
            raise
        return 1
    return 0


def _stdout_is_unread() -> bool:
    """Whether what reads stdout has ended, as `head` does; then the rest is dropped in silence."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _unknown(name: str) -> int:
    """Says that there is no such command, and which one was probably meant."""
    known = [*SUMMARIES, "help", "--help", "--version"]
    close = difflib.get_close_matches(name, known, 1)
    if close:
        hint = f"did you mean {close[0]!r}?"
    elif name.startswith("-"):
        hint = "flags come after the command: selfrag COMMAND --flag=value"
    else:
        hint = "`selfrag help` lists the commands"
    print(f"selfrag: unknown command {name!r}; {hint}", file=sys.stderr)
    return 2


def _versions() -> str:
    """One line: the package, JAX (which is not imported) and Python."""
    from importlib import metadata

    try:
        jax = metadata.version("jax")
    except metadata.PackageNotFoundError:
        jax = "missing"
    return f"selfrag-jax {__version__}, jax {jax}, Python {platform.python_version()}"


def _keep_compiled_programs() -> None:
    """Keeps compiled programs between runs: a second start takes seconds less."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "selfrag_jax" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


if __name__ == "__main__":
    sys.exit(main())
