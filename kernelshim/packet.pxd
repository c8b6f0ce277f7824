# A channel's packet sockets as a link.

from ulnet.kernelshim.link cimport Link
from ulnet.kernelshim.rings cimport pk_ctx

cdef class PacketLink(Link):
    cdef pk_ctx c
    cdef readonly str interface
    cdef void _shut(self) noexcept
