"""Chemical elements for make_table.py, from mendeleev."""

from __future__ import annotations

import re
from typing import Any

from selfrag_jax.facts.people_source import WordNet
from selfrag_jax.facts.table import TableEntity

# The source's discoverers, where its spelling or its choice needs mending; () leaves them out.
DISCOVERERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("Helium", "Beryllium", "Boron", "Platinum", "Cerium", "Iridium", "Einsteinium", "Fermium",
         "Nobelium", "Seaborgium", "Livermorium", "Bohrium", "Radon", "Vanadium", "Tennessine",
         "Rutherfordium", "Dubnium", "Protactinium", "Lutetium"),
        (),
    ),
    "Silicon": ("Jöns Jacob Berzelius", "Jöns Berzelius", "Berzelius"),
    "Selenium": ("Jöns Jacob Berzelius", "Jöns Berzelius", "Berzelius"),
    "Thorium": ("Jöns Jacob Berzelius", "Jöns Berzelius", "Berzelius"),
    "Oxygen": ("Joseph Priestley and Carl Wilhelm Scheele", "Priestley", "Scheele"),
    "Neon": ("William Ramsay and Morris Travers", "Ramsay", "Travers"),
    "Krypton": ("William Ramsay and Morris Travers", "Ramsay", "Travers"),
    "Xenon": ("William Ramsay and Morris Travers", "Ramsay", "Travers"),
    "Argon": ("Lord Rayleigh and William Ramsay", "Rayleigh", "Ramsay"),
    "Rubidium": ("Robert Bunsen and Gustav Kirchhoff", "Bunsen", "Kirchhoff"),
    "Cesium": ("Robert Bunsen and Gustav Kirchhoff", "Bunsen", "Kirchhoff"),
    "Strontium": ("Adair Crawford", "Crawford"),
    "Cobalt": ("Georg Brandt", "Brandt"),
    "Niobium": ("Charles Hatchett", "Hatchett"),
    "Technetium": ("Carlo Perrier and Emilio Segrè", "Perrier", "Segrè", "Segre"),
    "Cadmium": ("Friedrich Stromeyer", "Stromeyer"),
    "Tellurium": ("Franz-Joseph Müller von Reichenstein", "Müller von Reichenstein"),
    "Praseodymium": ("Carl Auer von Welsbach", "Auer von Welsbach"),
    "Neodymium": ("Carl Auer von Welsbach", "Auer von Welsbach"),
    "Promethium": ("Jacob Marinsky, Lawrence Glendenin and Charles Coryell", "Marinsky",
                   "Glendenin", "Coryell"),
    "Holmium": ("Jacques-Louis Soret", "Soret"),
    "Osmium": ("Smithson Tennant", "Tennant"),
    "Astatine": ("Dale Corson, Kenneth MacKenzie and Emilio Segrè", "Corson", "Segrè", "Segre"),
    "Francium": ("Marguerite Perey", "Perey"),
    "Neptunium": ("Edwin McMillan and Philip Abelson", "McMillan", "Abelson"),
    "Plutonium": ("Glenn Seaborg and his group", "Seaborg"),
    "Americium": ("Glenn Seaborg and his group", "Seaborg"),
    "Curium": ("Glenn Seaborg and his group", "Seaborg"),
    "Berkelium": ("Glenn Seaborg and his group", "Seaborg"),
    "Californium": ("Glenn Seaborg and his group", "Seaborg"),
    "Mendelevium": ("Albert Ghiorso and his group", "Ghiorso", "Seaborg"),
    "Lawrencium": ("Albert Ghiorso and his group", "Ghiorso"),
    **dict.fromkeys(
        ("Hassium", "Meitnerium", "Darmstadtium", "Roentgenium", "Copernicium"),
        ("GSI Helmholtz Centre for Heavy Ion Research", "Heavy Ion Research Laboratory", "GSI"),
    ),
    **dict.fromkeys(
        ("Radium", "Polonium"), ("Pierre and Marie Curie", "Marie Curie", "Pierre Curie", "Curie")
    ),
    "Indium": ("Ferdinand Reich and Theodor Richter", "Reich", "Richter"),
    "Rhenium": ("Walter Noddack, Ida Tacke and Otto Berg", "Noddack", "Tacke"),
    "Tungsten": ("Juan José and Fausto de Elhuyar", "Elhuyar"),
    "Manganese": ("Johan Gottlieb Gahn", "Gahn"),
    "Scandium": ("Lars Fredrik Nilson", "Lars Nilson", "Nilson"),
}  # fmt: skip
YEARS = {"Neodymium": "1885"}
# Uncertain years and countries, beside the discoverers that are left out above.
NO_YEAR = {"Magnesium", "Tellurium", "Osmium", "Nihonium"}
SPELLINGS = {"Aluminum": "aluminium", "Cesium": "caesium", "Sulfur": "sulphur"}
PLACES = {
    "United States": ("the United States", "USA", "America"),
    "England": ("England", "Great Britain", "United Kingdom", "Britain"),
    "Scotland": ("Scotland", "Great Britain", "United Kingdom", "Britain"),
}
DAVY = ("Humphry Davy", "Humphrey Davy", "Davy")


def elements(words: WordNet) -> list[TableEntity]:
    """Elements with number, discoverer, and year and country of the discovery.

    The popularity counts WordNet's glosses that mention the element.
    """
    from mendeleev import get_all_elements

    out = []
    all_elements: list[Any] = get_all_elements()
    for e in all_elements:
        facts: dict[str, tuple[str, ...]] = {"number": (str(e.atomic_number),)}
        by = (e.discoverers or "").replace("Sir ", "").strip(". ")
        left_out = DISCOVERERS.get(e.name) == () or not by or "ancients" in by
        if not left_out:
            found = DISCOVERERS.get(e.name) or (
                by,
                *([by.split()[-1]] if " and " not in by else []),
            )
            facts["discoverer"] = DAVY if "Davy" in by else found
            if e.name not in NO_YEAR:
                facts["discovery_year"] = (YEARS.get(e.name, str(e.discovery_year)),)
            if re.fullmatch("[A-Z][a-z]+(?: States)?", e.discovery_location or ""):
                place = e.discovery_location
                facts["discovery_country"] = PLACES.get(place, (place,))
        details = {"symbol": e.symbol}
        if e.melting_point:
            details["melting"] = f"{round(e.melting_point):,} kelvin"
        if e.density:
            details["density"] = f"{e.density:.3g} grams per cubic centimetre"
        aliases = (SPELLINGS[e.name],) if e.name in SPELLINGS else ()
        popularity = words.mentions[e.name.lower()] + words.mentions[e.name]
        out.append(
            TableEntity("element", e.name.lower(), e.name.lower(), aliases, popularity, 0, True,
                        tuple(facts.items()), tuple(details.items()))
        )  # fmt: skip
    return out
