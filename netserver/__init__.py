"""The network server: names, routes, set-up, hand-over, clean-up."""
