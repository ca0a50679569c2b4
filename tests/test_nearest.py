from pathlib import Path

import pytest
import threadpoolctl
import torch

from patchad.nearest import KERNELS, faiss, search, search_index

AT_START = Path("/proc/self/environ")
"""The environment as this process got it, before patchad was imported."""


@pytest.mark.skipif(not AT_START.is_file(), reason=f"{AT_START} is Linux's")
def test_faiss_multiplies_with_the_kernels_of_this_cpu_or_those_that_the_caller_asked_for():
    capability = torch.backends.cpu.get_cpu_capability()
    loaded = [one for one in threadpoolctl.threadpool_info() if "faiss" in one["filepath"]]
    kernels = {one["architecture"] for one in loaded if one["internal_api"] == "openblas"}
    if capability not in KERNELS or not kernels:
        pytest.skip(f"kernels are chosen for {', '.join(KERNELS)} and OpenBLAS, not for {capability}, {kernels}")
    given = dict(entry.split("=", 1) for entry in AT_START.read_text().split("\0") if "=" in entry)
    assert kernels == {given.get("OPENBLAS_CORETYPE", KERNELS[capability])}


def test_an_index_of_many_vectors_has_lists_and_finds_nearly_all():
    generator = torch.Generator().manual_seed(6)
    vectors = torch.tanh(torch.randn(20_000, 4, generator=generator) @ torch.randn(4, 8, generator=generator))
    queries = vectors[:500] + 0.01
    index = search_index(vectors, exact_most=10_000)
    assert isinstance(faiss.downcast_index(index), faiss.IndexIVF)
    found, nearest = (search(one, queries, 1) for one in (index, search_index(vectors, exact_most=20_000)))
    assert (found == nearest).float().mean() > 0.95
