"""Makes the small base model: training in stages from easy to hard, the gate, and a Hugging Face folder.

A single training on all documents at once stays at chance on names and values for a long time: the loss of copied
text drowns the faint signal of verdicts. So the first stages learn verdicts, on names and values (compare) and then on
statements, with next to no weight on text; looking values up by their kind and copying join when comparing works; then
come all skills together, and the last stages polish them at a lower rate, on questions and answers that tempt.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from selfrag_jax import artifacts
from selfrag_jax import config as configs
from selfrag_jax.base_model import gate
from selfrag_jax.base_model.drawer import BaseDataConfig
from selfrag_jax.base_model.source import BaseSource, make_tokenizer
from selfrag_jax.checkpoints import loading
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json, write_json
from selfrag_jax.huggingface import weights
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import count_parameters
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.training.train import train

RECORD = "made.json"


@dataclass(frozen=True)
class GateConfig:
    seed: int
    cases: int  # of each skill
    minimum: float  # share of right cases that every skill must reach


def make_base_model(c: ConfigDict, workdir: str | Path, out: str | Path) -> dict[str, float]:
    """Trains the stages of the config in `workdir` (resumable) and writes the model to `out`; returns the gate's scores.

    Raises BadInput when a skill stays below the gate's minimum: nothing is written then.
    """
    configs.require_kind(c, "base", "configs/base.py")
    workdir = Path(workdir)
    tokenizer = make_tokenizer(c.vocab_size)
    fields = c.model.to_dict() | dict(vocab_size=tokenizer.vocab_size)
    std = fields.pop("embed_std")
    model = Model(configs.build(LlamaConfig, fields, "model"))
    params: Any = model.init(jax.random.key(c.seed), std)
    previous: Path | None = None
    seconds = 0
    for i, (name, steps, rows, rate, copy_weight, tempting, families) in enumerate(c.stages):
        folder = workdir / f"{i}_{name}"
        section = configs.build(TrainConfig, c.train, "train")
        learner = replace(section.optimizer, learning_rate=rate)
        targets = (
            section.max_targets * rows // section.rows
        )  # the config's are those of a batch of its own rows
        section = replace(
            section, seed=c.seed + i, steps=steps, rows=rows, max_targets=targets, optimizer=learner
        )
        fields = c.data.to_dict() | dict(
            seed=c.data.seed + i,
            copy_weight=copy_weight,
            tempting=tempting,
            family_weights=families,
        )
        data = configs.build(BaseDataConfig, fields, "data")
        made = {"model": c.model.to_dict(), "data": asdict(data), "train": asdict(section)}
        inputs = {"previous": previous} if previous else {}
        previous = folder
        if artifacts.is_finished(folder, "base", made, inputs):
            seconds += read_json(artifacts.manifest_path(folder))["counts"]["cpu_seconds"]
            params = loading.load(folder).params
            continue
        artifacts.claim_workdir(folder, "base", made, inputs)
        started = time.process_time()
        params = train(
            section, model, params, BaseSource(data, tokenizer), tokenizer, folder, f"base: {name}"
        )["params"]
        spent = round(time.process_time() - started)
        artifacts.write_manifest(
            folder, "base", made, inputs, {"steps": steps, "cpu_seconds": spent}
        )
        seconds += spent
    gate_config = configs.build(GateConfig, c.gate, "gate")
    scores = gate.measure(
        loading.LoadedModel(model, params, tokenizer), gate_config.seed, gate_config.cases
    )
    low = {k: v for k, v in scores.items() if v < gate_config.minimum}
    if low:
        raise UserError(
            f"the base model did not pass its gate of {gate_config.minimum}: {low} (all: {scores})"
        )
    weights.save_folder(out, model.config, jax.device_get(params), tokenizer)
    record = {
        "command": c.command,
        "date": time.strftime("%Y-%m-%d"),
        "cpu_seconds": seconds,
        "scores": scores,
        "cases": gate_config.cases,
        "parameters": count_parameters(params),
        "config": c.to_dict(),
    }
    write_json(Path(out) / RECORD, record)
    return scores
