"""The protocol stack: wire formats, TCP, UDP, IP, the engine and its sockets."""
