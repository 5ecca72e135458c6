"""Training speed beside torch: the same Llama, weights, batch and AdamW, in turns in one run.

    python launch/benchmarks/train_step.py  # about 100M parameters, f32, on a CPU
    python launch/benchmarks/train_step.py --size=1b --length=2048 --dtype=bfloat16 --rounds=1  # on a GPU

Each runs in a process of its own, as its users start it: torch in a child, ours as `selfrag` does, which keeps the memory that
XLA frees (selfrag_jax/memory.py; --kept_torch gives torch the like). Prints tokens per second of both (of the median step),
their ratio, and on a device with a known peak the model FLOPs utilisation (selfrag_jax/models/roofline.py). Needs torch and
transformers, as `pip install '.[test]'` brings them. Compilation and the first steps are not timed.
"""

import argparse
import multiprocessing
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch may need its share

SIZES = {
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ),  # to try the script
    "100m": dict(
        hidden_size=640, intermediate_size=1728, num_hidden_layers=12, num_attention_heads=10
    ),
    "1b": dict(
        hidden_size=2048, intermediate_size=5504, num_hidden_layers=20, num_attention_heads=16
    ),
    "3b": dict(
        hidden_size=2560, intermediate_size=6912, num_hidden_layers=32, num_attention_heads=20
    ),
}


def fields(size: str, vocabulary: int, length: int) -> dict:
    c = SIZES[size]
    return c | dict(
        num_key_value_heads=c["num_attention_heads"],
        vocab_size=vocabulary,
        max_position_embeddings=length,
    )


def with_torch(a, c: dict, folder: str):
    """A step of transformers' Llama with torch's AdamW, and its parameters; the starting weights go to `folder`."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**c, attn_implementation=a.torch_attention)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    model.to(device).train()
    if a.torch_compile:
        model = torch.compile(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(3, c["vocab_size"], (a.rows, a.length), device=device)
    half = torch.autocast(device, torch.bfloat16, enabled=a.dtype == "bfloat16")

    def step():
        with half:
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return step, sum(p.numel() for p in model.parameters())


def torch_process(a, c: dict, folder: str, connection) -> None:
    """Sends the number of parameters, then the times of some steps whenever it is asked, until the other end is closed."""
    from selfrag_jax import allocator

    if a.kept_torch:
        allocator.keep_freed_memory()
    step, parameters = with_torch(a, c, folder)
    connection.send(parameters)
    try:
        while connection.recv():
            connection.send(measure(step, a))
    except EOFError:
        return


def ask(connection) -> list[float]:
    connection.send(True)
    return connection.recv()


def with_jax(a, folder: str):
    """Our trainer's step, from the same weights, and the model's FLOPs for a token."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    import numpy as np

    from selfrag_jax.huggingface.weights import load_folder
    from selfrag_jax.models import roofline
    from selfrag_jax.models.llama import Model
    from selfrag_jax.training import optimizer
    from selfrag_jax.training.step import train_step

    c, params = load_folder(folder)
    remat = a.remat or ("none" if jax.default_backend() == "cpu" else "dots")
    model = Model(replace(c, dtype=a.dtype, remat=remat))
    tx = optimizer.make_optimizer(
        optimizer.OptimizerConfig("adamw", 1e-5, 1e-5, "constant", 0.0, 1e-8, 0.01, 1.0), 1000
    )
    params = jax.tree.map(jnp.asarray, params)
    state = {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}
    tokens = np.random.default_rng(0).integers(3, c.vocab_size, (a.rows, a.length)).astype(np.int32)
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    batch = dict(
        tokens=tokens,
        positions=np.broadcast_to(np.arange(a.length, dtype=np.int32), tokens.shape).copy(),
    )
    batch |= dict(
        targets=np.roll(tokens, -1, 1), weights=weights, groups=np.zeros(tokens.shape, np.int8)
    )
    batch = jax.device_put(batch)
    held = [state]

    def step():
        held[0], seen = train_step(held[0], batch, model, tx, a.loss_chunk or None)
        return float(seen["total"])

    return step, roofline.train_flops_per_token(c, a.length)


def measure(step, a) -> list[float]:
    """Seconds of some steps, after two that are not counted."""
    times = []
    for i in range(2 + a.steps):
        begin = time.perf_counter()
        step()
        times += [time.perf_counter() - begin] if i >= 2 else []
    return times


def rate(a, times: list[float]) -> float:
    """Tokens per second of the median step."""
    return a.rows * a.length / sorted(times)[len(times) // 2]


def main() -> None:
    import tempfile

    from selfrag_jax import allocator

    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--size", choices=SIZES, default="100m")
    p.add_argument("--rows", type=int, default=4)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--vocabulary", type=int, default=32_000)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--steps", type=int, default=5, help="timed at a time")
    p.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="torch and JAX take turns; 1: one after the other, as memory allows",
    )
    p.add_argument(
        "--loss_chunk", type=int, default=0, help="positions whose logits exist at a time; 0: all"
    )
    p.add_argument(
        "--remat",
        help="what our backward pass computes again: none, dots or full; by itself none on a CPU, else dots",
    )
    p.add_argument("--torch_attention", default="sdpa")
    p.add_argument("--torch_compile", action="store_true")
    p.add_argument(
        "--kept_torch", action="store_true", help="let torch's process keep freed memory too"
    )
    a = p.parse_args()
    c = fields(a.size, a.vocabulary, a.length)
    allocator.keep_freed_memory()
    spawn = multiprocessing.get_context("spawn")  # before JAX has threads
    with tempfile.TemporaryDirectory() as folder:
        torch_side, other_end = spawn.Pipe()
        process = spawn.Process(target=torch_process, args=(a, c, folder, other_end))
        process.start()
        other_end.close()
        parameters = torch_side.recv()
        times = {"torch": ask(torch_side), "ours": []}
        if a.rounds == 1:  # its memory is wanted too
            torch_side.close()
            process.join()
        ours_step, per_token = with_jax(a, folder)
        times["ours"] += measure(ours_step, a)
        for _ in range(a.rounds - 1):
            times["torch"] += ask(torch_side)
            times["ours"] += measure(ours_step, a)
    torch_side.close()
    process.join()
    theirs, ours = rate(a, times["torch"]), rate(a, times["ours"])
    import jax

    from selfrag_jax.models import roofline

    kind = jax.devices()[0].device_kind
    print(f"{parameters / 1e6:.0f}M parameters, {a.rows} x {a.length} tokens, {a.dtype}, {kind}")
    print(f"torch {theirs:9.1f} tokens/s\nours  {ours:9.1f} tokens/s\nratio {ours / theirs:.2f}")
    if chip := roofline.chip(kind):
        share = per_token / chip.bf16_flops
        print(f"MFU: torch {100 * theirs * share:.1f}%, ours {100 * ours * share:.1f}%")
    else:
        print(
            f"model FLOP/s: torch {theirs * per_token / 1e9:.1f} G, ours {ours * per_token / 1e9:.1f} G"
        )


if __name__ == "__main__":
    main()
