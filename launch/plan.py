"""Says before anything is rented which slices a training fits, how long it takes, what it costs.

    python launch/plan.py --config=generator_13b --chips=v5e,v6e --budget=500

Memory comes from the TPU compiler, which needs no TPU (`pip install '.[tpu]'`), and times from the
chips' peak rates: nothing here was measured. Compiling takes minutes for each slice, once.
--estimate needs no compiler, and gives lower bounds.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cloud.command_line import Subcommand, main, positive
from cloud.tables import GENERATIONS, PRICES, PRICES_DATE, Price, Slice

from selfrag_jax.commands.command import Command, Flag, config_flag, load_config
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.files import write_json

if TYPE_CHECKING:
    from cloud.costs import Fit

_HEADER = (
    "slice", "chips", "hosts", "GB a chip", "step", "tokens/s", "least hours", "hours",
    "on demand", "spot", "budget",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One slice. Hours and dollars are of the whole training; None where they are not known."""

    fit: Fit
    updates: int
    share: float  # of the roofline's speed
    price: Price | None

    @property
    def least_hours(self) -> float:
        return self.updates * self.fit.step_seconds / 3600

    @property
    def hours(self) -> float:
        return self.least_hours / self.share

    @property
    def tokens_per_second(self) -> float:
        return self.share * self.fit.tokens_per_step / self.fit.step_seconds

    def cost(self, spot: bool) -> float | None:
        if self.price is None:
            return None
        price = self.price.spot if spot else self.price.on_demand
        return None if price is None else self.hours * self.fit.chips * price


def run(values: dict[str, Any], _: list[str]) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the slices are described, not looked for
    from cloud import costs

    from selfrag_jax.training.architecture import follow_base

    positive(values, "max_chips", "fitting", "share", "rows", "epochs", "budget", "tokens")
    if values["share"] > 1:
        raise UserError(f"--share={values['share']}: nothing is faster than the roofline (1)")
    c = follow_base(load_config(values), values["overrides"])
    section = costs.training_section(c)
    chips = [chip.lower() for chip in values["chips"]]
    prices = _prices(values, chips)
    updates, counted = _num_updates(section, values)
    candidates = {chip: costs.topologies(chip, values["max_chips"]) for chip in chips}

    rows = []
    for chip, topologies in candidates.items():
        fitting = 0
        for topology in topologies:
            fit = costs.estimate(c, topology)
            if fit.fits and not values["estimate"]:
                fit = costs.compile_slice(values["config"], values["overrides"], c, topology, _tell)
            rows.append(Row(fit, updates, values["share"], prices.get(chip)))
            fitting += fit.fits
            if fitting == values["fitting"]:
                break
    _print(rows, c.name, counted, values)
    if values["out"]:
        write_json(values["out"], [_as_json(row) for row in rows])
    _conclude(rows, values["budget"], values["estimate"])


def _num_updates(section: Any, values: dict[str, Any]) -> tuple[int, str]:
    """Returns the number of updates, and what was counted, in words."""
    if section.steps is not None and values["epochs"] is None:
        return section.steps, f"{section.steps:,} updates"
    epochs = values["epochs"] or section.epochs or 1.0
    examples: float = section.rows
    note = ""
    if section.packed:
        if values["tokens"] is None:
            note = "; packed rows counted as one example each: give --tokens, their mean length"
        else:
            examples = section.rows * section.length / values["tokens"]
    updates = max(1, round(epochs * values["rows"] / examples))
    return updates, f"{epochs:g} epochs of {values['rows']:,} rows, {updates:,} updates{note}"


def _prices(values: dict[str, Any], chips: list[str]) -> dict[str, Price]:
    """Returns the price of each chip: of the table, changed by --price and --spot_price."""
    given = {name: _parse_prices(name, values[name] or (), chips) for name in _PRICE_FLAGS}
    prices = {}
    for chip in chips:
        listed = PRICES.get(chip)
        on_demand = given["price"].get(chip, listed.on_demand if listed else None)
        # Whoever gives an own price does not rent by Google's list.
        from_list = listed.spot if listed and chip not in given["price"] else None
        spot = given["spot_price"].get(chip, from_list)
        if on_demand is not None:
            prices[chip] = Price(on_demand, spot, listed.region if listed else "")
        elif spot is not None:
            raise UserError(f"--spot_price={chip}=…: give --price={chip}=… as well")
    return prices


def _parse_prices(flag: str, items: tuple[str, ...], chips: list[str]) -> dict[str, float]:
    found = {}
    for item in items:
        chip, _, text = item.partition("=")
        try:
            found[chip.lower()] = float(text)
        except ValueError:
            raise UserError(
                f"--{flag}={item}: expected dollars for a chip and hour, such as v5e=1.2"
            ) from None
        if chip.lower() not in chips:
            raise UserError(f"--{flag}={item}: {chip} is not among --chips={','.join(chips)}")
    return found


# ---- what is printed -----------------------------------------------------------------------------
def _print(rows: list[Row], name: str, counted: str, values: dict[str, Any]) -> None:
    known = [row.fit.mfu for row in rows if row.fit.fits]
    mfu = f", an MFU of {100 * values['share'] * max(known):.0f}% at most" if known else ""
    print(f"{name}: {counted}")
    print(
        f"Hours and dollars: at {100 * values['share']:.0f}% of the roofline{mfu} (--share; not "
        "measured). Least hours: at the chips' peak rates."
    )
    regions = ", ".join(f"{chip} {price.region}" for chip, price in PRICES.items())
    print(f"List prices of {PRICES_DATE} ({regions}); spot without what pre-emption repeats.")
    if values["estimate"]:
        print("Estimated without a compiler: memory and times are lower bounds.")
    print()
    cells = [_cells(row, values["budget"], values["estimate"]) for row in rows if row.fit.fits]
    table = [_HEADER, *cells]
    widths = [max(len(line[i]) for line in table) for i in range(len(_HEADER))]
    shown = iter(table)
    print(_line(next(shown), widths))
    for row in rows:  # smallest first, those that do not fit where they belong
        print(_line(next(shown), widths) if row.fit.fits else _misfit(row.fit, widths[0]))


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([f"{first[0]:<{first[1]}}", *(f"{c:>{w}}" for c, w in others)]).rstrip()


def _cells(row: Row, budget: float | None, estimated: bool) -> tuple[str, ...]:
    from cloud.costs import hosts_of

    f = row.fit
    on_demand, spot = row.cost(spot=False), row.cost(spot=True)
    return (
        f.topology,
        str(f.chips),
        str(hosts_of(f.topology)),
        f"{'>=' if estimated else ''}{(f.memory or 0) / 1e9:.1f} of {f.hbm / 1e9:.0f}",
        f"{f.step_seconds / row.share:.2f} s",
        f"{row.tokens_per_second:,.0f}",
        f"{row.least_hours:.1f}",
        f"{row.hours:.1f}",
        _dollars(on_demand),
        _dollars(spot),
        _verdict(on_demand, spot, budget),
    )


def _verdict(on_demand: float | None, spot: float | None, budget: float | None) -> str:
    if budget is None or on_demand is None:
        return ""
    if on_demand <= budget:
        return "yes"
    if spot is not None and spot <= budget:
        return "spot only"
    return f"over by {_dollars(min(on_demand, on_demand if spot is None else spot) - budget)}"


def _misfit(fit: Fit, width: int) -> str:
    """Says by how much a slice is too small, or why the training cannot be laid over it."""
    head = f"{fit.topology:<{width}}  does not fit"
    if fit.reason:
        return f"{head}: {fit.reason}"
    hbm = f"a chip has {fit.hbm / 1e9:.1f} GB"
    if fit.memory is None or fit.memory <= fit.hbm:
        return f"{head}: {hbm}; the compiler does not say what it needs"
    return f"{head}: {hbm}, and lacks {(fit.memory - fit.hbm) / 1e9:.1f} GB at least"


def _dollars(amount: float | None) -> str:
    return "no price" if amount is None else f"${amount:,.0f}"


def _conclude(rows: list[Row], budget: float | None, estimated: bool) -> None:
    """Prints the cheapest slice and how to rent it. Raises StageFailed if there is none."""
    fitting = [row for row in rows if row.fit.fits]
    if not fitting:
        raise StageFailed("no slice fits; a higher --max_chips, or remat=full, tensor in the mesh")
    offers = [(cost, spot, row) for row in fitting for spot in (False, True)
              if (cost := row.cost(spot)) is not None]  # fmt: skip
    if not offers:
        print("\nno list price: give --price=CHIP=DOLLARS, of one chip and hour")
        return
    cost, spot, row = min(offers, key=lambda offer: (offer[0], offer[2].fit.chips))
    if budget is not None and cost > budget:
        raise StageFailed(
            f"nothing is within ${budget:,.0f}: the cheapest is {row.fit.topology} for "
            f"{_dollars(cost)}{' on spot' if spot else ''}"
        )
    name, _, size = row.fit.topology.partition(":")
    print(f"\ncheapest: {row.fit.topology}{', spot' if spot else ''}, {_dollars(cost)}")
    if estimated:
        print("compile before you rent it: leave --estimate out")
    if name in GENERATIONS:
        kind = Slice(GENERATIONS[name], size).accelerator_type
        zone = GENERATIONS[name].zones[0]
        print(
            f"  python launch/tpu.py create --name=NAME --type={kind} --zone={zone}"
            f"{' --spot' if spot else ''}"
        )


def _as_json(row: Row) -> dict[str, Any]:
    known = row.fit.fits
    return asdict(row.fit) | {
        "updates": row.updates,
        "share_of_roofline": row.share,
        "least_hours": row.least_hours if known else None,
        "hours": row.hours if known else None,
        "on_demand_dollars": row.cost(spot=False) if known else None,
        "spot_dollars": row.cost(spot=True) if known else None,
    }


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


_PRICE_FLAGS = ("price", "spot_price")
COMMANDS = {
    "": Subcommand(
        "Says which slices a training fits, how long it takes at best, and what it costs.\n"
        "One slice for each training: multislice (--slices of tpu.py and gke.py) is left out, and\n"
        "so is TPU 7x, which launch/gke.py runs.",
        Command(
            "python launch/plan.py --config=generator_13b --chips=v5e,v6e --budget=500\n"
            "python launch/plan.py --config=generator_7b --chips=v5e,v5p,v6e --estimate",
            (
                Flag("chips", "v4, v5e, v5p, v6e, a100, h100, h200", "v5e,v6e", type=tuple),
                Flag("budget", "dollars for the whole training", type=float),
                Flag("rows", "examples of the data; the published data have 150,000", 150_000,
                     type=int),
                Flag("epochs", "passes over them; the config's if not given", type=float),
                Flag("tokens", "mean length of an example, for packed rows", type=float),
                Flag("share", "of the roofline's speed that is reached", 0.6, type=float),
                Flag("price", "dollars for a chip and hour on demand: v5e=1.2,h100=3", type=tuple),
                Flag("spot_price", "the same for spot: v5e=0.5", type=tuple),
                Flag("max_chips", "of a slice", 64, type=int),
                Flag("fitting", "stop after so many slices of a chip that fit", 3, type=int),
                Flag("estimate", "no compiler: lower bounds within seconds", False, type=bool),
                Flag("out", "JSON file to write as well"),
                config_flag("generator_7b", examples="critic_7b, generator_7b, generator_13b"),
            ),
            run,
        ),
    )
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main("launch/plan.py", COMMANDS))
