"""Training on any mesh has the losses of one device, checkpoints move between meshes, and two
processes train together. Run as a program, this file is one training process."""

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
from repetitions import some

from selfrag_jax.errors import UserError
from selfrag_jax.records import GeneratorExample, write_jsonl

MESHES = ((1, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2))
STEPS = 6
EXAMPLES = [
    GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
    for i in range(40)
]


# ---- the program ---------------------------------------------------------------------------------
def program(job, workdir, process=0, port=0):
    """Prints the losses of the job's training runs as JSON.

    job: "meshes" trains on each mesh and more; "two processes" is one of two that train together.
    """
    import jax

    if job == "two processes":
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    from selfrag_jax.base_model.source import make_tokenizer
    from selfrag_jax.checkpoints.workdirs import read_loss
    from selfrag_jax.data.generator_examples import GeneratorSource
    from selfrag_jax.data.held_out import all_rows
    from selfrag_jax.models.llama import LlamaConfig, Model
    from selfrag_jax.training import train as trainer
    from selfrag_jax.training.config import MeshConfig, TrainConfig
    from selfrag_jax.training.optimizer import OptimizerConfig

    tokenizer = make_tokenizer(4000).with_reflection_tokens()
    group_weights = dict.fromkeys(("retrieve", "isrel", "issup", "isuse"), 1.0)
    source = GeneratorSource(EXAMPLES, tokenizer, group_weights)
    # A number that no batch divides.
    held_out = all_rows(GeneratorSource(EXAMPLES[:11], tokenizer, group_weights))
    model = Model(LlamaConfig(
        vocab_size=tokenizer.vocab_size, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, max_length=64, rope_theta=1e4, norm_eps=1e-5,
        tie_embeddings=False, dtype="float32", remat="none", scan_unroll=1,
    ))  # fmt: skip
    initial = jax.device_get(model.init(jax.random.key(0), 0.3))
    losses, train_step = [], trainer.run_step
    results, stop_after = {}, None

    def recording_step(*args):
        if len(losses) == stop_after:
            raise KeyboardInterrupt
        state, metrics = train_step(*args)
        losses.append(float(metrics["total"]))
        return state, metrics

    trainer.run_step = recording_step

    def run(mesh, name, **changes):
        config = TrainConfig(
            seed=0, steps=STEPS, rows=8, length=32, max_targets=None, save_every=3, log_every=3,
            loss_chunk=16, remat="full", mesh=MeshConfig(*mesh),
            optimizer=OptimizerConfig("adamw", 0.01, 0.01, "linear", 0.1, 1e-8, 0.0, 1.0),
            **changes,
        )  # fmt: skip
        losses.clear()
        folder = Path(workdir) / name
        state = trainer.train(
            config, model, initial, source, tokenizer, folder, held_out_source=held_out
        )
        measured = read_loss(folder / "checkpoints" / str(STEPS) / "metrics" / "metrics")
        norm = float(sum(abs(x).sum() for x in jax.tree.leaves(state["params"])))
        results[name] = {"losses": list(losses), "norm": norm, "held out": measured}

    if job == "two processes":
        run((1, 8, 1), "two processes")
    else:
        for mesh in MESHES:
            run(mesh, str(mesh))
        run((1, 1, 1), "accumulated on one device", rows_per_device=4)
        run((1, 4, 1), "accumulated", rows_per_device=1)
        run((1, 2, 2, 2), "two slices")
        stop_after = 4  # between two checkpoints
        try:
            run((1, 8, 1), "moved")
        except KeyboardInterrupt:
            stop_after = None
        run((1, 2, 2), "moved")  # fewer devices, too
        results["search"] = search_on_devices(workdir)
    print(json.dumps(results))


def search_on_devices(workdir):
    """Largest differences of search on 8 and on 3 devices from exact search: rows, scores."""
    import jax

    from selfrag_jax.retrieval.device_search import DeviceSearch
    from selfrag_jax.retrieval.vectors import (
        VectorFiles,
        VectorLayout,
        search_exactly,
        write_vectors,
    )

    folder, rng = Path(workdir) / "vectors", np.random.default_rng(0)
    layout = VectorLayout(1003, 24, "float16", 400)
    layout.write(folder)
    for i in range(layout.num_files):
        first, after = layout.rows_of_file(i)
        x = rng.standard_normal((after - first, 24)).astype(np.float16)
        write_vectors(layout.file(folder, i), x, first)
    vectors, queries = VectorFiles(folder), rng.standard_normal((70, 24)).astype(np.float32)
    rows, scores = search_exactly(vectors, queries, 10, 100)
    differences = []
    for n in (8, 3):
        found, found_scores = DeviceSearch([vectors], "float32", False, jax.devices()[:n]).search(
            queries, 10
        )
        differences += [int((found != rows).sum()), float(np.abs(found_scores - scores).max())]
    return differences


def start(*arguments, devices):
    command = [sys.executable, __file__, *map(str, arguments)]
    return popen(command, devices)


def popen(command, devices):
    """Starts a process with that many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    if some(True, False):  # partitioned alike, and compiled faster
        env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)


def result(process):
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1])


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ---- one process ---------------------------------------------------------------------------------
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
def test_two_slices_have_the_losses_of_one_device(trained):
    """Of the eight devices four count as a slice: the batch is split over both, and fsdp within."""
    one, two = trained[str(MESHES[0])], trained["two slices"]
    np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-4, rtol=0)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)


@pytest.mark.slow
def test_search_over_several_devices_equals_exact_search(trained):
    rows_of_8, scores_of_8, rows_of_3, scores_of_3 = trained["search"]
    assert rows_of_8 == rows_of_3 == 0 and max(scores_of_8, scores_of_3) < 1e-5


@pytest.mark.slow
def test_training_resumes_on_another_mesh(trained):
    one, moved = trained[str(MESHES[0])], trained["moved"]
    after_checkpoint = one["losses"][3:]  # the last checkpoint was of step 3
    np.testing.assert_allclose(moved["losses"], after_checkpoint, atol=1e-4, rtol=0)
    assert moved["norm"] == pytest.approx(one["norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["accumulated on one device", "accumulated"])
def test_gradient_accumulation_has_the_losses_of_whole_batches(trained, run):
    one, accumulated = trained[str(MESHES[0])], trained[run]
    np.testing.assert_allclose(accumulated["losses"], one["losses"], atol=1e-4, rtol=0)
    assert accumulated["norm"] == pytest.approx(one["norm"], rel=1e-5)


@pytest.mark.slow
def test_the_held_out_loss_is_the_same_on_every_mesh(trained):
    runs = ("accumulated on one device", "accumulated", "two slices", "moved", *map(str, MESHES))
    found = [trained[run]["held out"] for run in runs]
    np.testing.assert_allclose(found, found[-1], atol=1e-4, rtol=0)


# ---- two processes -------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_with_a_checkpoint(tmp_path):
    """`selfrag train` runs on two hosts. One gets a SIGTERM during training, and both stop.

    Heads are split over both hosts, which works but is slow, so one of them warns.
    """
    write_jsonl(tmp_path / "data.jsonl", EXAMPLES)
    port, workdir = free_port(), tmp_path / "w"
    changes = {
        "steps": 4000, "save_every": 1000, "max_targets": None, "rows": 4, "length": 64,
        "log_every": 1, "mesh.tensor": -1,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "selfrag_jax", "train", "--role=generator",
        f"--data={tmp_path}/data.jsonl", f"--workdir={workdir}", "--config=tiny:smoke",
        *(f"--config.generator.{name}={value}" for name, value in changes.items()),
    ]  # fmt: skip
    both = [popen([*command, f"--distributed=127.0.0.1:{port},2,{i}"], devices=2) for i in range(2)]
    for _ in range(600):
        logged = sum(f.stat().st_size for f in (workdir / "logs").glob("*tfevents*"))
        if logged > 5000 or any(p.poll() is not None for p in both):
            break  # compiled, and some steps done
        time.sleep(0.5)
    both[1].send_signal(signal.SIGTERM)
    ends = [p.communicate(timeout=200) for p in both]
    assert [p.returncode for p in both] == [143, 143], ends
    assert ["the mesh's tensor=4 spans 2 hosts" in err for _, err in ends] == [True, False]
    [step] = (int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert 0 < step < 1000 and not (workdir / "manifest.json").exists()


@pytest.mark.slow
def test_two_processes_train_together(trained, tmp_path):
    one = trained[str(MESHES[0])]

    def train_in_two_processes():
        port = free_port()
        both = [start("two processes", tmp_path, i, port, devices=4) for i in range(2)]
        return [result(process)["two processes"] for process in both]

    for found in train_in_two_processes():
        np.testing.assert_allclose(found["losses"], one["losses"], atol=1e-4, rtol=0)
        assert found["held out"] == pytest.approx(one["held out"], abs=1e-4)
        assert found["norm"] == pytest.approx(one["norm"], rel=1e-5)

    # If one process cannot read a checkpoint, neither uses it: both resume from the one before.
    workdir = tmp_path / "two processes"
    files = (workdir / "checkpoints" / "6" / "state" / "ocdbt.process_1").rglob("*")
    largest = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    for found in train_in_two_processes():
        np.testing.assert_allclose(found["losses"], one["losses"][3:], atol=1e-4, rtol=0)
        assert found["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert (workdir / "damaged" / "6.0").is_dir()


# ---- meshes --------------------------------------------------------------------------------------
def test_a_tpu_mesh_is_a_block_of_each_slice():
    from selfrag_jax.models.sharding import make_mesh

    def chip(slice_index, x):
        return SimpleNamespace(
            platform="tpu", slice_index=slice_index, coords=(x, 0, 0), core_on_chip=0
        )

    two_slices = [chip(i, x) for i in (0, 1) for x in (0, 1)]
    message = r"mesh \(1, 4, 1\) needs 4 devices of each slice; a slice has 2"
    with pytest.raises(UserError, match=message):
        make_mesh(fsdp=4, devices=two_slices)
    with pytest.raises(UserError, match="slices=4: the devices are in 2 slices"):
        make_mesh(fsdp=2, devices=two_slices, slices=4)
    with pytest.raises(UserError, match="the slices have 2, 1 devices; they must be of one size"):
        make_mesh(fsdp=-1, devices=two_slices[:3])
    message = "cannot be laid over 2 devices of this slice; use all of them"
    with pytest.raises(UserError, match=message):
        make_mesh(fsdp=2, devices=[chip(0, 0), chip(0, 2)])


def test_a_gpu_mesh_may_span_hosts():
    from selfrag_jax.models.sharding import hosts_per_tensor_group, make_mesh

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
    assert hosts_per_tensor_group(mesh) == 1
    assert hosts_per_tensor_group(make_mesh(tensor=4, devices=devices)) == 2


if __name__ == "__main__":
    program(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
