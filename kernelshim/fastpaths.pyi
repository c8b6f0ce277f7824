from typing import Final

MODE: Final[str]  # "off", "on", or "" as usual
VARIABLE: Final[str]

def interface(usual: str) -> str:
    """The packet interface to use where ``usual`` was asked for."""
