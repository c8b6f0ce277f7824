"""ulnet: user-level networking for Python on Linux.

Each application runs the TCP/UDP data path in its own address space; a network
server sets sessions up and hands them over; the kernel filters and delivers packets.
"""

__version__ = "0.1.0"
