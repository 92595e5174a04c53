"""Pure decisions: facts in, verdict out. No files, no clock, no loop, no logging."""
