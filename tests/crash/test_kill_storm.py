"""
A storm: instances live and die while the agent and libvirtd are killed with SIGKILL at random moments.

Nothing is lost among the instances that lived for more than two seconds beside an agent, and nothing is scrubbed
that is not in the store. AUTOBACKUP_SEED repeats the choices of a storm, AUTOBACKUP_STORM_S or AUTOBACKUP_LONG=1
makes it longer.
"""

import contextlib
import os
import random
import shutil
import threading
import time
from dataclasses import dataclass, field

import libvirt
import pytest
from tests.crash.evidence import assert_spool_empty, bundles, sha256_of, unpack
from tests.crash.scene import Scene
from tests.lab.agent import AgentProcess, wait_until
from tests.lab.instances import Image, Instance

_DEFAULT_S = 600.0 if os.environ.get("AUTOBACKUP_LONG") else 20.0
STORM_S = float(os.environ.get("AUTOBACKUP_STORM_S", _DEFAULT_S))
SEED = int(os.environ.get("AUTOBACKUP_SEED", random.randrange(1 << 32)))
LIVING_AT_MOST = 6


@dataclass
class Life:
    instance: Instance
    born_at_s: float
    sha256: str = ""
    is_owed: bool = False


@dataclass
class Weather:
    """Kills the agent and libvirtd, starts them again, and remembers when an agent was up."""

    scene: Scene
    agent: AgentProcess
    dice: random.Random
    over: threading.Event = field(default_factory=threading.Event)
    up_since_s: float | None = None
    agent_kills: int = 0
    libvirtd_kills: int = 0
    failure: BaseException | None = None

    def rage(self) -> None:
        try:
            while not self.over.is_set():
                self._settle()
                self.over.wait(self.dice.uniform(0.3, 5.0))
                if self.dice.random() < 0.2:
                    self.scene.hypervisor.kill_libvirtd()
                    self.libvirtd_kills += 1
                    self.over.wait(self.dice.uniform(0, 0.5))
                if self.dice.random() < 0.8:
                    self.up_since_s = None
                    self.agent.kill()
                    self.agent_kills += 1
                    self.over.wait(self.dice.uniform(0, 0.5))
                if self.scene.hypervisor.libvirtd_pid is None:
                    self.scene.hypervisor.start_libvirtd()
        except BaseException as exc:
            self.failure = exc

    def _settle(self) -> None:
        if self.agent.process is None:
            before = len(self.agent.events("agent.started"))
            self.agent.start(ready=False)
            # now and then it dies before it has come up
            self.over.wait(self.dice.choice((0.2, 0.5, 0.8, 3.0, 3.0, 3.0)))
            if len(self.agent.events("agent.started")) > before:
                self.up_since_s = time.monotonic()
        assert self.agent.process is not None
        assert self.agent.process.poll() is None, self.agent.log_path.read_text()[-4000:]


@pytest.mark.timeout(STORM_S + 180)
def test_nothing_is_lost_in_a_storm(scene: Scene) -> None:
    print(f"AUTOBACKUP_SEED={SEED}")
    dice = random.Random(SEED)
    agent = scene.agent(capture="", more="[sealing]\nparallel_jobs = 4\n")
    agent.start()
    weather = Weather(scene, agent, random.Random(SEED + 1), up_since_s=time.monotonic())
    thread = threading.Thread(target=weather.rage, name="weather")
    lives: list[Life] = []
    ended: list[Life] = []
    image = Image()
    thread.start()
    try:
        over_at_s = time.monotonic() + STORM_S
        while time.monotonic() < over_at_s and weather.failure is None:
            if len(lives) < LIVING_AT_MOST and dice.random() < 0.6:
                lives.append(begin(scene, image, dice))
            elif lives:
                ended.append(end(scene, agent, weather, lives.pop(dice.randrange(len(lives)))))
            time.sleep(dice.uniform(0, 0.4))
    finally:
        weather.over.set()
        thread.join()
    if weather.failure is not None:
        raise weather.failure
    scene.hypervisor.heal()
    if agent.process is None:
        agent.start()
    wait_until(agent.is_ready)
    time.sleep(2)
    ended += [end(scene, agent, weather, life) for life in lives]

    assert_nothing_lost(agent, ended)
    owed = sum(life.is_owed for life in ended)
    print(f"{len(ended)} lives, {owed} owed, {weather.agent_kills} agent and {weather.libvirtd_kills} libvirtd kills")
    assert owed >= 5
    assert weather.agent_kills >= 2


def begin(scene: Scene, image: Image, dice: random.Random) -> Life:
    """Spawn; a libvirtd that is gone in the middle of it is a build that fails, and the files stay."""
    known = set(scene.compute._spawned)
    with contextlib.suppress(libvirt.libvirtError):
        scene.compute.spawn(image=image)
    [uuid] = set(scene.compute._spawned) - known
    instance = scene.compute._spawned[uuid]
    with instance.disk.open("ab") as disk:
        disk.write(dice.randbytes(256 << 10))
    return Life(instance, time.monotonic())


def end(scene: Scene, agent: AgentProcess, weather: Weather, life: Life) -> Life:
    """Terminate, as far as there is a libvirtd and a domain; the files go in any case."""
    instance = life.instance
    life.sha256 = sha256_of(instance.disk)
    up_since_s = weather.up_since_s
    now_s = time.monotonic()
    lived_beside_agent_s = 0.0 if up_since_s is None else now_s - max(up_since_s, life.born_at_s)
    held = bool(agent.claims(instance.uuid))
    assert held or lived_beside_agent_s < 2, f"{instance.uuid} lived {lived_beside_agent_s:.1f} s beside an agent"
    life.is_owed = held
    with contextlib.suppress(libvirt.libvirtError):
        scene.compute._destroy(instance)
    if instance.folder.exists():
        instance.folder.rename(instance.del_folder)
        shutil.rmtree(instance.del_folder)
    with contextlib.suppress(libvirt.libvirtError):
        scene.compute._undefine(instance)
    return life


def assert_nothing_lost(agent: AgentProcess, ended: list[Life]) -> None:
    wait_until(lambda: not agent.jobs() and not agent.claims(), within_s=90, words=f"an empty queue; {agent.log_path}")
    assert_spool_empty(agent)
    assert not agent.events("job.parked")
    receipts = agent.receipts()
    known = {life.instance.uuid: life for life in ended}
    for receipt in receipts:
        life = known[receipt["instance"]]
        assert receipt["scrub"]["scrubbed"]
        [copy] = receipt["copies"]
        sealed = unpack(agent, copy["attempt"]["attempt"]).digests.members["disks/disk"].sha256
        assert sealed == receipt["member_sha256"]["disks/disk"] == life.sha256
    captured = [receipt["instance"] for receipt in receipts]
    assert len(captured) == len(set(captured)), "captured twice"
    lost = [life.instance.uuid for life in ended if life.is_owed and life.instance.uuid not in captured]
    assert not lost
    assert sorted(receipt["copies"][0]["attempt"]["attempt"] for receipt in receipts) == bundles(agent)
