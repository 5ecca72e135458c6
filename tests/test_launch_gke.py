"""launch/gke.py: its JobSets against the published schema, and kubectl's failures."""

import copy
import json
import os
import shlex
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from selfrag_jax import cli

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))
import gke
import plan
import tpu
from cloud import command_line, tables

FAKES = Path(__file__).parent / "fake_cloud"
TRAIN = ["train", "--role=generator", "--data=/mnt/d.jsonl", "--workdir=/mnt/w"]


@pytest.fixture(scope="module")
def schema():
    file = Path(__file__).parent / "data" / "jobset_v1alpha2.json"
    return jsonschema.Draft202012Validator(json.loads(file.read_text()))


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """(exit code, stdout, stderr) of launch/gke.py."""
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{FAKES}:{os.environ['PATH']}")

    def call(*flags, stage=TRAIN):
        argv = ["--name=gen", "--type=tpu7x:2x2x2", "--image=img", *flags, *stage]
        code = command_line.main("launch/gke.py", gke.COMMANDS, argv)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("flags", "accelerator", "topology", "hosts", "chips"),
    [
        (["--type=tpu7x:2x2x2"], "tpu7x", "2x2x2", 2, 4),
        (["--type=tpu7x:4x4x4", "--slices=4"], "tpu7x", "4x4x4", 16, 4),
        (["--type=v6e-16", "--slices=2", "--queue=q", "--spot"], "tpu-v6e-slice", "4x4", 4, 4),
        (["--type=v6e-1"], "tpu-v6e-slice", "1x1", 1, 1),
        (["--type=v5litepod-64"], "tpu-v5-lite-podslice", "8x8", 16, 4),
        (["--type=v5p-32", "--service_account=a"], "tpu-v5p-slice", "2x2x4", 4, 4),
        (["--type=v4-8", "--secrets=hf,wandb"], "tpu-v4-podslice", "2x2x1", 1, 4),
    ],
)
def test_manifests_fit_the_published_schema(
    run, schema, flags, accelerator, topology, hosts, chips
):
    code, out, err = run(*flags)
    assert code == 0, err
    made = yaml.safe_load(out)
    schema.validate(made)
    [job] = made["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert spec["parallelism"] == spec["completions"] == hosts
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    slices = next((int(f.split("=")[1]) for f in flags if f.startswith("--slices")), 1)
    assert job["replicas"] == slices
    assert ("--distributed=auto" in container["command"]) == (hosts > 1)
    assert ("kueue.x-k8s.io/queue-name" in str(made)) == ("--queue=q" in flags)
    assert ("gke-spot" in str(made)) == ("--spot" in flags)


def test_every_slice_of_the_table_makes_a_valid_manifest(schema):
    for generation in tables.GENERATIONS.values():
        for topology in generation.topologies:
            s = tables.Slice(generation, topology)
            assert s.gke_hosts * s.gke_chips_per_host == s.chips
            assert tables.parse_slice(f"{generation.name}:{topology}") == s
            workload = gke.Workload("g", s, 1, "i", ("train",), 1)
            schema.validate(gke.manifest(workload))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m["spec"].update(maxRestarts=3),  # one level too high
        lambda m: m["spec"]["failurePolicy"].update(maxRestarts="3"),
        lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="Restart"),
        lambda m: m["spec"]["replicatedJobs"][0].pop("template"),
        lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"].update(completions="4"),
        lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"].update(
            nodeselector={}
        ),
    ],
)
def test_the_schema_refuses_wrong_manifests(schema, spoil):
    workload = gke.Workload("g", tables.parse_slice("v6e-16"), 2, "i", ("train",), 1)
    made = copy.deepcopy(gke.manifest(workload))
    spoil(made)
    with pytest.raises(jsonschema.ValidationError):
        schema.validate(made)


def test_restarts_are_for_preemption_and_not_for_wrong_input(run):
    made = yaml.safe_load(run("--max_restarts=7")[1])
    policy = made["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"][0]["action"] == "FailJobSet"
    spec = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert spec["backoffLimit"] == 0  # one failed pod fails the slice


def test_the_same_with_xpk(run):
    line = run("--type=tpu7x:2x2x2", "--cluster=c", "--slices=2")[1].splitlines()[-1]
    command = shlex.split(line.removeprefix("# "))
    assert command[:3] == ["xpk", "workload", "create"]
    assert {"--tpu-type=tpu7x-2x2x2", "--num-slices=2", "--max-restarts=50"} <= set(command)
    assert command[-1] == f"--command=selfrag {' '.join(TRAIN)} --distributed=auto"
    assert "--tpu-type=v5litepod-16" in run("--type=v5e-16")[1]


def test_a_file_is_written_and_applied(run, tmp_path, schema):
    out = tmp_path / "gen.yaml"
    for _ in range(2):  # our own file may be written again
        code, text, _ = run(f"--out={out}", "--apply")
        assert code == 0 and "jobset.jobset.x-k8s.io/gen created" in text
    schema.validate(yaml.safe_load((tmp_path / "applied").read_text()))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"kubectl apply --validate=strict --filename={out}"] * 2
    out.write_text("my: notes\n")
    code, _, err = run(f"--out={out}")
    assert code == 2 and "is no JobSet" in err and out.read_text() == "my: notes\n"


def test_dry_run_applies_nothing(run, tmp_path):
    code, text, _ = run("--apply", "--dry_run")
    assert code == 0 and "kubectl apply --validate=strict" in text
    assert not (tmp_path / "calls").exists()


def test_a_failure_of_kubectl_is_one_line(run, tmp_path):
    (tmp_path / "fail.kubectl").write_text(
        'error: resource mapping not found: no matches for kind "JobSet" in version "v1alpha2"\n'
        "ensure CRDs are installed first"
    )
    code, _, err = run("--apply")
    assert code == 1 and "applying gen failed" in err and err.count("\n") == 1
    assert "github.com/kubernetes-sigs/jobset" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--type=tpu7x:2x2x3"], "tpu7x-16 (2x2x2)"),
        (["--type=v7e-16"], "did you mean"),
        (["--name=Gen"], "small letters"),
        (["--slices=0"], "must be at least 1"),
        (["--slices=2", "--type=v6e-4"], "GKE joins slices of several hosts only"),
        (["--max_restarts=-1"], "must be at least 0"),
        (["--imag=x"], "did you mean --image?"),
    ],
)
def test_wrong_flags_are_user_errors(run, flags, message):
    code, _, err = run(*flags)
    assert code == 2 and message in err and err.count("\n") == 1


def test_the_stage_is_checked(run):
    assert "no stage of selfrag" in run(stage=["tarin"])[2]
    assert "belongs to the launcher" in run(stage=[*TRAIN, "--image=x"])[2]


def test_the_commands_of_the_readme_are_accepted():
    """Those of launch/README.md, with folders in place of buckets."""
    text = (Path(gke.__file__).parent / "README.md").read_text().replace("gs://", "/mnt/")
    programs = {"gke": gke, "tpu": tpu, "plan": plan}
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("python launch/")]
    assert {Path(line[1]).stem for line in lines} == set(programs)
    for _, program, *argv in lines:
        commands = programs[Path(program).stem].COMMANDS
        name = "" if "" in commands else argv.pop(0)
        own, stage = command_line._split(commands[name].command, argv)
        values, _ = cli.parse(commands[name].command, name, own)
        assert values
        if stage:
            arguments = command_line.stage_command(stage, True, commands[name].command.flags)
            assert "--distributed=auto" in arguments
