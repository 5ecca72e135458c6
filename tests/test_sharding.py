"""Training over several devices and processes is training over one: the same losses on every mesh, checkpoints that go from
one mesh to another, and two processes that work together. Run as a program, this file is one of those processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from selfrag_jax.errors import UserError
from selfrag_jax.records import GeneratorExample, write_jsonl

MESHES = ((1, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2))
STEPS = 6


def program(job, workdir, process=0, port=0):
    """Prints the losses of the job's trainings as JSON."""
    import jax

    if job == "two":
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    from selfrag_jax.base_model.source import make_tokenizer
    from selfrag_jax.data.generator_examples import GeneratorSource
    from selfrag_jax.models.llama import LlamaConfig, Model
    from selfrag_jax.records import GeneratorExample
    from selfrag_jax.training import train as trainer
    from selfrag_jax.training.config import MeshConfig, TrainConfig
    from selfrag_jax.training.optimizer import OptimizerConfig

    tokenizer = make_tokenizer(4000).with_reflection_tokens()
    rows = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(40)
    ]
    source = GeneratorSource(
        rows, tokenizer, dict.fromkeys(("retrieve", "isrel", "issup", "isuse"), 1.0)
    )
    fields = dict(
        vocab_size=tokenizer.vocab_size,
        embed_dim=32,
        mlp_dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
    )
    fields |= dict(
        head_dim=8,
        max_length=64,
        rope_theta=1e4,
        norm_eps=1e-5,
        tie_embeddings=False,
        dtype="float32",
    )
    model = Model(LlamaConfig(**fields, remat="none", scan_unroll=1))
    initial = jax.device_get(model.init(jax.random.key(0), 0.3))
    losses, step = [], trainer.train_step

    def spy(*args):
        if len(losses) == stop_after:
            raise KeyboardInterrupt
        state, seen = step(*args)
        losses.append(float(seen["total"]))
        return state, seen

    trainer.train_step, out, stop_after = spy, {}, None

    def run(mesh, name, **changes):
        config = TrainConfig(
            seed=0, steps=STEPS, rows=8, length=32, max_targets=None, save_every=3, log_every=3, loss_chunk=16, remat="full",
            mesh=MeshConfig(*mesh), optimizer=OptimizerConfig("adamw", 0.01, 0.01, "linear", 0.1, 1e-8, 0.0, 1.0),
            **changes,
        )  # fmt: skip
        losses.clear()
        made = trainer.train(config, model, initial, source, tokenizer, Path(workdir) / name)[
            "params"
        ]
        out[name] = {
            "losses": list(losses),
            "norm": float(sum(abs(x).sum() for x in jax.tree.leaves(made))),
        }

    if job == "two":
        run((1, 8, 1), "two")
    else:
        for mesh in MESHES:
            run(mesh, str(mesh))
        run((1, 1, 1), "accumulated on one", rows_per_device=4)
        run((1, 4, 1), "accumulated", rows_per_device=1)
        stop_after = 4  # between two checkpoints
        try:
            run((1, 8, 1), "moved")
        except KeyboardInterrupt:
            stop_after = None
        run((1, 2, 2), "moved")  # fewer devices, too
    print(json.dumps(out))


def start(*arguments, devices):
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def result(process):
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return result(start("meshes", tmp_path_factory.mktemp("meshes"), devices=8))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_every_mesh_has_the_losses_of_one_device(trained, mesh):
    one, several = trained[str(MESHES[0])], trained[str(mesh)]
    assert len(one["losses"]) == STEPS and one["losses"][-1] < one["losses"][0]
    np.testing.assert_allclose(several["losses"], one["losses"], atol=1e-4, rtol=0)
    assert several["norm"] == pytest.approx(one["norm"], rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_goes_on_over_another_mesh(trained):
    one, moved = trained[str(MESHES[0])], trained["moved"]
    np.testing.assert_allclose(
        moved["losses"], one["losses"][3:], atol=1e-4, rtol=0
    )  # the last save was at step 3
    assert moved["norm"] == pytest.approx(one["norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["accumulated on one", "accumulated"])
def test_parts_of_a_batch_learn_what_the_whole_does(trained, run):
    one, parts = trained[str(MESHES[0])], trained[run]
    np.testing.assert_allclose(parts["losses"], one["losses"], atol=1e-4, rtol=0)
    assert parts["norm"] == pytest.approx(one["norm"], rel=1e-5)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_with_a_checkpoint(tmp_path):
    """On the way, from the command line: `selfrag train` on two hosts, of which one is told to go. Heads are split over both, which
    is possible and slow, so that it is said."""
    rows = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(40)
    ]
    write_jsonl(tmp_path / "data.jsonl", rows)
    port, workdir = free_port(), tmp_path / "w"
    changes = dict(
        steps=4000, save_every=1000, max_targets=None, rows=4, length=64, log_every=1
    ).items()
    command = [
        sys.executable,
        "-m",
        "selfrag_jax",
        "train",
        "--role=generator",
        f"--data={tmp_path}/data.jsonl",
    ]
    command += [
        f"--workdir={workdir}",
        "--config=tiny:smoke",
        *(f"--config.generator.{k}={v}" for k, v in changes),
    ]
    command += ["--config.generator.mesh.tensor=-1"]
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    both = [
        subprocess.Popen([*command, f"--distributed=127.0.0.1:{port},2,{i}"], **pipes)
        for i in range(2)
    ]
    for _ in range(600):
        if any((workdir / "logs").glob("*tfevents*")) or any(p.poll() is not None for p in both):
            break
        time.sleep(0.5)
    time.sleep(20)  # compiled, and some steps done
    both[1].send_signal(signal.SIGTERM)
    ends = [p.communicate(timeout=200) for p in both]
    assert [p.returncode for p in both] == [143, 143], ends
    assert ["tensor=4 of the mesh lies over 2 hosts" in err for _, err in ends] == [True, False]
    [step] = (int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert 0 < step < 1000 and not (workdir / "manifest.json").exists()


@pytest.mark.slow
def test_two_processes_train_together(trained, tmp_path):
    port = free_port()
    both = [start("two", tmp_path, i, port, devices=4) for i in range(2)]
    for found in map(result, both):
        one, two = trained[str(MESHES[0])], found["two"]
        np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-4, rtol=0)
        assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)

    # What one of them cannot read, neither takes: both go on from the checkpoint before.
    parts = (tmp_path / "two" / "checkpoints" / "6" / "state" / "ocdbt.process_1").rglob("*")
    file = max((p for p in parts if p.is_file()), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    port = free_port()
    both = [start("two", tmp_path, i, port, devices=4) for i in range(2)]
    for found in map(result, both):
        np.testing.assert_allclose(found["two"]["losses"], one["losses"][3:], atol=1e-4, rtol=0)
        assert found["two"]["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert (tmp_path / "two" / "damaged" / "6.0").is_dir()


def test_a_mesh_lies_in_one_slice_without_holes():
    from selfrag_jax.models.sharding import make_mesh

    device = lambda number, x: SimpleNamespace(
        platform="tpu", slice_index=number, coords=(x, 0, 0), core_on_chip=0
    )  # noqa: E731
    with pytest.raises(
        UserError, match=r"mesh \(1, 4, 1\) would lie over 2 slices; it is laid over one"
    ):
        make_mesh(fsdp=4, devices=[device(number, x) for number in (0, 1) for x in (0, 1)])
    with pytest.raises(
        UserError, match="cannot be laid over 2 devices of this slice; use all of them"
    ):
        make_mesh(fsdp=2, devices=[device(0, 0), device(0, 2)])


def test_a_mesh_of_gpus_goes_over_hosts():
    from selfrag_jax.models.sharding import hosts_of_tensor, make_mesh

    @dataclass(frozen=True)
    class Gpu:
        id: int
        process_index: int
        slice_index: int
        platform: str = "gpu"
        device_kind: str = "NVIDIA H100 80GB HBM3"
        coords: tuple = (0, 0, 0)  # and no core_on_chip

    devices = [Gpu(2 * host + i, host, host) for host in (0, 1) for i in (0, 1)]
    mesh = make_mesh(fsdp=2, tensor=-1, devices=devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2}
    assert [[d.process_index for d in row] for row in mesh.devices[0]] == [[0, 0], [1, 1]]
    assert make_mesh(devices=devices[:1]).size == 1
    assert hosts_of_tensor(mesh) == 1 and hosts_of_tensor(make_mesh(tensor=4, devices=devices)) == 2


if __name__ == "__main__":
    program(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
