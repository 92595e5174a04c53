"""
How long `GET /healthz` takes: `SOCKET PER_SECOND`, over one kept connection, on a fixed schedule.

Until its standard input ends; then it prints every [Unix time, ms].
"""

import json
import select
import socket
import sys
import time

_REQUEST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


def main(path: str, per_second: str) -> None:
    seen: list[tuple[float, float]] = []
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    print("ready", flush=True)
    next_s = time.perf_counter()
    while not select.select([sys.stdin], [], [], max(0.0, next_s - time.perf_counter()))[0]:
        next_s = max(next_s + 1 / float(per_second), time.perf_counter())
        at_s, started_s = time.time(), time.perf_counter()
        connection.sendall(_REQUEST)
        answer = _answer(connection)
        if not answer.startswith(b"HTTP/1.1 200 "):
            sys.exit(f"/healthz: {answer[:200]!r}")
        seen.append((at_s, (time.perf_counter() - started_s) * 1000))
    print(json.dumps(seen))


def _answer(connection: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        received += _more(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields[b"content-length"]):
        body += _more(connection)
    return head


def _more(connection: socket.socket) -> bytes:
    received = connection.recv(65536)
    if not received:
        sys.exit("the agent closed the connection")
    return received


if __name__ == "__main__":
    main(*sys.argv[1:])
