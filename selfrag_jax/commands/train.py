"""The `train` stage: data and a starting model in, a workdir with checkpoints out."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from selfrag_jax import artifacts
from selfrag_jax import config as configs
from selfrag_jax.checkpoints import saving as checkpoints
from selfrag_jax.data.critic_examples import CriticSource
from selfrag_jax.data.generator_examples import GeneratorSource
from selfrag_jax.huggingface import weights as huggingface
from selfrag_jax.models import sharding
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.records import BadInput
from selfrag_jax.text import reflection
from selfrag_jax.training.train import TrainConfig, train

ROLES = ("critic", "generator")
# Fields of TrainConfig that do not change what is learned.
_WHERE = ("mesh", "save_every", "log_every", "rows_per_device", "loss_chunk", "remat", "attention", "keep_last", "keep_best")


def embedded_base() -> Path:
    """The folder of the small base model that is shipped with the package."""
    return Path(str(resources.files("selfrag_jax") / "base_model" / "weights"))


def _base_folder(c: ConfigDict) -> Path:
    """Of the model that training starts from; one of the hub is downloaded if need be."""
    return embedded_base() if c.base == "embedded" else huggingface.local(c.base)


def starting_model(c: ConfigDict, read: bool = True) -> tuple[checkpoints.LoadedModel, int]:
    """The model that training starts from, its vocabulary grown by the reflection tokens, and by how many.

    read: False leaves the base's parameters unread, and those of the result None.

    c.base: "embedded", "scratch" (the embedded tokenizer, random weights of the architecture c.scratch), or a path.
    c.new_rows: for reflection tokens the words whose rows of the embedding they start from; the others start at the
    mean of all rows. Tokens that the base model already has keep their rows, and from scratch all rows are random.
    c.tokenizer: the mode of the base's tokenizer (see tokenizer.py), or None for that which its folder records.
    Raises BadInput when c.new_rows is missing, or names an unknown token or no word, and when the base's tokenizer has some
    reflection tokens but not all.
    """
    if c.base is None:
        raise BadInput("config: base is none; it names a folder, a model of the Hugging Face hub, embedded or scratch")
    if c.base != "scratch":
        base = (checkpoints.load if read else checkpoints.describe)(_base_folder(c), c.tokenizer)
        tokenizer = base.tokenizer.with_reflection_tokens()
        like = {tokenizer.id(token): base.tokenizer.encode(words) for token, words in _new_rows(c)}
        old, grown = base.tokenizer.vocab_size, tokenizer.vocab_size
        config, params = checkpoints.with_vocabulary(base.model.config, base.params, old, grown, like)
        return checkpoints.LoadedModel(Model(config), params, tokenizer), grown - old
    tokenizer = checkpoints.load(embedded_base()).tokenizer.with_reflection_tokens()
    fields = c.scratch.to_dict()
    std = fields.pop("embed_std")
    extra = dict(vocab_size=tokenizer.vocab_size, dtype="float32", remat="none", scan_unroll=fields["num_layers"])
    model = Model(configs.build(LlamaConfig, fields | extra, "scratch"))
    return checkpoints.LoadedModel(model, model.init(jax.random.key(c.seed), std), tokenizer), 0


def _new_rows(c: ConfigDict) -> list[tuple[str, str]]:
    if "new_rows" not in c:
        raise BadInput("config: lacks new_rows, pairs of a reflection token and the words it starts as; () for none")
    tokens = [t for group in reflection.GROUPS.values() for t in group]
    for token, words in c.new_rows:
        if token not in tokens:
            raise BadInput(f"config new_rows: {token!r} is no reflection token; they are {', '.join(tokens)}")
        if not words.strip():
            raise BadInput(f"config new_rows: no word for {token}; leave it out to start it at the mean of all rows")
    return list(c.new_rows)


def train_stage(c: ConfigDict, role: str, data: str | Path, workdir: str | Path, name: str) -> None:
    """Trains `role` ("critic" or "generator") on `data`. Finished already, it does nothing.

    Raises BadInput for a role that the config has no section for.
    """
    if role not in ROLES or role not in c:
        raise BadInput(f"--role={role}: must be one of {', '.join(r for r in ROLES if r in c) or 'none in this config'}")
    configs.require(
        c, "base", "tokenizer", f"{role}_weights", "label.critic.brief", "scratch" if c.base == "scratch" else "new_rows"
    )
    section = configs.build(TrainConfig, c[role], role)
    if section.steps == 0:
        raise BadInput(f"config {role}: steps=0 trains nothing")
    weights = _group_weights(c, role)
    # What a training is: not where it runs, nor how often it saves. It may go on over another mesh.
    learned = {k: v for k, v in asdict(section).items() if k not in _WHERE}
    made: dict[str, Any] = {"role": role, "train": learned, "weights": weights}
    if c.base == "scratch":
        made["scratch"] = c.scratch.to_dict() | {"seed": c.seed}  # of the weights
    else:
        made["base"] = str(c.base)
    made["brief"] = c.label.critic.brief
    inputs = {"data": data}
    if c.base != "scratch":
        made["new_rows"] = _new_rows(c)
        made["tokenizer"] = c.tokenizer
        inputs["base"] = _base_folder(c)
    if artifacts.is_finished(workdir, "train", made, inputs):
        return
    # A checkpoint holds all but what LoRA leaves as it is.
    start, new = starting_model(c, read=section.lora is not None or not checkpoints.saved_steps(Path(workdir)))
    if role == "critic":
        source = CriticSource.read(data, start.tokenizer, c.label.critic.brief, weights)
    else:
        source = GeneratorSource.read(data, start.tokenizer, weights)
    mesh = section.make_mesh()
    section.check(start.model.config, mesh)
    leads = jax.process_index() == 0  # of several processes, the one that writes
    hosts = 1 if jax.default_backend() == "tpu" else sharding.hosts_of_tensor(mesh)  # a slice has links of its own
    if leads and hosts > 1:
        print(
            f"warning: tensor={mesh.shape['tensor']} of the mesh lies over {hosts} hosts, and every layer waits for their network; one "
            f"host has {jax.local_device_count()} devices: --config.{role}.mesh.tensor, and the rest in mesh.fsdp",
            file=sys.stderr,
        )
    # Not before data and mesh have been looked at: bad ones leave nothing behind.
    with artifacts.alone(workdir) if leads else nullcontext():
        artifacts.claim(workdir, "train", made, inputs, write=leads)  # all of them look, so that all refuse
        held = [start.params]
        start = replace(start, params=None)  # the trainer alone holds them, and lets them go
        result = train(section, start.model, held.pop, source, start.tokenizer, workdir, name, new)
    counts = {k: result[k] for k in ("steps", "examples", "truncated")}
    if leads:
        artifacts.finish(workdir, "train", made, inputs, counts)


def _group_weights(c: ConfigDict, role: str) -> dict[str, float]:
    """The loss weights of the groups of reflection tokens. Raises BadInput for one that is missing, unknown or below 0."""
    name, given = f"{role}_weights", dict(c[f"{role}_weights"].items())
    if set(given) != set(reflection.GROUPS):
        wrong = sorted(set(given) ^ set(reflection.GROUPS))
        raise BadInput(
            f"config {name}: {wrong[0]!r} is {'unknown' if wrong[0] in given else 'missing'}; it has {', '.join(reflection.GROUPS)}"
        )
    for group, weight in given.items():
        if isinstance(weight, (str, bool)) or weight is None or not 0 <= weight < float("inf"):
            raise BadInput(f"config {name}: {group}={weight!r} must be a number from 0 up")
    return {k: float(v) for k, v in given.items()}


def join_processes(spec: str) -> None:
    """Makes this process one of several that train together.

    spec: "auto" where JAX knows the others (TPU slices, Slurm, MPI, Kubernetes), else "HOST:PORT,PROCESSES,INDEX". Raises
    BadInput for another form.
    """
    if spec == "auto":
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as e:
            raise BadInput(
                f"--distributed=auto: JAX finds no other processes here ({e}); give HOST:PORT,PROCESSES,INDEX"
            ) from None
        return
    match = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", spec)
    if not match or int(match.group(3)) >= int(match.group(2)):
        raise BadInput(f"--distributed={spec}: expected auto, or HOST:PORT,PROCESSES,INDEX such as 10.0.0.1:9000,4,0")
    alone = dict(cluster_detection_method="deactivate")  # which would leave each process one GPU under Slurm or Open MPI
    jax.distributed.initialize(match.group(1), num_processes=int(match.group(2)), process_id=int(match.group(3)), **alone)
