from pathlib import Path

import pytest
import threadpoolctl
import torch

from patchad.nearest import KERNELS, search, search_index

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


def test_an_index_finds_the_nearest_vectors_in_their_order():
    generator = torch.Generator().manual_seed(6)
    vectors, queries = torch.randn(500, 8, generator=generator), torch.randn(40, 8, generator=generator)
    expected = torch.cdist(queries.double(), vectors.double()).argsort(dim=1)[:, :3]
    assert torch.equal(search(search_index(vectors), queries, 3), expected)
