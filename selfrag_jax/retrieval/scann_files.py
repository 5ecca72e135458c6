"""Writes a part of an index in ScaNN's own format, and opens it with ScaNN.

    scann_config.pb, scann_assets.pbtxt   what kind of index it is, and the files below
    serialized_partitioner.pb             the centers of the partition
    ah_codebook.pb                        the codebooks
    datapoint_to_token.npy                [n] int32: the leaf of each vector
    hashed_dataset.npy                    [n, M] uint8: its codes
    int8_*.npy, dp_norms.npy              int8 vectors, for rescoring in memory

The large files are written block by block through memory maps. ScaNN could write the folder itself
(`serialize`), but takes 1.8 MB of memory for each leaf of 768 dimensions to do so, and its training
differs from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from selfrag_jax.errors import UserError
from selfrag_jax.retrieval.plan import CODED_AT_ONCE, coding_threads
from selfrag_jax.retrieval.quantization import Quantizer
from selfrag_jax.retrieval.vectors import VectorFiles, as_float32, check_finite, create_array

_CODES, _LEAVES, _INT8 = "hashed_dataset.npy", "datapoint_to_token.npy", "int8_dataset.npy"
_SCALES, _NORMS = "int8_multipliers.npy", "dp_norms.npy"
_CENTERS, _CODEBOOKS = "serialized_partitioner.pb", "ah_codebook.pb"
_CONFIG, _ASSETS = "scann_config.pb", "scann_assets.pbtxt"


def write_part(
    folder: Path,
    vectors: VectorFiles,
    rows: tuple[int, int],
    quantizer: Quantizer,
    int8_range: Float32[np.ndarray, " dim"] | None,
    leaves_searched: int,
    candidates: int,
    advance: Callable[[int], None],
) -> None:
    """Writes the index of rows[0] .. rows[1] - 1 into the new folder `folder`.

    int8_range: the largest absolute value of each dimension, for int8 rescoring; None: codes only.
    leaves_searched, candidates: what a query visits by default.
    """
    start, stop = rows
    n, num_blocks = stop - start, len(quantizer.codebooks)
    folder.mkdir(parents=True)

    def create(name: str, dtype: str, shape: tuple[int, ...]) -> np.memmap:
        return create_array(folder / name, dtype, shape)

    leaves = create(_LEAVES, "<i4", (n,))
    codes = create(_CODES, "u1", (n, num_blocks))
    scales, int8 = None, None
    if int8_range is not None:
        scales = 127 / np.maximum(int8_range, 1e-9)
        int8 = create(_INT8, "i1", (n, vectors.dim))
        np.save(folder / _SCALES, scales.astype(np.float32))
        np.save(folder / _NORMS, np.zeros(0, np.float32))  # of no use to inner products

    def encode(job: tuple[int, np.ndarray]) -> int:
        i, block = job
        at = slice(i, i + len(block))
        check_finite(block, vectors.folder, start + i)
        leaves[at], codes[at] = quantizer.encode(block)
        if int8 is not None:
            int8[at] = np.rint(as_float32(block) * scales)
        return len(block)

    def jobs() -> Iterator[tuple[int, np.ndarray]]:
        i = 0
        for block in vectors.blocks(CODED_AT_ONCE, start, stop):
            yield i, block
            i += len(block)

    threads = coding_threads()
    remaining = jobs()
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(remaining, threads)):
            for done in pool.map(encode, batch):
                advance(done)
    for array in (leaves, codes, int8):
        if array is not None:
            array.flush()
    _write_messages(folder, quantizer, int8 is not None, leaves_searched, candidates)


def _write_messages(
    folder: Path, quantizer: Quantizer, int8: bool, leaves_searched: int, candidates: int
) -> None:
    """Writes the small files: protocol buffers, whose definitions ScaNN's package carries."""
    from google.protobuf import text_format
    from scann.partitioning.partitioner_pb2 import SerializedPartitioner
    from scann.proto.centers_pb2 import CentersForAllSubspaces
    from scann.proto.scann_pb2 import ScannConfig
    from scann.scann_ops.scann_assets_pb2 import ScannAsset, ScannAssets

    num_leaves, dim = quantizer.centers.shape
    num_blocks, _, dims_per_block = quantizer.codebooks.shape
    config = text_format.Parse(
        _CONFIG_TEXT.format(
            num_leaves=num_leaves,
            leaves_searched=leaves_searched,
            candidates=candidates,
            dim=dim,
            num_blocks=num_blocks,
            dims_per_block=dims_per_block,
            # Faster, and possible while sums of a vector's blocks fit 16 bits.
            use_global_topn=str(num_blocks <= 256).lower(),
        )
        + (_INT8_TEXT.format(candidates=candidates) if int8 else ""),
        ScannConfig(),
    )
    partition = SerializedPartitioner(n_tokens=num_leaves)
    tree = partition.kmeans.kmeans_tree
    tree.learned_spilling_type = 0
    root = tree.root
    root.leaf_id, root.learned_spilling_threshold = -1, float("nan")
    for i, center in enumerate(quantizer.centers):
        root.centers.add().dimension.extend(center.tolist())
        root.children.add(leaf_id=i, learned_spilling_threshold=float("nan"))
    codebooks = CentersForAllSubspaces(quantization_scheme=0)
    for codebook in quantizer.codebooks:
        block = codebooks.subspace_centers.add()
        for center in codebook:
            vector = block.center.add(feature_value_float=center.tolist())
            vector.feature_type = vector.FLOAT
    files = {
        ScannAsset.AH_CENTERS: _CODEBOOKS,
        ScannAsset.PARTITIONER: _CENTERS,
        ScannAsset.TOKENIZATION_NPY: _LEAVES,
        ScannAsset.AH_DATASET_NPY: _CODES,
    }
    if int8:
        files |= {
            ScannAsset.INT8_DATASET_NPY: _INT8,
            ScannAsset.INT8_MULTIPLIERS_NPY: _SCALES,
            ScannAsset.INT8_NORMS_NPY: _NORMS,
        }
    assets = ScannAssets()
    for kind, name in files.items():
        assets.assets.add(asset_type=kind, asset_path=name)
    for name, message in (
        (_CONFIG, config),
        (_CENTERS, partition),
        (_CODEBOOKS, codebooks),
    ):
        (folder / name).write_bytes(message.SerializeToString(deterministic=True))
    (folder / _ASSETS).write_text(text_format.MessageToString(assets))


def open_part(folder: Path, num_rows: int) -> Any:
    """Opens a part; ScaNN copies it into memory. Its results are rows of the part.

    Raises UserError naming a file that is missing, cut off or of another shape, since ScaNN may end
    the process on one.
    """
    import scann

    damaged = "; build the index again"
    try:
        assets = (folder / _ASSETS).read_text()
        for name in (_CONFIG, _CENTERS, _CODEBOOKS):
            if not (folder / name).stat().st_size:
                raise UserError(f"{folder / name}: is empty{damaged}")
        for name in (_LEAVES, _CODES, _INT8):
            if name in assets and len(np.load(folder / name, mmap_mode="r")) != num_rows:
                raise UserError(f"{folder / name}: has not {num_rows:,} rows{damaged}")
        if _INT8 in assets:
            np.load(folder / _SCALES)
        leaves, most = np.load(folder / _LEAVES, mmap_mode="r"), _num_leaves(folder)
        if len(leaves) and not 0 <= leaves.min() <= leaves.max() < most:
            raise UserError(f"{folder / _LEAVES}: is damaged{damaged}")
        return scann.scann_ops_pybind.load_searcher(str(folder.absolute()))
    except FileNotFoundError as e:
        raise UserError(f"{e.filename}: no such file{damaged}") from None
    except (ValueError, EOFError, RuntimeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{folder}: is damaged ({e}){damaged}") from None


def _num_leaves(folder: Path) -> int:
    from scann.proto.scann_pb2 import ScannConfig

    return ScannConfig.FromString((folder / _CONFIG).read_bytes()).partitioning.num_children


# What `scann_builder` makes of tree(...).score_ah(...) for inner products.
_CONFIG_TEXT = """
num_neighbors: {candidates}
distance_measure {{ distance_measure: "DotProductDistance" }}
partitioning {{
  num_children: {num_leaves}
  partitioning_distance {{ distance_measure: "SquaredL2Distance" }}
  query_spilling {{
    spilling_type: FIXED_NUMBER_OF_CENTERS
    max_spill_centers: {leaves_searched}
  }}
  partitioning_type: GENERIC
  query_tokenization_distance_override {{ distance_measure: "DotProductDistance" }}
  query_tokenization_type: FLOAT
}}
hash {{
  asymmetric_hash {{
    projection {{
      projection_type: CHUNK
      num_blocks: {num_blocks}
      num_dims_per_block: {dims_per_block}
      input_dim: {dim}
    }}
    num_clusters_per_block: 16
    quantization_distance {{ distance_measure: "SquaredL2Distance" }}
    lookup_type: INT8_LUT16
    use_residual_quantization: true
    fixed_point_lut_conversion_options {{ float_to_int_conversion_method: ROUND }}
    noise_shaping_threshold: 0.2
    use_global_topn: {use_global_topn}
  }}
}}
"""
_INT8_TEXT = """
exact_reordering {{
  approx_num_neighbors: {candidates}
  fixed_point {{ enabled: true }}
}}
"""
