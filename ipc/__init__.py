"""Mach-style ports between tasks, over ZeroMQ."""
