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
REFINED = 4
"""Vectors, the nearest by bytes, that patches which look again are compared with in float32."""
AT_ONCE = 8192
"""Parts whose vectors are held at once for each image: as bytes 13 MB where 40 vectors of 40 numbers make a part."""
CODES, QUERY_CODES, ZERO = 63, 127, 128
"""Codes of how far a vector is from the centre of its part go from -63 to 63, those of a query from -127 to 127;
products take the latter as bytes, of which 128 is 0. With one bit more, the sum of two products would pass 16 bits, in
which CPUs without VNNI hold it."""
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


class Codes(NamedTuple):
    """Vectors as bytes, group by group: how far each is from the centre of its group, in steps of that group.

    What is read for each query decides how long a search takes. Residuals need few bits (Jegou et al., Product
    quantization for nearest neighbor search, PAMI 2011, section IV).

    Attributes:
        codes: int8 `[groups, dim, length]`.
        steps: -2 times what a code of 1 stands for, `[groups, 1]`.
        offsets: squares of vectors less what is known of them, over those of the centre, `[groups, length]`.
    """

    codes: Tensor
    steps: Tensor
    offsets: Tensor


class Lists(NamedTuple):
    """A bank as its search takes it: weights times a query and 1 are squared distances, but for the query's own square.

    Attributes:
        vectors: of the bank, `[vectors, dim]`.
        allowance: what is subtracted from the squared distance to each, `[vectors]`.
        middle: of all vectors, which is subtracted from queries, `[dim]`.
        centres: weights of the centres of lists, `[lists, dim + 1]`.
        parts: the centres of the parts of each list.
        inner: the vectors of each part, list by list.
        members: their numbers, `[lists * parts, length]`.
    """

    vectors: Tensor
    allowance: Tensor
    middle: Tensor
    centres: Tensor
    parts: Codes
    inner: Codes
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
    values = torch.cat([vectors - middle, allowance[:, None]], 1)[members]
    parts = values.mean(2)
    centres = parts.mean(1)
    inner = residuals(values.flatten(0, 1), parts.flatten(0, 1))
    return Lists(vectors, allowance, middle, weigh(centres), residuals(parts, centres), inner, members.flatten(0, 1))


def residuals(values: Float[Tensor, "groups length numbers"], centres: Float[Tensor, "groups numbers"]) -> Codes:
    """Vectors, and what is known of each, by the centres of their groups.

    What rounding leaves of a vector counts as if each query were the centre, to which queries that look there are near.
    """
    exact = (values - centres[:, None])[..., :-1]
    codes, steps = encode(exact, CODES, (1, 2))
    rounding = ((exact - codes * steps) * centres[:, None, :-1]).sum(2)
    offsets = weigh(values)[..., -1] - weigh(centres)[:, None, -1] - 2 * rounding
    return Codes(codes.mT.to(torch.int8), -2 * steps.flatten(1), offsets)


def weigh(values: Float[Tensor, "*places numbers"]) -> Float[Tensor, "*places numbers"]:
    """What a query and 1 are multiplied by: -2 times the vector, and its square less what is known of it."""
    vectors, allowance = values[..., :-1], values[..., -1:]
    return torch.cat([-2 * vectors, vectors.square().sum(-1, keepdim=True) - allowance], -1)


def encode(values: Float[Tensor, "*places"], most: int, axes: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Whole numbers from `-most` to `most`, and the step that each stands for along those axes.

    Example:
        >>> encode(torch.tensor([[-0.5, 1.0]]), most=4, axes=1)
        (tensor([[-2.,  4.]]), tensor([[0.2500]]))
    """
    steps = values.abs().amax(axes, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny * most) / most
    return (values / steps).round(), steps


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
    least, nearest = look(queries, lists, FIRST, excluded, 1)
    squares = (queries - lists.middle).square().sum(2)
    farthest = (least[..., 0] + squares).topk(math.ceil(SHARE * queries.shape[1]), 1).indices
    queries = queries.gather(1, farthest[..., None].expand(-1, -1, queries.shape[2]))
    least, members = look(queries, lists, SECOND, excluded, REFINED)
    exact = (queries[:, :, None] - lists.vectors[members]).square().sum(3) - lists.allowance[members]
    refined = members.gather(2, exact.masked_fill(least.isinf(), torch.inf).argmin(2, keepdim=True))
    return nearest[..., 0].scatter(1, farthest, refined[..., 0])


def look(
    queries: Float[Tensor, "images patches dim"],
    lists: Lists,
    probes: int,
    excluded: Bool[Tensor, "images vectors"] | None,
    count: int,
) -> tuple[Float[Tensor, "images patches count"], Int[Tensor, "images patches count"]]:
    """The `count` least products that each query finds in that many parts of that many lists, and whose they are."""
    results = []
    for chunk in (queries - lists.middle).split(max(1, AT_ONCE // probes), 1):
        query = encode(chunk, QUERY_CODES, 2)
        least, near = nearest_of(F.pad(chunk, (0, 1), value=1.0) @ lists.centres.T, probes)
        of_list = torch.arange(lists.parts.offsets.shape[1], device=near.device)
        parts = (near[..., None] * len(of_list) + of_list).flatten(2)
        least, best = nearest_of(descend(query, lists.parts, near, least), probes)
        parts = parts.gather(2, best)
        products, members = descend(query, lists.inner, parts, least), rows(lists.members, parts).flatten(2)
        if excluded is not None:
            mask = excluded.gather(1, members.flatten(1)).unflatten(1, members.shape[1:])
            products = products.masked_fill(mask, torch.inf)
        least, places = nearest_of(products, count)
        results.append((least, members.gather(2, places)))
    least, nearest = (torch.cat(parts, 1) for parts in zip(*results, strict=True))
    return least, nearest


def nearest_of(
    products: Float[Tensor, "images patches candidates"], count: int
) -> tuple[Float[Tensor, "images patches nearest"], Int[Tensor, "images patches nearest"]]:
    """The smallest products of each query, and their places."""
    if count == 1:
        return products.min(2, keepdim=True)
    return products.topk(min(count, products.shape[2]), 2, largest=False)


def descend(
    query: tuple[Tensor, Tensor],
    codes: Codes,
    groups: Int[Tensor, "images patches probes"],
    products: Float[Tensor, "images patches probes"],
) -> Float[Tensor, "images patches vectors"]:
    """The products of queries with all vectors of the groups that each looks into.

    Args:
        query: what `encode` gave of the queries, `[images, patches, dim]` and `[images, patches, 1]`.
        codes: the vectors.
        groups: numbers of the groups.
        products: with their centres.
    """
    values, steps = query
    within = multiply(values, rows(codes.codes, groups)) * (steps * rows(codes.steps, groups).squeeze(3))[..., None]
    return (products[..., None] + rows(codes.offsets, groups) + within).flatten(2)


def multiply(
    queries: Float[Tensor, "images patches dim"], codes: Int[Tensor, "images patches probes dim length"]
) -> Float[Tensor, "images patches probes length"]:
    """The product of each query with codes of its own, exact: float32 holds all of these whole numbers."""
    left = queries[:, :, None, None]
    if torch.onnx.is_in_onnx_export():
        operands = ((left + ZERO).to(torch.uint8), codes, torch.tensor(ZERO, dtype=torch.uint8))
        shape = (*codes.shape[:3], 1, codes.shape[4])
        products = torch.onnx.ops.symbolic("::MatMulInteger", operands, dtype=torch.int32, shape=shape)
    else:
        products = left @ codes.to(queries.dtype)
    return products.to(queries.dtype).squeeze(3)


def rows(values: Tensor, numbers: Int[Tensor, "images patches probes"]) -> Tensor:
    """What stands in those rows, copied row by row, which is faster than `values[numbers]`."""
    return values.index_select(0, numbers.flatten()).unflatten(0, numbers.shape)
