"""The frames between a remote task and the hub. Little endian; both ends are on one machine and of one version.

A request is one header frame (fixed part, body rights, inline data) and one further frame for each out-of-line
buffer. Descriptors travel on the side channel under the tag that the header names, and are sent there first.

Every request but HELLO begins with the key, the last KEY_BYTES of the task's token: libzmq lets a peer choose a routing
id, and so take over that of a connection that has ended, so that the id of a frame does not tell who sent it.
"""

from enum import IntEnum
from struct import Struct

VERSION = 1
TOKEN_BYTES = 32
KEY_BYTES = 16
# Side channel, hub to task: first packet. magic, version, hub pid, task id, token.
WELCOME = Struct("<4sII Q32s")
MAGIC = b"ulnp"
# Side channel, both ways: the tag of the message that the descriptors in this packet belong to.
TAG = Struct("<Q")


class Op(IntEnum):
    """First byte of every header frame."""

    # task to hub
    HELLO = 1  # token; the first frame on every connection
    CALL = 2  # a call on the name space: JSON list [name, arguments...]
    SEND = 3  # one way, answered by STATUS when it is in the queue
    POST = 4  # one way, answered by nothing but now and then a POSTED
    RPC = 5  # answered by REPLY, or STATUS when refused
    CANCEL = 6  # the caller's time is over; answered by STATUS unless an answer is on its way
    TAKEN = 7  # the program has taken the pushed messages of a port up to this serial
    BYE = 8  # last frame of a connection; answered by STATUS
    # hub to task
    STATUS = 20
    REPLY = 21
    DELIVER = 22
    REVOKE = 23  # the receive right left the task: what was pushed and not taken is void
    POSTED = 24  # posts handled so far on this connection, and how many of them were refused
    REFUSED = 25  # the connection's credentials are not those of the side channel


# Structures of requests, after the key.
# op, remote disposition, local disposition, 0, seq, remote, local, id, descriptor tag, buffers, descriptors, rights
REQUEST = Struct("<BBBBIIIiQHHI")
# name, disposition, serial of the last message taken (MOVE_RECEIVE)
RIGHT = Struct("<IIQ")
# op, remote type, 0, 0, seq, remote, local, id, descriptor tag, buffers, descriptors, rights,
# task, pid, uid, gid, seqno, serial
MESSAGE = Struct("<BBBBIIIiQHHIIIIIIQ")
# name, type
GIVEN = Struct("<II")
# op, seq, code; JSON result follows
STATUS = Struct("<BxxxIi")
# op, seq; more follows
SHORT = Struct("<BxxxI")
# op, port name, serial
TAKEN = Struct("<BxxxIQ")
# op, posts handled, posts refused
POSTED = Struct("<BxxxII")
# op, version, kind of connection, token
HELLO = Struct("<BBBx32s")
KIND_CALLS, KIND_RECEIVER = 0, 1
# Posts a connection may have outstanding; the hub answers each half of it.
POST_WINDOW = 64
