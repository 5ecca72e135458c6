"""Measures on an accelerator what the README lists as not run, in pieces of under nine minutes.

    python launch/benchmarks/accelerator.py                       # all pieces, one after another
    python launch/benchmarks/accelerator.py --list
    python launch/benchmarks/accelerator.py --piece=generate_7b
    python launch/benchmarks/accelerator.py --small               # tiny models, to try it on a CPU

Each piece runs in a process of its own and writes OUT/PIECE.json: figures, device, date, versions,
command. A piece that is there already is not run again, unless it is named. Then the rows for the
README's tables are printed, of all pieces in OUT, and written to OUT/rows.md.

Weights are random. torch takes part where it has the same device (an NVIDIA GPU); elsewhere those
pieces are skipped. Needs `pip install '.[test]'`, with `gpu` or `tpu`, which that includes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from accelerator_pieces import PIECES

LIMIT_SECONDS = 540
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "torch", "transformers")


class Skipped(Exception):
    """Why a piece does not run here."""


def rows_of(folder: Path) -> str:
    """The pieces in a folder as a Markdown table."""
    lines = ["| what | device, date | measured |", "|---|---|---|"]
    for name, piece in PIECES.items():
        if (file := folder / f"{name}.json").is_file():
            r = json.loads(file.read_text())
            small = " (tiny, a trial)" if r["small"] else ""
            cells = piece.row(r["figures"]).replace(" | ", "; ")
            lines.append(f"| {piece.measures}{small} | {r['device']}, {r['date']} | {cells} |")
    return "\n".join(lines)


def run_piece(name: str, folder: Path, small: bool) -> None:
    """Runs a piece in this process, and writes its file. Raises Skipped if it cannot run here."""
    import jax

    piece, device = PIECES[name], jax.devices()[0]
    if piece.needs_torch and device.platform != "cpu":
        import torch

        if device.platform != "gpu" or not torch.cuda.is_available():
            raise Skipped(f"torch does not run on this {device.platform}")
    if device.platform == "cpu" and not small:
        raise Skipped("JAX finds no accelerator (see `selfrag doctor`); --small tries the pieces")
    begin = time.monotonic()
    figures = piece.run(small)
    small_flag = " --small" if small else ""
    result = {
        "piece": name,
        "measures": piece.measures,
        "small": small,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "date": datetime.date.today().isoformat(),
        "command": f"python launch/benchmarks/accelerator.py --piece={name}{small_flag}",
        "seconds": time.monotonic() - begin,
        "versions": {p: _version(p) for p in PACKAGES} | {"python": sys.version.split()[0]},
        "figures": figures,
    }
    temporary = folder / f".{name}.json"
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.rename(folder / f"{name}.json")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def run_in_child(name: str, folder: Path, small: bool) -> str:
    """Runs a piece in a process of its own; returns "done", or what became of it."""
    command = [sys.executable, __file__, f"--piece={name}", f"--out={folder}", "--here"]
    try:
        done = subprocess.run(command + ["--small"] * small, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"stopped after {LIMIT_SECONDS} s"
    return {0: "done", 3: "skipped"}.get(done.returncode, f"failed, status {done.returncode}")


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--piece", choices=PIECES, help="default: all that are not in OUT yet")
    p.add_argument("--list", action="store_true", help="what the pieces measure")
    p.add_argument("--small", action="store_true", help="tiny models, in one process")
    p.add_argument("--out", default="accelerator_results", help="folder of the results")
    p.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in a child
    args = p.parse_args()
    if args.list:
        width = max(map(len, PIECES))
        print("\n".join(f"{name:<{width}}  {piece.measures}" for name, piece in PIECES.items()))
        return 0
    return run_all(args)


def run_all(args: argparse.Namespace) -> int:
    """Runs the pieces that are asked for, and prints the table; returns the exit status.

    1: a piece failed. 3: the piece that was asked for cannot run here.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch may need its share
    folder = Path(args.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        [args.piece] if args.piece else [n for n in PIECES if not (folder / f"{n}.json").is_file()]
    )
    ended = {}
    for name in names:
        if not args.piece and (folder / f"{name}.json").is_file():
            continue
        print(f"---- {name}: {PIECES[name].measures}", flush=True)
        if args.here or args.small:
            try:
                run_piece(name, folder, args.small)
                ended[name] = "done"
            except Skipped as e:
                print(f"skipped: {e}", file=sys.stderr)
                ended[name] = "skipped"
        else:
            ended[name] = run_in_child(name, folder, args.small)
    if not args.here:
        table = rows_of(folder)
        (folder / "rows.md").write_text(table + "\n")
        print(f"\n{table}")
        for name, how in ended.items():
            if how != "done":
                print(f"{name}: {how}", file=sys.stderr)
    if any(how.startswith(("failed", "stopped")) for how in ended.values()):
        return 1
    return 3 if args.piece and ended[args.piece] == "skipped" else 0


if __name__ == "__main__":
    sys.exit(main())
