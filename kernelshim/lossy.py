"""A test host in the middle of a cable that loses one frame in so many, both ways, whoever sent it.

Read first: nft(8) "numgen", "fwd" in the netdev family. There is no netem everywhere, and a packet socket sees frames
before the rules of its own interface: so the loss is on a host between the two, and the same for everybody.

Call order: ``testbed.wire(a, middle)``, ``testbed.wire(b, middle)``, ``LossyHop(middle)``, ``lose(100)``.
The kernel forwards frames as they are: a segment that is still to be cut is one frame here, and lost as a whole.
"""

from __future__ import annotations

import socket
import struct
import sys
from types import TracebackType

from pyroute2.netlink import NETLINK_NETFILTER  # type: ignore[import-untyped,unused-ignore]
from pyroute2.netlink.nfnetlink.nftsocket import (  # type: ignore[import-untyped,unused-ignore]
    NFT_MSG_DELTABLE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWTABLE,
)

# Rules are written and sent as the guard's are (guard.py says why not by pyroute2).
from .guard import _BEGIN, _END, _attr, _be32, _compare, _expression, _nest, _nft, _split, _text, _verdict
from .testbed import Host

_TABLE = "ulnet_lossy"
# linux/netfilter/nf_tables.h, linux/netlink.h
_REGISTER = 8  # NFT_REG32_00
_RANDOM = 1  # NFT_NG_RANDOM
_INGRESS, _DROP, _ACCEPT = 0, 0, 1
_APPEND = 0x1 | 0x400 | 0x800  # NLM_F_REQUEST | NLM_F_CREATE | NLM_F_APPEND
_NLMSG_ERROR = 2


class LossyHop:
    """Forwards between the two interfaces of ``middle``; loses nothing until told to. OSError: nf_tables cannot."""

    def __init__(self, middle: Host) -> None:
        if len(middle.interfaces) != 2:
            raise ValueError(f"host {middle.name!r} is wired to {len(middle.interfaces)} others, not 2")
        self._ends = [(interface.name, interface.index) for interface in middle.interfaces]
        self._socket = middle.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_NETFILTER)
        try:
            self.lose(0)
        except BaseException:
            self._socket.close()
            raise

    def lose(self, one_in: int) -> None:
        """From now on one frame in ``one_in``, at random; 0: none."""
        if one_in < 0 or one_in == 1:
            raise ValueError(f"one frame in {one_in} cannot be lost: 0, or 2 and more")
        table = _text(1, _TABLE)
        batch = [_nft(NFT_MSG_NEWTABLE, table), _nft(NFT_MSG_DELTABLE, table), _nft(NFT_MSG_NEWTABLE, table)]
        for (name, _), (_, onward) in zip(self._ends, reversed(self._ends), strict=True):
            hook = _nest(4, _be32(1, _INGRESS), _be32(2, 0), _text(3, name))
            batch.append(_nft(NFT_MSG_NEWCHAIN, table, _text(3, name), hook, _be32(5, _ACCEPT), _text(7, "filter")))
            rules = []
            if one_in:
                rules.append(
                    _expression("numgen", _be32(1, _REGISTER), _be32(2, one_in), _be32(3, _RANDOM))
                    + _compare(bytes(4))
                    + _verdict(_DROP)
                )
            device = onward.to_bytes(4, sys.byteorder)
            rules.append(
                _expression("immediate", _be32(1, _REGISTER), _nest(2, _attr(1, device)))
                + _expression("fwd", _be32(1, _REGISTER))
            )
            batch += [_nft(NFT_MSG_NEWRULE, table, _text(2, name), _nest(4, rule), flags=_APPEND) for rule in rules]
        self._commit(batch)

    def _commit(self, messages: list[bytes]) -> None:
        self._socket.send(b"".join((_BEGIN, *messages, _END)))
        while True:
            try:
                answer = self._socket.recv(65536)
            except BlockingIOError:
                return
            for kind, body in _split(answer):
                code = -struct.unpack_from("=i", body)[0] if kind == _NLMSG_ERROR else 0
                if code:
                    raise OSError(code, "a lossy hop needs nf_tables with numgen and fwd on netdev ingress")

    def close(self) -> None:
        """The rules end with their host."""
        self._socket.close()

    def __enter__(self) -> LossyHop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
