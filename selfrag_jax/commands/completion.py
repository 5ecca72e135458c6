"""`selfrag completion`: completes commands, flags and values at a shell's prompt.

The script that a shell reads comes from argcomplete, and so does the protocol: at each Tab the
shell runs `selfrag` with _ARGCOMPLETE set, and reads the completions that `answer_shell` writes. It
knows `--flag=value`, which scripts of choices made ahead of time (shtab's) do not in bash.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

from selfrag_jax import config
from selfrag_jax.commands import SUMMARIES, load_command
from selfrag_jax.commands.command import Command, Flag
from selfrag_jax.errors import UserError

SHELLS = ("bash", "zsh", "fish")
_EXAMPLE = 'eval "$(selfrag completion bash)"'


def run(values: dict[str, Any], positional: list[str]) -> None:
    if len(positional) != 1 or positional[0] not in SHELLS:
        raise UserError(f"completion of which shell? {', '.join(SHELLS)}; for example: {_EXAMPLE}")
    _library()
    from argcomplete.shell_integration import shellcode

    print(shellcode(["selfrag"], shell=positional[0]))


def answer_shell() -> None:
    """Writes the completions that the shell asks for, and ends the process."""
    import argcomplete

    os.environ.setdefault("COLUMNS", "120")
    line = os.environ.get("COMP_LINE", "")
    argcomplete.autocomplete(_parser(line.split()[1:]), exclude=["-h"])


def _library() -> None:
    try:
        import argcomplete  # noqa: F401
    except ImportError as e:
        raise UserError("completion needs argcomplete: pip install argcomplete") from e


# ---- the parser that argcomplete reads ----------------------------------------------------------
def _parser(words: list[str]) -> argparse.ArgumentParser:
    """All commands, and the flags of the one that the words after `selfrag` begin with."""
    parser = argparse.ArgumentParser("selfrag", add_help=False)
    parser.add_argument("--version", action="store_true", help="versions, on one line")
    commands = parser.add_subparsers()
    for name, summary in SUMMARIES.items():
        one = commands.add_parser(name, help=summary, add_help=False)
        if words[:1] == [name]:
            _add_flags(one, load_command(name), words)
    explained = commands.add_parser("help", help="explains a command", add_help=False)
    explained.add_argument("command", choices=list(SUMMARIES))
    return parser


def _add_flags(parser: argparse.ArgumentParser, command: Command, words: list[str]) -> None:
    from argcomplete.completers import FilesCompleter

    parser.add_argument("--help", action="store_true", help="explains the command")
    for f in command.flags:
        if f.type is bool:
            names = [f"--{f.name}"] if f.default is False else [f"--{f.name}", f"--no{f.name}"]
            parser.add_argument(*names, action="store_true", help=f.help)
            continue
        action: Any = parser.add_argument(f"--{f.name}", help=f.help, choices=f.choices or None)
        action.completer = _completer(f)
        if f.name == "config" and words[-1].startswith("--config."):
            for name in _fields(_config_name(words, command)):
                parser.add_argument(f"--config.{name}=", help="a field of the config")
    if command.positional_choices:
        parser.add_argument("positional", choices=command.positional_choices)
    elif command.positional:
        given: Any = parser.add_argument("positional", nargs="*")
        given.completer = FilesCompleter() if command.positional_paths else _nothing


def _completer(flag: Flag) -> Any:
    """What argcomplete asks for a flag's values; None: the flag's choices."""
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter

    if flag.choices:
        return None
    if flag.name == "config":
        return _configs
    if flag.type in (int, float) or flag.is_url:
        return _nothing
    if flag.is_model:
        return FilesCompleter(("gguf",))  # folders, too
    return DirectoriesCompleter() if flag.is_folder else FilesCompleter()


def _nothing(**_: Any) -> list[str]:
    return []


def _configs(prefix: str, **_: Any) -> list[str]:
    """Installed configs, and files that begin with what was typed."""
    from argcomplete.completers import FilesCompleter

    installed = config.installed_folder().glob("*.py")
    names = sorted(p.stem for p in installed if p.stem != "__init__" and p.stem.startswith(prefix))
    return [*names, *(FilesCompleter()(prefix) if prefix else [])]


def _config_name(words: list[str], command: Command) -> str:
    """The config that is given among the words, or the command's own."""
    given = [w.removeprefix("--config=") for w in words if w.startswith("--config=")]
    default = next((f.default for f in command.flags if f.name == "config"), None)
    return (given or [str(default or command.default_config or "tiny")])[-1]


def _fields(name: str) -> list[str]:
    """The fields of a config, as section.field; none if it cannot be read."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key in node:
            value, path = node[key], f"{prefix}{key}"
            if hasattr(value, "keys"):
                yield from walk(value, f"{path}.")
            else:
                yield path

    try:
        return list(walk(config.load(name), ""))
    except UserError:
        return []


COMMAND = Command(
    example=f"{_EXAMPLE}\n{_EXAMPLE.replace('bash', 'zsh')}\n"
    "selfrag completion fish > ~/.config/fish/completions/selfrag.fish",
    flags=(),
    run=run,
    positional="|".join(SHELLS),
    positional_choices=SHELLS,
)
