# Time stamps of the data path. Off, a stamp is one predictable branch on a global.
#
# One message passes, in this order (the program's own points come from the measuring program, by stamps.mark):
#   sender    CALL_SEND, TRANSPORT_OUT, OUTPUT (TCP only), IP_OUT, LINK_OUT, LINK_SENT, SEND_RETURN
#   receiver  WOKEN (only if it slept), FRAME, TRANSPORT_IN, DELIVERED, READY, RECV_RETURN
# RELAYED: a server that manages the session has written what came to the program's descriptor.

cdef enum:
    STAMP_CALL_SEND = 1
    STAMP_TRANSPORT_OUT = 2
    STAMP_OUTPUT = 3
    STAMP_IP_OUT = 4
    STAMP_LINK_OUT = 5
    STAMP_LINK_SENT = 6
    STAMP_SEND_RETURN = 7
    STAMP_WOKEN = 8
    STAMP_FRAME = 9
    STAMP_TRANSPORT_IN = 10
    STAMP_DELIVERED = 11
    STAMP_READY = 12
    STAMP_RELAYED = 13
    STAMP_RECV_RETURN = 14

cdef void *stamps_at                 # the mapped file, or NULL: off
cdef void stamp_take(int point) noexcept nogil

cdef inline void stamp(int point) noexcept nogil:
    if stamps_at != NULL:
        stamp_take(point)
