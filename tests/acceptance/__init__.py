"""The system as its users meet it: a server, unprivileged programs and a kernel's stack, all real processes."""
