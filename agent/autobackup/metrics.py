"""
What Prometheus scrapes: one object, built once, passed to the rooms that count. No instance ids in labels.
"""

from importlib.metadata import version
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)

_STAGE_BUCKETS_S: Final = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600)


class Metrics:
    """Every series of the agent, by Prometheus' naming rules."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody asks for
        self.registry = registry = CollectorRegistry()
        Info("autobackup_build", "Version of the agent", registry=registry).info({"version": version("autobackup")})
        self.libvirt_connected = Gauge(
            "autobackup_libvirt_connected", "1 while the event connection to libvirt stands", registry=registry
        )
        self.claims = Gauge("autobackup_claims", "Hard links held on disks of living instances", registry=registry)
        self.claims_made = Counter(
            "autobackup_claims_made_total", "Claims made, by what told of the disk", ["source"], registry=registry
        )
        self.claims_missed = Counter(
            "autobackup_claims_missed_total",
            "Disks that could not be claimed, by reason",
            ["reason"],
            registry=registry,
        )
        self.verdicts = Counter(
            "autobackup_verdicts_total", "Verdicts reached over candidates", ["verdict"], registry=registry
        )
        self.undecided_oldest = Gauge(
            "autobackup_undecided_oldest_age_seconds", "Age of the oldest undecided candidate", registry=registry
        )
        self.jobs = Gauge("autobackup_jobs", "Jobs in the spool, by state", ["state"], registry=registry)
        self.oldest_job_age = Gauge(
            "autobackup_queue_oldest_job_age_seconds", "Age of the oldest job that is not done", registry=registry
        )
        self.stage_attempts = Counter(
            "autobackup_stage_attempts_total", "Tries of a stage, by outcome", ["stage", "outcome"], registry=registry
        )
        self.stage_duration = Histogram(
            "autobackup_stage_duration_seconds", "Time that a stage took", ["stage"],
            buckets=_STAGE_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self.sealed_bytes = Counter(
            "autobackup_sealed_bytes_total", "Ciphertext handed to a destination", ["destination"], registry=registry
        )
        self.read_bytes = Counter("autobackup_read_bytes_total", "Plaintext read from disks", registry=registry)
        self.last_success = Gauge(
            "autobackup_last_success_timestamp_seconds", "When a copy was last proven", ["destination"],
            registry=registry,
        )  # fmt: skip
        self.destination_reachable = Gauge(
            "autobackup_destination_reachable", "1 if the destination would take a copy, at the last look",
            ["destination"], registry=registry,
        )  # fmt: skip
        self.parents_kept = Gauge(
            "autobackup_parents_kept", "Images and sealed bases that backups there stand on, at the last look",
            ["destination", "kind"], registry=registry,
        )  # fmt: skip
        self.nova_reachable = Gauge(
            "autobackup_nova_reachable", "1 if Nova answered when it was last asked", registry=registry
        )
        self.requests_refused = Gauge(
            "autobackup_requests_refused", "Instances whose owners ask for what is not granted", registry=registry
        )
        self.scrubs = Counter("autobackup_scrubs_total", "Disks scrubbed or kept", ["outcome"], registry=registry)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
