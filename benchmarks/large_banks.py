"""How fast, how exact and how large an index of very many vectors is, as Markdown.

python -m benchmarks.large_banks --vectors 4000000

Vectors are made, chunk by chunk, from a seed: tanh of `RANK` random numbers mixed to 64, near the effective rank of
learned embeddings. Shards share trained lists and codes, so that each may be filled on a machine of its own.
"""

import time
from collections.abc import Iterator

import numpy as np
from jsonargparse import auto_cli

from patchad.nearest import faiss

DIM, RANK, CHUNK = 64, 8, 250_000
SAMPLE = 500_000
"""Vectors that lists and codes are trained on."""
PROBES, POINTS_PER_LIST = 32, 64
"""Lists that a query looks into, and vectors that a list's centre is trained on."""


def list_count(vectors: int) -> int:
    """Into how many lists an index of that many vectors is divided: 4 sqrt(vectors)."""
    return 4 * round(vectors**0.5)


def main(
    vectors: int = 4_000_000, shards: int = 4, queries: int = 10_000, probes: int = PROBES, code: str = "PQ32"
) -> None:
    """Prints rates, bytes and recall.

    Args:
        vectors: in all shards.
        shards: parts of the bank.
        queries: searched at once.
        probes: lists that a query looks into.
        code: how a vector is stored, in the words of `faiss.index_factory`.
    """
    start = time.perf_counter()
    description = f"IVF{list_count(vectors)},{code}"
    empty = trained(description, min(SAMPLE, vectors))
    training = time.perf_counter()
    parts = [filled(empty, range(shard, -(-vectors // CHUNK), shards), vectors) for shard in range(shards)]
    adding = time.perf_counter()
    bank = sharded(parts, probes)
    samples = next(chunks([-1], queries))
    searching = time.perf_counter()
    _, neighbours = bank.search(samples, 1)
    searched = time.perf_counter()
    exact = exactly(samples, vectors)
    size = sum(len(faiss.serialize_index(part)) for part in parts)
    print("| vectors | shards | index | training | adding | bytes per vector | search | recall |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {bank.ntotal} | {shards} | {description}, {probes} probes | {training - start:.0f} s "
        f"| {vectors / (adding - training):.0f} vectors/s | {size / vectors:.0f} "
        f"| {queries / (searched - searching):.0f} queries/s | {100 * np.mean(neighbours[:, 0] == exact[1]):.1f} % |"
    )
    excess = distances(samples, neighbours[:, 0], vectors) / np.maximum(exact[0], 1e-9) - 1
    print(f"\nthe vector found is farther than the nearest by {100 * np.mean(excess):.2f} % on average")


def chunks(numbers: list[int] | range, total: int) -> Iterator[np.ndarray]:
    """The chunks of those numbers; `total` vectors are in all chunks."""
    mixing = np.random.default_rng(0).standard_normal((RANK, DIM), dtype=np.float32)
    for number in numbers:
        count = min(CHUNK, total - max(0, number) * CHUNK)
        drawn = np.random.default_rng((1, number + 1)).standard_normal((count, RANK), dtype=np.float32)
        yield np.tanh(drawn @ mixing)


def trained(description: str, sample: int) -> faiss.Index:
    """An index with lists and codes, but no vector."""
    index = faiss.index_factory(DIM, description)
    faiss.extract_index_ivf(index).cp.max_points_per_centroid = POINTS_PER_LIST
    index.train(np.concatenate(list(chunks(range(-(-sample // CHUNK)), sample))))
    return index


def filled(empty: faiss.Index, numbers: range, total: int) -> faiss.Index:
    """A shard with the vectors of some chunks, each under its number in the whole bank."""
    shard = faiss.clone_index(empty)
    for number, values in zip(numbers, chunks(numbers, total), strict=True):
        first = number * CHUNK
        shard.add_with_ids(values, np.arange(first, first + len(values)))
    return shard


def sharded(parts: list[faiss.Index], probes: int) -> faiss.IndexShards:
    """All shards as one index."""
    bank = faiss.IndexShards(DIM, True, False)  # type: ignore[reportCallIssue]  # faiss's stub lacks the two flags
    for part in parts:
        faiss.extract_index_ivf(part).nprobe = probes
        bank.add_shard(part)
    return bank


def exactly(queries: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance and number of the nearest vector of each query."""
    best, number = np.full(len(queries), np.inf, np.float32), np.zeros(len(queries), np.int64)
    for chunk, values in enumerate(chunks(range(-(-total // CHUNK)), total)):
        squared, nearest = faiss.knn(queries, values, 1)
        closer = squared[:, 0] < best
        best[closer], number[closer] = squared[closer, 0], nearest[closer, 0] + chunk * CHUNK
    return np.sqrt(np.maximum(best, 0)), number


def distances(queries: np.ndarray, numbers: np.ndarray, total: int) -> np.ndarray:
    """Euclidean distance between each query and the vector of that number."""
    result = np.empty(len(queries), np.float32)
    for chunk, values in enumerate(chunks(range(-(-total // CHUNK)), total)):
        in_chunk = numbers // CHUNK == chunk
        result[in_chunk] = np.linalg.norm(queries[in_chunk] - values[numbers[in_chunk] - chunk * CHUNK], axis=1)
    return result


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
