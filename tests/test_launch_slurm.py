"""launch/slurm.sbatch, run by bash with a Slurm that records; and shellcheck over all scripts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
FAKES = Path(__file__).parent / "fake_cloud"
TRAIN = ["train", "--role=generator", "--workdir=/shared/w"]


@pytest.fixture
def slurm(tmp_path):
    """Starts the script; returns the process, and a function for the recorded calls."""

    def start(stage, *arguments, **env):
        (tmp_path / "stage").write_text(stage)
        slurm_sets = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_NNODES": "2"}
        path = f"{FAKES / 'slurm_bin'}:{os.environ['PATH']}"
        process = subprocess.Popen(
            ["bash", SCRIPT, *arguments],
            env=os.environ | slurm_sets | {"FAKE": str(tmp_path), "PATH": path} | env,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        return process

    def calls():
        file = tmp_path / "calls"
        return file.read_text().splitlines() if file.is_file() else []

    start.calls = calls
    return start


def test_one_task_for_each_gpu_with_distributed_added(slurm):
    process = slurm("echo done", *TRAIN)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 0 and "done" in out
    assert slurm.calls() == [
        f"srun --gpu-bind=none --kill-on-bad-exit=1 --label selfrag {' '.join(TRAIN)} "
        "--distributed=auto",
        f"selfrag {' '.join(TRAIN)} --distributed=auto",
    ]
    header = SCRIPT.read_text()
    assert "#SBATCH --gpus-per-node=8\n#SBATCH --ntasks-per-node=8\n" in header


def test_distributed_is_not_added_twice_nor_for_one_task(slurm):
    slurm("true", *TRAIN, "--distributed=h:1,2,0").communicate(timeout=10)
    assert "auto" not in " ".join(slurm.calls())
    slurm("true", *TRAIN, SLURM_NTASKS="1").communicate(timeout=10)
    assert "auto" not in " ".join(slurm.calls())


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_before_its_end_the_stage_saves_and_is_queued_again(slurm, sent):
    process = slurm('trap "echo saved; exit 143" TERM; touch "$FAKE/up"; '
                    "while :; do sleep 0.02; done", *TRAIN)  # fmt: skip
    for _ in range(500):
        if any(call.startswith("selfrag") for call in slurm.calls()):
            break
        time.sleep(0.01)
    time.sleep(0.1)  # the trap of the stage
    process.send_signal(sent)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 0 and "saved" in out
    assert slurm.calls()[-2:] == ["scancel --signal=TERM 7", "scontrol requeue 7"]


def test_a_stage_that_slurm_told_to_save_is_queued_again(slurm):
    """On pre-emption Slurm signals the tasks alone."""
    process = slurm("exit 143", *TRAIN)
    process.communicate(timeout=10)
    assert process.returncode == 0 and slurm.calls()[-1] == "scontrol requeue 7"


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_other_ends_are_the_jobs_end(slurm, status):
    process = slurm(f"exit {status}", *TRAIN)
    process.communicate(timeout=10)
    assert process.returncode == status
    assert not any(call.startswith("scontrol") for call in slurm.calls())


def test_requeues_are_bounded(slurm):
    process = slurm("exit 143", *TRAIN, SLURM_RESTART_COUNT="3", SELFRAG_MAX_RESTARTS="3")
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 1 and "gave up after 3 restarts" in out
    assert not any(call.startswith("scontrol") for call in slurm.calls())


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ([], {}, "run what?"),
        (TRAIN, {"SLURM_JOB_ID": ""}, "is started by sbatch"),
        (TRAIN, {"SELFRAG": "nowhere"}, "nowhere is not on the PATH"),
    ],
)
def test_wrong_starts_say_what_to_do(slurm, arguments, env, message):
    process = slurm("true", *arguments, **env)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 2 and message in out and slurm.calls() == []


def test_shellcheck_finds_nothing():
    sys.path.insert(0, str(ROOT / "launch"))
    from cloud import remote

    shellcheck = Path(sys.executable).parent / "shellcheck"
    fakes = [f for f in FAKES.rglob("*") if f.is_file() and f.suffix != ".md"]
    done = subprocess.run(
        [shellcheck, "--severity=style", SCRIPT, *fakes], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    scripts = [
        remote.install("abc", "selfrag-abc.tar.gz"),
        remote.start("gen", "abc", ["train", "--role=it's"], "s1"),
        remote.stop("gen"),
        remote.probe("gen", "/mnt/a b", "s1"),
        remote.follow("gen", 20, True),
        remote.JOB,
    ]
    for script in scripts:
        done = subprocess.run(
            # SC2016: what `start` quotes expands later, and is checked by itself (JOB).
            # SC1091: the environment file is made on the host.
            [shellcheck, "--shell=bash", "--severity=style", "--exclude=SC2016,SC1091", "-"],
            input=script, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
