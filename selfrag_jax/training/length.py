"""How long a training is, and what happens to one that is made longer.

A training continues with another number of steps or epochs, also after it was finished. Its
schedule is then that of the new length, from the current step on: a rate that had decayed to 0 goes
up again, to where a training of the new length would be. What was trained before is not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.checkpoints import workdirs
from selfrag_jax.data.batches import Packer, Source
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json, write_json
from selfrag_jax.processes.group import current
from selfrag_jax.progress import say
from selfrag_jax.storage.paths import as_path
from selfrag_jax.training import optimizer
from selfrag_jax.training.config import TrainConfig

_LENGTH_FIELDS = ("steps", "epochs")
LENGTHENED = "lengthened"  # in a manifest's config: the steps at which the length was changed
_SAMPLE = 200  # rows whose tokens are counted


def num_steps(config: TrainConfig, source: Source) -> int:
    """Returns the number of updates, `steps` or those of `epochs`.

    With packing, the examples per update are measured on the first thousand or so.
    """
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None  # TrainConfig has checked this
    if not source.size:
        raise UserError(f"epochs={config.epochs}: the data has no end; give steps")
    examples_per_update: float = config.rows
    if config.packed:
        packer, updates = make_packer(config, source), 0
        while packer.state < min(1000, source.size):
            packer.next()
            updates += 1
        examples_per_update = packer.state / updates
    return max(1, round(config.epochs * source.size / examples_per_update))


def make_packer(c: TrainConfig, source: Source, state: int = 0) -> Packer:
    return Packer(source, c.rows, c.length, c.max_targets, c.seed, state, c.packed)


def describe(c: TrainConfig, source: Source, steps: int, first: int, seed: int = 0) -> str:
    """Returns a line about the data and the length: rows, tokens, steps."""
    text = f"{steps:,} steps of {c.rows} x {c.length} tokens"
    if first:
        text += f", from step {first:,} on"
    if not source.size:
        return text
    packer = Packer(source, 1, c.length, None, seed)
    sample = packer.source_rows(0, min(_SAMPLE, source.size))
    tokens = sum(len(source.example(i).tokens) for i in sample) * source.size / len(sample)
    about = "about " if source.size > _SAMPLE else ""
    return f"{source.size:,} rows, {about}{round(tokens):,} tokens; {text}"


# ---- another length ------------------------------------------------------------------------------
@dataclass(frozen=True)
class NewLength:
    """A training was begun with another length than it is now asked for."""

    steps: int | None  # what it was begun with
    epochs: float | None


def asked_length(
    workdir: str | Path, made: dict[str, Any], inputs: Mapping[str, str | Path]
) -> NewLength | None:
    """Returns the length that the training in `workdir` had, if it differs, and nothing else does.

    made: what identifies the training asked for, as in its manifest. The steps at which the length
    was changed before are added to it.
    """
    files = as_path(workdir) / artifacts.STARTED, artifacts.manifest_path(workdir)
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        return None
    old = read_json(file)
    if not isinstance(old, dict) or old.get("stage") != "train":
        return None
    config = old.get("config", {})
    if LENGTHENED in config:
        made[LENGTHENED] = config[LENGTHENED]
    new = json.loads(json.dumps(made, default=str))
    before, after = config.get("train", {}), new["train"]
    if not isinstance(before, dict) or _length(before) == _length(after):
        return None
    if {**config, "train": _without_length(before)} != {**new, "train": _without_length(after)}:
        return None
    if old.get("inputs") != {name: artifacts.fingerprint(p) for name, p in inputs.items()}:
        return None
    return NewLength(*_length(before))


def check_length(
    role: str, change: NewLength | None, config: TrainConfig, source: Source, workdir: str | Path
) -> None:
    """Raises UserError if the length that is asked for is less than what was trained."""
    if change is None:
        return
    done, steps = max(workdirs.saved_steps(workdir), default=0), num_steps(config, source)
    if steps < done:
        asked = f"steps={config.steps}" if config.steps is not None else f"epochs={config.epochs}"
        raise UserError(
            f"--config.{role}.{asked}: {workdir} has been trained for {done} steps, more than "
            f"these {steps}; give at least {done} steps, or begin in another workdir (an earlier "
            "checkpoint is read with `selfrag convert --step=`)"
        )


def change_length(
    name: str,
    change: NewLength,
    made: dict[str, Any],
    inputs: Mapping[str, str | Path],
    config: TrainConfig,
    source: Source,
    workdir: str | Path,
) -> None:
    """Records the new length in `made` and in the workdir, which becomes unfinished; says so.

    Of several processes, the main one writes; the others wait for it.
    """
    done, steps = max(workdirs.saved_steps(workdir), default=0), num_steps(config, source)
    before = num_steps(replace(config, steps=change.steps, epochs=change.epochs), source)
    made[LENGTHENED] = [*made.get(LENGTHENED, ()), done]
    if current().is_main:
        artifacts.manifest_path(workdir).unlink(missing_ok=True)
        started = artifacts.made_from("train", made, inputs)
        write_json(as_path(workdir) / artifacts.STARTED, started)
    current().barrier("the new length")
    c = config.optimizer

    def rate(length: int) -> str:
        at_step = optimizer.schedule(c.schedule, c.learning_rate, c.warmup_fraction, length)
        return f"{float(at_step(done)):.1e}"

    say(
        name,
        f"step {done} of {before} becomes step {done} of {steps}; the learning rate goes on at "
        f"{rate(steps)} (it was {rate(before)}), as the {c.schedule} schedule is now over "
        f"{steps} steps",
        current().is_main,
    )


def _length(train: dict[str, Any]) -> tuple[int | None, float | None]:
    return train.get("steps"), train.get("epochs")


def _without_length(train: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in train.items() if k not in _LENGTH_FIELDS}
