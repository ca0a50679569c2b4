"""Normal embeddings -> distance to the nearest of them, on faiss."""

import faiss
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from patchad.types import PatchadError


class MemoryBank(nn.Module):
    """The embeddings of normal patches of one side.

    While it is filled it never holds more than `max_vectors` and one batch. Which patches are kept depends on the seed,
    the side, the image and the position alone (each patch draws a number, the smallest numbers stay), so neither the
    order of the images nor the number of processes changes it.

    Args:
        side: side of a patch in pixels.
        max_vectors: most vectors to keep; None keeps all.
        seed: of the choice.

    Attributes:
        vectors: embeddings, float32 `[vectors, dim]`.
        keys: number of the image and of the position within it, int64 `[vectors, 2]`, sorted.
    """

    vectors: Tensor
    keys: Tensor

    def __init__(self, side: int, max_vectors: int | None = 10_000, seed: int = 0) -> None:
        super().__init__()
        if max_vectors is not None and max_vectors < 1:
            raise PatchadError(f"max_vectors {max_vectors} keeps nothing; give at least 1, or null to keep all")
        self.side, self.max_vectors, self.seed = side, max_vectors, seed
        self.register_buffer("vectors", torch.empty(0, 0))
        self.register_buffer("keys", torch.empty(0, 2, dtype=torch.int64))
        self._draws = np.empty(0)
        self._index: faiss.Index | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def clear(self) -> None:
        """Empties the bank."""
        self._set(self.keys[:0], self.vectors[:0, :0])
        self._draws = np.empty(0)

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
        full = self.max_vectors is not None and len(self._draws) == self.max_vectors
        return float(self._draws.max()) if full else 1.0

    def _keep(self, draws: np.ndarray, keys: Tensor, vectors: Tensor) -> None:
        draws, keys = np.concatenate([self._draws, draws]), torch.cat([self.keys, keys])
        vectors = torch.cat([self.vectors, vectors]) if len(self) else vectors
        if self.max_vectors is not None and len(draws) > self.max_vectors:
            kept = np.argpartition(draws, self.max_vectors - 1)[: self.max_vectors]
            draws, keys, vectors = draws[kept], keys[torch.from_numpy(kept)], vectors[torch.from_numpy(kept)]
        self._draws = draws
        self._set(keys, vectors)

    def _set(self, keys: Tensor, vectors: Tensor) -> None:
        self.keys, self.vectors, self._index = keys, vectors, None

    def finish(self) -> None:
        """Merges the banks of all processes and sorts by key: every process then holds the same bank."""
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

    def distances(self, queries: Float[Tensor, "queries dim"]) -> Float[Tensor, " queries"]:
        """Euclidean distance between each query and the nearest vector of the bank, in one search.

        Raises:
            PatchadError: if the bank is empty.
        """
        if not len(self):
            raise PatchadError("the memory bank is empty: run patchad fit first, or give --ckpt_path")
        if self._index is None:
            self._index = flat_index(self.vectors)
        squared, _ = self._index.search(np.ascontiguousarray(queries.float().cpu().numpy()), 1)
        return torch.from_numpy(squared[:, 0]).clamp(min=0).sqrt().to(queries.device)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        for name in ("vectors", "keys"):  # a bank of another length is taken as it is, not refused
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.vectors.device))
        self._index = None
        super()._load_from_state_dict(state_dict, prefix, *args)


def flat_index(vectors: Float[Tensor, "vectors dim"]) -> faiss.Index:
    """An exact faiss index of the vectors, on the GPU when faiss sees one."""
    index = faiss.IndexFlatL2(vectors.shape[1])
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), vectors.device.index or 0, index)
    index.add(np.ascontiguousarray(vectors.float().cpu().numpy()))
    return index
