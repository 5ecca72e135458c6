"""Compiles the shipped configs for TPU slices and GPUs; prints the table of configs/README.md.

    pip install '.[tpu,gpu]' && python launch/compile_table.py --out=compiled

The table holds memory, traffic and the best possible step time. It takes an hour on one core.
Each compilation is `selfrag compile` in a process of its own and leaves one JSON file in --out, so
a second run continues where the first one stopped.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

SEVEN_B = ("v5e:4x4", "v5e:8x8", "v4:2x2x4", "v5p:2x2x4", "v6e:4x4")
SLICES = {
    "critic_7b": SEVEN_B,
    "generator_7b": (*SEVEN_B, "h100:8"),
    "generator_13b": ("v5e:8x8", "v4:2x4x4", "v5p:2x4x4", "v6e:4x8", "h100:8"),
    "lora_7b": ("v5e:2x4", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "h100:1"),
}
HEADER = (
    "| config | slice | mesh | GB a chip: arguments + temporaries | collectives (sent by a chip) "
    "| least step | tokens/s |"
)


def compile_config(config: str, topology: str, out: Path) -> dict:
    file = out / f"{config}-{topology.replace(':', '-')}.json"
    if not file.is_file():
        command = [sys.executable, "-m", "selfrag_jax", "compile"]
        command += [f"--config={config}", f"--topology={topology}", f"--out={file}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if not file.is_file():  # a program that does not fit leaves its file too
            sys.exit(done.stderr)
    return json.loads(file.read_text())


def table_row(result: dict) -> str:
    mesh = " x ".join(f"{n} {axis}" for axis, n in result["mesh"].items() if n > 1)
    head = f"| {result['config']} | {result['topology']} | {mesh}"
    if "compiler" in result:  # it ran out of memory
        return f"{head} | does not fit | | | |"
    gb = {name: size / 1e9 for name, size in result["memory_per_chip"].items()}
    memory = f"{gb['arguments']:.1f} + {gb['temporaries']:.1f} of {gb['hbm']:.0f}"
    if not result["fits"]:
        memory += ": no"
    kinds = result["collectives"].values()
    count = sum(kind["count"] for kind in kinds)
    sent = sum(kind["bytes_per_chip"] for kind in kinds)
    seconds = result["roofline_seconds"]
    bound = max(("arithmetic", "memory", "links"), key=seconds.get)
    tokens_per_second = result["tokens_per_step"] / seconds["step"]
    return (
        f"{head} | {memory} | {count:,} ({sent / 1e9:.0f} GB) | {seconds['step']:.2f} s ({bound}) "
        f"| {tokens_per_second:,.0f} |"
    )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, default=Path("compiled"), help="folder for the JSON files")
    p.add_argument("--only", help="one config")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(HEADER)
    print("|---|---|---|---|---|---|---|")
    for config, slices in SLICES.items():
        for topology in slices if args.only in (None, config) else ():
            print(table_row(compile_config(config, topology, args.out)), flush=True)


if __name__ == "__main__":
    main()
