"""The search in a large bank, coarse to fine: one code for a detector as it runs and for its exported file."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchad.clustering import kmeans
from patchad.nearest import list_count, search, search_index

FIRST, SHARE, SECOND = 2, 0.05, 32
"""Lists that every patch looks into; the share of an image's patches, those that are then farthest, that look again;
the lists that these look into."""
AT_ONCE = 512
"""Lists whose vectors are held at once for each image: 2.6 MB where 80 vectors of 64 numbers make a list."""
SAMPLED, ITERATIONS = 32, 5
"""Vectors per list, at least, that K-means finds centres of, and its iterations."""


def divide(vectors: Float[Tensor, "vectors dim"], seed: int = 0) -> Int[Tensor, "lists length"]:
    """The numbers of vectors that lie together, in lists of one length; a list that is too short repeats its members.

    K-means finds 4 sqrt(vectors) centres and each vector goes to the nearest; what is longer than the mean is cut into
    equal parts.

    Args:
        vectors: all that are to be found.
        seed: of the first centres.

    Example:
        >>> divide(torch.tensor([[0.0], [9.0], [0.1], [9.1]])).sort(dim=0).values.tolist()
        [[0], [1], [2], [3]]
    """
    count = min(list_count(len(vectors)), len(vectors))
    step = max(1, len(vectors) // (SAMPLED * count))
    centres = kmeans(vectors[::step], count, iterations=ITERATIONS, seed=seed)
    home = search(search_index(centres, exact_most=count), vectors, 1)[:, 0]
    parts = home.argsort(stable=True).split(home.bincount(minlength=count).tolist())
    longest = math.ceil(len(vectors) / count)
    lists = [one for part in parts if len(part) for one in cut(part, vectors[part], longest)]
    places = torch.arange(max(map(len, lists)), device=vectors.device)
    return torch.stack([one[places % len(one)] for one in lists])


def cut(
    members: Int[Tensor, " members"], vectors: Float[Tensor, "members dim"], longest: int
) -> tuple[Int[Tensor, " _"], ...]:
    """Members in as few equal parts of at most `longest` as can be, along the axis on which they differ most."""
    axis = vectors.var(0, correction=0).argmax()
    return members[vectors[:, axis].argsort(stable=True)].tensor_split(math.ceil(len(members) / longest))


class Lists(NamedTuple):
    """A bank as its search takes it: a product with a query, plus the offset, is a squared distance.

    Attributes:
        members: numbers of the vectors of each list, `[lists, length]`.
        middle: of all vectors, which is subtracted from queries, `[dim]`.
        centres: weights of the lists' centres, `[lists, own]`.
        weights: of the vectors, list by list, `[lists, length, own]`.
        offset: of all centres, then all vectors, `[lists + vectors]`.
        rest: their weights for what the queries of an image share, `[lists + vectors, shared]`.
    """

    members: Tensor
    middle: Tensor
    centres: Tensor
    weights: Tensor
    offset: Tensor
    rest: Tensor


def as_lists(
    vectors: Float[Tensor, "vectors dim"],
    known: Float[Tensor, " vectors"],
    members: Int[Tensor, "lists length"],
    shared: int = 0,
) -> Lists:
    """A bank in the lists that `divide` found.

    Args:
        vectors: of the bank.
        known: what is subtracted from the squared distance to each.
        members: of each list.
        shared: how many of the last numbers the queries of an image share.
    """
    middle, own, count = vectors.mean(0), vectors.shape[1] - shared, len(members)
    every = torch.cat([vectors[members].mean(1), vectors]) - middle
    offset = every.square().sum(1) - torch.cat([known[members].mean(1), known])
    weights = -2 * every
    return Lists(members, middle, weights[:count, :own], weights[count:, :own][members], offset, weights[:, own:])


def nearest_in_lists(
    queries: Float[Tensor, "images patches dim"], lists: Lists, passed: Bool[Tensor, "images vectors"] | None = None
) -> Int[Tensor, "images patches"]:
    """The number of the vector nearest to each query, or of one nearly as near, coarse to fine.

    What a query finds in the few lists whose centres are nearest bounds its distance: where that is small, the patch is
    normal, whatever else is in the bank. So only the `SHARE` of an image's queries that are then farthest, which decide
    its score, look into more lists.

    Args:
        queries: embeddings of the patches of each image.
        lists: the bank.
        passed: vectors that each image's queries pass over; they get one all the same where they find nothing else.
    """
    queries = queries - lists.middle
    own = lists.weights.shape[2]
    offset = lists.offset + queries[:, 0, own:] @ lists.rest.T
    if passed is not None:
        offset[:, len(lists.members) :].masked_fill_(passed, torch.inf)
    queries = queries[..., :own]
    least, nearest = look(queries, lists, offset, FIRST)
    farthest = (least + queries.square().sum(2)).topk(math.ceil(SHARE * queries.shape[1]), 1).indices
    queries = queries.gather(1, farthest[..., None].expand(-1, -1, own))
    return nearest.scatter(1, farthest, look(queries, lists, offset, SECOND)[1])


def look(
    queries: Float[Tensor, "images patches own"],
    lists: Lists,
    offset: Float[Tensor, "images added"],
    probes: int,
) -> tuple[Float[Tensor, "images patches"], Int[Tensor, "images patches"]]:
    """The least product plus offset that each query finds in the lists with the nearest centres, and whose it is."""
    count, found = len(lists.members), []
    probes, coarse, fine = min(probes, count), offset[:, None, :count], offset[:, count:]
    for part in queries.split(max(1, AT_ONCE // probes), 1):
        probed = (part @ lists.centres.T + coarse).topk(probes, 2, largest=False).indices
        members = rows(lists.members, probed).flatten(2)
        products = (rows(lists.weights, probed) @ part[:, :, None, :, None])[..., 0].flatten(2)
        products = products + fine.gather(1, members.flatten(1)).unflatten(1, members.shape[1:])
        least, place = products.min(2, keepdim=True)
        found.append((least[..., 0], members.gather(2, place)[..., 0]))
    least, nearest = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return least, nearest


def rows(values: Tensor, numbers: Int[Tensor, "images patches probes"]) -> Tensor:
    """What stands in those rows, copied row by row, which is faster than `values[numbers]`."""
    return values.index_select(0, numbers.flatten()).unflatten(0, numbers.shape)
