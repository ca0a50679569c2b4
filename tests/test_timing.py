import time
from functools import partial

import pytest
import torch

from patchad import PatchModel
from patchad.lists import divide
from patchad.memory import MemoryBank
from patchad.models import EfficientNetLite0, WindowEncoder
from patchad.timing import (
    STAGES,
    Row,
    alternate,
    best_rate,
    floating_point_operations,
    peak_memory,
    reset_peak_memory,
    stage_rows,
    time_stages,
)

SIZE = (96, 96)


@pytest.fixture(scope="module", params=["dense", "sliding"])
def model(request) -> PatchModel:
    made = PatchModel(EfficientNetLite0(weights="none"), sides=(32,), mode=request.param).eval()
    made.bank(32)._set(torch.zeros(50, 2, dtype=torch.int64), torch.rand(50, 112))
    return made


def test_every_stage_takes_time_and_together_they_are_the_whole(model):
    image, content = torch.rand(2, 3, *SIZE), torch.tensor([SIZE] * 2)
    start = time.perf_counter()
    stages = time_stages(model, image, content)
    whole = 1e3 * (time.perf_counter() - start)
    assert tuple(stages) == STAGES
    assert min(stages.values()) > 0
    assert sum(stages.values()) <= whole
    assert not model.encoder.backbone._forward_hooks


def test_operations_are_counted_as_the_closed_form_says():
    encoder = partial(WindowEncoder, dim=64)
    made = PatchModel(EfficientNetLite0(weights="none"), encoder, sides=(16,), taps={16: "stage2"}).eval()
    made.bank(16)._set(torch.zeros(50, 2, dtype=torch.int64), torch.rand(50, 64))
    counted = floating_point_operations(made, torch.rand(2, 3, *SIZE), torch.tensor([SIZE] * 2))
    positions = 11 * 11  # stride 8
    assert counted["search"] == 2 * 2 * positions * 50 * 64
    assert counted["encoders"] == 2 * 2 * positions * 24 * 64  # a projection of 24 channels to 64 numbers
    stem, first = 48 * 48 * 27 * 32, 48 * 48 * 32 * (9 + 16)
    second = 48 * 48 * 16 * 96 + 24 * 24 * 96 * (9 + 24)
    third = 24 * 24 * 144 * (24 + 9 + 24)
    assert counted["backbone"] == 2 * 2 * (stem + first + second + third)


def test_a_large_bank_is_not_counted_as_if_it_were_searched_whole():
    made = PatchModel(EfficientNetLite0(weights="none"), sides=(16,), bank=partial(MemoryBank, exact_most=100)).eval()
    bank, count = made.bank(16), 4000
    bank._set(torch.zeros(count, 2, dtype=torch.int64), torch.rand(count, 40))
    bank.lists = divide(bank.vectors)
    one, two = (
        floating_point_operations(made, torch.rand(images, 3, *SIZE), torch.tensor([SIZE] * images))["search"]
        for images in (1, 2)
    )
    assert two == 2 * one
    least, whole = (2 * 11 * 11 * 40 * vectors for vectors in (len(bank.lists), count))
    assert least < one < whole / 4


def test_the_floor_is_the_operations_over_the_rate():
    rows = {row.stage: row for row in stage_rows([dict.fromkeys(STAGES, 2.0)] * 3, {"backbone": 3_000_000}, rate=1e9)}
    assert rows["backbone"].floor == pytest.approx(3.0)
    assert rows["fold"].floor is None
    assert rows["all"].times == [10.0] * 3
    assert Row("backbone", [2.0, 4.0, 30.0], 2.0).markdown() == "| backbone | 4.00 | 27.40 | 2.00 | 2.00 |"


def test_tasks_run_in_turns_after_one_warm_up():
    called = []
    times = alternate({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, repeats=2)
    assert called == ["a", "b"] * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


def test_rate_and_memory_are_of_this_machine():
    assert 1e8 < best_rate(torch.device("cpu"), repeats=1) < 1e15
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(40_000_000)
    assert before < peak_memory(torch.device("cpu")) + 1
    assert peak_memory(torch.device("cpu")) > held.numel() * 4 / 1e6


def test_memory_held_before_a_reset_is_forgotten():
    held = torch.ones(60_000_000)
    before = peak_memory(torch.device("cpu"))
    del held
    reset_peak_memory(torch.device("cpu"))
    assert peak_memory(torch.device("cpu")) < before - 200
