"""Flags that are addresses (gs://): the command is given copies, and what it writes is sent.

A flag says how: `writes` for outputs; `in_place` for what is read and written through the address
itself, training workdirs and models; all others are inputs, fetched before the command begins.

Of the processes of a job each fetches, and process 0 alone sends; the others send what `each_sends`
says.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from selfrag_jax.commands.command import Command
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.locks import exclusive_workdir
from selfrag_jax.processes.group import current
from selfrag_jax.storage.copies import with_addresses
from selfrag_jax.storage.mirror import Mirror, NotSent, pushed_regularly
from selfrag_jax.storage.paths import check_address, is_remote


@contextlib.contextmanager
def local_copies(
    command: Command, values: dict[str, Any], positional: list[str]
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yields values and positional arguments with paths of this machine in place of addresses.

    Messages within the block name the addresses. Raises UserError for an address that cannot be
    read or written, and OSError if what the block wrote could not be sent.
    """
    flags = {f.name: f for f in command.flags}
    remote = [
        name
        for name, value in values.items()
        if name in flags and not flags[name].is_url and _has_address(value)
    ]
    if not remote and not (command.positional_paths and any(map(is_remote, positional))):
        yield values, positional
        return
    for f in command.flags:
        beside = [name for name in f.default_beside if name in remote]
        if beside and not values[f.name]:
            raise UserError(
                f"missing --{f.name}: --{beside[0]} is in a bucket; say where the results go"
            )
    if writes := [name for name in remote if flags[name].writes]:
        _refuse_shards(values, writes[0])
    outputs: list[Mirror] = []

    def fetched(address: str) -> str:
        return str(Mirror(address).pull()) if is_remote(address) else address

    def opened(name: str, address: str) -> str:
        if not is_remote(address):
            return address
        sends = "*" if current().is_main else flags[name].each_sends
        mirror = Mirror(address, sends, flags[name].folders_beside)
        mirror.check_writable()
        outputs.append(mirror)
        return str(mirror.pull(must_exist=False))

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(_WithAddresses(sys.stdout)))  # type: ignore[type-var]
        stack.enter_context(contextlib.redirect_stderr(_WithAddresses(sys.stderr)))  # type: ignore[type-var]
        try:
            values = dict(values)
            for name in remote:
                if flags[name].in_place:
                    check_address(values[name])
                else:
                    change = partial(opened, name) if flags[name].writes else fetched
                    values[name] = _each(values[name], change)
            if command.positional_paths:
                positional = [fetched(p) for p in positional]
            for mirror in outputs:
                stack.enter_context(exclusive_workdir(_lock_folder(mirror)))
            with pushed_regularly(outputs):
                yield values, positional
        except NotSent:
            raise  # names the copy itself, which is where the results are
        except (UserError, StageFailed) as e:
            raise type(e)(with_addresses(str(e))) from e
        except OSError as e:
            raise OSError(with_addresses(str(e))) from e


def _refuse_shards(values: dict[str, Any], name: str) -> None:
    if values.get("shard") not in (None, "0/1"):
        raise UserError(
            f"--shard={values['shard']}: is for machines that share a disk, and --{name} is in a "
            "bucket; give --distributed instead"
        )
    if values.get("distributed") and "seed" in values and name == "workdir":
        raise UserError(
            "--distributed: the quickstart's --workdir must lie on a disk that all hosts share"
        )


def _has_address(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(is_remote(v) for v in value)
    return isinstance(value, str) and is_remote(value)


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """Changes a path, each of several, or each in a text with commas."""
    if isinstance(value, tuple):
        return tuple(map(change, value))
    return ",".join(map(change, value.split(",")))


def _lock_folder(mirror: Mirror) -> Path:
    """A folder beside the copy: the command itself locks the copy."""
    return mirror.path.with_name(f".{mirror.path.name}.sent")


class _WithAddresses:
    """A stream that is written to with addresses in place of their copies' paths."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(with_addresses(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
