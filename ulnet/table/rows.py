"""Rows and columns of the table, and what 1993 measured for them (SOSP 1993, tables 2 and 3; milliseconds and KB/s)."""

from __future__ import annotations

from typing import NamedTuple

from ulnet.table import features


class Column(NamedTuple):
    """``size`` 0: bulk."""

    key: str
    proto: str
    size: int

    @property
    def unit(self) -> str:
        return "us" if self.size else "Gbit/s"

    @property
    def title(self) -> str:
        return f"{self.size} B" if self.size else "bulk, Gbit/s"


class Row(NamedTuple):
    """``api``: what the measuring processes open sockets with (worker.Api); ``year_1993``: its row in the paper."""

    key: str
    name: str
    api: str
    spin: bool = True
    lend: bool = False
    year_1993: str = ""

    def missing(self) -> str:
        """Why this row cannot be measured with this build; empty: it can."""
        return features.NO_PLACEMENT if self.api.endswith("-server") and not features.PLACEMENT else ""


COLUMNS = (
    Column("bulk", "tcp", 0),
    *(Column(f"tcp{size}", "tcp", size) for size in (1, 100, 512, 1024, 1460)),
    *(Column(f"udp{size}", "udp", size) for size in (1, 100, 512, 1024, 1472)),
)
COLUMN = {column.key: column for column in COLUMNS}

BLOCKING = Row("kernel-blocking", "kernel sockets, blocking", "kernel", spin=False, year_1993="kernel")
SPINNING = Row("kernel-spinning", "kernel sockets, spinning", "kernel", year_1993="kernel")
SERVER = Row("server", "server placement", "ulnet-ipf-server", year_1993="server")
IPC = Row("ipc", "Library-IPC", "ulnet-ipc", year_1993="ipc")
SHM = Row("shm", "Library-SHM", "ulnet-shm", year_1993="shm")
IPF = Row("ipf", "Library-SHM-IPF", "ulnet-ipf", year_1993="ipf")
BUFFER_IPC = Row("buffer-ipc", "Library-NEWAPI-IPC", "ulnet-ipc", lend=True)
BUFFER_SHM = Row("buffer-shm", "Library-NEWAPI-SHM", "ulnet-shm", lend=True)
BUFFER_IPF = Row("buffer-ipf", "Library-NEWAPI-SHM-IPF", "ulnet-ipf", lend=True, year_1993="buffer-ipf")
ROWS = (BLOCKING, SPINNING, SERVER, IPC, SHM, IPF, BUFFER_IPC, BUFFER_SHM, BUFFER_IPF)
ROW = {row.key: row for row in ROWS}

# Same order as COLUMNS. The kernel is Mach 2.5's, the server Mach 3.0 with the UX server.
_1993: dict[str, tuple[float, ...]] = {
    "kernel": (1070, 1.40, 1.73, 3.05, 4.56, 6.04, 1.45, 1.74, 3.05, 4.56, 5.88),
    "server": (740, 3.64, 4.20, 5.90, 7.82, 9.73, 3.61, 4.04, 5.89, 7.99, 9.84),
    "ipc": (910, 1.69, 2.09, 3.43, 5.09, 6.63, 1.40, 1.77, 3.08, 4.71, 6.14),
    "shm": (1076, 1.82, 2.29, 3.66, 5.32, 6.73, 1.34, 1.68, 2.95, 4.59, 5.95),
    "ipf": (1088, 1.72, 2.11, 3.44, 5.09, 6.56, 1.23, 1.57, 2.83, 4.41, 5.79),
    "buffer-ipf": (1099, 1.63, 1.98, 3.24, 4.80, 6.26, 1.25, 1.57, 2.83, 4.38, 5.76),
}


def reference(column: Column) -> Row:
    """The kernel row that a column's ratios refer to: spinning for round trips, sendall and recv_into for bulk."""
    return SPINNING if column.size else BLOCKING


def ratio_1993(row: Row, column: Column) -> float | None:
    """What this cell was, over Mach 2.5 in the kernel; None: the paper's table here has no such row."""
    figures = _1993.get(row.year_1993)
    if figures is None:
        return None
    at = COLUMNS.index(column)
    return figures[at] / _1993["kernel"][at]
