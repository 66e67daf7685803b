"""Which devices: runs stay where they are, room is made where it pays, nobody is spread."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fleets import job, nodes
from orchestrator.fleet.cluster import Fleet
from orchestrator.fleet.placement import Choice, Wish, place


def fleet(count: int = 0, **devices: tuple[int, int]) -> Fleet:
    return Fleet.of([job(f"run-{index}") for index in range(count)], nodes(**devices))


def wish(index: int, *devices: int, here: dict[str, int] | None = None, moving: float = 0.1) -> Wish:
    choices = tuple(Choice(0, count, float(count)) for count in devices)
    return Wish(index, choices, 0.0, here, 0 if here else -1, moving)


def test_a_run_keeps_its_place_and_others_fill_the_fullest_node() -> None:
    placed = place(fleet(gpu=(2, 8)), [wish(0, 2, here={"gpu-01": 2}), wish(1, 4), wish(2, 8)])
    assert {index: dict(one.where) for index, one in placed.items()} == {
        0: {"gpu-01": 2},
        1: {"gpu-01": 4},
        2: {"gpu-00": 8},
    }
    assert not any(one.moved for one in placed.values())


def test_large_runs_get_whole_nodes() -> None:
    placed = place(fleet(gpu=(4, 8)), [wish(0, 1, here={"gpu-01": 1}), wish(1, 24)])
    assert dict(placed[1].where) == {"gpu-00": 8, "gpu-02": 8, "gpu-03": 8}


def test_room_is_made_where_that_costs_less_than_it_is_worth() -> None:
    scattered = [wish(index, 2, here={f"gpu-0{index}": 2}) for index in range(2)]
    placed = place(fleet(gpu=(2, 4)), [*scattered, wish(2, 4)])
    assert dict(placed[2].where) == {"gpu-00": 4}
    assert dict(placed[0].where) == {"gpu-01": 2}
    assert [placed[index].moved for index in range(3)] == [True, False, False]


def test_where_moving_costs_more_a_smaller_size_is_taken() -> None:
    dear = [wish(index, 2, here={f"gpu-0{index}": 2}, moving=10.0) for index in range(2)]
    placed = place(fleet(gpu=(2, 4)), [*dear, wish(2, 4, 2, 1)])
    assert placed[2].choice.devices == 2
    assert not any(one.moved for one in placed.values())


def test_a_run_that_cannot_grow_stays() -> None:
    growing = Wish(0, (Choice(0, 8, 8.0), Choice(0, 2, 2.0)), 0.0, {"gpu-00": 2}, 1, 100.0)
    other = wish(1, 2, here={"gpu-00": 2}, moving=100.0)
    placed = place(fleet(gpu=(1, 8)), [growing, other])
    assert dict(placed[0].where) == {"gpu-00": 2}


@given(
    st.lists(st.sampled_from([1, 2, 4, 8, 16, 24]), max_size=12),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 8)), max_size=6),
)
def test_places_fit_and_are_as_few_as_possible(sizes: list[int], count: int, kept: list[tuple[int, int]]) -> None:
    free = {f"gpu-{index:02}": 8 for index in range(count)}
    wishes = []
    for index, devices in kept:
        name = f"gpu-{index:02}"
        if free.get(name, 0) >= devices:
            free[name] -= devices
            wishes.append(wish(len(wishes), devices, here={name: devices}))
    standing = len(wishes)
    wishes += [wish(standing + index, size) for index, size in enumerate(sizes)]
    placed = place(fleet(gpu=(count, 8)), wishes)
    used = dict.fromkeys(free, 0)
    for one in placed.values():
        assert sum(one.where.values()) == one.choice.devices
        assert len(one.where) == -(-one.choice.devices // 8)
        for name, devices in one.where.items():
            used[name] += devices
    assert all(devices <= 8 for devices in used.values())
    assert set(range(standing)) <= set(placed)
