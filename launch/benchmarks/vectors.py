"""Vectors for the index's benchmark: clustered like embeddings of text, generated from a seed."""

from collections.abc import Iterator

import numpy as np

# Vectors per cluster, and the length of what sets a vector apart from its cluster's center. With
# these, the ten nearest neighbours of a query lie in its own cluster and in those around it.
CLUSTER, SPREAD = 200, 1.0
_TOPICS, _TOPIC_SPREAD = 500, 0.5  # clusters overlap around topics
_BLOCK = 50_000


class ClusteredVectors:
    """n unit vectors of `dim` dimensions in clusters, and queries from the same clusters.

    The variance of the dimensions decays, as that of principal components of text embeddings does.
    """

    def __init__(self, n: int, dim: int, seed: int = 0):
        self.n, self.dim, self.seed = n, dim, seed
        rng = np.random.default_rng(seed)
        scale = (1 + np.arange(dim)) ** -0.35
        self._scale = (scale / np.linalg.norm(scale)).astype(np.float32)
        topics = self._noise(rng, _TOPICS)
        of_topic = rng.integers(_TOPICS, size=max(1, n // CLUSTER))
        self._centers = topics[of_topic] + _TOPIC_SPREAD * self._noise(rng, len(of_topic))
        self._rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)

    def _noise(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.standard_normal((n, self.dim), np.float32) * self._scale

    def _draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        of_cluster = rng.integers(len(self._centers), size=n)
        x = self._centers[of_cluster] + SPREAD * self._noise(rng, n)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return x @ self._rotation

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields the vectors, 50,000 at a time."""
        for i in range(0, self.n, _BLOCK):
            yield self._draw(np.random.default_rng((self.seed, 1, i)), min(_BLOCK, self.n - i))

    def queries(self, n: int) -> np.ndarray:
        return self._draw(np.random.default_rng((self.seed, 2)), n)
