"""Which tests say nothing where every fast path is forced off or on (kernelshim/fastpaths.pyx), and why."""

from __future__ import annotations

import pytest

from ulnet.kernelshim import fastpaths

SLOT = "received data stay in ring slots"
RING = "frames come by a ring"
TRAIN = "datagrams leave and come as trains"
HELD = "sent data are held where they lie"
COPIED = "small data are copied out of their slots, together where they belong together"
WHILE_IT_PAYS = "polling ends where it is in vain"
OTHERS = "the other packet interfaces are used where asked for"
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
    "test_measuring.py::test_lent_buffers_are_counted_back": SLOT,
    "test_packet_interfaces.py::test_each_carries_data_and_sleeps_while_nothing_comes": RING,
    "test_packet_interfaces.py::test_only_the_polled_ring_spins": RING,
    "test_session_fork.py::test_buffers_in_a_ring_are_read_in_both": SLOT,
    "test_sim.py::test_slow_reader_with_a_small_ring_loses_nothing": SLOT,
    "test_tcp_output.py::test_peek_and_lend": SLOT,
    "test_udp.py::test_large_datagrams_keep_their_slot_and_give_it_back": SLOT,
}
ON = {
    "test_buf.py::test_small_payload_is_copied_and_its_slot_returns_at_once": COPIED,
    "test_buf.py::test_stream_segments_coalesce_but_datagrams_do_not": COPIED,
    "test_buf.py::test_relieve_": COPIED,
    "test_buf.py::test_a_lent_slot_that_cannot_be_evacuated_stays_held": COPIED,
    "test_packet_interfaces.py::test_each_carries_data_and_sleeps_while_nothing_comes": OTHERS,
    "test_packet_interfaces.py::test_polling_ends_where": WHILE_IT_PAYS,
    "test_relay.py::test_a_prefix_comes_first_and_keeps_the_window": COPIED,
    "test_tcp_input.py::test_neighbouring_crumbs_become_few_blocks": COPIED,
    "test_udp.py::test_large_datagrams_keep_their_slot_and_give_it_back": COPIED,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    named = {"off": OFF, "on": ON}.get(fastpaths.MODE, {})
    for item in items:
        for part, what in named.items():
            if part in item.nodeid:
                reason = f"asserts how it is as usual, not with {fastpaths.VARIABLE}={fastpaths.MODE}: {what}"
                item.add_marker(pytest.mark.skip(reason=reason))
