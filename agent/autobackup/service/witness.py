"""Whom the agent asks what became of a server, and by which rules it goes: as the configuration says."""

import hashlib

from autobackup.cloud.session import ProjectSession
from autobackup.config import Config
from autobackup.host.nova_conf import nova_host_name
from autobackup.rules.policy import Rulebook


def rulebook(config: Config) -> Rulebook:
    """Who is backed up."""
    return Rulebook(
        rules=config.rule,
        mode=config.rule_mode,
        requests=config.request,
        aggregates=config.aggregates,
        hears_owners=config.verdict == "nova",
    )


def fingerprint(book: Rulebook) -> str:
    """Tells one rulebook from another: whether an agent runs with the file that one looks at."""
    return hashlib.sha256(repr(book).encode()).hexdigest()[:16]


def nova_session(config: Config) -> ProjectSession | None:
    """None where libvirt's word is enough."""
    if config.verdict != "nova":
        return None
    return ProjectSession(
        cloud=config.nova.cloud,
        project=config.nova.project,
        project_domain=config.nova.project_domain,
        clouds_yaml=config.openstack.clouds_yaml,
        call_timeout_s=config.openstack.call_timeout_s,
    )


def nova_host(config: Config) -> str:
    """What Nova calls this host. Raises `ConfigError` if nova.conf cannot be read."""
    return config.nova.host or nova_host_name(config.nova_conf)
