"""``python -m ulnet`` is the command line."""

from ulnet.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
