"""The autobackup agent: seals the last disk state of a terminated instance, proves it, scrubs the host."""
