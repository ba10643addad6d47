"""Work in threads: order, small items, errors."""

from __future__ import annotations

import threading

import pytest

from ckptvcs.parallel import ordered_map

LARGE = 1 << 20


def thread_of(_: int) -> int:
    return threading.get_ident()


def test_small_items_need_no_thread_and_results_keep_their_order() -> None:
    sizes = [LARGE, 1, LARGE, 2, 3, LARGE, 4]
    found = list(ordered_map(lambda size: (size, thread_of(size)), sizes, lambda size: size))
    assert [size for size, _ in found] == sizes
    here = threading.get_ident()
    assert [thread == here for _, thread in found] == [size < LARGE for size in sizes]


@pytest.mark.parametrize("size", [1, LARGE])
def test_an_error_is_raised_at_its_item(size: int) -> None:
    def fail_at_two(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    results = ordered_map(fail_at_two, range(5), lambda _: size)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
