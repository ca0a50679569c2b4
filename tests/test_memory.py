import io

import pytest
import torch

from patchad.memory import MemoryBank
from patchad.types import PatchadError

IMAGES, DIM, ROWS, COLUMNS = 6, 8, 5, 4


def embeddings() -> torch.Tensor:
    return torch.randn(IMAGES, DIM, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def filled(order=range(IMAGES), batch=2, max_vectors=None, seed=0, counted=None) -> MemoryBank:
    bank = MemoryBank(side=16, max_vectors=max_vectors, seed=seed)
    counted = torch.ones(IMAGES, ROWS, COLUMNS, dtype=torch.bool) if counted is None else counted
    index = torch.tensor(list(order))
    for part in index.split(batch):
        bank.add(embeddings()[part], counted[part], part)
    bank.finish()
    return bank


def test_distances_are_euclidean_to_the_nearest_vector():
    bank, queries = filled(), torch.randn(50, DIM, generator=torch.Generator().manual_seed(1))
    expected = torch.cdist(queries.double(), bank.vectors.double()).amin(1)
    torch.testing.assert_close(bank.distances(queries).double(), expected, rtol=1e-4, atol=1e-4)


def test_every_vector_lies_under_its_image_and_position():
    bank = filled()
    assert len(bank) == IMAGES * ROWS * COLUMNS
    image, position = bank.keys.T
    assert torch.equal(bank.vectors, embeddings().flatten(2)[image, :, position])


@pytest.mark.parametrize("max_vectors", [None, 7, 40, 120])
def test_the_order_and_grouping_of_images_do_not_change_the_bank(max_vectors):
    first = filled(max_vectors=max_vectors)
    second = filled(order=[5, 1, 3, 0, 4, 2], batch=4, max_vectors=max_vectors)
    assert torch.equal(first.keys, second.keys)
    assert torch.equal(first.vectors, second.vectors)


def test_a_cap_keeps_a_subset_that_depends_on_the_seed():
    everything = set(map(tuple, filled().keys.tolist()))
    chosen = [set(map(tuple, filled(max_vectors=30, seed=seed).keys.tolist())) for seed in (0, 1)]
    assert all(len(keys) == 30 and keys < everything for keys in chosen)
    assert chosen[0] != chosen[1]


def test_each_patch_is_kept_equally_often():
    counts = torch.zeros(IMAGES, ROWS * COLUMNS)
    for seed in range(300):
        image, position = filled(max_vectors=12, seed=seed).keys.T
        counts[image, position] += 1
    expected = 300 * 12 / counts.numel()
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_while_filling_no_more_than_the_cap_is_held():
    bank = MemoryBank(side=16, max_vectors=9)
    for image in range(IMAGES):
        bank.add(embeddings()[image : image + 1], torch.ones(1, ROWS, COLUMNS, dtype=torch.bool), torch.tensor([image]))
        assert len(bank) == 9


def test_patches_that_do_not_count_stay_out():
    counted = torch.zeros(IMAGES, ROWS, COLUMNS, dtype=torch.bool)
    counted[2, 1, 3] = True
    assert filled(counted=counted).keys.tolist() == [[2, 1 * COLUMNS + 3]]


def test_a_bank_of_any_length_loads_into_an_empty_one():
    bank, file = filled(max_vectors=30), io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    other = filled(max_vectors=5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.keys, bank.keys)
    queries = torch.randn(9, DIM)
    assert torch.equal(other.distances(queries), bank.distances(queries))


def test_an_empty_bank_says_how_to_fill_it():
    with pytest.raises(PatchadError, match="patchad fit"):
        MemoryBank(side=16).distances(torch.zeros(1, DIM))


def test_a_cap_of_nothing_is_refused():
    with pytest.raises(PatchadError, match="max_vectors 0"):
        MemoryBank(side=16, max_vectors=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_distances_on_the_gpu_equal_those_on_the_cpu():
    bank, queries = filled(), torch.randn(50, DIM)
    expected = bank.distances(queries)
    torch.testing.assert_close(bank.cuda().distances(queries.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
