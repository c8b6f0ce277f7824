"""Names to addresses and back by the host's configuration, asking over whatever ``socket.socket`` is (ulnet.patch).

The order is that of nsswitch.conf(5) as most systems have it: files, then dns. hosts(5) and resolv.conf(5) are read as
they are at each look-up; questions go out by dnspython through ``socket.socket``, so over ulnet, or by the kernel
to a nameserver on 127.0.0.0/8. Numeric addresses, service names and errors are the C library's, locally.

differs from getaddrinfo(3): AF_UNSPEC gives IPv4 addresses only (this stack speaks IPv4), unless the name is a numeric
IPv6 address; nsswitch.conf and gai.conf are not read. Without dnspython the C library looks names up, by the kernel.
"""

from __future__ import annotations

import logging
import os
import re
import socket as _module
from collections.abc import Iterable
from functools import lru_cache
from socket import getaddrinfo as _getaddrinfo
from socket import gethostbyaddr as _gethostbyaddr
from socket import getnameinfo as _getnameinfo
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    import dns.resolver

log = logging.getLogger("ulnet.resolve")

__all__ = ["getaddrinfo", "gethostbyaddr", "gethostbyname", "gethostbyname_ex", "getnameinfo"]

HOSTS = "/etc/hosts"
RESOLV_CONF = "/etc/resolv.conf"
TIMEOUT_S: Final = 5.0  # resolv.conf(5): RES_TIMEOUT, and RES_DFLRETRY attempts
ATTEMPTS: Final = 2

# Constants at import: the module's names may be replaced later.
AF_INET: Final = _module.AF_INET
AF_INET6: Final = _module.AF_INET6
AF_UNSPEC: Final = _module.AF_UNSPEC
_LOCAL_FLAGS: Final = _module.AI_CANONNAME | _module.AI_ADDRCONFIG  # not for numeric look-ups
_AI_NUMERICHOST: Final = _module.AI_NUMERICHOST
_AI_ADDRCONFIG: Final = _module.AI_ADDRCONFIG
_AI_CANONNAME: Final = _module.AI_CANONNAME
_AI_MAPPED: Final = _module.AI_V4MAPPED | _module.AI_ALL
_NI_NUMERICHOST: Final = _module.NI_NUMERICHOST
_NI_NAMEREQD: Final = _module.NI_NAMEREQD

_EAI_TEXT: Final = {  # gai_strerror(3)
    _module.EAI_NONAME: "Name or service not known",
    _module.EAI_AGAIN: "Temporary failure in name resolution",
    _module.EAI_FAIL: "Non-recoverable failure in name resolution",
    _module.EAI_NODATA: "No address associated with hostname",
}
_HERROR: Final = {  # netdb.h, hstrerror(3)
    _module.EAI_NONAME: (1, "Unknown host"),
    _module.EAI_AGAIN: (2, "Host name lookup failure"),
    _module.EAI_FAIL: (3, "Unknown server error"),
    _module.EAI_NODATA: (4, "No address associated with name"),
}


def _fail(code: int) -> NoReturn:
    raise _module.gaierror(code, _EAI_TEXT[code]) from None


# -- the functions of the socket module ------------------------------------------------------------


def getaddrinfo(
    host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
) -> list[tuple[Any, Any, int, str, Any]]:
    """As socket.getaddrinfo(). gaierror: EAI_NONAME, EAI_NODATA, EAI_AGAIN (no nameserver answers), EAI_FAIL."""
    if host is None or family not in (AF_UNSPEC, AF_INET, AF_INET6):
        return _getaddrinfo(host, port, family or AF_INET, type, proto, flags & ~_AI_ADDRCONFIG)
    try:
        # glibc's AI_ADDRCONFIG asks what the kernel has, which says nothing of this stack's addresses.
        return _getaddrinfo(host, port, family, type, proto, flags & ~_AI_ADDRCONFIG | _AI_NUMERICHOST)
    except _module.gaierror as error:
        if flags & _AI_NUMERICHOST or error.errno != _module.EAI_NONAME:  # EAI_ADDRFAMILY: of the other family
            raise
    if _dns() is None:
        return _getaddrinfo(host, port, family or AF_INET, type, proto, flags & ~_AI_ADDRCONFIG)
    plain = flags & ~(_LOCAL_FLAGS | _AI_MAPPED) | _AI_NUMERICHOST
    wanted = family or AF_INET
    # The service first: a wrong one costs no question.
    _getaddrinfo("::1" if wanted == AF_INET6 else "127.0.0.1", port, wanted, type, proto, plain)
    name, _, addresses = _look_up(_text(host), wanted, bool(flags & _AI_MAPPED))
    rows: list[tuple[Any, Any, int, str, Any]] = []
    for address in addresses:
        rows += _getaddrinfo(address, port, wanted, type, proto, plain | flags & _AI_MAPPED)
    if flags & _AI_CANONNAME:
        rows[0] = (*rows[0][:3], name, rows[0][4])
    return rows


def gethostbyname(hostname: Any, /) -> str:
    """The first IPv4 address of a name. Raises gaierror."""
    return gethostbyname_ex(hostname)[2][0]


def gethostbyname_ex(hostname: Any, /) -> tuple[str, list[str], list[str]]:
    """(true name, other names, IPv4 addresses). Raises gaierror."""
    text = _text(hostname)
    if text == "":
        return "", [], ["0.0.0.0"]
    if text == "<broadcast>":
        return text, [], ["255.255.255.255"]
    numeric = _numeric(text, AF_INET)
    if numeric is not None:
        return numeric, [], [numeric]
    if _dns() is None:
        rows = _getaddrinfo(text, None, AF_INET, _module.SOCK_STREAM, 0, _AI_CANONNAME)
        return rows[0][3] or text, [], [str(row[4][0]) for row in rows]
    return _look_up(text, AF_INET)


def gethostbyaddr(ip_address: Any, /) -> tuple[str, list[str], list[str]]:
    """(name, other names, [address]) of an address, or of a name's first address. Raises herror, gaierror."""
    text = _text(ip_address)
    address = _numeric(text, AF_INET) or _numeric(text, AF_INET6)
    if address is None:
        address = gethostbyname(text)
    names = _hosts().by_address.get(address)
    if names:
        return names[0], list(names[1:]), [address]
    if _dns() is None:
        return _gethostbyaddr(address)
    try:
        return _reverse(address), [], [address]
    except _module.gaierror as error:
        raise _module.herror(*_HERROR[error.errno or _module.EAI_FAIL]) from None


def getnameinfo(sockaddr: Any, flags: int, /) -> tuple[str, str]:
    """(host, service) of an address; numbers where there is no name. Raises gaierror."""
    host, service = _getnameinfo(sockaddr, flags & ~_NI_NAMEREQD | _NI_NUMERICHOST)
    if flags & _NI_NUMERICHOST:
        if flags & _NI_NAMEREQD:
            _fail(_module.EAI_NONAME)  # contradiction, as glibc has it
        return host, service
    try:
        return gethostbyaddr(host)[0], service
    except OSError:
        if flags & _NI_NAMEREQD:
            _fail(_module.EAI_NONAME)
        return host, service


# -- files -----------------------------------------------------------------------------------------


class _Hosts:
    """What hosts(5) says."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.by_name: dict[tuple[int, str], list[str]] = {}  # (family, lower-case name): addresses
        self.by_address: dict[str, tuple[str, ...]] = {}  # true name first
        for line in lines:
            address, *names = line.partition("#")[0].split() or [""]
            if not names:
                continue
            family = AF_INET6 if ":" in address else AF_INET
            numeric = _numeric(address, family)
            if numeric is None:
                continue
            self.by_address.setdefault(numeric, tuple(names))
            for name in names:
                known = self.by_name.setdefault((family, name.lower()), [])
                if numeric not in known:
                    known.append(numeric)


def _hosts() -> _Hosts:
    try:
        stat = os.stat(HOSTS)
    except OSError:
        return _Hosts(())
    return _read_hosts(HOSTS, stat.st_mtime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=1)
def _read_hosts(path: str, *_: int) -> _Hosts:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return _Hosts(file)
    except OSError:
        return _Hosts(())


def _text(host: Any) -> str:
    if isinstance(host, str):
        return host.encode("idna").decode("ascii")  # UnicodeError as from the standard functions
    if isinstance(host, (bytes, bytearray)):
        return bytes(host).decode("ascii")
    raise TypeError("getaddrinfo() argument 1 must be string or None")


def _numeric(text: str, family: int) -> str | None:
    try:
        return str(_getaddrinfo(text, None, family, _module.SOCK_STREAM, 0, _AI_NUMERICHOST)[0][4][0])
    except (OSError, UnicodeError):
        return None


def _look_up(name: str, family: int, mapped: bool = False) -> tuple[str, list[str], list[str]]:
    # (true name, other names, addresses) by files, then dns.
    wanted = name.rstrip(".").lower()
    if not wanted:
        _fail(_module.EAI_NONAME)
    hosts = _hosts()
    addresses = hosts.by_name.get((family, wanted), [])
    if not addresses and (wanted == "localhost" or wanted.endswith(".localhost")):
        addresses = ["127.0.0.1" if family == AF_INET else "::1"]  # RFC 6761 (6.3): not a question for the DNS
        return wanted, [], addresses
    if addresses:
        names = hosts.by_address.get(addresses[0], (wanted,))
        return names[0], [other for other in names[1:] if other], list(addresses)
    try:
        true_name, addresses = _ask(name, "A" if family == AF_INET else "AAAA")
    except _module.gaierror:
        if not mapped:
            raise
        addresses = []
    if mapped and not addresses:
        return _look_up(name, AF_INET)
    if not addresses:
        _fail(_module.EAI_NODATA)
    return true_name, [] if true_name.lower() == wanted else [name.rstrip(".")], addresses


# -- dns -------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _dns() -> Any:
    """dnspython's resolver module; None, with a warning, where it is not installed."""
    try:
        import dns.resolver
    except ModuleNotFoundError:
        log.warning("dnspython is not installed: names are looked up by the C library, through the kernel")
        return None
    return dns.resolver


def _resolver() -> dns.resolver.Resolver:
    path = RESOLV_CONF
    try:
        stat = os.stat(path)
    except OSError:
        return _configure(path)
    return _configure(path, stat.st_mtime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=1)
def _configure(path: str, *_: int) -> dns.resolver.Resolver:
    resolver: dns.resolver.Resolver = _dns().Resolver(configure=False)
    resolver.timeout = TIMEOUT_S
    try:
        resolver.read_resolv_conf(path)
    except _dns().NoResolverConfiguration:
        resolver.nameservers = ["127.0.0.1"]  # resolv.conf(5)
    attempts = ATTEMPTS
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                found = re.match(r"options\s.*\battempts:(\d+)", line)
                if found:
                    attempts = min(max(int(found[1]), 1), 5)  # RES_MAXRETRY
    except OSError:
        pass
    resolver.lifetime = resolver.timeout * attempts * max(len(resolver.nameservers), 1)
    return resolver


def _question(name: Any, kind: str, search: bool) -> Any:
    """The answer, which may hold no record. Raises gaierror."""
    import dns.exception

    found = _dns()
    try:
        return _resolver().resolve(name, kind, search=search, raise_on_no_answer=False)
    except found.NXDOMAIN:
        _fail(_module.EAI_NONAME)
    except found.NoAnswer:
        _fail(_module.EAI_NODATA)
    except (dns.exception.Timeout, found.NoNameservers):
        _fail(_module.EAI_AGAIN)
    except found.YXDOMAIN:
        _fail(_module.EAI_FAIL)
    except dns.exception.DNSException:  # a name that cannot be asked for
        _fail(_module.EAI_NONAME)


def _ask(name: str, kind: str) -> tuple[str, list[str]]:
    answer = _question(name, kind, search=True)
    true_name = answer.canonical_name.to_text(omit_final_dot=True)
    return true_name, [record.address for record in answer.rrset or ()]


def _reverse(address: str) -> str:
    import dns.reversename

    answer = _question(dns.reversename.from_address(address), "PTR", search=False)
    for record in answer.rrset or ():
        return str(record.target.to_text(omit_final_dot=True))
    _fail(_module.EAI_NODATA)
