"""Films for make_table.py, from vega-datasets."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from selfrag_jax.facts.table import TableEntity

GENRES = {
    "Drama": "drama", "Comedy": "comedy", "Action": "action", "Adventure": "adventure",
    "Thriller/Suspense": "thriller", "Horror": "horror", "Romantic Comedy": "romantic comedy",
    "Musical": "musical", "Documentary": "documentary", "Western": "western",
    "Black Comedy": "black comedy",
}  # fmt: skip
DISTRIBUTORS = {
    "Universal": ("Universal Pictures", "Universal"),
    "Warner Bros.": ("Warner Bros.", "Warner Brothers", "Warner"),
    "Walt Disney Pictures": ("Walt Disney Pictures", "Disney"),
    "Paramount Pictures": ("Paramount Pictures", "Paramount"),
    "Sony Pictures": ("Sony Pictures", "Sony"),
    "20th Century Fox": ("20th Century Fox", "Twentieth Century Fox", "Fox"),
    "MGM": ("MGM", "Metro-Goldwyn-Mayer"),
    "New Line": ("New Line Cinema", "New Line"),
    "Dreamworks SKG": ("DreamWorks", "DreamWorks SKG"),
    "Miramax/Dimension": ("Dimension Films", "Miramax", "Dimension"),
    "Weinstein/Dimension": ("Dimension Films", "Weinstein", "Dimension"),
    "Weinstein Co.": ("The Weinstein Company", "Weinstein Company", "Weinstein"),
    "Sony/Columbia": ("Columbia Pictures", "Columbia", "Sony"),
    "Sony/TriStar": ("TriStar Pictures", "TriStar", "Sony"),
    "Sony/Screen Gems": ("Screen Gems", "Sony"),
    "Focus/Rogue Pictures": ("Rogue Pictures", "Focus"),
    "Artisan": ("Artisan Entertainment", "Artisan"),
    "Gramercy": ("Gramercy Pictures", "Gramercy"),
    "Fine Line": ("Fine Line Features", "Fine Line"),
    "IDP/Goldwyn/Roadside": (),
}
LAST_YEAR = 2010  # of the source; what is later was read from two digits (2033 for 1933)
RARE = 4  # films of a company, below which its name is left out
SOURCES = {
    "Based on Book/Short Story": "a book", "Based on Real Life Events": "real events",
    "Based on TV": "a television series", "Based on Comic/Graphic Novel": "a comic",
    "Based on Play": "a play", "Based on Game": "a game",
}  # fmt: skip


def films(movies: Path) -> list[TableEntity]:
    """Films with director, distributor, genre, and the year in which they opened in America.

    Those of one title get their year in the name. Titles with damaged letters are left out, and so
    are all whose date was read from two digits.
    """
    rows = [m for m in json.loads(movies.read_text()) if isinstance(m["Title"], str)]
    companies = Counter(m["Distributor"] for m in rows)
    rows = [m for m in rows if _is_sound(m)]
    titles = Counter(m["Title"].lower() for m in rows)
    same_year = Counter((m["Title"].lower(), m["Release Date"][-4:]) for m in rows)
    out = []
    for m in rows:
        title, year = m["Title"].strip(), m["Release Date"][-4:]
        if same_year[title.lower(), year] > 1:
            continue
        facts: dict[str, tuple[str, ...]] = {}
        if m["Director"] and m["Director"].isascii():
            facts["director"] = (m["Director"],)
        company = m["Distributor"]
        values = DISTRIBUTORS.get(company, (company,))
        if company and companies[company] >= RARE and values:
            facts["distributor"] = values
        facts["year"] = (year,)
        if m["Major Genre"] in GENRES:
            facts["genre"] = (GENRES[m["Major Genre"]],)
        details = {}
        for name, field in (("budget", "Production Budget"), ("gross", "Worldwide Gross")):
            if m[field] and float(m[field]) >= 1e6:
                details[name] = f"{round(float(m[field]) / 1e6)} million dollars"
        if m["MPAA Rating"] in ("R", "PG-13", "PG", "G"):
            details["rating"] = m["MPAA Rating"]
        if m["Source"] in SOURCES:
            details["basis"] = SOURCES[m["Source"]]
        name = title if titles[title.lower()] == 1 else f"{title} ({year})"
        votes = float(m["IMDB Votes"] or 0)
        if len(facts) >= 3 and votes:
            out.append(
                TableEntity("film", name, title, (), votes, 0, True, tuple(facts.items()),
                            tuple(details.items()))
            )  # fmt: skip
    return out


def _is_sound(m: dict) -> bool:
    title, date = m["Title"], m["Release Date"] or ""
    return (
        re.fullmatch(r"[A-Z0-9][A-Za-z0-9 '&:,.!?\-]{1,58}", title) is not None
        and len(re.findall("[A-Za-z]", title)) >= 2
        and not title.endswith("..")
        and ". " not in title.replace("Mr. ", "").replace("Dr. ", "").replace("Mrs. ", "")
        and re.search(r" \d{4}$", date) is not None
        and int(date[-4:]) <= LAST_YEAR
    )
