"""What `selfrag help` and `selfrag COMMAND --help` print: flags in groups, wrapped to the terminal.

Examples are wrapped as a shell continues lines, so that they can be copied.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from typing import Any

from selfrag_jax import config
from selfrag_jax.commands import GROUPS, SUMMARIES
from selfrag_jax.commands.command import INPUT, OUTPUT, REQUIRED, SETTINGS, Command, Flag
from selfrag_jax.errors import UserError

MIN_WIDTH, MAX_WIDTH = 40, 120  # longer lines are hard to read
_LAST = (OUTPUT, SETTINGS)  # headings at the end


def terminal_width() -> int:
    """COLUMNS, or the terminal's width, or 80; within the bounds above."""
    return min(max(shutil.get_terminal_size((80, 24)).columns, MIN_WIDTH), MAX_WIDTH)


def overview(width: int) -> str:
    """The commands with what they do, in the order of the flow."""
    names = max(map(len, SUMMARIES))
    parts = ["Usage: selfrag COMMAND --flag=value ..."]
    for title, group in _groups().items():
        rows = [_row(f"  {name:<{names}}  ", SUMMARIES[name], width) for name in group]
        parts.append("\n".join([title, *rows]))
    parts.append(
        _filled(
            "`selfrag help COMMAND` explains a command, `selfrag completion bash` completes "
            "commands and flags at the prompt, `selfrag --version` prints versions. Start with: "
            "selfrag quickstart --workdir=W",
            width,
        )
    )
    return "\n\n".join(parts)


def _groups() -> dict[str, list[str]]:
    """The commands under their headings; those that no heading names come last."""
    named = {name for group in GROUPS.values() for name in group}
    groups = {title: list(group) for title, group in GROUPS.items()}
    groups[[*groups][-1]] += [name for name in SUMMARIES if name not in named]
    return groups


def command_help(name: str, command: Command, width: int) -> str:
    """What a command does, examples, and its flags with their defaults."""
    needed = [f"--{f.name}=..." for f in command.flags if f.required]
    usage = ["selfrag", name, *needed]
    if len(needed) < len(command.flags):
        usage.append("[--flag=value ...]")
    if command.positional:
        usage.append(command.positional)
    parts = [
        _filled(SUMMARIES[name], width),
        _row("Usage: ", " ".join(usage), width) + _note_below(command.positional_help, width),
        "\n".join(["Examples", *(_example(e, width) for e in command.examples)]),
    ]
    numbers = _config_numbers(command)
    names = max((len(f.name) for f in command.flags), default=0)
    for title, flags in flag_groups(command).items():
        rows = [_row(f"  --{f.name:<{names}}  ", f.help + _note(f, numbers), width) for f in flags]
        if command.default_config and any(f.field for f in flags):
            title += f" (defaults of --config={command.default_config})"
        parts.append("\n".join([_filled(title, width), *rows]))
    return "\n\n".join(parts)


def flag_groups(command: Command) -> dict[str, list[Flag]]:
    """The flags under their headings: what is required first, output and settings last."""
    headings = dict.fromkeys([REQUIRED, INPUT, *(f.heading for f in command.flags)])
    for heading in _LAST:
        headings.pop(heading, None)
    groups: dict[str, list[Flag]] = {heading: [] for heading in (*headings, *_LAST)}
    for f in command.flags:
        groups[f.heading].append(f)
    return {heading: flags for heading, flags in groups.items() if flags}


# ---- defaults -----------------------------------------------------------------------------------
def _config_numbers(command: Command) -> Any:
    """The config whose numbers are the defaults of flags that replace its fields, or None."""
    given = next((f.default for f in command.flags if f.name == "config"), None)
    name = command.default_config or given
    try:
        return config.load(str(name)) if name else None
    except UserError:  # the help does not depend on a config
        return None


def _note(flag: Flag, numbers: Any) -> str:
    """The default, unless the help tells it."""
    if flag.required or "default" in flag.help:
        return ""
    if flag.field and numbers is None:  # which config it is depends on other flags
        return " (default: the config's)"
    value = _look_up(numbers, flag) if flag.field else flag.default
    return f" (default: {_shown(value)})"


def _look_up(numbers: Any, flag: Flag) -> Any:
    """The value of a flag's field in a config, which may lack it."""
    node = numbers
    for part in flag.field.split("."):
        if not hasattr(node, "keys") or part not in node:
            return flag.field_default
        node = node[part]
    return node


def _shown(value: Any) -> str:
    if value is None or value == "" or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _note_below(text: str, width: int) -> str:
    return "\n" + _filled(text, width, "  ", "  ") if text else ""


# ---- lines --------------------------------------------------------------------------------------
def _filled(text: str, width: int, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def _row(label: str, text: str, width: int) -> str:
    """Text beside its label; lines of the text stay lines."""
    indent = " " * len(label)
    lines = text.split("\n")
    return "\n".join(
        _filled(line.strip(), width, label if i == 0 else indent + "  ", indent + "  " * min(i, 1))
        for i, line in enumerate(lines)
    )


def _example(example: str, width: int) -> str:
    """A command line on as many lines as it needs, each but the last ending in a backslash."""
    lines = [" "]
    for word in re.findall(r"(?:\"[^\"]*\"|'[^']*'|\S)+", example):  # a quoted text is one word
        if len(f"{lines[-1]} {word} \\") > width and lines[-1].strip():
            lines.append("     ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines)
