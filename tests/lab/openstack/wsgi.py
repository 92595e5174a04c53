"""
What uWSGI loads, in the services' own environment: LAB_APP=keystone|barbican|glance|nova.

The services are unmodified. For SQLite alone: oslo.db opens every transaction with a
deferred BEGIN, so of two that read and then write at the same time one fails at once with
"database is locked" (the busy timeout does not hold for the upgrade of a lock), and
concurrent uploads answer 500. With BEGIN IMMEDIATE they queue, for at most the `timeout`
in the database's URL.
"""

import os
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine


@event.listens_for(Engine, "before_cursor_execute", retval=True)
def _immediate(
    connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _executemany: bool
) -> tuple[str, Any]:
    if statement == "BEGIN" and connection.dialect.name == "sqlite":
        statement = "BEGIN IMMEDIATE"
    return statement, parameters


match os.environ["LAB_APP"]:
    case "keystone":
        from keystone.wsgi.api import application
    case "glance":
        from glance.wsgi.api import application
    case "nova":
        from nova.wsgi.osapi_compute import application
    case "barbican":
        # barbican.wsgi.api knows only /etc/barbican/barbican-api-paste.ini.
        from paste import deploy

        application = deploy.loadapp(f"config:{os.environ['LAB_BARBICAN_PASTE']}")

__all__ = ["application"]
