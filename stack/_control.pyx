"""Control messages: what goes and comes beside a datagram, as sendmsg(2) and recvmsg(2) of Linux have it (ip(7))."""

import socket as _std
from operator import index as operator_index

from libc.errno cimport EINVAL, ENETUNREACH, ENODEV, EPERM
from libc.stdint cimport int64_t

from ulnet.stack.engine_core cimport time_of_day

cdef extern from "<sys/socket.h>" nogil:
    enum: MSG_CTRUNC

cdef enum:
    CMSG_HEAD_BYTES = 16         # struct cmsghdr; data and the next one are aligned to 8
    # Control messages (socket(7), ip(7)): levels and types
    SOL_SOCKET = 1
    SCM_RIGHTS = 1
    SCM_CREDENTIALS = 2
    SCM_TIMESTAMP = 29
    SCM_TIMESTAMPNS = 35
    SO_MARK = 36
    SOL_IP = 0
    IP_TOS = 1
    IP_TTL = 2
    IP_PKTINFO = 8
    # What is wanted (_sockopt.BESIDE)
    WANT_STAMP = 1
    WANT_STAMP_NS = 2
    WANT_PKTINFO = 4
    WANT_TTL = 8
    WANT_TOS = 16


cdef int refuse(int number, str what) except -1:
    raise OSError(number, what)


cdef int control_parse(list ancdata, bint dgram, Session s, int ifindex, user_meta *meta) except -1:
    # What Linux does: ip_cmsg_send() for datagrams, only SOL_SOCKET is looked at for streams; other levels are passed by.
    cdef int level, kind, device
    cdef int value = 0
    cdef list items = []
    for item in ancdata:
        if not isinstance(item, (tuple, list)) or len(item) != 3:
            raise TypeError("[sendmsg() ancillary data items] must be (level, type, data) tuples")
        items.append((operator_index(item[0]), operator_index(item[1]), bytes(memoryview(item[2]))))
    meta.ttl = meta.tos = -1
    for number, name, data in items:
        level = number
        kind = name
        if level == SOL_SOCKET and kind != SCM_RIGHTS and kind != SCM_CREDENTIALS:
            refuse(EPERM if kind == SO_MARK else EINVAL, f"control message {kind} of SOL_SOCKET cannot be sent")
        if level != SOL_IP or not dgram:
            continue
        if kind == IP_PKTINFO:
            if len(data) != 12:
                refuse(EINVAL, f"IP_PKTINFO is 12 bytes long, not {len(data)}")
            device = int.from_bytes(data[:4], "little", signed=True)
            source = ".".join([str(b) for b in data[4:8]])
            if device != 0 and device != ifindex:
                refuse(ENODEV, f"IP_PKTINFO: this stack has no interface {device}")
            if source != "0.0.0.0" and source != s.local[0]:
                refuse(ENETUNREACH, f"IP_PKTINFO: {source} is not the address of this socket")
        elif kind == IP_TTL or kind == IP_TOS:
            if len(data) == 4:
                value = int.from_bytes(data, "little", signed=True)
            elif kind == IP_TOS and len(data) == 1:
                value = data[0]
            else:
                refuse(EINVAL, f"IP_TTL and IP_TOS are ints, not {len(data)} bytes")
            if not (0 if kind == IP_TOS else 1) <= value <= 255:
                refuse(EINVAL, f"IP_TTL or IP_TOS of {value}: at most 255")
            if kind == IP_TTL:
                meta.ttl = value
            else:
                meta.tos = value
        else:
            refuse(EINVAL, f"control message {kind} of IPPROTO_IP cannot be sent")
    return len(items)


cdef list control_list(Session s, const user_meta *meta, uint32_t wanted, int ifindex, Py_ssize_t room, int *out_flags):
    # In Linux's order; what does not fit is cut or left out as put_cmsg() does.
    cdef list found = []
    cdef list fitting = []
    cdef int64_t stamp = meta.stamp_ns if meta.stamp_ns else time_of_day()
    cdef Py_ssize_t size
    if wanted & WANT_STAMP:
        found.append((SOL_SOCKET, SCM_TIMESTAMP, (stamp // 1000000000).to_bytes(8, "little")
                      + (stamp % 1000000000 // 1000).to_bytes(8, "little")))
    if wanted & WANT_STAMP_NS:
        found.append((SOL_SOCKET, SCM_TIMESTAMPNS, (stamp // 1000000000).to_bytes(8, "little")
                      + (stamp % 1000000000).to_bytes(8, "little")))
    if wanted & WANT_PKTINFO:
        own = _std.inet_aton(s.local[0])
        found.append((SOL_IP, IP_PKTINFO, ifindex.to_bytes(4, "little") + own + own))
    if wanted & WANT_TTL:
        found.append((SOL_IP, IP_TTL, meta.ttl.to_bytes(4, "little")))
    if wanted & WANT_TOS:
        found.append((SOL_IP, IP_TOS, meta.tos.to_bytes(1, "little")))
    for level, kind, data in found:
        size = len(data)
        if room < CMSG_HEAD_BYTES:
            out_flags[0] |= MSG_CTRUNC
            continue
        if room < CMSG_HEAD_BYTES + size:
            out_flags[0] |= MSG_CTRUNC
            size = room - CMSG_HEAD_BYTES
        fitting.append((level, kind, data[:size]))
        room -= min(room, (CMSG_HEAD_BYTES + size + 7) & ~7)
    return fitting
