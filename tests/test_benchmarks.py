import re

import pytest

from benchmarks import large_banks


def test_the_path_to_very_large_banks_finds_the_nearest_in_all_shards(capsys, monkeypatch):
    monkeypatch.setattr(large_banks, "CHUNK", 5_000)
    large_banks.main(vectors=22_000, shards=3, queries=300, probes=64, code="PQ32x4")
    told = capsys.readouterr().out
    row = [cell.strip() for cell in told.splitlines()[2].split("|")]
    assert row[1] == "22000"
    assert float(re.match(r"[\d.]+", row[8])[0]) > 60
    excess = float(re.search(r"by ([\d.-]+) %", told)[1])
    assert 0 <= excess < 5


def test_exact_search_over_chunks_is_exact_search_over_all(monkeypatch):
    import numpy as np

    monkeypatch.setattr(large_banks, "CHUNK", 700)
    vectors = np.concatenate(list(large_banks.chunks(range(3), 2000)))
    asked = next(large_banks.chunks([-1], 20))
    distance, number = large_banks.exactly(asked, 2000)
    expected = np.linalg.norm(asked[:, None] - vectors[None], axis=2)
    assert np.array_equal(number, expected.argmin(1))
    np.testing.assert_allclose(distance, expected.min(1), rtol=1e-3)
    np.testing.assert_allclose(large_banks.distances(asked, number, 2000), expected.min(1), rtol=1e-5)


@pytest.mark.parametrize("number", [-1, 0, 2])
def test_chunks_are_the_same_each_time(number):
    first, second = (next(large_banks.chunks([number], 10_000_000)) for _ in range(2))
    assert (first[:10] == second[:10]).all()
