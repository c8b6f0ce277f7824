"""``ulnet table``: the experiment of 1993 on this machine, its targets, and where the time goes.

``rows`` what is compared; ``bed`` two served hosts; ``worker`` and ``crowds`` one end of a measurement; ``measure`` the
table; ``targets`` the table of targets; ``layers`` and ``counts`` where the time goes; ``report`` and ``page`` show it.
"""
