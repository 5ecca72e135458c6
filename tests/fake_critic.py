"""Critics without a model, for the tests of labelling."""

import hashlib

import numpy as np

from selfrag_jax.text import reflection


class FakeCritic:
    """Gives all probability to `label(query)`, and records the queries."""

    def __init__(self, label):
        self.label, self.queries = label, []

    def judge(self, queries):
        self.queries += queries
        groups = [reflection.GROUPS[q.group] for q in queries]
        return [
            np.eye(len(group))[group.index(self.label(q))]
            for q, group in zip(queries, groups, strict=True)
        ]


class ArbitraryCritic:
    """Gives each query its own distribution: arbitrary, but always the same."""

    def judge(self, queries):
        return [self.distribution(query) for query in queries]

    def distribution(self, query):
        evidence = query.evidence.id if query.evidence else None
        asked = (query.group, query.instruction, query.preceding, evidence, query.output)
        seed = hashlib.sha256(repr(asked).encode()).digest()[:8]
        p = np.random.default_rng(int.from_bytes(seed)).random(len(reflection.GROUPS[query.group]))
        return p / p.sum()
