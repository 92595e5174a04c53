"""
As much of Neutron as a list of servers needs: nobody has a port.

nova-api asks for the ports of every server that it shows, for the names of their security
groups; without an answer there is no list. Nothing here stands for Neutron's behaviour.
"""

import http.server
import json
import threading
from typing import Any, Final
from urllib.parse import urlsplit

from tests.lab.openstack.services import HOST

_COLLECTIONS: Final = ("ports", "security-groups")


class Ports:
    """Listens on a free port until `close`."""

    def __init__(self) -> None:
        self._server = http.server.ThreadingHTTPServer((HOST, 0), _Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05], name="neutron")
        self._thread.start()
        self.url = f"http://{HOST}:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = urlsplit(self.path).path.rpartition("/")[2]
        found = name in _COLLECTIONS
        body = json.dumps({name.replace("-", "_"): []}).encode() if found else b""
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *_arguments: Any) -> None:  # noqa: A002
        """Say nothing."""
