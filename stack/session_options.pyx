"""Socket options of a session: what a shell keeps for its connection, and what goes to the protocol at once."""

from libc.errno cimport EINVAL, ENOPROTOOPT, ENOTCONN, EOPNOTSUPP
from libc.stdint cimport uint8_t, uint16_t, uint32_t

from ulnet.stack.engine_core cimport ROLE_TCP
from ulnet.stack.tcp cimport tcp_getopt, tcp_setopt
from ulnet.stack.tcp_cb cimport TCP_MSS_MIN
from ulnet.stack.types cimport UL_IPPROTO_TCP, UL_IPPROTO_UDP, addr_is_zero

cdef enum:
    SOL_SOCKET = 1
    SO_SNDBUF = 7
    SO_RCVBUF = 8
    SO_KEEPALIVE = 9
    SO_RCVLOWAT = 18
    SO_TIMESTAMP = 29
    SOL_IP = 0
    IP_TOS = 1
    IP_TTL = 2
    IP_MTU_DISCOVER = 10
    IP_MTU = 14
    TCP_NODELAY = 1
    TCP_MAXSEG = 2
    TCP_KEEPIDLE = 4
    TCP_KEEPINTVL = 5
    TCP_KEEPCNT = 6
    TCP_USER_TIMEOUT = 18


cdef int option_set(engine *e, ul_session *s, int level, int name, int value) noexcept nogil:
    if level == SOL_IP:
        if name == IP_TTL:
            if value == -1:                # ip(7): the default again
                value = 64
            if value < 1 or value > 255:
                return -EINVAL
            s.ttl = <uint8_t>value
            return 0
        if name == IP_TOS:
            s.tos = <uint8_t>value
            return 0
        if name == IP_MTU_DISCOVER:
            if value < 0 or value > 5:
                return -EINVAL
            s.mtu_discover = <uint8_t>value
            return 0
        return -ENOPROTOOPT
    if level == SOL_SOCKET and name == SO_RCVLOWAT:
        s.rcvlowat_bytes = <uint32_t>(value if value >= 0 else 0x7FFFFFFF)
        return 0
    if level == SOL_SOCKET and name == SO_TIMESTAMP:
        s.stamp = value != 0
        return 0
    if s.flow.proto == UL_IPPROTO_UDP:
        if level == SOL_SOCKET and name == SO_RCVBUF:
            s.cfg.rcvbuf_bytes = <uint32_t>(value if value > 4096 else 4096)
            if s.udp != NULL:
                s.udp.rcvbuf_bytes = s.cfg.rcvbuf_bytes
            return 0
        if level == SOL_SOCKET and name == SO_KEEPALIVE:
            s.cfg.keepalive = value != 0   # means nothing, but is remembered
            return 0
        if level == SOL_SOCKET and name == SO_SNDBUF:
            return 0
        return -ENOPROTOOPT
    # The configuration is what accepted connections inherit and what the control block starts with.
    if level == SOL_SOCKET:
        if name == SO_SNDBUF:
            s.cfg.sndbuf_bytes = <uint32_t>(value if value > 4096 else 4096)
        elif name == SO_RCVBUF:
            s.cfg.rcvbuf_bytes = <uint32_t>(value if value > 4096 else 4096)
        elif name == SO_KEEPALIVE:
            s.cfg.keepalive = value != 0
        elif s.role != ROLE_TCP:
            return -ENOPROTOOPT
    elif level == UL_IPPROTO_TCP:
        if name == TCP_NODELAY:
            s.cfg.nodelay = value != 0
        elif name == TCP_KEEPIDLE or name == TCP_KEEPINTVL or name == TCP_KEEPCNT:
            if value < 1 or value > (127 if name == TCP_KEEPCNT else 32767):
                return -EINVAL
            if name == TCP_KEEPIDLE:
                s.cfg.keepidle_s = value
            elif name == TCP_KEEPINTVL:
                s.cfg.keepintvl_s = value
            else:
                s.cfg.keepcnt = value
        elif name == TCP_USER_TIMEOUT:
            if value < 0:
                return -EINVAL
            s.cfg.user_timeout_ms = value
        elif name == TCP_MAXSEG and s.role != ROLE_TCP:
            if value < TCP_MSS_MIN or value > 65495:
                return -EINVAL
            if value < s.cfg.mss_bytes:
                s.cfg.mss_bytes = <uint16_t>value
        elif s.role != ROLE_TCP:
            return -ENOPROTOOPT
    else:
        return -ENOPROTOOPT
    if s.role == ROLE_TCP:
        return tcp_setopt(&e.env, s.tcp, level, name, value)
    return 0


cdef int option_get(engine *e, ul_session *s, int level, int name, int *value) noexcept nogil:
    if level != SOL_SOCKET and level != SOL_IP and level != s.flow.proto:
        return -EOPNOTSUPP                 # setsockopt() says ENOPROTOOPT to the same: so does Linux
    if level == SOL_IP and name == IP_TTL:
        value[0] = s.ttl
        return 0
    if level == SOL_IP and name == IP_TOS:
        value[0] = s.tos
        return 0
    if level == SOL_IP and name == IP_MTU_DISCOVER:
        value[0] = s.mtu_discover
        return 0
    if level == SOL_IP and name == IP_MTU:
        if addr_is_zero(&s.flow.raddr):
            return -ENOTCONN
        value[0] = <int>e.link.mtu_bytes
        if s.path_mtu_bytes and s.path_mtu_bytes < e.link.mtu_bytes:
            value[0] = s.path_mtu_bytes
        return 0
    if level == SOL_SOCKET and name == SO_RCVLOWAT:
        value[0] = <int>(s.rcvlowat_bytes if s.rcvlowat_bytes else 1)
        return 0
    if s.role == ROLE_TCP:
        return tcp_getopt(s.tcp, level, name, value)
    if level == SOL_SOCKET:
        if name == SO_SNDBUF:
            value[0] = s.cfg.sndbuf_bytes
        elif name == SO_RCVBUF:
            value[0] = s.cfg.rcvbuf_bytes
        elif name == SO_KEEPALIVE:
            value[0] = s.cfg.keepalive
        else:
            return -ENOPROTOOPT
        return 0
    if level == UL_IPPROTO_TCP and s.flow.proto == UL_IPPROTO_TCP:
        if name == TCP_NODELAY:
            value[0] = s.cfg.nodelay
        elif name == TCP_KEEPIDLE:
            value[0] = s.cfg.keepidle_s
        elif name == TCP_KEEPINTVL:
            value[0] = s.cfg.keepintvl_s
        elif name == TCP_KEEPCNT:
            value[0] = s.cfg.keepcnt
        elif name == TCP_USER_TIMEOUT:
            value[0] = s.cfg.user_timeout_ms
        elif name == TCP_MAXSEG:
            value[0] = s.cfg.mss_bytes
        else:
            return -ENOPROTOOPT
        return 0
    return -ENOPROTOOPT
