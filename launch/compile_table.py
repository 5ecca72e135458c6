"""Compiles the shipped configs for TPU slices and GPUs and prints the README's table of memory, traffic and best step times.

    pip install '.[tpu,gpu]' && python launch/compile_table.py --out=compiled    # an hour on one core; started again, it continues

Each compilation is `selfrag compile` in a process of its own, and leaves one JSON file in --out.
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


def compile_one(config: str, topology: str, out: Path) -> dict:
    file = out / f"{config}-{topology.replace(':', '-')}.json"
    if not file.is_file():
        command = [
            sys.executable,
            "-m",
            "selfrag_jax",
            "compile",
            f"--config={config}",
            f"--topology={topology}",
            f"--out={file}",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if not file.is_file():  # not one that does not fit: that is a result too
            sys.exit(done.stderr)
    return json.loads(file.read_text())


def row(r: dict) -> str:
    mesh = " x ".join(f"{n} {axis}" for axis, n in r["mesh"].items() if n > 1)
    head = f"| {r['config']} | {r['topology']} | {mesh}"
    if "compiler" in r:  # it gave up
        return f"{head} | does not fit | | | |"
    m, s = r["memory_per_chip"], r["roofline_seconds"]
    memory = (
        f"{m['arguments'] / 1e9:.1f} + {m['temporaries'] / 1e9:.1f} of {m['hbm'] / 1e9:.0f}"
        + ("" if r["fits"] else ": no")
    )
    count = sum(c["count"] for c in r["collectives"].values())
    sent = sum(c["bytes_per_chip"] for c in r["collectives"].values())
    limit = max(("arithmetic", "memory", "links"), key=s.get)
    return (
        f"{head} | {memory} | {count:,} ({sent / 1e9:.0f} GB) | {s['step']:.2f} s ({limit}) | "
        f"{r['tokens_per_step'] / s['step']:,.0f} |"
    )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, default=Path("compiled"), help="folder for the JSON files")
    p.add_argument("--only", help="one config")
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    print(
        "| config | slice | mesh | GB a chip: arguments + temporaries | collectives (sent by a chip) | least step | tokens/s |"
    )
    print("|---|---|---|---|---|---|---|")
    for config, slices in SLICES.items():
        for topology in slices if a.only in (None, config) else ():
            print(row(compile_one(config, topology, a.out)), flush=True)


if __name__ == "__main__":
    main()
