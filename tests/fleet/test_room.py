"""What machines have for the fleet: others' devices are kept out, one wrong reading is not believed."""

from __future__ import annotations

from orchestrator.fleet.room import Host, Room
from orchestrator.fleet.view import Allocation
from orchestrator.planning.layout import Layout


def room(**hosts: Host) -> Room:
    return Room().read(hosts).read(hosts).read(hosts)


def told(**devices: int) -> Allocation:
    return Allocation("cpu", devices, Layout(sum(devices.values()), 1, 1))


def test_what_others_hold_is_not_given_away() -> None:
    assert dict(room(n1=Host("cpu", 4, 1, {"a": 2}), n2=Host("cpu", 2, 2)).nodes()) == {
        "n1": ("cpu", 3),
        "n2": ("cpu", 2),
    }


def test_a_part_of_a_device_makes_all_of_it_somebody_elses() -> None:
    assert room(n1=Host("cpu", 4, 3.5)).nodes()["n1"].devices == 3


def test_where_there_are_accelerators_only_those_are_shared() -> None:
    assert dict(room(n1=Host("cpu", 8, 8), n2=Host("A100", 4, 4)).nodes()) == {"n2": ("A100", 4)}


def test_one_reading_between_two_moments_is_not_believed() -> None:
    steady = Host("cpu", 4, 2, {"a": 2})
    known = room(n1=steady)
    # Its workers have just gone from the one table, and not yet from the other.
    assert known.read({"n1": Host("cpu", 4, 2)}).nodes()["n1"].devices == 4
    assert known.read({"n1": Host("cpu", 4, 2)}).read({"n1": Host("cpu", 4, 2)}).nodes()["n1"].devices == 2


def test_a_machine_that_is_gone_is_forgotten() -> None:
    both = room(n1=Host("cpu", 2, 2), n2=Host("cpu", 2, 2))
    left = both.read({"n2": Host("cpu", 2, 2)})
    assert list(left.nodes()) == ["n2"]
    assert not left.has_place("a", told(n1=1))


def test_a_run_starts_where_devices_are_free_or_its_own() -> None:
    known = room(n1=Host("cpu", 4, 1, {"a": 2, "b": 1}))
    assert known.has_place("a", told(n1=3))
    assert not known.has_place("b", told(n1=3))
    assert known.has_place("b", told(n1=2))


def test_a_run_is_in_the_way_of_another_only_on_devices_that_it_is_to_give_up() -> None:
    known = room(n1=Host("cpu", 4, 0, {"a": 4}))
    shares = {"a": told(n1=2), "b": told(n1=2)}
    assert known.is_in_the_way("a", shares)
    assert not known.is_in_the_way("b", shares)
    assert not known.is_in_the_way("a", {"a": told(n1=4), "b": None})
    assert not room(n1=Host("cpu", 6, 2, {"a": 4})).is_in_the_way("a", shares)


def test_runs_that_change_places_are_both_in_the_way() -> None:
    known = room(n1=Host("cpu", 1, 0, {"a": 1}), n2=Host("cpu", 1, 0, {"b": 1}))
    shares = {"a": told(n2=1), "b": told(n1=1)}
    assert known.is_in_the_way("a", shares)
    assert known.is_in_the_way("b", shares)
