"""What the kernel gives a user-level stack: packet channels, filters, guards, links, test hosts."""
