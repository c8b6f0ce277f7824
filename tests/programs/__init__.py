"""Real programs, unchanged: each runs on kernel sockets and by ``ulnet run``, and must do the same."""
