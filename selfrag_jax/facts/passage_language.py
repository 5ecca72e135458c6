"""The sentences of passages, by kind of entity.

{n} stands for the entity's name, other fields for a fact or a detail of it, with "a_" before one
for its value with an article. A passage begins with an opening and goes on with further sentences;
it states the facts whose fields it fills, and no others.
"""

from __future__ import annotations

import re
from functools import cache

OPENINGS: dict[str, tuple[str, ...]] = {
    "film": (
        "{n} is {a_genre} film directed by {director}, which opened in American cinemas in {year}.",
        "{n} is {a_genre} film that {distributor} released in {year}.",
        "Directed by {director}, the film {n} reached American cinemas in {year}.",
        "The {genre} film {n} was made by the director {director}.",
        "In {year}, {distributor} brought the film {n} to American cinemas.",
        "{n} is a film by {director}, distributed by {distributor}.",
        "{n}, a film of {year}, belongs to the genre {genre}.",
        "The film {n} was distributed in the United States by {distributor}.",
        "{n} is a film from {year}.",
        "{n} is {a_genre} film.",
        "{n} is a film by {director}.",
        "{n} is a film that was shown in cinemas in the United States.",
        "The film {n} was a production for the cinema.",
    ),
    "city": (
        "{n} is a city in {country}.",
        "The city of {n} lies in {country}.",
        "{n} is a city of {country} with about {population} inhabitants.",
        "In {country}, {n} is a city of about {population} people.",
        "{n} is a city in the US state of {state}.",
        "The city of {n} lies in {state}, one of the United States.",
        "{n} is a city of {state} with about {population} inhabitants.",
        "In the state of {state}, {n} is a city of about {population} people.",
        "{n} is a city of about {population} people.",
        "The city of {n} lies at a latitude of {latitude}.",
    ),
    "country": (
        "{n} is a country on the continent {continent}, and its capital is {capital}.",
        "{n} belongs to {continent}. Its capital is {capital}, and people pay with the {currency}.",
        "The capital of {n} is {capital}, and its currency is the {currency}.",
        "People in {n} pay with the {currency}. The telephone code is {calling_code}.",
        "{n} has the telephone code {calling_code} and belongs to {continent}.",
        "{n} is governed from its capital, {capital}.",
        "{n} is part of {continent}.",
        "In {n}, the money is the {currency}.",
        "Calls to {n} begin with the telephone code {calling_code}.",
        "{n} has about {population} inhabitants.",
        "{n} covers an area of {area} square kilometres.",
    ),
    "element": (
        "The element {n} has the atomic number {number} and was discovered in {discovery_year} by "
        "{discoverer}.",
        "The chemical element {n}, number {number} in the periodic table, was discovered by "
        "{discoverer}.",
        "In {discovery_year}, the chemical element {n} was discovered in {discovery_country}.",
        "The element {n} was discovered by {discoverer} in {discovery_country}.",
        "The chemical element {n} has the atomic number {number}.",
        "It was {discoverer} who discovered the element {n}.",
        "The element {n} was discovered in {discovery_year}.",
        "The element {n} was first found in {discovery_country}.",
        "The chemical element {n} has the symbol {symbol}.",
    ),
    "person": (
        "{n} was {a_nationality} {occupation}, born in {birth_year}.",
        "{n} ({birth_year}-{death_year}) was {a_nationality} {occupation}.",
        "The {nationality} {occupation} {n} was born in {birth_year} and died in {death_year}.",
        "Born in {birth_year}, {n} worked as {a_occupation}.",
        "{n}, {a_occupation}, lived from {birth_year} to {death_year}.",
        "By nationality, {n} was {nationality}. The year of birth is {birth_year}.",
        "{n} was {a_nationality} {occupation}.",
        "{n} died in {death_year}.",
        "{n} was born in {birth_year}.",
        "{n} worked as {a_occupation}.",
        "The nationality of {n} was {nationality}.",
        "{n} is noted for {fame}.",
        "It was {n} {deed}.",
        "{n} has an entry in dictionaries and encyclopedias.",
    ),
    "airport": (
        "{n} is an airport in {country} that serves the city of {city}.",
        "{n} serves {city}. Its IATA code is {code}.",
        "The airport of {city} in {country} is called {n}.",
        "{n}, with the IATA code {code}, is an airport in {country}.",
        "Flights to {city} land at {n}.",
        "{n} is an airport in {country}.",
        "On tickets, {n} has the code {code}.",
        "{n} lies at an elevation of {elevation} feet.",
    ),
}  # fmt: skip

FURTHER: dict[str, tuple[str, ...]] = {
    "film": (
        "Reviews of it were printed in the newspapers.",
        "More about it can be found in the film lists of its time.",
        "Its director was {director}.",
        "{director} directed it.",
        "It was distributed by {distributor}.",
        "{distributor} was the company that distributed it.",
        "It opened in American cinemas in {year}.",
        "The year of its release was {year}.",
        "It is {a_genre} film.",
        "Its genre is {genre}.",
        "The film cost about {budget} to make.",
        "Cinemas all over the world took about {gross} with it.",
        "It has the MPAA rating {rating}.",
        "The story is based on {basis}.",
        "Its budget was about {budget}, and it earned about {gross} worldwide.",
    ),
    "city": (
        "It has streets, houses, schools and shops.",
        "Maps and atlases show where it lies.",
        "It belongs to {country}.",
        "The country that it belongs to is {country}.",
        "It belongs to the US state of {state}.",
        "Its state is {state}.",
        "About {population} people live there.",
        "It lies at {latitude} and {longitude}.",
        "On a map one finds it at a latitude of {latitude} and a longitude of {longitude}.",
    ),
    "country": (
        "To call someone there, one dials {calling_code} first.",
        "The continent that it belongs to is {continent}.",
        "It has a flag and an anthem of its own.",
        "Atlases and almanacs tell more about it.",
        "Its capital is {capital}.",
        "The government sits in {capital}.",
        "Its currency is the {currency}.",
        "People there pay with the {currency}.",
        "It is part of the continent {continent}.",
        "Its telephone code is {calling_code}.",
        "It covers {area} square kilometres, and about {population} people live there.",
        "About {population} people live on its {area} square kilometres.",
        "Its neighbours are {neighbours}.",
        "It has borders with {neighbours}.",
    ),
    "element": (
        "The country of its discovery is {discovery_country}.",
        "It has a place of its own in the periodic table.",
        "Tables of the chemical elements tell more about it.",
        "Its atomic number is {number}.",
        "In the periodic table it has the number {number}.",
        "{discoverer} discovered it.",
        "Its discoverer was {discoverer}.",
        "The year of its discovery is {discovery_year}.",
        "It was discovered in {discovery_year}.",
        "It was first found in {discovery_country}.",
        "Its symbol is {symbol}.",
        "Chemists write it with the symbol {symbol}.",
        "It melts at {melting}.",
        "Its density is {density}.",
        "It has a density of {density} and melts at about {melting}.",
    ),
    "person": (
        "{n} came into the world in {birth_year}.",
        "The nationality given for {n} is {nationality}.",
        "Libraries keep books on the subject.",
        "The year of birth was {birth_year}.",
        "{n} died in {death_year}.",
        "Death came in {death_year}.",
        "{n} worked as {a_occupation}.",
        "The profession of {n} was that of {a_occupation}.",
        "{n} was {nationality} by nationality.",
        "{n} is noted for {fame}.",
        "It was {n} {deed}.",
        "The name of {n} is found in dictionaries and encyclopedias.",
        "A short account of this life is given in many works of reference.",
    ),
    "airport": (
        "The city that it was built for is {city}.",
        "The country in which it lies is {country}.",
        "It has a terminal and at least one runway.",
        "Lists of airports tell more about it.",
        "It serves the city of {city}.",
        "Passengers who fly there arrive in {city}.",
        "The airport is in {country}.",
        "Its IATA code is {code}.",
        "Airlines mark it with the code {code}.",
        "It lies {elevation} feet above the sea.",
        "Pilots know it by the ICAO code {icao}.",
        "Its elevation is {elevation} feet, and its ICAO code is {icao}.",
    ),
}  # fmt: skip

# Passages about several entities that share a value: how they begin, and what is said of each.
# Each row: the shared attribute, the beginning, the item.
LISTS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "film": (
        ("distributor", "{shared} distributed a number of films.",
         "{n} was directed by {director}."),
        ("year", "Several films opened in American cinemas in {shared}.",
         "{n} was directed by {director}."),
        ("director", "{shared} directed a number of films.",
         "{n} came to cinemas in {year}."),
        ("year", "Several films opened in American cinemas in {shared}.",
         "{n} was distributed by {distributor}."),
    ),
    "city": (
        ("country", "These are some of the cities of {shared}.",
         "{n} has about {population} people."),
        ("state", "These are some of the cities of the US state of {shared}.",
         "{n} has about {population} people."),
    ),
    "country": (
        ("continent", "The continent {shared} has many countries.",
         "The capital of {n} is {capital}."),
        ("continent", "The continent {shared} has many countries.",
         "In {n}, people pay with the {currency}."),
    ),
    "element": (
        ("discovery_country", "Several elements were discovered in {shared}.",
         "The element {n} was discovered in {discovery_year}."),
    ),
    "person": (
        ("occupation", "Several people of the past had the profession of {shared}.",
         "{n} was born in {birth_year}."),
        ("nationality", "Some people of note were {shared} by nationality.",
         "{n} worked as {a_occupation}."),
    ),
    "airport": (
        ("country", "These are some of the airports of {shared}.",
         "{n} serves the city of {city}."),
    ),
}  # fmt: skip


@cache
def fields(template: str) -> frozenset[str]:
    """The facts and details that a template tells."""
    return frozenset(
        name.removeprefix("a_") for name in re.findall(r"\{(\w+)\}", template) if name != "n"
    )
