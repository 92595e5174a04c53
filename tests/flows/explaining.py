"""An agent that holds instances and answers on its socket, and the command that asks it. It talks to no libvirt."""

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from click.testing import CliRunner, Result

from autobackup.configfile import load
from autobackup.host.filesystems import kind_of
from autobackup.host.libvirt_events import DomainAnswer
from autobackup.model import InstanceId, ServerRecord
from autobackup.rules.termination import Domain
from autobackup.service.app import Agent
from autobackup.service.cli import main

_ANSWERS_S = 5.0
_NOVA = "http://openstack.org/xmlns/libvirt/nova/1.1"


@dataclass
class Explaining:
    """*file* is the agent's own configuration."""

    agent: Agent
    file: Path

    async def lives(
        self,
        name: str,
        *,
        uuid_: str = "",
        flavor: str = "m1.small",
        project: str = "Finance",
        image_properties: Mapping[str, str] | None = None,
        disk_bytes: int = 4096,
    ) -> InstanceId:
        """One more instance of a Nova of 2025.2, whose disk is held."""
        instance = InstanceId(uuid_ or str(uuid.uuid4()))
        folder = Path(self.agent.spool.instances_path) / instance
        folder.mkdir()
        (folder / "disk").write_bytes(os.urandom(disk_bytes))
        self.agent.spool.claims.claim_folder(instance)
        properties = "".join(
            f"<n:property name={quoteattr(key)}>{escape(value)}</n:property>"
            for key, value in (image_properties or {}).items()
        )
        metadata = f"""<n:instance xmlns:n="{_NOVA}"><n:name>{escape(name)}</n:name>
            <n:owner><n:project uuid="{"5e" * 16}">{escape(project)}</n:project></n:owner>
            <n:flavor name={quoteattr(flavor)}><n:extraSpecs/></n:flavor>
            <n:image uuid=""><n:properties>{properties}</n:properties></n:image></n:instance>"""
        xml = f"<domain><uuid>{instance}</uuid><name>i</name><metadata>{metadata}</metadata></domain>"
        await self.agent.learn.from_answer(instance, DomainAnswer(domain=Domain.ACTIVE, xml=xml))
        return instance

    async def told(self, instance: InstanceId, told: ServerRecord) -> None:
        """OpenStack tells more of it."""
        await self.agent.learn.from_server(instance, told, project="", amend=lambda record: record)

    async def explain(self, *arguments: str, config: Path | None = None) -> Result:
        """`autobackup explain`, as an operator calls it."""
        call = ["explain", "--config", str(config or self.file), "--socket", str(self.agent._config.api.socket)]
        return await asyncio.to_thread(CliRunner().invoke, main, [*call, *arguments])

    async def says(self, *arguments: str, config: Path | None = None) -> str:
        result = await self.explain(*arguments, config=config)
        assert result.exit_code == 0, result.output
        return result.stdout

    async def tells(self, *arguments: str) -> Any:
        return json.loads(await self.says(*arguments, "-f", "json"))


def write(folder: Path, rules: str, *, name: str = "agent.toml", head: str = "") -> Path:
    """A configuration with a vault that keeps for 30 days, one for owners, and *rules*."""
    file = folder / name
    file.write_text(f"""
        instances_path = "{folder}/instances"
        verdict_despite_nova = true
        {head}
        [capture]
        filesystems = ["{kind_of(str(folder))}"]
        [api]
        socket = "{folder}/agent.sock"
        [request]
        destination = "owners"
        [[destination]]
        name = "vault"
        store = "directory"
        path = "{folder}/vault"
        key = "none"
        retention = "30d"
        [[destination]]
        name = "owners"
        store = "glance"
        cloud = "lab"
        key = "none"
        {rules}
    """)
    return file


@asynccontextmanager
async def explaining(folder: Path, rules: str, *, head: str = "") -> AsyncIterator[Explaining]:
    (folder / "instances").mkdir()
    file = write(folder, rules, head=head)
    agent = Agent(load(file))
    agent.spool.open()
    serving = asyncio.create_task(agent.api.run())
    try:
        async with asyncio.timeout(_ANSWERS_S):
            while not (folder / "agent.sock").exists():
                await asyncio.sleep(0.01)
        yield Explaining(agent, file)
    finally:
        serving.cancel()
        await asyncio.wait({serving})
        agent.watch.stop()
        agent.workers.close()
        agent.spool.close()
