"""Overwrites one file with one of our methods, and says what that alone took: `METHOD FILE`."""

import json
import sys
import time

from autobackup.host.disks import HeldDisk
from autobackup.host.scrub_methods import random, zero


def main(method: str, path: str) -> None:
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    with HeldDisk(path, writable=True) as disk:
        {"zero": zero, "random": random}[method](disk.fd, list(disk.data_ranges()), disk.identity.size_bytes)
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s}))


if __name__ == "__main__":
    main(*sys.argv[1:])
