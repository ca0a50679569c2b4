"""The search in a large bank, coarse to fine: one code for a detector as it runs and for its exported file."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from patchad.clustering import kmeans
from patchad.nearest import search, search_index

FIRST, SHARE, SECOND = 2, 0.05, 16
"""Lists, and parts of them, that every patch looks into; the share of an image's patches, those that are then farthest,
that look again; the lists, and parts of them, that these look into (benchmarks/products.md)."""
PART = 40
"""Vectors that a part holds, about."""
AT_ONCE = 2048
"""Parts whose vectors are held at once for each image: 13 MB where 40 vectors of 40 numbers make a part."""
SAMPLED, ITERATIONS, POWERS = 32, 5, 8
"""Vectors per list, at least, that K-means finds centres of, its iterations, and those that find a principal axis."""


def divide(vectors: Float[Tensor, "vectors dim"], seed: int = 0) -> Int[Tensor, "lists parts length"]:
    """The numbers of vectors that lie together, in lists of one length, each in parts that lie closer together.

    K-means finds sqrt(vectors) centres and each vector goes to the nearest; what is longer than the mean is cut into
    equal lists. A list is halved across the direction in which it is longest until its parts hold about `PART` vectors.
    A list that is too short repeats its members.

    Args:
        vectors: all that are to be found.
        seed: of the first centres.

    Example:
        >>> divide(torch.tensor([[0.0], [9.0], [0.1], [9.1]])).flatten(1).sort(dim=0).values.tolist()
        [[0, 2], [1, 3]]
    """
    count = round(len(vectors) ** 0.5)
    step = max(1, len(vectors) // (SAMPLED * count))
    centres = kmeans(vectors[::step], count, iterations=ITERATIONS, seed=seed)
    home = search(search_index(centres), vectors, 1)[:, 0]
    groups = home.argsort(stable=True).split(home.bincount(minlength=count).tolist())
    longest = math.ceil(len(vectors) / count)
    lists = [piece for members in groups if len(members) for piece in cut(members, vectors[members], longest)]
    halvings = max(0, round(math.log2(longest / PART)))
    length = 2**halvings * math.ceil(max(map(len, lists)) / 2**halvings)
    places = torch.arange(length, device=vectors.device)
    parts = torch.stack([piece[places % len(piece)] for piece in lists])
    for _ in range(halvings):
        parts = halve(parts, vectors[parts])
    return parts.unflatten(0, (len(lists), -1))


def cut(
    members: Int[Tensor, " members"], vectors: Float[Tensor, "members dim"], longest: int
) -> tuple[Int[Tensor, " _"], ...]:
    """Members in as few equal parts of at most `longest` as can be, along the axis on which they differ most."""
    axis = vectors.var(0, correction=0).argmax()
    return members[vectors[:, axis].argsort(stable=True)].tensor_split(math.ceil(len(members) / longest))


def halve(parts: Int[Tensor, "parts length"], vectors: Float[Tensor, "parts length dim"]) -> Int[Tensor, "halves half"]:
    """Each part in two, at the median along its principal axis, which powers find also where vectors are equal."""
    vectors = vectors - vectors.mean(1, keepdim=True)
    scatter = vectors.mT @ vectors
    longest = F.one_hot(scatter.diagonal(dim1=1, dim2=2).argmax(1), scatter.shape[1])[..., None].to(scatter.dtype)
    for _ in range(POWERS):
        longest = F.normalize(scatter @ longest, dim=1)
    order = (vectors @ longest)[..., 0].argsort(stable=True, dim=1)
    return parts.gather(1, order).unflatten(1, (2, -1)).flatten(0, 1)


class Lists(NamedTuple):
    """A bank as its search takes it: weights times a query and 1 are squared distances, but for the query's own square.

    Attributes:
        middle: of all vectors, which is subtracted from queries, `[dim]`.
        centres: weights of the centres of lists, `[lists, dim + 1]`.
        part_centres: weights of the centres of parts, `[lists, parts, dim + 1]`.
        weights: of the vectors of each part, list by list, `[lists * parts, length, dim + 1]`.
        members: their numbers, `[lists * parts, length]`.
    """

    middle: Tensor
    centres: Tensor
    part_centres: Tensor
    weights: Tensor
    members: Tensor


def as_lists(
    vectors: Float[Tensor, "vectors dim"],
    allowance: Float[Tensor, " vectors"],
    members: Int[Tensor, "lists parts length"],
) -> Lists:
    """A bank in the lists that `divide` found.

    Args:
        vectors: of the bank.
        allowance: what is subtracted from the squared distance to each.
        members: of each part of each list.
    """
    middle = vectors.mean(0)
    values = torch.cat([vectors - middle, allowance[:, None]], 1)
    parts = values[members].mean(2)
    return Lists(
        middle, weigh(parts.mean(1)), weigh(parts), weigh(values)[members.flatten(0, 1)], members.flatten(0, 1)
    )


def weigh(values: Float[Tensor, "*places numbers"]) -> Float[Tensor, "*places numbers"]:
    """What a query and 1 are multiplied by: -2 times the vector, and its square less what is known of it."""
    vectors, allowance = values[..., :-1], values[..., -1:]
    return torch.cat([-2 * vectors, vectors.square().sum(-1, keepdim=True) - allowance], -1)


def nearest_in_lists(
    queries: Float[Tensor, "images patches dim"], lists: Lists, excluded: Bool[Tensor, "images vectors"] | None = None
) -> Int[Tensor, "images patches"]:
    """The number of the vector nearest to each query, or of one nearly as near, coarse to fine.

    What a query finds in the few parts whose centres are nearest bounds its distance: where that is small, the patch is
    normal, whatever else is in the bank. So only the `SHARE` of an image's queries that are then farthest, which decide
    its score, look into more of them.

    Args:
        queries: embeddings of the patches of each image.
        lists: the bank.
        excluded: vectors that each image's queries pass over; they get one all the same where they find nothing else.
    """
    queries = queries - lists.middle
    squares, queries = queries.square().sum(2), F.pad(queries, (0, 1), value=1.0)
    least, nearest = look(queries, lists, FIRST, excluded)
    farthest = (least + squares).topk(math.ceil(SHARE * queries.shape[1]), 1).indices
    queries = queries.gather(1, farthest[..., None].expand(-1, -1, queries.shape[2]))
    return nearest.scatter(1, farthest, look(queries, lists, SECOND, excluded)[1])


def look(
    queries: Float[Tensor, "images patches weights"],
    lists: Lists,
    probes: int,
    excluded: Bool[Tensor, "images vectors"] | None,
) -> tuple[Float[Tensor, "images patches"], Int[Tensor, "images patches"]]:
    """The least product that each query finds in that many parts of that many lists, and whose it is."""
    results = []
    for chunk in queries.split(max(1, AT_ONCE // probes), 1):
        parts = nearest_parts(chunk, lists, probes)
        members = rows(lists.members, parts).flatten(2)
        products = multiply(rows(lists.weights, parts).flatten(2, 3), chunk)
        if excluded is not None:
            mask = excluded.gather(1, members.flatten(1)).unflatten(1, members.shape[1:])
            products = products.masked_fill(mask, torch.inf)
        least, place = products.min(2, keepdim=True)
        results.append((least.squeeze(2), members.gather(2, place).squeeze(2)))
    least, nearest = (torch.cat(parts, 1) for parts in zip(*results, strict=True))
    return least, nearest


def nearest_parts(
    queries: Float[Tensor, "images patches weights"], lists: Lists, probes: int
) -> Int[Tensor, "images patches probes"]:
    """The numbers of the parts whose centres are nearest to each query, of the lists whose centres are."""
    count, parts = lists.part_centres.shape[:2]
    near = (queries @ lists.centres.T).topk(min(probes, count), 2, largest=False).indices
    products = multiply(rows(lists.part_centres, near).flatten(2, 3), queries)
    best = products.topk(min(probes, products.shape[2]), 2, largest=False).indices
    return near.gather(2, best // parts) * parts + best % parts


def multiply(
    weights: Float[Tensor, "images patches vectors weights"], queries: Float[Tensor, "images patches weights"]
) -> Float[Tensor, "images patches vectors"]:
    """The product of each query with vectors of its own."""
    return (weights @ queries[..., None]).squeeze(-1)


def rows(values: Tensor, numbers: Int[Tensor, "images patches probes"]) -> Tensor:
    """What stands in those rows, copied row by row, which is faster than `values[numbers]`."""
    return values.index_select(0, numbers.flatten()).unflatten(0, numbers.shape)
