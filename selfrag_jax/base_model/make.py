"""Makes the small base model: trains it in stages, applies the gate, writes a Hugging Face folder.

Training on all documents at once would stay at chance on names and values for a long time, because
the loss of copied text drowns out the faint signal of verdicts. So the stages go from easy to hard.
The first ones learn verdicts, on names and values (compare) and then on statements, with almost no
weight on text. Once comparing works, looking up values by kind and copying join in, and then all
skills together. The last stages use a lower rate, and questions and answers that tempt.
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
from selfrag_jax.base_model.sampler import BaseDataConfig
from selfrag_jax.base_model.source import BaseSource, make_tokenizer
from selfrag_jax.checkpoints import loading
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json, write_json
from selfrag_jax.huggingface import weights
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import count_parameters
from selfrag_jax.text.tokenizer import Tokenizer
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.training.train import train

RECORD = "made.json"


@dataclass(frozen=True)
class GateConfig:
    seed: int
    cases: int  # per skill
    minimum: float  # accuracy that every skill must reach


def read_record(folder: str | Path) -> dict[str, Any]:
    """Returns the record of a base model, with the current names of all skills in its scores."""
    record = read_json(Path(folder) / RECORD)
    current = {old: new for new, old in gate.FORMER_NAMES.items()}
    record["scores"] = {current.get(k, k): v for k, v in record["scores"].items()}
    return record


def make_base_model(c: ConfigDict, workdir: str | Path, out: str | Path) -> dict[str, float]:
    """Trains all stages of a config and writes the model to `out`; returns the gate's scores.

    Checkpoints go to `workdir`; an interrupted run resumes from them. Raises UserError if a skill
    stays below the gate's minimum; nothing is written to `out` then.
    """
    configs.require_kind(c, "base", "configs/base.py")
    tokenizer = make_tokenizer(c.vocab_size)
    fields = c.model.to_dict() | dict(vocab_size=tokenizer.vocab_size)
    std = fields.pop("embed_std")
    model = Model(configs.build(LlamaConfig, fields, "model"))
    params: Any = model.init(jax.random.key(c.seed), std)
    previous: Path | None = None
    seconds = 0
    for i, stage in enumerate(c.stages):
        folder = Path(workdir) / f"{i}_{stage[0]}"
        params, spent = _train_stage(c, i, model, params, tokenizer, folder, previous)
        seconds += spent
        previous = folder
    gate_config = configs.build(GateConfig, c.gate, "gate")
    loaded = loading.LoadedModel(model, params, tokenizer)
    scores = gate.measure(loaded, gate_config.seed, gate_config.cases)
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


def _train_stage(
    c: ConfigDict,
    i: int,
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    folder: Path,
    previous: Path | None,
) -> tuple[Any, int]:
    """Trains stage `i` in `folder`, or loads it if it is finished.

    Returns the parameters and the CPU seconds spent.
    """
    name, steps, rows, rate, copy_weight, tempting, families = c.stages[i]
    section = configs.build(TrainConfig, c.train, "train")
    section = replace(
        section,
        seed=c.seed + i,
        steps=steps,
        rows=rows,
        max_targets=section.max_targets * rows // section.rows,  # as many per row
        optimizer=replace(section.optimizer, learning_rate=rate),
    )
    fields = c.data.to_dict() | dict(
        seed=c.data.seed + i,
        copy_weight=copy_weight,
        tempting=tempting,
        family_weights=families,
    )
    data = configs.build(BaseDataConfig, fields, "data")
    made = {"model": c.model.to_dict(), "data": asdict(data), "train": section.manifest_fields()}
    inputs = {"previous": previous} if previous else {}
    if artifacts.is_finished(folder, "base", made, inputs):
        manifest = read_json(artifacts.manifest_path(folder))
        return loading.load(folder).params, manifest["counts"]["cpu_seconds"]
    artifacts.claim_workdir(folder, "base", made, inputs)
    started = time.process_time()
    source = BaseSource(data, tokenizer)
    params = train(section, model, params, source, tokenizer, folder, f"base: {name}")["params"]
    spent = round(time.process_time() - started)
    artifacts.write_manifest(folder, "base", made, inputs, {"steps": steps, "cpu_seconds": spent})
    return params, spent
