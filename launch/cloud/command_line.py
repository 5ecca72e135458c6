"""The command line of the launchers: sub-commands with absl flags, as `selfrag` has them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfrag_jax import cli
from selfrag_jax.commands import SUMMARIES, load_command
from selfrag_jax.commands.command import Command, Flag
from selfrag_jax.errors import StageFailed, UserError


@dataclass(frozen=True)
class Subcommand:
    summary: str
    command: Command


def main(
    program: str, commands: Mapping[str, Subcommand], argv: Sequence[str] | None = None
) -> int:
    """Runs a sub-command; returns its exit status: 0, 1 (failed), 2 (wrong input), 130 (Ctrl-C).

    A program with one command has it under the name "".
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = "" if "" in commands else next(iter(argv[:1]), "--help")
    arguments = argv if "" in commands else argv[1:]
    if name in ("--help", "-h", "help"):
        print(_overview(program, commands))
        return 0
    title = f"{program} {name}".strip()
    if name not in commands:
        close = difflib.get_close_matches(name, commands, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        print(f"{program}: unknown command {name!r}{hint}", file=sys.stderr)
        print(f"\n{_overview(program, commands)}", file=sys.stderr)
        return 2
    chosen = commands[name]
    arguments, stage = _split(chosen.command, arguments)
    if any(a in ("--help", "-h") for a in arguments):
        print(f"{chosen.summary}\n\n{_help(chosen.command)}")
        return 0
    try:
        values, positional = cli.parse(chosen.command, title, arguments)
        chosen.command.run(values, [*positional, *stage])
    except UserError as e:
        print(f"{title}: {e}", file=sys.stderr)
        return 2
    except (StageFailed, OSError) as e:
        print(f"{title}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _split(command: Command, arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns the launcher's own flags, and STAGE with everything after it, if it takes a stage."""
    if not command.positional:
        return arguments, []
    switches = {"-h", "--help"} | {
        f"--{no}{f.name}" for f in command.flags if f.type is bool for no in ("", "no")
    }
    i = 0
    while i < len(arguments) and arguments[i].startswith("-"):
        flag = arguments[i]
        # --name gen: the value is the next argument.
        i += (
            1 if "=" in flag or flag in switches or flag.startswith(("--no", "-h", "--help")) else 2
        )
    return arguments[:i], arguments[i:]


def stage_command(positional: Sequence[str], distributed: bool, own: Sequence[Flag]) -> list[str]:
    """Returns the arguments of `selfrag` for STAGE and its flags, which are checked.

    distributed: several hosts run it. --distributed=auto is then added. own: the launcher's flags,
    which stand before STAGE. Raises UserError for an unknown stage, for flags that the stage
    refuses, and for a stage that cannot run on several hosts.
    """
    if not positional:
        raise UserError("run what? Give a stage of selfrag after the flags, such as train --role=…")
    stage, *flags = positional
    if stage not in SUMMARIES:
        close = difflib.get_close_matches(stage, SUMMARIES, 1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; stages: {', '.join(SUMMARIES)}"
        raise UserError(f"{stage!r} is no stage of selfrag{hint}")
    command = load_command(stage)
    theirs = {f.name for f in command.flags}
    for flag in flags:
        name = flag.lstrip("-").split("=")[0]
        if name in {f.name for f in own} - theirs:
            raise UserError(f"--{name} belongs to the launcher: give it before {stage!r}")
    try:
        values, _ = cli.parse(command, stage, flags)
    except UserError as e:
        raise UserError(f"selfrag {stage}: {e}") from None
    if not distributed or values.get("distributed"):
        return [stage, *flags]
    if "distributed" not in theirs:
        raise UserError(
            f"selfrag {stage} does not run on several hosts; take a slice of one host (v6e-8, "
            "v5litepod-8, v5p-8), or run it elsewhere"
        )
    return [stage, *flags, "--distributed=auto"]


def positive(values: Mapping[str, Any], *names: str) -> None:
    """Raises UserError if one of these flags is 0 or below."""
    for name in names:
        if values[name] is not None and values[name] <= 0:
            raise UserError(f"--{name}={values[name]}: must be above 0")


def _overview(program: str, commands: Mapping[str, Subcommand]) -> str:
    if "" in commands:
        return f"{commands[''].summary}\n\n{_help(commands[''].command)}"
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {c.summary}" for name, c in commands.items()]
    return (
        f"{program} COMMAND --flags\n\n" + "\n".join(lines) + "\n\n"
        f"`{program} COMMAND --help` explains a command."
    )


def _help(command: Command) -> str:
    lines = [*(f"  {example}" for example in command.examples), ""]
    width = max(len(f.name) for f in command.flags)
    for f in command.flags:
        note = "" if f.default is None else f" (default: {f.default})"
        lines.append(f"  --{f.name:<{width}}  {f.help}{' (required)' if f.required else note}")
    return "\n".join(lines)
