"""Which tests say nothing where every fast path is forced off or on (kernelshim/fastpaths.pyx), and why."""

from __future__ import annotations

import pytest

from ulnet.kernelshim import fastpaths

SLOT = "received data stay in ring slots"
RING = "frames come by a ring"
TRAIN = "datagrams leave and come as trains"
HELD = "sent data are held where they lie"
COUNTED = "the exact counts are those of the fast paths as usual"
# Part of a test's name, and what it asserts.
OFF = {
    "test_guard_end_to_end.py::test_the_locks_hold": RING,
    "test_buf.py::test_big_payload_stays_in_its_slot_until_read": SLOT,
    "test_buf.py::test_at_most_half_of_the_ring_is_held": SLOT,
    "test_buf.py::test_slots_that_are_not_scarce_are_held_freely": SLOT,
    "test_buf.py::test_relieve_": SLOT,
    "test_buf.py::test_a_lent_slot_that_cannot_be_evacuated_stays_held": SLOT,
    "test_buf.py::test_the_newest_frame_alone_is_a_whole_turn_away": SLOT,
    "test_buffers_api.py::test_who_cannot_send_keeps_it": HELD,
    "test_buffers_api.py::test_others_wait_while_it_is_being_sent": HELD,
    "test_buffers_api.py::test_trains_and_single_ones_look_alike": TRAIN,
    "test_buffers_api.py::test_the_kernel_takes_trains_apart": TRAIN,
    "test_buffers_api.py::test_trains_from_the_kernel": TRAIN,
    "test_buffers_api.py::test_lending_too_much_degrades_to_copies": SLOT,
}
ON: dict[str, str] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    named = {"off": OFF, "on": ON}.get(fastpaths.MODE, {})
    for item in items:
        for part, what in named.items():
            if part in item.nodeid:
                reason = f"asserts how it is as usual, not with {fastpaths.VARIABLE}={fastpaths.MODE}: {what}"
                item.add_marker(pytest.mark.skip(reason=reason))
