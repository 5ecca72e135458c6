"""The searches that --scorer chooses from."""

from __future__ import annotations

from selfrag_jax.search.paper import PaperSearch
from selfrag_jax.search.released.search import ReleasedSearch
from selfrag_jax.search.search import SegmentSearch

ALGORITHMS: dict[str, type[SegmentSearch]] = {"paper": PaperSearch, "released": ReleasedSearch}
