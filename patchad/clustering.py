"""Embeddings -> pseudo-labels, by faiss's K-means."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patchad.errors import PatchadError
from patchad.nearest import faiss, on_device


def kmeans(
    embeddings: Float[Tensor, "patches dim"],
    clusters: int,
    start: Float[Tensor, "clusters dim"] | None = None,
    iterations: int = 20,
    seed: int = 0,
) -> Float[Tensor, "clusters dim"]:
    """Centroids of embeddings, found where these are; faiss splits a large cluster for each empty one.

    Args:
        embeddings: what to cluster.
        clusters: how many.
        start: centroids to start from; seeded patches by default.
        iterations: of Lloyd's algorithm.
        seed: of the start.

    Raises:
        PatchadError: if there are fewer patches than clusters.

    Example:
        >>> two = torch.tensor([[0.0], [0.2], [4.0], [4.2]])
        >>> kmeans(two, clusters=2).sort(dim=0).values.squeeze()
        tensor([0.1000, 4.1000])
    """
    if len(embeddings) < clusters:
        raise PatchadError(f"{clusters} clusters need as many patches, there are {len(embeddings)}; lower clusters")
    # all patches take part: the caller sampled already
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(embeddings)}
    run = faiss.Kmeans(embeddings.shape[1], clusters, niter=iterations, seed=seed, **limits)
    run.index = on_device(run.index, embeddings.device)
    first = None if start is None else start.float().cpu().numpy()
    run.train(np.ascontiguousarray(embeddings.float().cpu().numpy()), init_centroids=first)
    return torch.from_numpy(run.centroids).to(embeddings.device)


class PseudoLabels(nn.Module):
    """The clusters of one side's embeddings, held for an epoch.

    Args:
        clusters: how many (K = 50 is the paper's, supplement, table 3).
        dim: numbers per embedding.
        seed: of the first centroids.

    Attributes:
        centroids: float32 `[clusters, dim]`.
        ready: whether they were fitted.
    """

    centroids: Tensor
    ready: Tensor

    def __init__(self, clusters: int = 50, dim: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.clusters, self.seed = clusters, seed
        self.register_buffer("centroids", torch.zeros(clusters, dim))
        self.register_buffer("ready", torch.tensor(False))

    @torch.no_grad()
    def refit(self, embeddings: Float[Tensor, "patches dim"]) -> None:
        """Moves the centroids, from where they are, to the embeddings."""
        start = self.centroids if self.ready else None
        self.centroids.copy_(kmeans(embeddings, self.clusters, start, seed=self.seed))
        self.ready.fill_(True)

    @torch.no_grad()
    def forward(self, embeddings: Float[Tensor, "patches dim"]) -> Int[Tensor, " patches"]:
        """The number of the nearest centroid of each patch: its pseudo-label. It has no gradient."""
        return torch.cdist(embeddings, self.centroids).argmin(1)


def churn(before: Int[Tensor, " patches"], after: Int[Tensor, " patches"]) -> float:
    """Share of patches whose pseudo-label changed.

    Example:
        >>> churn(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
        0.25
    """
    return float((before != after).float().mean())
