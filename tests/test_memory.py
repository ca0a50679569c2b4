import io
import itertools

import pytest
import torch

from patchad.errors import PatchadError
from patchad.lists import divide
from patchad.memory import MemoryBank, kcenter, kmeans_medoids
from patchad.nearest import nearest_by_product

IMAGES, DIM, ROWS, COLUMNS = 6, 8, 5, 4


def embeddings() -> torch.Tensor:
    return torch.randn(IMAGES, DIM, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def filled(
    order=range(IMAGES), batch=2, max_vectors=None, counted=None, baseline=0.0, things=None, **settings
) -> MemoryBank:
    bank = MemoryBank(side=16, max_vectors=max_vectors, baseline=baseline, **settings)
    counted = torch.ones(IMAGES, ROWS, COLUMNS, dtype=torch.bool) if counted is None else counted
    index = torch.tensor(list(order))
    for part in index.split(batch):
        bank.add(embeddings()[part], counted[part], part)
    bank.finish(things)
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


@pytest.mark.parametrize("reduce", ["random", "kcenter", "kmeans"])
@pytest.mark.parametrize("max_vectors", [None, 7, 40, 120])
def test_the_order_and_grouping_of_images_do_not_change_the_bank(max_vectors, reduce):
    first = filled(max_vectors=max_vectors, reduce=reduce)
    second = filled(order=[5, 1, 3, 0, 4, 2], batch=4, max_vectors=max_vectors, reduce=reduce)
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


@pytest.mark.parametrize("reduce", ["kcenter", "kmeans"])
def test_a_reduction_holds_no_more_than_its_candidates_and_keeps_real_patches(reduce, monkeypatch):
    monkeypatch.setattr("patchad.memory.CANDIDATES", 50)
    bank = MemoryBank(side=16, max_vectors=9, reduce=reduce)
    for image in range(IMAGES):
        bank.add(embeddings()[image : image + 1], torch.ones(1, ROWS, COLUMNS, dtype=torch.bool), torch.tensor([image]))
        assert len(bank) <= 50
    bank.finish()
    assert 5 < len(bank) <= 9
    image, position = bank.keys.T
    assert torch.equal(bank.vectors, embeddings().flatten(2)[image, :, position])


def covering_radius(vectors: torch.Tensor, chosen: torch.Tensor) -> float:
    return float(torch.cdist(vectors, vectors[chosen]).amin(1).max())


def test_kcenter_is_the_greedy_choice_of_the_farthest():
    vectors = torch.randn(60, DIM, generator=torch.Generator().manual_seed(3))
    chosen = [int((vectors - vectors.mean(0)).norm(dim=1).argmin())]
    while len(chosen) < 12:
        chosen.append(int(torch.cdist(vectors, vectors[chosen]).amin(1).argmax()))
    assert kcenter(vectors, 12).tolist() == sorted(chosen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kcenter_chooses_alike_at_reduced_precision():
    vectors = torch.randn(60, DIM, generator=torch.Generator().manual_seed(3)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        found = kcenter(vectors, 12)
    assert torch.equal(found, kcenter(vectors, 12))


def test_kcenter_covers_within_twice_the_best():
    vectors = torch.randn(10, 2, generator=torch.Generator().manual_seed(4))
    best = min(covering_radius(vectors, torch.tensor(few)) for few in itertools.combinations(range(10), 3))
    assert covering_radius(vectors, kcenter(vectors, 3)) <= 2 * best


def test_kcenter_of_all_is_all_even_where_some_are_equal():
    vectors = torch.tensor([[1.0], [1.0], [5.0]])
    assert kcenter(vectors, 3).tolist() == [0, 1, 2]


def test_kmeans_keeps_one_patch_of_each_group():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    vectors = (centres[:, None] + torch.rand(3, 20, 2, generator=torch.Generator().manual_seed(5))).flatten(0, 1)
    assert sorted((kmeans_medoids(vectors, 3) // 20).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(("group", "block"), [(1, 7), (7, 7), (7, 28), (20, 120), (20, 1000), (200, 1000)])
def test_the_exported_search_finds_what_faiss_finds(group, block, monkeypatch):
    monkeypatch.setattr("patchad.nearest.GROUP", group)
    monkeypatch.setattr("patchad.nearest.BLOCK", block)
    bank, queries = filled(), torch.randn(2, 50, DIM, generator=torch.Generator().manual_seed(1))
    bank.baseline, bank.levels = 4.0, torch.rand(len(bank), generator=torch.Generator().manual_seed(2)).sqrt()
    assert torch.equal(nearest_by_product(queries, bank.vectors, bank._allowance), bank._search(queries))


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


THINGS = torch.tensor([0, 0, 1, 1, 2, 2])


def slow_levels(bank: MemoryBank, things: torch.Tensor) -> torch.Tensor:
    """One patch after the other, all of them candidates."""
    patches, owners = embeddings().permute(0, 2, 3, 1).flatten(0, 2), things.repeat_interleave(ROWS * COLUMNS)
    lists = divide(bank.vectors, bank.seed).flatten(1)
    home = [int((lists == number).any(1).nonzero()) for number in range(len(bank))]
    found: list[list[float]] = [[] for _ in lists]
    for patch, owner in zip(patches, owners, strict=True):
        distance = (bank.vectors - patch).norm(dim=1)
        other = distance.masked_fill(things[bank.keys[:, 0]] == owner, torch.inf)
        found[home[int(distance.argmin())]].append(float(other.min()))
    mean = sum(map(sum, found)) / sum(map(len, found))
    return torch.tensor([(sum(found[place]) + 5 * mean) / (len(found[place]) + 5) for place in home])


@pytest.mark.parametrize("exact_most", [10, 1000])
@pytest.mark.parametrize("reduce", ["random", "kmeans"])
def test_levels_are_the_distances_to_other_things_that_patches_of_each_list_have(reduce, exact_most, monkeypatch):
    monkeypatch.setattr("patchad.memory.TABLE", 1000)  # a bank that is searched whole, in several parts
    monkeypatch.setattr("patchad.lists.SHARE", 1.0)  # where there are lists, all patches look into all of them
    monkeypatch.setattr("patchad.lists.SECOND", 1000)
    max_vectors = None if reduce == "random" else 30
    bank = filled(baseline=0.5, things=THINGS, max_vectors=max_vectors, reduce=reduce, exact_most=exact_most)
    assert bank.levels.unique().numel() > 1
    torch.testing.assert_close(bank.levels, slow_levels(bank, THINGS), rtol=1e-4, atol=1e-4)


def test_with_a_baseline_distances_are_the_smallest_power_distances():
    bank = filled(baseline=0.8, things=THINGS)
    queries = torch.cat([torch.randn(50, DIM, generator=torch.Generator().manual_seed(1)), embeddings()[0, :, 0].T])
    power = (torch.cdist(queries, bank.vectors).square() - 0.8 * bank.levels.square()).amin(1)
    assert power.min() < 0 < power.max()
    torch.testing.assert_close(bank.distances(queries), power.clamp(min=0).sqrt(), rtol=1e-4, atol=1e-4)


def test_with_a_baseline_distances_do_not_jump_where_the_nearest_vector_changes():
    bank = filled(baseline=0.8, things=THINGS)
    start, end = torch.randn(2, DIM, generator=torch.Generator().manual_seed(1))
    path = torch.lerp(start, end, torch.linspace(0, 1, 10_001)[:, None])
    assert bank.levels.unique().numel() > 1
    assert bank._search(path).unique().numel() > 1
    squares = bank.distances(path).square()
    assert squares.diff().abs().max() < 0.01


def test_without_another_thing_there_is_no_level():
    bank = filled(baseline=1.0, things=torch.zeros(IMAGES, dtype=torch.int64))
    assert (bank.levels == 0).all()
    queries = torch.randn(9, DIM)
    assert torch.equal(bank.distances(queries), filled().distances(queries))


def test_neither_order_nor_batches_change_the_levels():
    one = filled(baseline=0.5, things=THINGS, max_vectors=40, reduce="kmeans")
    other = filled([5, 1, 3, 0, 4, 2], batch=4, baseline=0.5, things=THINGS, max_vectors=40, reduce="kmeans")
    assert torch.equal(one.levels, other.levels)


def test_a_bank_without_patches_has_no_levels():
    assert len(filled(baseline=0.5, counted=torch.zeros(IMAGES, ROWS, COLUMNS, dtype=torch.bool)).levels) == 0


def test_a_negative_baseline_is_refused():
    with pytest.raises(PatchadError, match=r"baseline -0\.5 must be at least 0"):
        MemoryBank(side=16, baseline=-0.5)


@pytest.mark.parametrize("baseline", [0.0, 0.8])
def test_patches_are_compared_with_other_things_alone_where_the_image_is_of_one_in_the_bank(baseline):
    random = torch.Generator().manual_seed(0)
    things, bank = torch.tensor([0, 0, 1, 2]), MemoryBank(16, None, baseline=baseline)
    for number in range(4):
        bank.add(
            torch.rand(1, 6, 3, 3, generator=random), torch.ones(1, 3, 3, dtype=torch.bool), torch.tensor([number])
        )
    bank.finish(things)
    queries, own = torch.rand(3, 5, 6, generator=random), torch.tensor([0, -1, 2])
    squared = torch.cdist(queries.double(), bank.vectors.double()).square() - baseline * bank.levels.double().square()
    other = things[bank.keys[:, 0]] != own[:, None]
    expected = squared.masked_fill(~other[:, None], torch.inf).amin(2).clamp(min=0).sqrt()
    torch.testing.assert_close(bank.distances(queries, own=own).double(), expected, rtol=1e-4, atol=1e-5)
    assert (bank.distances(queries) <= bank.distances(queries, own=own) + 1e-6).all()


def test_a_large_bank_passes_over_what_an_image_shows_too_also_where_its_lists_hold_nothing_else():
    random, bank = torch.Generator().manual_seed(0), MemoryBank(16, None, baseline=0.0, exact_most=500)
    for number in range(4):  # the last image lies far from all others
        values = torch.rand(1, 6, 15, 15, generator=random) + 9 * (number == 3)
        bank.add(values, torch.ones(1, 15, 15, dtype=torch.bool), torch.tensor([number]))
    bank.finish()
    own = torch.arange(4)
    queries = torch.stack([bank.vectors[bank.things == number][:50] for number in own])
    exact = torch.cdist(queries, bank.vectors).masked_fill(bank.things == own[:, None, None], torch.inf).amin(2)
    found = bank.distances(queries, own=own)
    assert len(bank.lists) and (found >= exact - 1e-4).all()
    torch.testing.assert_close(found[3], exact[3])
    assert (found / exact).mean() < 1.05
    assert torch.equal(bank.distances(queries, own=torch.full((4,), -1)), torch.zeros(4, 50))


def test_a_bank_of_one_image_compares_it_with_nothing():
    bank = MemoryBank(16, None)
    bank.add(torch.rand(1, 6, 3, 3), torch.ones(1, 3, 3, dtype=torch.bool), torch.tensor([0]))
    bank.finish()
    with pytest.raises(PatchadError, match="patches of one image alone"):
        bank.distances(torch.rand(1, 5, 6), own=torch.tensor([0]))


def test_the_exported_search_loses_no_digits_where_all_vectors_lie_far_from_zero():
    random = torch.Generator().manual_seed(3)
    vectors, queries = (1000 + torch.rand(count, 8, generator=random) for count in (300, 50))
    expected = torch.cdist(queries.double(), vectors.double()).argmin(1)
    assert torch.equal(nearest_by_product(queries[None], vectors, torch.zeros(300))[0], expected)


@pytest.mark.parametrize("exact_most", [10, 1000])
def test_a_bank_that_was_searched_forgets_its_index_when_another_is_loaded(exact_most):
    bank, other = filled(exact_most=exact_most), filled(exact_most=exact_most)
    other.vectors.add_(5.0)
    other._forget()
    queries = torch.rand(1, 7, DIM)
    before = bank.distances(queries)
    bank.load_state_dict(other.state_dict())
    torch.testing.assert_close(bank.distances(queries), other.distances(queries))
    assert (bank.distances(queries) > before + 1).all()
