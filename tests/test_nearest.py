import pytest
import threadpoolctl
import torch

from patchad.nearest import KERNELS


def test_faiss_multiplies_with_the_kernels_of_this_cpu():
    capability = torch.backends.cpu.get_cpu_capability()
    loaded = [one for one in threadpoolctl.threadpool_info() if "faiss" in one["filepath"]]
    kernels = {one["architecture"] for one in loaded if one["internal_api"] == "openblas"}
    if capability not in KERNELS or not kernels:
        pytest.skip(f"kernels are chosen for {', '.join(KERNELS)} and OpenBLAS, not for {capability}, {kernels}")
    assert kernels == {KERNELS[capability]}
