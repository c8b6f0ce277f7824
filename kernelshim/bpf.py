"""bpf(2) and two small assemblers, extended and classic, for the programs in filters.py.

Read first: bpf(2), Documentation/bpf/instruction-set.rst, Documentation/networking/filter.rst.
Programs are lists of readable instructions with labels; ``assemble`` resolves the jumps.
"""

import contextlib
import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable
from typing import NamedTuple

__all__ = [
    "ANY",
    "Array",
    "ClassicProgram",
    "ExtendedProgram",
    "Hash",
    "Map",
    "attachable",
    "available",
    "load_socket_filter",
]

# linux/bpf.h: enum bpf_cmd, bpf_map_type, bpf_prog_type, flags
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_GET_NEXT = 0, 1, 2, 3, 4
_PROG_LOAD, _MAP_UPDATE_BATCH = 5, 26
_MAP_TYPE_HASH, _MAP_TYPE_ARRAY = 1, 2
_PROG_TYPE_SOCKET_FILTER = 1
_F_NO_PREALLOC = 1
ANY = 0
_VERIFIER_LOG_BYTES = 1 << 18
_SYSCALL_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351, "loongarch64": 280}

_libc = ctypes.CDLL(None, use_errno=True)


_number = _SYSCALL_NUMBERS.get(platform.machine(), -1)  # -1: no such call, ENOSYS


def _bpf(command: int, attributes: bytes) -> int:
    """One bpf(2) call; the attributes are the bytes of union bpf_attr. Raises OSError."""
    return _bpf_at(command, ctypes.create_string_buffer(attributes, len(attributes)))


def _bpf_at(command: int, attributes: "ctypes.Array[ctypes.c_char]") -> int:
    result: int = _libc.syscall(_number, command, attributes, len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Map:
    """A BPF map with fixed key and value sizes in bytes. Holds its descriptor until ``close``."""

    def __init__(self, kind: int, key_bytes: int, value_bytes: int, entries: int, flags: int = 0) -> None:
        self.key_bytes = key_bytes
        self.value_bytes = value_bytes
        self.entries = entries
        self.fd = _bpf(_MAP_CREATE, struct.pack("=5I", kind, key_bytes, value_bytes, entries, flags))

        # Made once: entries change with every flow, and ctypes objects are what costs most about it.
        self._key = ctypes.create_string_buffer(key_bytes)
        self._value = ctypes.create_string_buffer(value_bytes)
        addresses = ctypes.addressof(self._key), ctypes.addressof(self._value)
        element = struct.pack("=IIQQQ", self.fd, 0, *addresses, ANY)
        self._element = ctypes.create_string_buffer(element, len(element))
        self._only_key = ctypes.create_string_buffer(element[:16], 16)  # the kernel refuses a delete that names a value

    def _set_key(self, key: bytes) -> None:
        if len(key) != self.key_bytes:
            raise ValueError(f"a key of this map has {self.key_bytes} bytes, not {len(key)}")
        self._key.raw = key

    def update(self, key: bytes, value: bytes) -> None:
        """Set one entry; readers see the old or the new value, never a mixture."""
        if len(value) != self.value_bytes:
            raise ValueError(f"a value of this map has {self.value_bytes} bytes, not {len(value)}")
        self._set_key(key)
        self._value.raw = value
        _bpf_at(_MAP_UPDATE, self._element)

    def update_batch(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Set many entries in one system call."""
        pairs = list(items)
        if not pairs:
            return
        keys = ctypes.create_string_buffer(b"".join(key for key, _ in pairs), len(pairs) * self.key_bytes)
        values = ctypes.create_string_buffer(b"".join(value for _, value in pairs), len(pairs) * self.value_bytes)
        addresses = (ctypes.addressof(keys), ctypes.addressof(values))
        _bpf(_MAP_UPDATE_BATCH, struct.pack("=QQQQIIQQ", 0, 0, *addresses, len(pairs), self.fd, ANY, 0))

    def lookup(self, key: bytes) -> bytes | None:
        """The value at key, or None."""
        self._set_key(key)
        try:
            _bpf_at(_MAP_LOOKUP, self._element)
        except FileNotFoundError:
            return None
        return self._value.raw

    def delete(self, key: bytes) -> None:
        """Remove one entry. Raises KeyError when it is not there."""
        self._set_key(key)
        try:
            _bpf_at(_MAP_DELETE, self._only_key)
        except FileNotFoundError:
            raise KeyError(key) from None

    def every_key(self) -> list[bytes]:
        """Every key, for inspection."""
        found: list[bytes] = []
        following = ctypes.create_string_buffer(self.key_bytes)
        key = None
        while len(found) < self.entries:
            at = 0 if key is None else ctypes.addressof(key)
            try:
                _bpf(_MAP_GET_NEXT, struct.pack("=IIQQ", self.fd, 0, at, ctypes.addressof(following)))
            except FileNotFoundError:
                break
            found.append(following.raw)
            key = ctypes.create_string_buffer(following.raw, self.key_bytes)
        return found

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class Hash(Map):
    """A hash map whose memory grows with its entries."""

    def __init__(self, key_bytes: int, value_bytes: int, entries: int) -> None:
        super().__init__(_MAP_TYPE_HASH, key_bytes, value_bytes, entries, _F_NO_PREALLOC)


class Array(Map):
    """An array of ``entries`` values, indexed by u32."""

    def __init__(self, value_bytes: int, entries: int) -> None:
        super().__init__(_MAP_TYPE_ARRAY, 4, value_bytes, entries)


# ---- extended BPF ----

_SIZES = {1: 0x10, 2: 0x08, 4: 0x00, 8: 0x18}  # BPF_B, BPF_H, BPF_W, BPF_DW
_ALU64, _JMP, _LDX, _STX, _ST, _LD = 0x07, 0x05, 0x61, 0x63, 0x62, 0x18
_REGISTER = 0x08  # BPF_X: the source is a register
_ALU = {"add": 0x00, "sub": 0x10, "or": 0x40, "and": 0x50, "lsh": 0x60, "rsh": 0x70, "mov": 0xB0}
_JUMPS = {"eq": 0x10, "gt": 0x20, "ge": 0x30, "set": 0x40, "ne": 0x50, "lt": 0xA0}


class ExtendedProgram:
    """Assembler. Registers are their numbers; ``fp`` (10) is the frame pointer. Jumps name labels."""

    fp = 10

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int, int, str | None]] = []  # op, dst, src, off, imm, jump label
        self._labels: dict[str, int] = {}

    def _add(self, op: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0, to: str | None = None) -> None:
        self._code.append((op, dst, src, off, imm, to))

    def label(self, name: str) -> None:
        if name in self._labels:
            raise ValueError(f"label {name!r} stands twice")
        self._labels[name] = len(self._code)

    def alu(self, operation: str, dst: int, value: int) -> None:
        """dst = dst <operation> constant, 64 bits."""
        self._add(_ALU64 | _ALU[operation], dst, imm=value)

    def alu_reg(self, operation: str, dst: int, src: int) -> None:
        self._add(_ALU64 | _ALU[operation] | _REGISTER, dst, src)

    def load(self, size: int, dst: int, src: int, off: int) -> None:
        """dst = size bytes at src + off."""
        self._add(_LDX | _SIZES[size], dst, src, off)

    def store(self, size: int, dst: int, off: int, src: int) -> None:
        """size bytes at dst + off = register src."""
        self._add(_STX | _SIZES[size], dst, src, off)

    def store_imm(self, size: int, dst: int, off: int, value: int) -> None:
        self._add(_ST | _SIZES[size], dst, 0, off, value)

    def load_map(self, dst: int, source: Map) -> None:
        """dst = the map (BPF_PSEUDO_MAP_FD); takes two instruction slots."""
        self._add(_LD, dst, 1, 0, source.fd)
        self._add(0)

    def jump(self, to: str) -> None:
        self._add(_JMP, to=to)

    def jump_if(self, condition: str, dst: int, value: int, to: str) -> None:
        self._add(_JMP | _JUMPS[condition], dst, imm=value, to=to)

    def call(self, helper: int) -> None:
        self._add(_JMP | 0x80, imm=helper)

    def exit(self, value: int | None = None) -> None:
        """Return r0, or a constant."""
        if value is not None:
            self.alu("mov", 0, value)
        self._add(_JMP | 0x90)

    def assemble(self) -> bytes:
        out = bytearray()
        for at, (op, dst, src, off, imm, to) in enumerate(self._code):
            if to is not None:
                off = self._labels[to] - at - 1
            registers = src << 4 | dst if sys.byteorder == "little" else dst << 4 | src
            out += struct.pack("=BBhI", op, registers, off, imm & 0xFFFFFFFF)
        return bytes(out)


def load_socket_filter(program: ExtendedProgram) -> int:
    """Load a program of type SOCKET_FILTER; returns its descriptor.

    Raises OSError; when the verifier refuses it, with the last lines of its log.
    """
    code = program.assemble()
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"MIT")

    def attributes(level: int, size: int, log: int) -> bytes:
        return struct.pack(
            "=IIQQIIQI",
            _PROG_TYPE_SOCKET_FILTER,
            len(code) // 8,
            ctypes.addressof(instructions),
            ctypes.addressof(licence),
            level,
            size,
            log,
            0,
        )

    try:
        return _bpf(_PROG_LOAD, attributes(0, 0, 0))
    except OSError as refused:
        if refused.errno not in (errno.EINVAL, errno.EACCES, errno.E2BIG):
            raise
        log = ctypes.create_string_buffer(_VERIFIER_LOG_BYTES)
        with contextlib.suppress(OSError):
            return _bpf(_PROG_LOAD, attributes(1, _VERIFIER_LOG_BYTES, ctypes.addressof(log)))
        tail = "\n".join(log.value.decode(errors="replace").splitlines()[-12:])
        raise OSError(refused.errno, f"the BPF verifier refused the program:\n{tail}") from None


def available() -> bool:
    """Whether this process may load eBPF socket filters that use maps (CAP_BPF, or a permissive kernel)."""
    try:
        probe = Hash(4, 4, 1)
    except OSError:
        return False
    program = ExtendedProgram()
    program.alu_reg("mov", 6, 1)
    program.store_imm(4, program.fp, -4, 0)
    program.load_map(1, probe)
    program.alu_reg("mov", 2, program.fp)
    program.alu("add", 2, -4)
    program.call(1)
    program.exit(0)
    try:
        os.close(load_socket_filter(program))
    except OSError:
        return False
    finally:
        probe.close()
    return True


# ---- classic BPF ----

_CLASSIC_MAX = 4096  # BPF_MAXINSNS
SKF_AD_OFF = -0x1000  # linux/filter.h: ancillary data
SKF_NET_OFF = -0x100000  # linux/filter.h: relative to the network header
AD_PROTOCOL, AD_PKTTYPE, AD_IFINDEX, AD_VLAN_TAG_PRESENT = (SKF_AD_OFF + n for n in (0, 4, 8, 48))
_CLASSIC_LOADS = {4: 0x00, 2: 0x08, 1: 0x10}
_CLASSIC_ALU = {"add": 0x04, "or": 0x44, "and": 0x54, "lsh": 0x64, "rsh": 0x74}
_CLASSIC_JUMPS = {"eq": 0x15, "gt": 0x25, "ge": 0x35, "set": 0x45}


class _Classic(NamedTuple):
    code: int
    k: int
    yes: str | None = None
    no: str | None = None


class ClassicProgram:
    """Assembler for classic BPF: accumulator A, index X, scratch M[0..15]. Jumps name labels, or None for next."""

    def __init__(self) -> None:
        self._code: list[_Classic] = []
        self._labels: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._code)

    def label(self, name: str) -> None:
        if name in self._labels:
            raise ValueError(f"label {name!r} stands twice")
        self._labels[name] = len(self._code)

    def load(self, size: int, offset: int) -> None:
        """A = size bytes at a fixed offset (AD_*, or SKF_NET_OFF + n), in host order."""
        self._code.append(_Classic(0x20 | _CLASSIC_LOADS[size], offset))

    def load_at_x(self, size: int, offset: int) -> None:
        """A = size bytes at X + offset."""
        self._code.append(_Classic(0x40 | _CLASSIC_LOADS[size], offset))

    def load_value(self, value: int) -> None:
        """A = a constant."""
        self._code.append(_Classic(0x00, value))

    def load_length(self) -> None:
        """A = bytes of the packet: in a fanout selector, from the network header on."""
        self._code.append(_Classic(0x80, 0))

    def load_scratch(self, cell: int) -> None:
        self._code.append(_Classic(0x60, cell))

    def store_scratch(self, cell: int) -> None:
        self._code.append(_Classic(0x02, cell))

    def scratch_to_x(self, cell: int) -> None:
        self._code.append(_Classic(0x61, cell))

    def a_to_x(self) -> None:
        self._code.append(_Classic(0x07, 0))

    def alu(self, operation: str, value: int) -> None:
        self._code.append(_Classic(_CLASSIC_ALU[operation], value))

    def alu_x(self, operation: str) -> None:
        """A = A <operation> X."""
        self._code.append(_Classic(_CLASSIC_ALU[operation] | 0x08, 0))

    def jump_if(self, condition: str, value: int, yes: str | None = None, no: str | None = None) -> None:
        """At most 255 instructions ahead, by the format; ``jump`` has no limit."""
        self._code.append(_Classic(_CLASSIC_JUMPS[condition], value, yes, no))

    def jump(self, to: str) -> None:
        self._code.append(_Classic(0x05, 0, to))

    def ret(self, value: int) -> None:
        self._code.append(_Classic(0x06, value))

    def ret_a(self) -> None:
        self._code.append(_Classic(0x16, 0))

    def assemble(self) -> bytes:
        """The array of struct sock_filter. Raises OSError(ENOSPC) when it is longer than the kernel takes."""
        if len(self._code) > _CLASSIC_MAX:
            raise OSError(
                errno.ENOSPC,
                f"a classic filter of {len(self._code)} instructions; Linux takes {_CLASSIC_MAX} "
                "(too many flows without CAP_BPF)",
            )
        out = bytearray()
        for at, step in enumerate(self._code):
            if step.code == 0x05:
                assert step.yes is not None
                out += struct.pack("=HBBI", step.code, 0, 0, self._labels[step.yes] - at - 1)
                continue
            skips = [0 if name is None else self._labels[name] - at - 1 for name in (step.yes, step.no)]
            if max(skips) > 255 or min(skips) < 0:
                raise ValueError(f"instruction {at} jumps {skips}: a conditional jump goes 0 to 255 ahead")
            out += struct.pack("=HBBI", step.code, *skips, step.k & 0xFFFFFFFF)
        return bytes(out)


def attachable(program: bytes) -> tuple[bytes, object]:
    """struct sock_fprog for setsockopt, and the memory it points to (keep it until the call is over)."""
    memory = ctypes.create_string_buffer(program, len(program))
    return struct.pack("@HP", len(program) // 8, ctypes.addressof(memory)), memory
