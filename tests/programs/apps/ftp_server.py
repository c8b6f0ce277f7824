"""A pyftpdlib server: ``ftp_server ADDRESS PORT FOLDER``."""

from __future__ import annotations

import sys

from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer


class Handler(FTPHandler):  # type: ignore[misc]
    authorizer = DummyAuthorizer()
    banner = "small FTP server"


Handler.authorizer.add_user("user", "secret", sys.argv[3], perm="elradfmwMT")
FTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
