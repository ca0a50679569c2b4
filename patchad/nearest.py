"""Nearest neighbours on faiss, which the rest of patchad imports from here."""

import functools
import os

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

KERNELS = {"AVX2": "Haswell", "AVX512": "SkylakeX"}
"""What OpenBLAS calls its kernels for what torch says that the CPU can do."""

if (capability := torch.backends.cpu.get_cpu_capability()) in KERNELS:
    # The OpenBLAS in faiss's wheels is of 2021 and takes newer Intel CPUs for one of 2004, which makes searches 2 to 5
    # times as long (benchmarks/learned.md). It looks at this when it is loaded.
    os.environ.setdefault("OPENBLAS_CORETYPE", KERNELS[capability])

import faiss  # noqa: E402
import faiss.contrib.torch_utils  # noqa: E402  # indices take tensors, those of a GPU without a way through the CPU

# Faiss 1.15 compares the patches of a single image with the bank one by one, not by a product of matrices, which takes
# 2.4 times as long on few cores (benchmarks/learned.md). 0 asks for the product always, as before from 20 queries
# on.
faiss.cvar.distance_compute_blas_threshold = 0

GROUP, BLOCK = 20, 1000
"""In the search of exported files: vectors of which only the least distance is looked at first, and vectors, a multiple
of them, whose distances are held at once."""


def on_device(index: faiss.Index, device: torch.device) -> faiss.Index:
    """The index where the tensors are that it is for: on their GPU, if faiss was built for GPUs, or on the CPU."""
    if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
        return index
    number = device.index or 0
    return faiss.index_cpu_to_gpu(gpu_resources(number), number, index)


@functools.cache
def gpu_resources(number: int) -> "faiss.StandardGpuResources":
    """The working memory of a GPU, up to 1.5 GB, shared by all of its indices."""
    return faiss.StandardGpuResources()


def search_index(vectors: Float[Tensor, "vectors dim"]) -> faiss.Index:
    """An exact faiss index of the vectors, on their GPU where they are on one."""
    index = on_device(faiss.IndexFlatL2(vectors.shape[1]), vectors.device)
    index.add(readable(vectors, index))
    return index


def search(index: faiss.Index, queries: Float[Tensor, "queries dim"], count: int) -> Int[Tensor, "queries count"]:
    """The numbers of the vectors nearest to each query, the nearest first, on the device of the queries."""
    return index.search(readable(queries, index), count)[1].to(queries.device)


def readable(values: Tensor, index: faiss.Index) -> Tensor:
    """Values as an index takes them: contiguous float32, on its GPU or, where it has none, on the CPU."""
    on_gpu = hasattr(index, "getDevice")
    return (values if on_gpu else values.cpu()).float().contiguous()


def nearest_by_product(
    queries: Float[Tensor, "images patches dim"],
    vectors: Float[Tensor, "vectors dim"],
    allowance: Float[Tensor, " vectors"],
) -> Int[Tensor, "images patches"]:
    """The number of the vector nearest to each query, by matrix products: the search that exported files run.

    Squared distances less the `allowance` of each vector, but for the query's own square, are one product: the
    vector's square rides along as one more number. Both sides are centred first: distances stay, and less is lost
    where squares of nearly equal numbers are subtracted. First the group that holds the nearest is found, then its
    place among those few: where the least of many stands takes runtimes longer to find than what it is.
    """
    centre = vectors.mean(0)
    queries, vectors = queries - centre, vectors - centre
    missing = -len(vectors) % GROUP
    weights = F.pad(-2 * vectors, (0, 0, 0, missing))
    offset = F.pad(vectors.square().sum(1) - allowance, (0, missing), value=torch.inf)
    members = GROUP * nearest_group(queries, weights, offset) + torch.arange(GROUP, device=queries.device)
    products = (weights[members] @ queries[..., None])[..., 0]
    nearest = (products + offset[members]).argmin(2, keepdim=True)
    return members.gather(2, nearest)[..., 0]


def nearest_group(
    queries: Float[Tensor, "images patches dim"],
    weights: Float[Tensor, "vectors dim"],
    offset: Float[Tensor, " vectors"],
) -> Int[Tensor, "images patches 1"]:
    """The number of the group of `GROUP` vectors that holds the least product with each query, plus its offset.

    The bank is taken in blocks, so that the table of all queries and vectors is never held whole.
    """
    queries, least = F.pad(queries, (0, 1), value=1.0), []
    for part, added in zip(weights.split(BLOCK), offset.split(BLOCK), strict=True):
        least.append((queries @ torch.cat([part, added[:, None]], dim=1).T).unflatten(2, (-1, GROUP)).amin(3))
    return torch.cat(least, dim=2).argmin(2, keepdim=True)
