import io

import pytest
import torch

from patchad.lists import PART, divide, halve
from patchad.memory import MemoryBank

DIM = 8


def clustered(count: int, seed: int = 0) -> torch.Tensor:
    """Points near a curved surface of four dimensions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(4, DIM, generator=torch.Generator().manual_seed(9))
    return torch.tanh(torch.randn(count, 4, generator=generator) @ mixing)


def bank(vectors: torch.Tensor, exact_most: int, baseline: float = 0.0) -> MemoryBank:
    """A bank of those vectors, ten of each image."""
    made = MemoryBank(side=16, max_vectors=None, baseline=baseline, exact_most=exact_most)
    numbers = torch.arange(len(vectors))
    made._set(torch.stack([numbers // 10, numbers % 10], dim=1), vectors)
    made.finish()
    return made


@pytest.fixture(scope="module")
def large() -> MemoryBank:
    return bank(clustered(4000), exact_most=1000)


@pytest.fixture(scope="module")
def whole() -> MemoryBank:
    return bank(clustered(4000), exact_most=4000)


@pytest.mark.parametrize("count", [3, 50, 1999, 9000])
def test_lists_hold_every_vector_and_nothing_else(count):
    lists = divide(clustered(count))
    assert torch.equal(lists.unique(), torch.arange(count))
    longest = -(-count // round(count**0.5))
    assert lists.shape[1] * lists.shape[2] < longest + lists.shape[1]
    assert lists.shape[2] < 2 * PART
    assert torch.equal(lists, divide(clustered(count)))


def test_parts_of_a_list_are_halves_across_its_longest_direction():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 80, DIM, generator=generator) * torch.tensor([1.0] * 7 + [9.0])
    turned = vectors @ torch.linalg.qr(torch.randn(DIM, DIM, generator=generator)).Q
    halves = halve(torch.arange(80)[None], turned)
    below = (vectors[0, halves[0], -1] < vectors[0, :, -1].median()).float().mean()
    assert halves.shape == (2, 40) and torch.equal(halves.unique(), torch.arange(80))
    assert max(below, 1 - below) > 0.9


def test_lists_of_vectors_of_which_few_differ_hold_all_of_them():
    vectors = clustered(3).repeat(200, 1)
    assert torch.equal(divide(vectors).unique(), torch.arange(600))
    made = bank(vectors, exact_most=10)
    torch.testing.assert_close(made.distances(vectors[:9]), torch.zeros(9))
    queries = clustered(40, seed=1)
    exact = torch.cdist(queries, vectors[:3]).amin(1)
    assert (made.distances(queries) >= exact - 1e-5).all()


def test_a_part_whose_vectors_are_nearly_all_the_same_is_halved():
    vectors = torch.zeros(3, 20, DIM)
    vectors[1, 0, 3], vectors[2, :, 0] = 1e-30, torch.arange(20.0)
    halves = halve(torch.arange(60).reshape(3, 20).flip(1), vectors.flip(1))
    assert halves.shape == (6, 10) and torch.equal(halves.unique(), torch.arange(60))
    assert {int(half.max() - half.min()) for half in halves[4:]} == {9}


def test_a_bank_up_to_the_limit_is_searched_whole(large, whole):
    assert len(whole.lists) == 0
    assert len(large.lists) > 0


def test_what_is_found_is_a_vector_of_the_bank_and_no_nearer_than_the_nearest(large, whole):
    queries = clustered(300, seed=1) + 0.05
    found, exact = large.distances(queries), whole.distances(queries)
    assert (found >= exact - 1e-5).all()
    all_distances = torch.cdist(queries.double(), large.vectors.double())
    assert ((all_distances - found[:, None]).abs().amin(1) < 1e-5).all()


def test_of_patches_that_look_again_nearly_all_find_the_nearest_and_of_all_most_do(large, whole):
    queries = clustered(1000, seed=1) + 0.05
    found, exact = large.distances(queries), whole.distances(queries)
    same = found - exact < 1e-5
    assert same[exact.topk(20).indices].float().mean() >= 0.98
    assert same.float().mean() > 0.7


@pytest.mark.parametrize("baseline", [0.0, 0.8])
def test_where_all_patches_look_into_all_lists_the_search_is_exact(baseline, monkeypatch):
    monkeypatch.setattr("patchad.lists.SHARE", 1.0)
    monkeypatch.setattr("patchad.lists.SECOND", 10_000)
    monkeypatch.setattr("patchad.lists.AT_ONCE", 1000)
    vectors = clustered(600)
    large, whole = (bank(vectors, exact_most, baseline) for exact_most in (599, 600))
    whole.levels = large.levels
    queries = clustered(60, seed=1).reshape(2, 30, DIM)
    torch.testing.assert_close(large.distances(queries), whole.distances(queries), rtol=1e-4, atol=1e-4)


def test_the_share_that_looks_again_is_each_images_own(large):
    images = torch.stack([clustered(100, seed=1), 3 * clustered(100, seed=2)])
    together = large.distances(images)
    alone = torch.stack([large.distances(one) for one in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_an_image_of_few_patches_is_searched(large, whole, count):
    queries = clustered(count, seed=3)
    assert (large.distances(queries) >= whole.distances(queries) - 1e-5).all()


def test_a_large_bank_finds_the_same_after_it_was_saved(large):
    file = io.BytesIO()
    torch.save(large.state_dict(), file)
    file.seek(0)
    other = MemoryBank(side=16)
    other.load_state_dict(torch.load(file, weights_only=True))
    queries = clustered(50, seed=1)
    assert torch.equal(other.distances(queries), large.distances(queries))


def test_a_bank_that_is_filled_anew_forgets_its_lists(large):
    other = bank(clustered(2000, seed=4), exact_most=1000)
    other.distances(clustered(5))
    other._set(large.keys[:30], large.vectors[:30])
    torch.testing.assert_close(other.distances(large.vectors[:30]), torch.zeros(30))


def test_reduced_precision_does_not_reach_the_search(large):
    queries = clustered(50, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = large.distances(queries)
    assert torch.equal(found, large.distances(queries))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_large_bank_finds_on_the_gpu_what_it_finds_on_the_cpu(large):
    queries = clustered(200, seed=1)
    expected = large.distances(queries)
    found = bank(clustered(4000), exact_most=1000)
    found.load_state_dict(large.state_dict())
    torch.testing.assert_close(found.cuda().distances(queries.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)


def test_digits_are_kept_where_all_vectors_lie_far_from_zero():
    vectors, queries = clustered(2000), clustered(100, seed=9)
    near, far = bank(vectors, exact_most=1000), bank(vectors + 1000, exact_most=1000)
    far.lists = near.lists
    agree = near._nearest(queries[None]) == far._nearest(queries[None] + 1000)
    assert agree.float().mean() > 0.9
