"""``python -m ulnet.table.stamped_server FILE COMMAND...``: a command that leaves its time stamps in FILE."""

from __future__ import annotations

import sys

from ulnet import cli
from ulnet.stack import stamps

if __name__ == "__main__":
    stamps.open(sys.argv[1])
    sys.exit(cli.main(sys.argv[2:]))
