"""
The inotify thread: claims disks the moment they appear, and tells the loop when Nova has let go of one.

It watches the instances folder, each instance folder, and every claim. IN_ATTRIB on a claim with st_nlink 1 comes
0.2 ms after Nova's unlink and needs no libvirt. Claims are made in this thread, so that a busy event loop delays
none, and made durable in another: an fsync takes as long as the disk pleases, and an instance may live and die in
less (measured: 2 of 50 missed). A scan of everything answers lost events (queue overflow), the start, and the clock.

It decides nothing. `on_change(instance)` is called from this thread after any change that may matter, and
`on_scan(instance)` for each instance with a claim after each scan: a scan is a reason to look, and no change.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Final

import inotify_simple
from inotify_simple import flags

from autobackup import logs
from autobackup.errors import SpoolUnavailable
from autobackup.host.claims import Claim, Claims, parse_folder
from autobackup.metrics import Metrics
from autobackup.model import InstanceId

_FOLDER_EVENTS: Final = flags.CREATE | flags.MOVED_TO | flags.ONLYDIR | flags.DONT_FOLLOW
_ROOT_EVENTS: Final = (_FOLDER_EVENTS | flags.MOVED_FROM | flags.DELETE) & ~flags.DONT_FOLLOW  # the operator's link
_WAKE_MS: Final = 200  # the longest delay of a stop, and of an fsync of the folder of claims

_log = logs.get("host.watch")


class Watch:
    """Owns the inotify descriptor and its thread. Start it once, before the first scan."""

    def __init__(
        self,
        *,
        claims: Claims,
        instances_path: str,
        scan_interval_s: float,
        metrics: Metrics,
        on_change: Callable[[InstanceId], None],
        on_scan: Callable[[InstanceId], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._claims = claims
        self._instances_path = instances_path
        self._scan_interval_s = scan_interval_s
        self._metrics = metrics
        self._on_change = on_change
        self._on_scan = on_scan
        self._on_failure = on_failure
        self._stop = threading.Event()
        self._scan_wanted = threading.Event()
        self._inotify = inotify_simple.INotify()
        self._folders: dict[int, str] = {}  # watch descriptor -> folder name
        self._held: dict[int, Claim] = {}  # watch descriptor -> claim
        self._root_wd = -1
        self._claimed = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(part,), name=name, daemon=True)
            for name, part in (("watch", self._watch), ("watch sync", self._sync))
        ]
        claims.on_claimed = self._hold

    def start(self) -> None:
        """Register first, then scan: nothing falls between. Returns when the first scan is done."""
        self._root_wd = self._inotify.add_watch(self._instances_path, _ROOT_EVENTS)
        for instance in self._claims.instances():
            for claim in self._claims.of(instance):
                self._hold(claim)
        self._scan()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._inotify.close()

    def claim_now(self, folder_name: str, source: str) -> None:
        """Any thread: claim what is in one instance folder."""
        self._attempt(source, lambda: self._claims.claim_folder(folder_name))

    def ask_scan(self) -> None:
        """Any thread: scan everything soon (libvirt came back)."""
        self._scan_wanted.set()

    def _run(self, part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as exc:
            self._on_failure(exc)

    def _sync(self) -> None:
        while not self._stop.is_set():
            self._claimed.wait(_WAKE_MS / 1000)
            self._claimed.clear()
            self._claims.sync()
        self._claims.sync()

    def _watch(self) -> None:
        next_scan_s = time.monotonic() + self._scan_interval_s
        while not self._stop.is_set():
            events = self._inotify.read(timeout=_WAKE_MS)
            for event in events:
                self._handle(event)
            if self._scan_wanted.is_set() or time.monotonic() >= next_scan_s:
                self._scan_wanted.clear()
                self._scan()
                next_scan_s = time.monotonic() + self._scan_interval_s

    def _handle(self, event: inotify_simple.Event) -> None:
        if event.mask & flags.Q_OVERFLOW:
            _log.warning("inotify.overflowed", consequence="everything is scanned")
            self._scan_wanted.set()
        elif event.wd in self._held:
            claim = self._held[event.wd]
            if event.mask & flags.IGNORED:
                del self._held[event.wd]
            else:
                self._on_change(claim.instance)
        elif event.mask & flags.IGNORED:
            self._folders.pop(event.wd, None)
        elif event.wd == self._root_wd:
            self._folder_changed(event)
        elif event.wd in self._folders:
            self._attempt("inotify", lambda: self._claims.claim_file(self._folders[event.wd], event.name))

    def _folder_changed(self, event: inotify_simple.Event) -> None:
        owner = parse_folder(event.name)
        if owner is None:
            return
        if event.mask & (flags.CREATE | flags.MOVED_TO):
            self._enter(event.name, "inotify")
        self._on_change(owner[0])

    def _enter(self, folder_name: str, source: str) -> None:
        """Watch one instance folder, then claim what is in it already."""
        try:
            wd = self._inotify.add_watch(os.path.join(self._instances_path, folder_name), _FOLDER_EVENTS)
        except OSError as exc:
            if isinstance(exc, FileNotFoundError | NotADirectoryError):
                return
            _log.warning("watch.refused", folder=folder_name, error=str(exc), consequence="only scans see this folder")
        else:
            self._folders[wd] = folder_name
        self.claim_now(folder_name, source)

    def _hold(self, claim: Claim) -> None:
        """Watch a claim. An unlink that came before the watch is seen by the look at the link count."""
        with contextlib.suppress(OSError):
            wd = self._inotify.add_watch(self._claims.path(claim), flags.ATTRIB | flags.DONT_FOLLOW)
            self._held[wd] = claim
            if self._claims.link_count(claim) == 1:
                self._on_change(claim.instance)

    def _scan(self) -> None:
        with os.scandir(self._instances_path) as entries:
            folders = [e.name for e in entries if parse_folder(e.name) and e.is_dir(follow_symlinks=False)]
        for folder_name in folders:
            self._enter(folder_name, "scan")
        for instance in self._claims.instances():
            self._on_scan(instance)
        self._metrics.claims.set(self._claims.count())  # jobs have taken some over

    def _attempt(self, source: str, make: Callable[[], list[Claim]]) -> None:
        try:
            made = make()
        except (OSError, SpoolUnavailable) as exc:
            self._metrics.claims_missed.labels(reason=type(exc).__name__).inc()
            _log.error("claim.missed", source=source, error=str(exc), consequence="tried again at the next scan")
            return
        if made:
            self._claimed.set()
        for claim in made:
            self._metrics.claims_made.labels(source=source).inc()
            _log.info("claim.made", instance=claim.instance, disk=claim.disk, inode=claim.inode, source=source)
            self._on_change(claim.instance)
        self._metrics.claims.set(self._claims.count())
