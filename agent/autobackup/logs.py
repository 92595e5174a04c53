"""
Structured logs: one JSON object a line on stderr, where systemd's journal picks it up.

Events are constants in the form `noun.verb_past`; values are keys with units. What a log must never hold (keys,
tokens, whole records) is kept out by not passing it, not by a filter.
"""

import logging
import sys
from typing import TextIO

# structlog imports rich for its console wherever that is installed: 3 MiB that a daemon without one does not need
_is_rich_hidden = sys.modules.setdefault("rich", None) is None  # type: ignore[arg-type]
import structlog  # noqa: E402

if _is_rich_hidden:
    del sys.modules["rich"]


def configure(*, stream: TextIO = sys.stderr, level: int = logging.INFO) -> None:
    """Set up structlog for the whole process. Called once, by the entry points."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            _when_and_what_first,
            structlog.processors.JSONRenderer(sort_keys=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=True,
    )


def _when_and_what_first(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """For whoever reads the journal as it is."""
    return {key: event[key] for key in ("timestamp", "level", "event") if key in event} | dict(event)


def get(room: str) -> structlog.typing.FilteringBoundLogger:
    """The logger of one module, e.g. `get("flows.backup")`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(room=room)
    return logger
