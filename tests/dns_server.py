"""A tiny name server for tests: ``python dns_server.py ADDRESS PORT``. One line of output a question.

Answers for example.test over UDP and TCP. ``silent`` gets no answer, ``fail`` SERVFAIL, ``big`` only fits TCP.
"""

from __future__ import annotations

import select
import socket
import struct
import sys

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

RECORDS = {
    ("a.example.test.", "A"): ["192.0.2.1", "192.0.2.2"],
    ("a.example.test.", "AAAA"): ["2001:db8::1"],
    ("six.example.test.", "AAAA"): ["2001:db8::6"],
    ("big.example.test.", "A"): [f"192.0.2.{i}" for i in range(1, 201)],
    ("1.2.0.192.in-addr.arpa.", "PTR"): ["a.example.test."],
    ("here.example.test.", "A"): ["10.77.0.2"],
}
ALIASES = {"alias.example.test.": "a.example.test."}


def answer(packet: bytes, by: str) -> bytes | None:
    query = dns.message.from_wire(packet)
    question = query.question[0]
    name, kind = question.name.to_text().lower(), dns.rdatatype.to_text(question.rdtype)
    print(by, name, kind, flush=True)
    if name.startswith("silent."):
        return None
    response = dns.message.make_response(query)
    response.flags |= dns.flags.RA
    if name.startswith("fail."):
        response.set_rcode(dns.rcode.SERVFAIL)
        return response.to_wire()
    true_name = ALIASES.get(name, name)
    if true_name != name:
        response.answer.append(dns.rrset.from_text(name, 60, "IN", "CNAME", true_name))
    records = RECORDS.get((true_name, kind))
    if records:
        response.answer.append(dns.rrset.from_text(true_name, 60, "IN", kind, *records))
    elif not any(known == true_name for known, _ in RECORDS):
        response.set_rcode(dns.rcode.NXDOMAIN)
    wire = response.to_wire()
    if by == "udp" and len(wire) > 512:
        response.answer.clear()
        response.flags |= dns.flags.TC
        wire = response.to_wire()
    return wire


def main(address: str, port: int) -> None:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((address, port))
    tcp = socket.create_server((address, port))
    print("ready", flush=True)
    while True:
        for sock in select.select([udp, tcp], [], [])[0]:
            if sock is udp:
                packet, peer = udp.recvfrom(65535)
                reply = answer(packet, "udp")
                if reply:
                    udp.sendto(reply, peer)
                continue
            connection, _ = tcp.accept()
            with connection, connection.makefile("rb") as file:
                (size,) = struct.unpack("!H", file.read(2))
                reply = answer(file.read(size), "tcp")
                if reply:
                    connection.sendall(struct.pack("!H", len(reply)) + reply)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
