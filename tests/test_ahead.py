import threading
from collections.abc import Iterator

import pytest

from patchad.ahead import MOST, in_order


def test_results_are_taken_in_order_by_one_thread_while_several_work():
    """The first item is done last: it waits for three others."""
    others, taken, takers = threading.Semaphore(0), [], set()

    def work(number: int) -> int:
        for _ in range(3):
            if number == 0:
                assert others.acquire(timeout=60)
        others.release()
        return 10 * number

    def take(result: int) -> None:
        taken.append(result)
        takers.add(threading.get_ident())

    in_order(work, take, range(20), threads=2)
    assert taken == [10 * number for number in range(20)] and len(takers) == 1


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_few_items_are_begun_ahead_of_what_is_taken(threads):
    taken, ahead, lock = [], [], threading.Lock()

    def items() -> Iterator[int]:
        for number in range(50):
            with lock:
                ahead.append(number - len(taken))
            yield number

    in_order(lambda number: number, taken.append, items(), threads)
    assert len(taken) == 50 and max(ahead) < 2 * min(MOST, threads)


def test_a_result_is_taken_before_the_next_item_comes():
    answered = threading.Event()

    def items() -> Iterator[str]:
        for name in ("a", "b", "c"):
            answered.clear()
            yield name
            assert answered.wait(60)

    taken = []
    in_order(str.upper, lambda result: (taken.append(result), answered.set()), items())
    assert taken == ["A", "B", "C"]


@pytest.mark.parametrize("fails", ["work", "take", "items"])
def test_nothing_behind_an_error_is_taken_and_the_first_one_is_told(fails):
    taken, begun = [], []

    def failing(place: str, number: int) -> int:
        if place == fails and number >= 3:
            raise ValueError(f"{number}")
        return number

    def items() -> Iterator[int]:
        for number in range(1000):
            begun.append(number)
            yield failing("items", number)

    with pytest.raises(ValueError, match=r"^3$"):
        in_order(
            lambda number: failing("work", number),
            lambda number: taken.append(failing("take", number)),
            items(),
            threads=2,
        )
    assert taken == [0, 1, 2] and len(begun) < 20
