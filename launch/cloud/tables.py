"""What Google rents: TPU generations, their slices, zones, runtimes and list prices.

Everything here is copied by hand from public sources and ages; each table has its date. A zone that
is newer than the table is passed on with --unlisted_zone, a price with --price.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from selfrag_jax.errors import UserError

ZONES_DATE = "2026-11"  # cloud.google.com/tpu/docs/regions-zones, and SkyPilot's catalog of prices
PRICES_DATE = "2026-11"

# Topologies: AI-Hypercomputer/xpk, core/system_characteristics.py (2026-11), without the largest.
_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_V4 = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16"
_V5P = (
    "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x4x12 4x8x8 4x4x20 4x8x12 4x4x28 8x8x8 4x12x12 4x8x20 "
    "8x8x12 4x8x28 4x12x20 8x8x16 8x12x12 8x8x20 4x12x28 8x12x16 12x12x12 8x8x28 8x12x20 8x16x16 "
    "12x12x16 8x16x20 12x12x20 12x16x16 12x12x24 12x16x20 16x16x16 16x16x20 16x16x24"
)
_V7X = (
    "1x1x1 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x4x12 4x8x8 4x8x12 8x8x8 8x8x12 8x8x16 8x12x12 "
    "8x12x16 8x16x16 12x12x12 12x12x16 12x16x16 16x16x16 16x16x24 16x24x24"
)


@dataclass(frozen=True)
class Generation:
    name: str
    prefix: str  # of accelerator types: v5litepod-16
    cores_per_chip: int  # what the number in an accelerator type counts: chips, or two for each
    topologies: tuple[str, ...]  # ascending
    gke_accelerator: str  # the node label cloud.google.com/gke-tpu-accelerator
    runtime: str | None  # of TPU VMs; None: on GKE only
    zones: tuple[str, ...] = ()  # where TPU VMs are offered to everybody


# Runtimes: cloud.google.com/tpu/docs/runtimes (2026-10).
GENERATIONS = {
    g.name: g
    for g in (
        Generation(
            "v4", "v4", 2, tuple(_V4.split()), "tpu-v4-podslice", "tpu-ubuntu2204-base",
            ("us-central2-b",),
        ),
        Generation(
            "v5e", "v5litepod", 1, tuple(_FLAT.split()), "tpu-v5-lite-podslice",
            "v2-alpha-tpuv5-lite",
            ("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a", "europe-west4-b",
             "asia-southeast1-b"),
        ),
        Generation(
            "v5p", "v5p", 2, tuple(_V5P.split()), "tpu-v5p-slice", "v2-alpha-tpuv5",
            ("us-central1-a", "us-east5-a", "europe-west4-b"),
        ),
        Generation(
            "v6e", "v6e", 1, tuple(_FLAT.split()), "tpu-v6e-slice", "v2-alpha-tpuv6e",
            ("us-central1-b", "us-east1-d", "us-east5-a", "us-east5-b", "europe-west4-a",
             "asia-northeast1-b", "southamerica-west1-a"),
        ),
        Generation("tpu7x", "tpu7x", 2, tuple(_V7X.split()), "tpu7x", None),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """A slice of one generation, such as v5e 4x4."""

    generation: Generation
    topology: str

    @property
    def chips(self) -> int:
        return num_chips(self.topology)

    @property
    def accelerator_type(self) -> str:
        """The name that gcloud takes: v5litepod-16, v5p-32."""
        return f"{self.generation.prefix}-{self.chips * self.generation.cores_per_chip}"

    @property
    def hosts(self) -> int:
        """The TPU VMs of the slice. Eight v5e or v6e chips are one VM; all others hold four."""
        return 1 if self.chips <= 8 and self.generation.topologies[0] == "1x1" else self.gke_hosts

    @property
    def gke_hosts(self) -> int:
        """The nodes of the slice on GKE, with four chips each."""
        return max(1, self.chips // 4)

    @property
    def gke_chips_per_host(self) -> int:
        return self.chips // self.gke_hosts


def num_chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))


def parse_slice(text: str, flag: str = "--type") -> Slice:
    """Returns the slice of `v6e-16`, `v5e:4x4`, `v5litepod-16`, `v5p-32` or `tpu7x-2x2x2`.

    Raises UserError for a generation or size that does not exist, and names the close ones.
    """
    match = re.fullmatch(r"([a-z0-9]+?)[-:]([0-9x]+)", text.strip().lower())
    by_name = {n: g for g in GENERATIONS.values() for n in (g.name, g.prefix)}
    by_name |= {"v7x": GENERATIONS["tpu7x"]}
    if match is None or match.group(1) not in by_name:
        name = match.group(1) if match else text.split("-")[0].split(":")[0]
        close = difflib.get_close_matches(name, by_name, 1, 0.5)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"{flag}={text}: no such TPU; {hint}expected one like v6e-16, v5litepod-16, v5p-32, "
            "v4-32, or with its topology: v6e:4x4, v5p:2x2x4, tpu7x:2x2x2"
        )
    generation, size = by_name[match.group(1)], match.group(2)
    slices = [Slice(generation, t) for t in generation.topologies]
    for s in slices:
        if size == s.topology or f"{generation.prefix}-{size}" == s.accelerator_type:
            return s
    raise UserError(f"{flag}={text}: {generation.name} has no such slice; {_close(slices, size)}")


def _close(slices: list[Slice], size: str) -> str:
    """Names the slices whose number of chips is nearest."""
    per_chip = 1 if "x" in size else slices[0].generation.cores_per_chip
    try:
        wanted = num_chips(size) / per_chip
    except ValueError:  # 4xx4
        wanted = 1
    near = sorted(slices, key=lambda s: abs(math.log(s.chips / max(wanted, 0.5))))[:3]
    names = [f"{s.accelerator_type} ({s.topology})" for s in sorted(near, key=lambda s: s.chips)]
    return f"close ones: {', '.join(names)}"


def check_zone(s: Slice, zone: str, unlisted: bool = False) -> None:
    """Raises UserError for a generation without TPU VMs, and for a zone that does not offer it."""
    generation = s.generation
    if generation.runtime is None:
        raise UserError(
            f"--type={s.accelerator_type}: {generation.name} has no TPU VMs; launch/gke.py runs it"
        )
    if not re.fullmatch(r"[a-z]+(-[a-z]+)+\d+-[a-z0-9]+", zone):
        raise UserError(f"--zone={zone}: expected a zone, such as {generation.zones[0]}")
    if zone not in generation.zones and not unlisted:
        raise UserError(
            f"--zone={zone}: has no {generation.name}; these zones have it: "
            f"{', '.join(generation.zones)} (as of {ZONES_DATE}; --unlisted_zone tries it anyway)"
        )


# ---- list prices ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Price:
    """Dollars for one chip and hour in `region`."""

    on_demand: float
    spot: float | None
    region: str


# SkyPilot's catalog (skypilot-org/skypilot-catalog, catalogs/v8/gcp/vms.csv, commit 006059e), which
# reads Google's billing API; divided by the chips. Spot prices change monthly and differ between
# regions by more than a factor of two.
PRICES = {
    "v4": Price(3.22, 0.92, "us-central2"),
    "v5e": Price(1.20, 0.245, "us-central1"),
    "v5p": Price(4.20, 0.836, "us-central1"),
    "v6e": Price(2.70, 0.544, "us-central1"),
}
