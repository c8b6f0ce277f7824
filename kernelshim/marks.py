"""The packet mark of a channel: SO_MARK ties what a channel's socket sends to the endpoints it was given.

The server sets it before it hands the socket over; changing it takes CAP_NET_ADMIN (socket(7)).
"""

MARK_TAG = 0x756C0000  # "ul", in the upper half
MARK_MASK = 0xFFFF0000
CHANNEL_MASK = 0x0000FFFF  # the lower half is the channel's number


def channel_mark(channel_id: int, tag: int = MARK_TAG) -> int:
    """SO_MARK of the channel. Raises ValueError outside 0..65535."""
    if not 0 <= channel_id <= CHANNEL_MASK:
        raise ValueError(f"channel id {channel_id} does not fit the mark: use 0 to {CHANNEL_MASK}")
    return tag | channel_id
