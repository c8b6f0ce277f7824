"""ftplib against a server: ``ftp_client HOST PORT``; the server's folder must be empty and writable."""

from __future__ import annotations

import ftplib
import io
import sys

from tests.programs.apps.clients import error_of, say
from tests.programs.apps.site import pattern


def fetch(ftp: ftplib.FTP, name: str, rest: int | None = None) -> bytes:
    parts: list[bytes] = []
    ftp.retrbinary(f"RETR {name}", parts.append, rest=rest)
    return b"".join(parts)


with ftplib.FTP() as ftp:
    say("welcome", line=ftp.connect(sys.argv[1], int(sys.argv[2]), timeout=20))
    say("login", line=ftp.login("user", "secret"))
    ftp.mkd("sub")
    ftp.cwd("sub")
    say("where", path=ftp.pwd())
    for passive in (True, False):  # a data connection in each direction
        ftp.set_pasv(passive)
        for size in (0, 1, 70_000, 2_000_000):
            name = f"f{size}-{passive}"
            say("stored", line=ftp.storbinary(f"STOR {name}", io.BytesIO(pattern(size))))
            say("fetched", size=ftp.size(name), body=fetch(ftp, name))
        say("rest", body=fetch(ftp, f"f70000-{passive}", 60_000))
        lines: list[str] = []
        ftp.storlines(f"STOR lines-{passive}", io.BytesIO(b"one\ntwo\n"))
        ftp.retrlines(f"RETR lines-{passive}", lines.append)
        say("listed", names=sorted(ftp.nlst()), lines=lines)
    say("renamed", line=ftp.rename("f1-True", "other"))
    say("deleted", line=ftp.delete("other"))
    say("missing", error=error_of(ftp.size, "other"))
    say("quit", line=ftp.quit())
say("refused", error=error_of(ftplib.FTP, sys.argv[1], "u", "p"))
