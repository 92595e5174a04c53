"""QEMU's disk format as bytes: what a file of it says, and what a new one must say. Pure: callers do all reading."""
