"""The command line: `selfrag STAGE --flags`. Imports only the stage that is asked for."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from selfrag_jax import allocator as memory
from selfrag_jax.commands.stages import STAGES, Failed, Stage
from selfrag_jax.records import BadInput


def _overview() -> str:
    width = max(map(len, STAGES))
    lines = [f"  {name:<{width}}  {stage.summary}" for name, stage in STAGES.items()]
    return (
        "selfrag STAGE --flags\n\n"
        + "\n".join(lines)
        + "\n\n`selfrag STAGE --help` explains a stage. Start with: selfrag quickstart --workdir=W"
    )


def _help(name: str, stage: Stage) -> str:
    lines = [stage.summary, "", f"  {stage.example}", ""]
    for f in stage.flags:
        note = " (required)" if f.required else "" if f.default is None else f" (default: {f.default})"
        lines.append(f"  --{f.name:<12} {f.help}{note}")
    return "\n".join(lines)


def define(name: str) -> flags.FlagValues:
    """The absl flags of a stage, in a FlagValues of their own: only the stage that runs has any."""
    values = flags.FlagValues()
    define_as = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_boolean}
    for f in STAGES[name].flags:
        define_as[f.type](f.name, f.default, f.help, flag_values=values)
    return values


def parse(name: str, arguments: Sequence[str]) -> tuple[dict, list[str]]:
    """Flag values (also `overrides`, the --config.x.y=z assignments) and positional arguments.

    Raises BadInput for an unknown flag, naming the one that was probably meant, a bad value, or a missing flag.
    """
    stage, parser = STAGES[name], define(name)
    has_config = any(f.name == "config" for f in stage.flags)
    overrides = [a.removeprefix("--config.") for a in arguments if has_config and a.startswith("--config.")]
    rest = [a for a in arguments if not (has_config and a.startswith("--config."))]
    try:
        positional = parser([name, *rest])[1:]
    except flags.UnrecognizedFlagError as e:
        close = e.flagname and difflib.get_close_matches(e.flagname, [f.name for f in stage.flags], 1, 0.5)
        hint = f"did you mean --{close[0]}?" if close else f"flags: {', '.join('--' + f.name for f in stage.flags)}"
        raise BadInput(f"unknown flag --{e.flagname}; {hint}") from None
    except flags.Error as e:
        raise BadInput(str(e)) from None
    values = {f.name: parser[f.name].value for f in stage.flags} | {"overrides": overrides}
    for flag, value in values.items():
        if isinstance(value, str) and "://" in value:
            raise BadInput(
                f"--{flag}={value}: storage in a cloud is not reached by address; mount it (gcsfuse) or copy it here"
            )
    if missing := [f.name for f in stage.flags if f.required and not values[f.name]]:
        raise BadInput(f"missing {', '.join('--' + m for m in missing)}; for example: {stage.example}")
    if positional and not stage.positional:
        raise BadInput(f"unexpected argument {positional[0]!r}; flags start with --, for example: {stage.example}")
    return values, positional


def main(argv: Sequence[str] | None = None) -> int:
    whole_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    name, arguments = argv[0], argv[1:]
    if name not in STAGES:
        close = difflib.get_close_matches(name, STAGES, 1)
        print(f"selfrag: unknown stage {name!r}" + (f"; did you mean {close[0]!r}?" if close else "") + "\n", file=sys.stderr)
        print(_overview(), file=sys.stderr)
        return 2
    if any(a in ("--help", "-h") for a in arguments):
        print(_help(name, STAGES[name]))
        return 0
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        values, positional = parse(name, arguments)
        _compilation_cache()
        if whole_process:
            # As an interruption, so that what is half-written is removed; training saves a checkpoint first.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            if name not in ("convert", "compile"):  # which run no model
                memory.keep_freed()
        STAGES[name].run(values, positional)
    except BadInput as e:
        print(f"selfrag {name}: {e}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError, Failed) as e:
        print(f"selfrag {name}: {e}", file=sys.stderr)
        return 1
    except RuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        print(f"selfrag {name}: {_MEMORY} ({str(e).splitlines()[0]})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues where it was", file=sys.stderr)
        return 130
    return 0


# `selfrag compile` tells it beforehand.
_MEMORY = (
    "the device's memory is full; what was done is kept. Answering goes on with --config.answer.batch= lower, training with "
    "rows_per_device= lower, remat=full, or a mesh of more devices. Lower --ndocs= or --beam_width=, and --quantization=int8, take "
    "less too; with them answering begins anew, for they change the answers"
)


def _compilation_cache() -> None:
    """Compiled programs are kept between runs: a second start takes seconds less."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfrag_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


if __name__ == "__main__":
    sys.exit(main())
