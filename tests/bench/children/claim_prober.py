"""
How long a new disk has one name: `INSTANCES_PATH PREFIX PER_SECOND`. Makes `<uuid>/disk`, spins on its link count.

Until its standard input ends; then it prints every [Unix time, ms]. A disk that is not claimed within 30 s is an error.
"""

import json
import os
import select
import sys
import time
import uuid

_GIVE_UP_S = 30.0


def main(instances_path: str, prefix: str, per_second: str) -> None:
    seen: list[tuple[float, float]] = []
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 1 / float(per_second))[0]:
        folder = os.path.join(instances_path, f"{prefix}-{str(uuid.uuid4())[9:]}")
        path = os.path.join(folder, "disk")
        os.mkdir(folder)
        at_s = time.time()
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        started_s = time.perf_counter()
        while os.fstat(fd).st_nlink < 2:
            if time.perf_counter() - started_s > _GIVE_UP_S:
                sys.exit(f"{path} was not claimed in {_GIVE_UP_S:g} s")
        seen.append((at_s, (time.perf_counter() - started_s) * 1000))
        os.close(fd)
        os.unlink(path)
        os.rmdir(folder)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
