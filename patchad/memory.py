"""Normal embeddings -> distance to the nearest of them, on faiss."""

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from patchad.checkpoint import take_sizes
from patchad.clustering import kmeans
from patchad.errors import PatchadError, check_range, check_seed
from patchad.lists import Lists, as_lists, divide, nearest_in_lists
from patchad.nearest import faiss, nearest_by_product, search, search_index

Reduction = Literal["random", "kcenter", "kmeans"]

CANDIDATES = 100_000
"""Vectors, drawn at random, among which `kcenter` and `kmeans` choose; 51 MB of 128 numbers each."""

REDUCING_ITERATIONS = 3
"""Of K-means where it reduces a bank; 10 of them take 3 times as long
for the same AUROC (benchmarks/learned.md)."""
SAMPLED, PRIOR = 20_000, 5
"""Candidates at most whose distances give the local levels of a bank, and distances of the mean size that are added to
those of each list."""
TABLE = 40_000_000
"""Distances to all vectors of a bank that are held at once."""


class MemoryBank(nn.Module):
    """The embeddings of normal patches of one side.

    While it is filled it never holds more than its cap and one batch: `max_vectors`, or, where `reduce` chooses among
    more, `CANDIDATES`. Which patches stay depends on the seed, the side, the image and the position alone (each patch
    draws a number, the smallest numbers stay), so neither the order of the images nor the number of processes changes
    it. Whatever reduces it, every vector is the embedding of a real patch, known by its key.

    Args:
        side: side of a patch in pixels.
        max_vectors: most vectors to keep; None keeps all. A part that lies at any angle needs more than 10 000.
        reduce: how they are chosen: `random`; `kcenter` covers all candidates as closely as it can (see `kcenter`);
            `kmeans` takes the patch nearest to each centroid.
        baseline: how far normal patches of unseen things are to be expected around each vector is known (`levels`);
            this share of its square is subtracted from squared distances. Not in the paper; 0 leaves it out.
        exact_most: vectors up to which the bank is searched whole, None for any number; see `nearest_in_lists`.
        seed: of the choice.

    Attributes:
        vectors: embeddings, float32 `[vectors, dim]`.
        keys: number of the image, or of its copy, and of the position within it, int64 `[vectors, 2]`, sorted.
        things: number of what the image of each vector shows, int64 `[vectors]`.
        levels: how far normal patches of things that the bank does not know are to be expected from each vector,
            float32 `[vectors]`, one for all that lie in one list. 0 without a baseline.
        lists: numbers of the vectors that lie together, int64 `[lists, parts, length]`; see `divide`. Empty in a bank
            that is searched whole.
    """

    vectors: Tensor
    keys: Tensor
    things: Tensor
    levels: Tensor
    lists: Tensor

    def __init__(
        self,
        side: int,
        max_vectors: int | None = 400_000,
        reduce: Reduction = "random",
        baseline: float = 0.5,
        exact_most: int | None = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_range({"max_vectors": max_vectors, "exact_most": exact_most}, 1)
        check_range({"baseline": baseline}, 0)
        check_seed(seed)
        if reduce not in get_args(Reduction):
            raise PatchadError(f"reduce {reduce} is none of {', '.join(get_args(Reduction))}")
        self.side, self.max_vectors, self.reduce, self.seed = side, max_vectors, reduce, seed
        self.baseline, self.exact_most = baseline, exact_most
        self.register_buffer("vectors", torch.empty(0, 0))
        self.register_buffer("keys", torch.empty(0, 2, dtype=torch.int64))
        self.register_buffer("things", torch.empty(0, dtype=torch.int64))
        self.register_buffer("levels", torch.empty(0))
        self.register_buffer("lists", torch.empty(0, 0, 0, dtype=torch.int64))
        self._draws = np.empty(0)
        self._earlier: tuple[MemoryBank, ...] = ()  # what a bank that was opened again held; no submodule
        self._forget()

    def _forget(self) -> None:
        """What searches prepared is of other vectors."""
        self._index: faiss.Index | None = None
        self._prepared: dict[torch.device, Lists] = {}

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def _cap(self) -> int | None:
        """Most vectors that are held while it is filled."""
        if self.max_vectors is None or self._earlier:
            return None
        return self.max_vectors if self.reduce == "random" else max(self.max_vectors, CANDIDATES)

    def has_room_for(self, count: int) -> bool:
        """Whether it can hold that many vectors without leaving one out."""
        return self.max_vectors is None or count <= self.max_vectors

    def clear(self) -> None:
        """Empties the bank."""
        self._set(self.keys[:0], self.vectors[:0, :0])
        self._draws = np.empty(0)

    def reopen(self) -> None:
        """Takes in more, after `finish`: all of it, also where the bank is full, for what was missing may be among it.

        The vectors that are there stay, and their levels (see `finish`), so that distances can only come down.
        """
        self._earlier, self._draws = (snapshot(self),), np.zeros(len(self))

    def forget(self, things: Int[Tensor, " things"]) -> None:
        """Leaves out the vectors of these things; levels stay, and `finish` is to follow."""
        self._earlier = (snapshot(self),)
        kept = ~torch.isin(self.things, things)
        self._set(self.keys[kept], self.vectors[kept])

    def add(
        self,
        embeddings: Float[Tensor, "batch dim rows columns"],
        counted: Bool[Tensor, "batch rows columns"],
        index: Int[Tensor, " batch"],
    ) -> None:
        """Takes in the patches of some images.

        Args:
            embeddings: of every position.
            counted: the positions that lie on the image's content.
            index: number of each image within the training set.
        """
        positions = torch.arange(counted[0].numel(), device=index.device).expand(len(index), -1)
        keys = torch.stack([index[:, None].expand_as(positions), positions], dim=-1)
        draws = np.stack([self._draw(image, positions.shape[1]) for image in index.tolist()])
        chosen = counted.flatten(1).cpu().numpy() & (draws <= self._worst())
        mask = torch.from_numpy(chosen).to(embeddings.device)
        self._keep(draws[chosen], keys[mask], embeddings.flatten(2).transpose(1, 2)[mask])

    def _draw(self, image: int, count: int) -> np.ndarray:
        return np.random.default_rng((self.seed, self.side, image)).random(count)

    def _worst(self) -> float:
        full = self._cap is not None and len(self._draws) == self._cap
        return float(self._draws.max()) if full else 1.0

    def _keep(self, draws: np.ndarray, keys: Tensor, vectors: Tensor) -> None:
        draws, keys = np.concatenate([self._draws, draws]), torch.cat([self.keys, keys])
        vectors = torch.cat([self.vectors, vectors]) if len(self) else vectors
        if self._cap is not None and len(draws) > self._cap:
            kept = np.argpartition(draws, self._cap - 1)[: self._cap]
            draws, keys, vectors = draws[kept], keys[torch.from_numpy(kept)], vectors[torch.from_numpy(kept)]
        self._draws = draws
        self._set(keys, vectors)

    def _set(self, keys: Tensor, vectors: Tensor) -> None:
        self.keys, self.things, self.vectors = keys, keys[:, 0], vectors
        self.levels, self.lists = torch.zeros(len(vectors), device=vectors.device), keys[:0, :0, None]
        self._forget()

    def finish(self, things: Int[Tensor, " images"] | None = None, progress: bool = False) -> None:
        """Merges the banks of all processes, sorts by key and reduces: every process then holds the same bank.

        In a bank that was opened again, vectors keep their levels; new ones have that of the nearest that there was.

        Args:
            things: number of what each training image, or copy, shows; by default each shows another thing.
            progress: whether a reduction by `kcenter` shows a bar.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = self.vectors.device
            parts: list = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, (self._draws, self.keys.cpu(), self.vectors.cpu()))
            self.clear()
            for draws, keys, vectors in parts:
                self._keep(draws, keys.to(device), vectors.to(device))
        order = torch.from_numpy(np.lexsort(self.keys.cpu().numpy().T[::-1]))
        self._set(self.keys[order], self.vectors[order])
        self._draws = np.empty(0)
        candidates, keys = self.vectors, self.keys
        if self.max_vectors is not None and len(self) > self.max_vectors and not self._earlier:
            self._reduce_to(self.max_vectors, progress)
        things_of_candidates = keys[:, 0]
        if things is not None:
            self.things, things_of_candidates = things[self.keys[:, 0]], things[things_of_candidates]
        if self.exact_most is not None and len(self) > self.exact_most:
            self.lists = divide(self.vectors, self.seed)
        if self._earlier:
            self.levels = inherited(self.keys, self.vectors, *self._earlier)
            self._earlier = ()
        elif self.baseline and len(self):
            sample = slice(None, None, math.ceil(len(candidates) / SAMPLED))
            self.levels = self._local_levels(candidates[sample], things_of_candidates[sample])
        self._forget()

    def _local_levels(
        self, patches: Float[Tensor, "patches dim"], things: Int[Tensor, " patches"]
    ) -> Float[Tensor, " vectors"]:
        """How far normal patches of things that the bank does not know are to be expected from each vector.

        Each patch finds the nearest vector of another thing than its own, as patches of a new image do; the level of a
        vector is the mean of the distances that patches of its list so have. Where normal patches differ much from one
        thing to the next, as textures do, it is high. Comparing a distance with those of its surroundings is the idea
        of the local outlier factor (Breunig et al., SIGMOD 2000). A bank of one thing has no levels: all are 0.

        Args:
            patches: embeddings of normal patches.
            things: number of what the image of each patch shows.
        """
        lists = (self.lists if len(self.lists) else divide(self.vectors, self.seed)).flatten(1)
        home = torch.empty_like(self.things)
        home[lists.flatten()] = torch.arange(len(lists), device=home.device).repeat_interleave(lists.shape[1])
        total, count = torch.zeros(2, len(lists), dtype=torch.float64, device=home.device)
        for thing in things.unique():
            if (self.things != thing).any():
                queries = patches[things == thing]
                place = home[self._nearest(queries[None])[0]]
                nearest = self._nearest(queries[None], own=thing[None])[0]
                distance = (queries - self.vectors[nearest]).double().norm(dim=1)
                total.index_add_(0, place, distance)
                count.index_add_(0, place, torch.ones_like(distance))
        mean = total.sum() / count.sum().clamp(min=1)
        return ((total + PRIOR * mean) / (count + PRIOR)).float()[home]

    def _reduce_to(self, count: int, progress: bool) -> None:
        if self.reduce == "kcenter":
            chosen = kcenter(self.vectors, count, progress)
        else:
            chosen = kmeans_medoids(self.vectors, count, self.seed)
        self._set(self.keys[chosen], self.vectors[chosen])

    def distances(
        self,
        queries: Float[Tensor, "*places dim"],
        own: Int[Tensor, " images"] | None = None,
    ) -> Float[Tensor, "*places"]:
        """Distance between each query and the nearest vector of the bank, over the baseline, in one search.

        Above `exact_most` vectors it is that to a vector nearly as near; see `nearest_in_lists`.

        It is the root of the smallest `|query - vector|^2 - baseline level^2`, and 0 below: the power distance
        (Aurenhammer, Power diagrams, SIAM Journal on Computing, 1987), which does not jump where two vectors of
        different level are equally near. What makes a patch a defect, if it is independent of how normal patches
        vary, adds its square to theirs. Without a baseline it is the Euclidean distance.

        Args:
            queries: embeddings; exported files take them as `[images, patches, dim]`. The patches of an image, which a
                large bank needs to know, are those of the last axis but one.
            own: number of what each image shows, of queries `[images, patches, dim]`: vectors of the same thing are
                passed over. An image that is in the bank is so compared with the others alone.

        Raises:
            PatchadError: if the bank is empty, or holds nothing else than one of these things.
        """
        if not len(self):
            raise PatchadError("the memory bank is empty: run patchad fit first, or give --ckpt_path")
        if own is not None and not torch.isin(own, self.things).any():
            own = None  # of images that are none of the bank's nothing is passed over
        nearest = self._nearest(queries, own)
        # not faiss's own distances, which lose digits where they are small
        squares = (queries - self.vectors[nearest]).square().sum(-1)
        return (squares - self._allowance[nearest]).clamp(min=0).sqrt()

    def _nearest(self, queries: Tensor, own: Tensor | None = None) -> Tensor:
        """The number of the vector nearest to each query by power distance, or of one nearly as near."""
        if len(self.lists):
            return self._search_lists(queries, own)
        if torch.compiler.is_compiling():
            return nearest_by_product(queries, self.vectors, self._allowance)
        if own is None:
            return self._search(queries)
        return torch.stack([self._nearest_other(patches, thing) for patches, thing in zip(queries, own, strict=True)])

    @property
    def _allowance(self) -> Tensor:
        """What is subtracted from the squared distance to each vector."""
        return self.baseline * self.levels.square()

    def _search(self, queries: Tensor) -> Tensor:
        """One more number makes the nearest by Euclidean distance the nearest by power distance."""
        if self._index is None:
            allowance = self._allowance
            lifted = torch.cat([self.vectors, (allowance.max() - allowance).sqrt()[:, None]], dim=1)
            self._index = search_index(lifted)
        flat = F.pad(queries.float().flatten(0, -2), (0, 1))
        return search(self._index, flat, 1)[:, 0].reshape(queries.shape[:-1])

    def _nearest_other(self, queries: Tensor, own: Tensor) -> Tensor:
        """The numbers of the vectors nearest to patches of one image, among those that show something else."""
        eligible = self.things != own
        if not eligible.any():
            raise PatchadError("the bank holds patches of one image alone, which nothing can be compared with")
        offset = (self.vectors.square().sum(1) - self._allowance).masked_fill(~eligible, torch.inf)
        with torch.autocast(queries.device.type, enabled=False):  # reduced precision would swamp small distances
            parts = queries.float().split(max(1, TABLE // len(self)))
            return torch.cat([torch.addmm(offset, part, self.vectors.T, alpha=-2).argmin(1) for part in parts])

    def _search_lists(self, queries: Tensor, own: Tensor | None) -> Tensor:
        images, key = queries.reshape(-1, *queries.shape[-2:]), self.vectors.device
        if key not in self._prepared:
            self._prepared[key] = as_lists(self.vectors, self._allowance, self.lists)
        if torch.compiler.is_compiling():  # an exported file holds the vectors once
            lists = self._prepared[key]._replace(vectors=self.vectors, allowance=self._allowance)
            return nearest_in_lists(images, lists)
        with torch.autocast(queries.device.type, enabled=False):  # distances would lose digits
            excluded = None if own is None else own[:, None] == self.things
            at_once = len(images) if key.type == "cuda" else 1  # a CPU uses the memory of one image again for the next
            parts = zip(images.float().split(at_once), split(excluded, at_once), strict=False)
            nearest = torch.cat([nearest_in_lists(part, self._prepared[key], mask) for part, mask in parts])
        if own is not None:  # where the lists hold nothing else
            for number, wrong in enumerate(self.things[nearest] == own[:, None]):
                if wrong.any():
                    nearest[number, wrong] = self._nearest_other(images[number, wrong], own[number])
        return nearest.reshape(queries.shape[:-1])

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        take_sizes(self, state_dict, prefix, ("vectors", "keys", "things", "levels", "lists"))
        self._forget()
        super()._load_from_state_dict(state_dict, prefix, *args)


def split(values: Tensor | None, length: int) -> Iterable[Tensor | None]:
    """Parts of that length; of None, None over and over."""
    return itertools.repeat(None) if values is None else values.split(length)


def snapshot(bank: MemoryBank) -> MemoryBank:
    """A bank that keeps what another holds now."""
    kept = copy.copy(bank)
    kept._buffers = dict(bank._buffers)
    return kept


def inherited(
    keys: Int[Tensor, "vectors 2"], vectors: Float[Tensor, "vectors dim"], earlier: MemoryBank
) -> Float[Tensor, " vectors"]:
    """The levels that vectors had in an earlier bank, and of new ones that of the nearest vector there."""
    known, codes = (numbers[:, 0] * 2**32 + numbers[:, 1] for numbers in (earlier.keys, keys))  # both sorted
    place = torch.searchsorted(known, codes).clamp(max=len(known) - 1)
    levels, new = earlier.levels[place], known[place] != codes
    for number in keys[new, 0].unique():
        rows = new & (keys[:, 0] == number)
        levels[rows] = earlier.levels[earlier._nearest(vectors[rows][None])[0]]
    return levels


BankFactory = Callable[[int], MemoryBank]
"""Makes the bank of a side (pixels): `MemoryBank`, a subclass, or a `partial` of one."""


def kcenter(vectors: Float[Tensor, "vectors dim"], count: int, progress: bool = False) -> Int[Tensor, " count"]:
    """Numbers of `count` vectors that cover all: the one nearest to the mean, then each time the farthest from those.

    The greedy 2-approximation of the k-centre problem (Gonzalez, 1985), the coreset of PatchCore (Roth et al., CVPR
    2022, algorithm 1). It costs `count` products of all vectors with one.

    Args:
        vectors: to choose from.
        count: how many, at most as many as there are.
        progress: whether to show a bar.

    Example:
        >>> kcenter(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), count=2)
        tensor([2, 3])
    """
    vectors = vectors - vectors.mean(0)
    squared = vectors.square().sum(1)
    chosen, nearest = [squared.argmin()], torch.full_like(squared, torch.inf)
    for _ in track(range(count - 1), "Reducing the memory bank", disable=not progress, transient=True):
        centre = chosen[-1]
        with torch.autocast(vectors.device.type, enabled=False):  # reduced precision would swamp small distances
            products = vectors @ (2 * vectors[centre])
        torch.minimum(nearest, squared + squared[centre] - products, out=nearest)
        nearest[centre] = -torch.inf
        chosen.append(nearest.argmax())
    return torch.stack(chosen).sort().values


def kmeans_medoids(vectors: Float[Tensor, "vectors dim"], count: int, seed: int = 0) -> Int[Tensor, " chosen"]:
    """Numbers of the vectors nearest to the centroids of K-means; where two share one, there are fewer than `count`."""
    centroids = kmeans(vectors, count, iterations=REDUCING_ITERATIONS, seed=seed)
    return search(search_index(vectors), centroids, 1).unique()
