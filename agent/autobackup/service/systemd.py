"""
What systemd is told: ready, alive, stopping. Outside systemd all of it does nothing.

The watchdog is fed from the event loop, so that a loop that hangs is a service that is restarted.
"""

import asyncio
import os

import sdnotify


class Notify:
    """The sd_notify protocol, through the `sdnotify` package."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier()
        watchdog_us = int(os.environ.get("WATCHDOG_USEC") or 0)
        self._feed_s = watchdog_us / 2_000_000 if watchdog_us else 15.0

    def ready(self, status: str) -> None:
        self._notifier.notify(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        self._notifier.notify("STOPPING=1")

    async def feed(self) -> None:
        """Half the watchdog's interval, as sd_watchdog_enabled(3) recommends."""
        while True:
            self._notifier.notify("WATCHDOG=1")
            await asyncio.sleep(self._feed_s)
