"""What ``make conformance`` does not run, with the reason of each exclusion, and what its quick part is.

Patterns are those of the shell. A class or test that no line names is run: what a newer interpreter adds is seen.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final

_OTHER: Final = "another protocol family: this stack has TCP and UDP over IPv4"

_COUNTED: Final = "sockets made of one number are counted, as duplicates are: the first close() ends nothing"

# Pattern of class names: reason.
CLASSES: Final[dict[str, str]] = {
    "*CAN*": _OTHER,
    "*J1939*": _OTHER,
    "*ISOTP*": _OTHER,
    "*RDS*": _OTHER,
    "*QIPCRTR*": _OTHER,
    "*VSOCK*": _OTHER,
    "*Bluetooth*": _OTHER,
    "*HyperV*": _OTHER,
    "*UDPLITE*": _OTHER,
    "*SCTP*": _OTHER,
    "*TIPC*": _OTHER,
    "*UDP6*": _OTHER,
    "*Unix*": _OTHER,
    "TestLinuxAbstractNamespace": _OTHER,
    "LinuxKernelCryptoAPI": _OTHER,
    "*SCMRights*": "descriptors are passed over AF_UNIX, which stays the kernel's",
    "SendRecvFdsTests": "descriptors are passed over AF_UNIX, which stays the kernel's",
    "CmsgMacroTests": "CMSG_LEN and CMSG_SPACE are the standard module's own functions",
    "BasicSocketPairTest": "socketpair() is the kernel's: two ends in one process need no network",
    "TestMSWindowsTCPFlags": "Windows",
    "TestSocketSharing": "Windows (socket.share)",
}

# (pattern of class names, pattern of tests, pattern of arrangements): reason.
TESTS: Final[dict[tuple[str, str, str], str]] = {
    ("GeneralModuleTests", "test_SocketType_is_socketobject", "*"): "the identity of the interpreter's own C class",
    ("GeneralModuleTests", "test_csocket_repr", "*"): "the interpreter's own C class",
    ("GeneralModuleTests", "test_sethostname", "*"): "renames this machine; the standard module's own function",
    ("GeneralModuleTests", "test_socket_close", "*"): "no session sees its number closed behind its back",
    ("GeneralModuleTests", "test_socket_fileno", "*"): f"its parts for TCP and UDP pass; then {_OTHER}",
    ("GeneralModuleTests", "test_unknown_socket_family_repr", "*"): "the family of a socket's descriptor is known here",
    ("GeneralModuleTests", "testCloseException", "*"): _COUNTED,
    ("TestExceptions", "test_setblocking_invalidfd", "*"): _COUNTED,
}

# Unthreaded classes that are clients: they run against the far kernel, too.
CLIENTS: Final = frozenset(("NetworkConnectionNoServer",))

# Some of everything that does not wait for time to pass.
QUICK: Final = (
    "GeneralModuleTests",
    "BasicTCPTest",
    "BasicUDPTest",
    "ContextManagersTest",
    "SendmsgTCPTest",
    "SendmsgUDPTest",
    "RecvmsgUDPTest",
    "RecvmsgIntoTCPTest",
    "NonBlockingTCPTests",
    "InheritanceTest",
    "NonblockConstantTest",
    "CreateServerTest",
    "BufferIOTest",
)


def class_reason(name: str) -> str | None:
    """Why a class is not run, or None."""
    return next((reason for pattern, reason in CLASSES.items() if fnmatchcase(name, pattern)), None)


def test_reason(name: str, test: str, arrangement: str) -> str | None:
    """Why a test is not run in an arrangement, or None."""
    for (cls, method, where), reason in TESTS.items():
        if fnmatchcase(name, cls) and fnmatchcase(test, method) and fnmatchcase(arrangement, where):
            return reason
    return None
