"""Mach's constants: rights, dispositions, options, notifications and error codes, under their own names.

Values are those of the Mach 3 headers (mach/port.h, message.h, kern_return.h, notify.h, mig_errors.h).
"""

from enum import IntEnum, IntFlag

PORT_NULL = 0
PORT_DEAD = 0xFFFFFFFF


class Right(IntEnum):
    """What mod_refs, get_refs and allocate speak of."""

    SEND = 0
    RECEIVE = 1
    SEND_ONCE = 2
    PORT_SET = 3
    DEAD_NAME = 4


class RightSet(IntFlag):
    """What a name denotes; SEND and RECEIVE may stand together."""

    NONE = 0
    SEND = 1 << (16 + Right.SEND)
    RECEIVE = 1 << (16 + Right.RECEIVE)
    SEND_ONCE = 1 << (16 + Right.SEND_ONCE)
    PORT_SET = 1 << (16 + Right.PORT_SET)
    DEAD_NAME = 1 << (16 + Right.DEAD_NAME)


class MsgType(IntEnum):
    """Dispositions of a port right in a message. AUTO (ours) moves a send-once right and copies a send right."""

    AUTO = 0
    MOVE_RECEIVE = 16
    MOVE_SEND = 17
    MOVE_SEND_ONCE = 18
    COPY_SEND = 19
    MAKE_SEND = 20
    MAKE_SEND_ONCE = 21
    # What a received right is.
    PORT_RECEIVE = 16
    PORT_SEND = 17
    PORT_SEND_ONCE = 18


class MsgOption(IntFlag):
    """Options of msg(), Mach's mach_msg."""

    NONE = 0
    SEND = 0x1
    RCV = 0x2
    RCV_LARGE = 0x4
    SEND_TIMEOUT = 0x10
    RCV_TIMEOUT = 0x100


class Notify(IntEnum):
    """Notification message ids (MACH_NOTIFY_FIRST is octal 0100)."""

    PORT_DELETED = 65
    PORT_DESTROYED = 69
    NO_SENDERS = 70
    SEND_ONCE = 71
    DEAD_NAME = 72


class KernReturn(IntEnum):
    """Results of calls on names and rights."""

    KERN_SUCCESS = 0
    KERN_NO_SPACE = 3
    KERN_INVALID_ARGUMENT = 4
    KERN_FAILURE = 5
    KERN_RESOURCE_SHORTAGE = 6
    KERN_NO_ACCESS = 8
    KERN_NAME_EXISTS = 13
    KERN_INVALID_NAME = 15
    KERN_INVALID_TASK = 16
    KERN_INVALID_RIGHT = 17
    KERN_INVALID_VALUE = 18
    KERN_UREFS_OVERFLOW = 19
    KERN_INVALID_CAPABILITY = 20
    KERN_RIGHT_EXISTS = 21
    KERN_NOT_IN_SET = 12


class MachMsgReturn(IntEnum):
    """Results of sending and receiving."""

    MACH_MSG_SUCCESS = 0
    MACH_SEND_INVALID_DATA = 0x10000002
    MACH_SEND_INVALID_DEST = 0x10000003
    MACH_SEND_TIMED_OUT = 0x10000004
    MACH_SEND_INTERRUPTED = 0x10000007
    MACH_SEND_MSG_TOO_SMALL = 0x10000008
    MACH_SEND_INVALID_REPLY = 0x10000009
    MACH_SEND_INVALID_RIGHT = 0x1000000A
    MACH_SEND_INVALID_NOTIFY = 0x1000000B
    MACH_SEND_INVALID_MEMORY = 0x1000000C
    MACH_SEND_NO_BUFFER = 0x1000000D
    MACH_SEND_TOO_LARGE = 0x1000000E
    MACH_SEND_INVALID_TYPE = 0x1000000F
    MACH_SEND_INVALID_HEADER = 0x10000010
    MACH_RCV_INVALID_NAME = 0x10004002
    MACH_RCV_TIMED_OUT = 0x10004003
    MACH_RCV_TOO_LARGE = 0x10004004
    MACH_RCV_INTERRUPTED = 0x10004005
    MACH_RCV_PORT_CHANGED = 0x10004006
    MACH_RCV_INVALID_NOTIFY = 0x10004007
    MACH_RCV_INVALID_DATA = 0x10004008
    MACH_RCV_PORT_DIED = 0x10004009
    MACH_RCV_IN_SET = 0x1000400A


class MigReturn(IntEnum):
    """Results of interface stubs (mig_errors.h)."""

    TYPE_ERROR = -300
    REPLY_MISMATCH = -301
    REMOTE_ERROR = -302
    BAD_ID = -303
    BAD_ARGUMENTS = -304
    NO_REPLY = -305
    EXCEPTION = -306
    ARRAY_TOO_LARGE = -307
    SERVER_DIED = -308


class BootstrapReturn(IntEnum):
    """Results of bootstrap calls (servers/bootstrap.h)."""

    BOOTSTRAP_NOT_PRIVILEGED = 1100
    BOOTSTRAP_NAME_IN_USE = 1101
    BOOTSTRAP_UNKNOWN_SERVICE = 1102
    BOOTSTRAP_SERVICE_ACTIVE = 1103
    BOOTSTRAP_NO_MEMORY = 1105


Code = KernReturn | MachMsgReturn | MigReturn | BootstrapReturn

_CODES: dict[int, Code] = {}
for _enum in (BootstrapReturn, MigReturn, MachMsgReturn, KernReturn):
    for _member in _enum:
        _CODES[_member.value] = _member


def code_of(value: int) -> Code | int:
    """The enum member for a number that came in a message; the number itself when nobody defined it."""
    return _CODES.get(value, value)


class MachError(Exception):
    """A call was refused. `code` is a member of one of the enums above (a plain int if a server made it up)."""

    def __init__(self, code: Code | int, what: str = "") -> None:
        self.code = code
        self.what = what
        name = code.name if isinstance(code, IntEnum) else str(code)
        super().__init__(f"{name}: {what}" if what else name)
