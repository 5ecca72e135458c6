"""Runs stages of selfrag on TPUs of GKE (TPU 7x and others): writes a JobSet, or applies it.

    python launch/gke.py --name=gen --type=tpu7x:2x2x2 --image=REGION-docker.pkg.dev/P/R/selfrag \
        --out=gen.yaml train --config=generator_7b --role=generator --data=gs://B/data.jsonl \
        --workdir=gs://B/generator

It also prints the command of XPK that does the same. launch/README.md has the traps.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from cloud.command_line import Subcommand, main, stage_command
from cloud.jobset import Workload, manifest, xpk_command
from cloud.processes import Runner
from cloud.tables import parse_slice

from selfrag_jax.commands.command import Command, Flag
from selfrag_jax.errors import UserError
from selfrag_jax.files import write_text


def run(values: dict[str, Any], positional: list[str]) -> None:
    workload = _workload(values, positional)
    text = yaml.safe_dump(manifest(workload), sort_keys=False, width=100)
    if values["out"]:
        write_text(_own_or_new(Path(values["out"])), text)
        print(f"# kubectl apply --filename={values['out']}")
    elif not values["apply"]:
        print(text)
    if values["apply"]:
        _apply(text, values["out"], Runner(dry_run=values["dry_run"]), workload.name)
    print(f"# the same with XPK:\n# {shlex.join(xpk_command(workload, values['cluster']))}")


def _workload(values: dict[str, Any], positional: list[str]) -> Workload:
    slice_ = parse_slice(values["type"])
    for name, least in (("slices", 1), ("max_restarts", 0)):
        if values[name] < least:
            raise UserError(f"--{name}={values[name]}: must be at least {least}")
    several = values["slices"] * slice_.gke_hosts > 1
    return Workload(
        name=values["name"],
        slice=slice_,
        slices=values["slices"],
        image=values["image"],
        arguments=tuple(stage_command(positional, several, FLAGS)),
        max_restarts=values["max_restarts"],
        namespace=values["namespace"],
        queue=values["queue"],
        service_account=values["service_account"],
        spot=values["spot"],
        secrets=tuple(values["secrets"] or ()),
    )


def _own_or_new(file: Path) -> Path:
    """Raises UserError if a file is there that is no JobSet."""
    if file.is_dir() or (
        file.is_file() and "kind: JobSet" not in file.read_text(errors="replace")[:400]
    ):
        raise UserError(f"--out={file}: is there already and is no JobSet; choose another name")
    return file


def _apply(text: str, out: str | None, runner: Runner, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = out or f"{folder}/{name}.yaml"
        if not out:
            Path(file).write_text(text)
        said = runner.run(
            f"applying {name}", ["kubectl", "apply", "--validate=strict", f"--filename={file}"]
        )
    if not runner.dry_run:
        print(said.strip())
        print(f"# kubectl get jobset {name}; kubectl delete jobset {name}")
        print(f"# kubectl logs --follow --prefix --selector=jobset.sigs.k8s.io/jobset-name={name}")


FLAGS = (
    Flag("name", "of the JobSet", required=True),
    Flag("type", "tpu7x:2x2x2, v6e-16, v5litepod-16, v5p-32, v4-32, or v6e:4x4", required=True),
    Flag("image", "a container image with selfrag-jax[tpu] installed", required=True),
    Flag("slices", "several slices for one job (multislice)", 1, type=int),
    Flag("max_restarts", "of all slices together, after a pre-emption", 50, type=int),
    Flag("spot", "on spot nodes", False, type=bool),
    Flag("namespace", "of Kubernetes", "default"),
    Flag("queue", "a LocalQueue of Kueue that admits the job"),
    Flag("service_account", "of Kubernetes; one that may use your bucket"),
    Flag("secrets", "Secrets whose keys become environment variables, such as one with HF_TOKEN",
         type=tuple),
    Flag("out", "YAML file to write; printed if not given"),
    Flag("apply", "give it to kubectl", False, type=bool),
    Flag("dry_run", "with --apply, print kubectl's command and do nothing", False, type=bool),
    Flag("cluster", "for the command of XPK", "CLUSTER"),
)  # fmt: skip
COMMANDS = {
    "": Subcommand(
        "Writes or applies a JobSet that runs a stage of selfrag on TPUs of GKE.",
        Command(
            "python launch/gke.py --name=gen --type=tpu7x:2x2x2 --image=IMAGE --out=gen.yaml train "
            "--config=generator_7b --role=generator --data=gs://B/data.jsonl "
            "--workdir=gs://B/generator",
            FLAGS,
            run,
            positional="STAGE and its flags",
        ),
    )
}

if __name__ == "__main__":
    sys.exit(main("launch/gke.py", COMMANDS))
