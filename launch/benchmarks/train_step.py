"""Compares training speed with torch: the same Llama, weights, batch and AdamW, in one run.

    python launch/benchmarks/train_step.py
    python launch/benchmarks/train_step.py --size=1b --length=2048 --dtype=bfloat16 --rounds=1

The first is about 100M parameters in f32, for a CPU; the second is for a GPU.

The two take turns. Each runs in a process of its own, as its users start it: torch in a child, ours
as `selfrag` does, which keeps the memory that XLA frees (selfrag_jax/allocator.py; --kept_torch
does the same for torch). Prints tokens per second of both (of the median step), their ratio, and on
a device with known peak rates the model FLOPs utilisation (selfrag_jax/models/roofline.py).

Needs torch and transformers, which `pip install '.[test]'` brings. Compilation and the first steps
are not timed.
"""

import argparse
import multiprocessing
import os
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch may need its share

SIZES = {
    # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads
    "tiny": (64, 128, 2, 4),  # to try the script
    "100m": (640, 1728, 12, 10),
    "1b": (2048, 5504, 20, 16),
    "3b": (2560, 6912, 32, 20),
}
UNTIMED_STEPS = 2


def llama_fields(size: str, vocabulary: int, length: int) -> dict:
    hidden, intermediate, layers, heads = SIZES[size]
    return dict(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=length,
    )


# ---- theirs --------------------------------------------------------------------------------------
def torch_step(args, fields: dict, folder: str):
    """Returns a step of transformers' Llama with torch's AdamW, and the number of parameters.

    The starting weights go to `folder`.
    """
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**fields, attn_implementation=args.torch_attention)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    model.to(device).train()
    if args.torch_compile:
        model = torch.compile(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(3, fields["vocab_size"], (args.rows, args.length), device=device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def step():
        with autocast:
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return step, sum(p.numel() for p in model.parameters())


def torch_process(args, fields: dict, folder: str, connection) -> None:
    """Sends the number of parameters; then the times of some steps, whenever it is asked.

    Returns when the other end is closed.
    """
    from selfrag_jax import allocator

    if args.kept_torch:
        allocator.keep_freed_memory()
    step, num_parameters = torch_step(args, fields, folder)
    connection.send(num_parameters)
    try:
        while connection.recv():
            connection.send(time_steps(step, args.steps))
    except EOFError:
        return


def ask_for_times(connection) -> list[float]:
    connection.send(True)
    return connection.recv()


# ---- ours ----------------------------------------------------------------------------------------
def jax_step(args, folder: str | None):
    """Returns our trainer's step, from the same weights, and the model's FLOPs for a token.

    folder: None for random weights of our own.
    """
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    import numpy as np

    from selfrag_jax.huggingface.weights import load_folder
    from selfrag_jax.models import roofline
    from selfrag_jax.models.llama import LlamaConfig, Model
    from selfrag_jax.training import optimizer
    from selfrag_jax.training.step import train_step

    if folder is None:
        hidden, intermediate, layers, heads = SIZES[args.size]
        c = LlamaConfig(
            vocab_size=args.vocabulary, embed_dim=hidden, mlp_dim=intermediate, num_layers=layers,
            num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads, max_length=args.length,
            rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, dtype=args.dtype, remat="none",
            scan_unroll=1,
        )  # fmt: skip
        params = jax.jit(Model(c).init)(jax.random.key(0))
    else:
        c, params = load_folder(folder)
    remat = args.remat or ("none" if jax.default_backend() == "cpu" else "dots")
    model = Model(replace(c, dtype=args.dtype, remat=remat))
    recipe = optimizer.OptimizerConfig(
        name="adamw",
        learning_rate=1e-5,
        adam_learning_rate=1e-5,
        schedule="constant",
        warmup_fraction=0.0,
        adam_eps=1e-8,
        weight_decay=0.01,
        clip=1.0,
    )
    tx = optimizer.make_optimizer(recipe, 1000)
    params = jax.tree.map(jnp.asarray, params)
    state = {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}

    rng = np.random.default_rng(0)
    tokens = rng.integers(3, c.vocab_size, (args.rows, args.length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(args.length, dtype=np.int32), tokens.shape).copy()
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    batch = jax.device_put(
        dict(
            tokens=tokens,
            positions=positions,
            targets=np.roll(tokens, -1, 1),
            weights=weights,
            groups=np.zeros(tokens.shape, np.int8),
        )
    )

    def step():
        nonlocal state
        state, metrics = train_step(state, batch, model, tx, args.loss_chunk or None)
        return float(metrics["total"])

    return step, roofline.train_flops_per_token(c, args.length)


# ---- measuring -----------------------------------------------------------------------------------
def time_steps(step, count: int) -> list[float]:
    """Returns the seconds of some steps, after a few that are not timed."""
    times = []
    for _ in range(UNTIMED_STEPS + count):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return times[UNTIMED_STEPS:]


def tokens_per_second(args, times: list[float]) -> float:
    """Of the median step."""
    return args.rows * args.length / sorted(times)[len(times) // 2]


def measure(args) -> tuple[list[float], list[float], int, float]:
    """Returns torch's and our times, the number of parameters, and the FLOPs for a token."""
    fields = llama_fields(args.size, args.vocabulary, args.length)
    spawn = multiprocessing.get_context("spawn")  # before JAX has threads
    with tempfile.TemporaryDirectory() as folder:
        connection, other_end = spawn.Pipe()
        process = spawn.Process(target=torch_process, args=(args, fields, folder, other_end))
        process.start()
        other_end.close()
        num_parameters = connection.recv()
        theirs = ask_for_times(connection)
        if args.rounds == 1:  # ours may need its memory
            connection.close()
            process.join()
        step, flops_per_token = jax_step(args, folder)
        ours = time_steps(step, args.steps)
        for _ in range(args.rounds - 1):
            theirs += ask_for_times(connection)
            ours += time_steps(step, args.steps)
    connection.close()
    process.join()
    return theirs, ours, num_parameters, flops_per_token


def measure_ours(args) -> dict[str, float]:
    """Measures our step alone, with random weights; returns its figures. MFU: of a known device."""
    import jax

    from selfrag_jax.models import roofline

    step, flops_per_token = jax_step(args, None)
    rate = tokens_per_second(args, time_steps(step, args.steps))
    figures = {"tokens_per_second": rate, "flops_per_second": rate * flops_per_token}
    if chip := roofline.chip(jax.devices()[0].device_kind):
        figures["mfu"] = rate * flops_per_token / chip.bf16_flops
    memory = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        figures["peak_bytes"] = memory["peak_bytes_in_use"]
    return figures


def compare(args) -> dict[str, float]:
    """Prints and returns the tokens per second of both, and their ratio."""
    from selfrag_jax import allocator

    allocator.keep_freed_memory()
    their_times, our_times, num_parameters, flops_per_token = measure(args)
    theirs, ours = tokens_per_second(args, their_times), tokens_per_second(args, our_times)
    import jax

    from selfrag_jax.models import roofline

    kind = jax.devices()[0].device_kind
    print(
        f"{num_parameters / 1e6:.0f}M parameters, {args.rows} x {args.length} tokens, "
        f"{args.dtype}, {kind}"
    )
    print(f"torch {theirs:9.1f} tokens/s")
    print(f"ours  {ours:9.1f} tokens/s")
    print(f"ratio {ours / theirs:.2f}")
    if chip := roofline.chip(kind):
        share = flops_per_token / chip.bf16_flops
        print(f"MFU: torch {100 * theirs * share:.1f}%, ours {100 * ours * share:.1f}%")
    else:
        gflops = flops_per_token / 1e9
        print(f"model FLOP/s: torch {theirs * gflops:.1f} G, ours {ours * gflops:.1f} G")
    return {"theirs": theirs, "ours": ours, "ratio": ours / theirs}


def parse_arguments(argv: list[str] | None = None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--size", choices=SIZES, default="100m")
    p.add_argument("--rows", type=int, default=4)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--vocabulary", type=int, default=32_000)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--steps", type=int, default=5, help="timed in each round")
    p.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="torch and JAX take turns; 1: torch ends before JAX starts, to save memory",
    )
    p.add_argument(
        "--loss_chunk", type=int, default=0, help="positions whose logits exist at a time; 0: all"
    )
    p.add_argument(
        "--remat",
        help="what our backward pass recomputes: none, dots or full; default: none on a CPU, "
        "else dots",
    )
    p.add_argument("--torch_attention", default="sdpa")
    p.add_argument("--torch_compile", action="store_true")
    p.add_argument(
        "--kept_torch", action="store_true", help="let torch's process keep freed memory too"
    )
    return p.parse_args(argv)


if __name__ == "__main__":
    compare(parse_arguments())
