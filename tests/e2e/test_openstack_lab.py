"""The lab's cloud and its proxy are what they claim to be: tests of the agent stand on these."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote

import openstack
import openstack.config
import openstack.connection
import pytest
from tests.lab.agent import wait_until
from tests.lab.leftovers import find_leftovers
from tests.lab.openstack.cloud import Answer, Cloud, CloudError
from tests.lab.openstack.rest import request
from tests.lab.proxy import Proxy

MIB = 1024 * 1024
OCTETS = {"Content-Type": "application/octet-stream"}
BROKEN = (ConnectionError, HTTPException)

# openstacksdk 4.22 warns of its own code, as soon as it reads a clouds.yaml.
uses_sdk = pytest.mark.filterwarnings(
    "ignore::openstack.warnings.RemovedInSDK50Warning", "ignore::openstack.warnings.RemovedInSDK60Warning"
)

# identity


@pytest.mark.parametrize("project", ["tenant-a", "tenant-b", "vault"])
def test_the_agent_stores_wherever_it_was_let_in(cloud: Cloud, project: str) -> None:
    image = create(cloud, "autobackup", project)
    answer = upload(cloud, "autobackup", project, image, data=b"sealed" * 1000)

    assert answer.status == 204
    seen = show(cloud, "autobackup", project, image)
    assert (seen["status"], seen["owner"], seen["size"]) == ("active", cloud.projects[project], 6000)
    assert seen["os_hash_value"] == hashlib.sha512(b"sealed" * 1000).hexdigest()
    assert cloud.image_file(image).read_bytes() == b"sealed" * 1000
    assert cloud.image_file(image) in cloud.image_files()


def test_without_a_role_there_is_no_token(cloud: Cloud) -> None:
    assert cloud.authenticate("autobackup", "no-consent").status == 401
    with pytest.raises(CloudError, match="no token for autobackup in no-consent: 401"):
        cloud.call("autobackup", "no-consent", "GET", f"{cloud.glance_url}/v2/images")


def test_a_role_comes_and_goes_at_once(cloud: Cloud) -> None:
    cloud.grant("autobackup", "no-consent", "member")
    try:
        create(cloud, "autobackup", "no-consent")
        old = {"X-Auth-Token": cloud.token("autobackup", "no-consent")}
    finally:
        cloud.revoke("autobackup", "no-consent", "member")

    answer = cloud.call("autobackup", "no-consent", "GET", f"{cloud.glance_url}/v2/images", headers=old)

    assert answer.status == 401
    assert cloud.authenticate("autobackup", "no-consent").status == 401


def test_a_spent_token_is_renewed(cloud: Cloud) -> None:
    token = cloud.token("bob", "tenant-b")
    revoked = cloud.call(
        "bob", "tenant-b", "DELETE", f"{cloud.keystone_url}/v3/auth/tokens", headers={"X-Subject-Token": token}
    )

    assert revoked.status == 204
    assert cloud.call("bob", "tenant-b", "GET", f"{cloud.glance_url}/v2/images").status == 200
    assert cloud.token("bob", "tenant-b") != token


def test_short_tokens_expire(cloud: Cloud) -> None:
    with cloud.keystone_with(token_lifetime_s=3) as keystone_url:
        answer = cloud.authenticate("alice", "tenant-a", keystone_url=keystone_url)
        token = {"X-Auth-Token": answer.headers["X-Subject-Token"]}

        def status() -> int:
            return cloud.call("alice", "tenant-a", "GET", f"{cloud.glance_url}/v2/images", headers=token).status

        assert status() == 200
        began_s = time.monotonic()
        wait_until(lambda: status() == 401, within_s=10)
        assert time.monotonic() - began_s < 4


@uses_sdk
def test_clouds_yaml_is_secret_and_opens_every_door(cloud: Cloud) -> None:
    entries = json.loads(cloud.clouds_file.read_text())["clouds"]

    assert stat.S_IMODE(cloud.clouds_file.stat().st_mode) == 0o600
    assert {"alice", "autobackup", "autobackup@tenant-a", "autobackup@vault", "carol", "erin", "vera"} <= set(entries)
    assert "project_name" not in entries["autobackup"]["auth"]
    with sdk(cloud.clouds_file, "autobackup") as connection:
        assert connection.session.get_project_id() is None
        vault = connection.connect_as_project("vault")
        with contextlib.closing(vault):
            assert vault.current_project_id == cloud.projects["vault"]
            assert list(vault.image.images(limit=100)) is not None
            assert list(vault.key_manager.secrets(limit=100)) is not None  # its pages lead nowhere


def test_a_key_is_for_those_it_names(cloud: Cloud) -> None:
    secret = {"name": "kek", "payload": "c2VhbGVk", "payload_content_type": "application/octet-stream"}
    secret |= {"payload_content_encoding": "base64"}
    made = cloud.call("autobackup", "vault", "POST", f"{cloud.barbican_url}/v1/secrets", json=secret)
    assert made.status == 201
    ref = made.json()["secret_ref"]
    assert ref.startswith(cloud.barbican_url)
    acl = {"read": {"project-access": False, "users": [cloud.users["rita"]]}}
    assert cloud.call("autobackup", "vault", "PUT", f"{ref}/acl", json=acl).status == 200

    def status(user: str, project: str) -> int:
        return cloud.call(user, project, "GET", f"{ref}/payload", headers={"Accept": OCTETS["Content-Type"]}).status

    assert (status("rita", "tenant-a"), status("carol", "tenant-a"), status("vera", "vault")) == (200, 403, 403)


# Glance


def test_an_image_is_shared_before_it_has_data(cloud: Cloud) -> None:
    image = create(cloud, "autobackup", "vault", visibility="shared")
    url = f"{cloud.glance_url}/v2/images/{image}"
    member = {"member": cloud.projects["tenant-a"]}

    answer = cloud.call("autobackup", "vault", "POST", f"{url}/members", json=member)

    assert (answer.status, answer.json()["status"]) == (200, "pending")
    assert show(cloud, "alice", "tenant-a", image)["status"] == "queued"
    assert cloud.call("alice", "tenant-a", "GET", f"{url}/file").status == 204
    assert upload(cloud, "autobackup", "vault", image, data=b"sealed").status == 204
    assert cloud.call("alice", "tenant-a", "GET", f"{url}/file").body == b"sealed"
    assert cloud.call("bob", "tenant-b", "GET", url).status == 404
    assert cloud.call("autobackup", "vault", "POST", f"{url}/members", json=member).status == 409


@pytest.mark.parametrize("visibility", ["private", "community"])
def test_only_a_shared_image_has_members(cloud: Cloud, visibility: str) -> None:
    image = create(cloud, "autobackup", "vault", visibility=visibility)
    member = {"member": cloud.projects["tenant-a"]}

    answer = cloud.call("autobackup", "vault", "POST", f"{cloud.glance_url}/v2/images/{image}/members", json=member)

    assert answer.status == 403


@pytest.mark.parametrize(
    "text",
    [
        *("a\0b", "a\x01\x1f\x7f\x85", "\"'`\\", "a\nb\r\n\t", " a ", "/:.%00", "äßЖ漢", "\ufeff\ufffe\u202e\u2028"),
        pytest.param("k" * 255, id="255"),
    ],
)
def test_glance_keeps_any_character_of_three_bytes(cloud: Cloud, text: str) -> None:
    """In a value and in a key, and finds it again."""
    mark = uuid.uuid4().hex
    image = create(cloud, "autobackup", "vault", **{"value": f"{mark}{text}", text: mark})

    seen = show(cloud, "autobackup", "vault", image)
    by_value = f"{cloud.glance_url}/v2/images?value={quote(mark + text)}"
    found = cloud.call("autobackup", "vault", "GET", by_value).json()["images"]

    assert (seen["value"], seen[text]) == (f"{mark}{text}", mark)
    assert [one["id"] for one in found] == [image]


@pytest.mark.parametrize(
    ("text", "value_status", "key_status"),
    [
        ("\U0001f4be", 400, 400),
        ("\ud83d", 500, 500),  # half a pair: JSON can say it, UTF-8 cannot
        pytest.param("k" * 256, 201, 400, id="256"),
        pytest.param("v" * 4000, 201, 400, id="4000"),
        pytest.param("v" * 70000, 201, 400, id="70000"),  # on SQLite; MySQL's TEXT has 65535 bytes
        pytest.param("", 201, 201, id="empty"),
    ],
)
def test_glance_refuses_some_texts(cloud: Cloud, text: str, value_status: int, key_status: int) -> None:
    assert try_create(cloud, "autobackup", "vault", value=text).status == value_status
    assert try_create(cloud, "autobackup", "vault", **{text: "x"}).status == key_status


def test_uploads_at_the_same_time_do_not_lock_the_database(cloud: Cloud) -> None:
    """As SQLite is used by oslo.db, they would: the lab's own trick in `wsgi.py`."""
    images = [create(cloud, "autobackup", "vault") for _ in range(8)]
    with ThreadPoolExecutor(len(images)) as pool:
        answers = list(pool.map(lambda image: upload(cloud, "autobackup", "vault", image, data=bytes(MIB)), images))

    assert [answer.status for answer in answers] == [204] * 8


def test_a_killed_worker_is_replaced(cloud: Cloud) -> None:
    before = cloud.glance_workers()
    assert len(before) == 2
    for worker in before:
        os.kill(worker, signal.SIGKILL)

    wait_until(lambda: len(cloud.glance_workers()) == 2 and not set(before) & set(cloud.glance_workers()))
    create(cloud, "autobackup", "vault")


def test_a_quota_is_enforced(cloud: Cloud) -> None:
    """At the end where the size is unknown, at once where it is announced."""
    with cloud.glance_with(user_storage_quota="1MB") as glance_url:
        told, untold = (create(cloud, "mallory", "elsewhere") for _ in range(2))
        parts = [bytes(MIB // 4)] * 8
        announced = {**OCTETS, "x-openstack-image-size": str(2 * MIB)}

        for image, headers, status in ((told, announced, "queued"), (untold, OCTETS, "saving")):
            url = f"{glance_url}/v2/images/{image}/file"
            answer = cloud.call("mallory", "elsewhere", "PUT", url, data=iter(parts), headers=headers)

            assert answer.status == 413
            assert show(cloud, "mallory", "elsewhere", image)["status"] == status
    assert upload(cloud, "mallory", "elsewhere", told, data=iter(parts)).status == 204  # the first Glance has none


def test_a_second_glance_has_its_own_options(cloud: Cloud) -> None:
    with cloud.glance_with(hashing_algorithm="sha256") as glance_url:
        image = create(cloud, "autobackup", "vault")
        url = f"{glance_url}/v2/images/{image}/file"

        assert cloud.call("autobackup", "vault", "PUT", url, data=b"sealed", headers=OCTETS).status == 204
    seen = show(cloud, "autobackup", "vault", image)
    assert (seen["os_hash_algo"], seen["os_hash_value"]) == ("sha256", hashlib.sha256(b"sealed").hexdigest())


def test_a_service_that_does_not_come_up_says_why(cloud: Cloud) -> None:
    with pytest.raises(CloudError, match="no-such-store"), cloud.glance_with(enabled_backends="files:no-such-store"):
        pass


def test_a_paused_service_does_not_answer(cloud: Cloud) -> None:
    with cloud.paused("glance"), pytest.raises(TimeoutError):
        request("GET", f"{cloud.glance_url}/healthcheck", timeout_s=1)
    create(cloud, "autobackup", "vault")


# the life of a cloud


def test_two_clouds_know_nothing_of_each_other(cloud: Cloud, tmp_path: Path) -> None:
    with Cloud(tmp_path) as other:
        image = create(cloud, "alice", "tenant-a")
        foreign = {"X-Auth-Token": cloud.token("alice", "tenant-a")}

        answer = other.call("alice", "tenant-a", "GET", f"{other.glance_url}/v2/images", headers=foreign)

        assert answer.status == 401
        url = f"{other.glance_url}/v2/images/{image}"
        assert other.call("alice", "tenant-a", "GET", url).status == 404
    assert (tmp_path / "logs/glance.log").exists()  # in a folder of ours, for us to look at
    assert show(cloud, "alice", "tenant-a", image)["id"] == image


def test_a_silent_upload_is_cut_after_the_socket_timeout(openstack_services: None, tmp_path: Path) -> None:
    with Cloud(tmp_path, socket_timeout_s=1, glance_worker_count=1) as cloud:
        assert len(cloud.glance_workers()) == 1

        def parts(pause_s: float) -> Iterator[bytes]:
            yield bytes(MIB // 4)
            time.sleep(pause_s)
            yield bytes(MIB // 4)

        image = create(cloud, "autobackup", "vault")
        with contextlib.suppress(*BROKEN):
            assert upload(cloud, "autobackup", "vault", image, data=parts(3)).status == 500
        assert show(cloud, "autobackup", "vault", image)["status"] == "queued"
        assert upload(cloud, "autobackup", "vault", image, data=parts(0.3)).status == 204


@pytest.mark.parametrize("signo", [signal.SIGINT, signal.SIGKILL])
def test_a_cloud_ends_with_whoever_started_it(openstack_services: None, tmp_path: Path, signo: signal.Signals) -> None:
    """By the marks that the leftover check goes by, so this is also the proof that it sees them."""
    token = uuid.uuid4().hex
    folder = f"Path({str(tmp_path)!r})" if signo == signal.SIGKILL else "None"
    script = (
        "import time; from pathlib import Path; from tests.lab.openstack.cloud import Cloud\n"
        f"with Cloud({folder}) as cloud:\n    print(cloud.folder, flush=True)\n    time.sleep(600)"
    )
    environment = {**os.environ, "AUTOBACKUP_LAB_SESSION": token, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as starter:
        assert starter.stdout is not None
        cloud_folder = Path(starter.stdout.readline().strip())
        running = processes(token)
        starter.send_signal(signo)
        starter.communicate(timeout=30)

    # The starter; three keepers, three masters, four workers.
    assert len(running) == 11
    wait_until(lambda: not processes(token), within_s=5)
    assert cloud_folder.exists() == (signo == signal.SIGKILL)


# the proxy


@uses_sdk
def test_everything_can_be_led_through_a_proxy(cloud: Cloud, tmp_path: Path) -> None:
    """openstacksdk follows the addresses that a service tells about itself; not so here."""
    with contextlib.ExitStack() as stack:
        glance, barbican, keystone = (
            stack.enter_context(Proxy.to(url)) for url in (cloud.glance_url, cloud.barbican_url, cloud.keystone_url)
        )
        clouds_file = cloud.clouds_with(tmp_path, image=glance.url, key_manager=barbican.url, auth=keystone.url)
        connection = stack.enter_context(sdk(clouds_file, "alice"))
        image = connection.image.create_image(
            "through", data=bytes(MIB), disk_format="raw", container_format="bare", wait=True
        )
        secret = connection.key_manager.create_secret(name="through", payload="x", payload_content_type="text/plain")

        assert cloud.image_file(image.id).stat().st_size == MIB
        assert glance.client_bytes > MIB
        assert secret.secret_id
        assert barbican.client_bytes > 0
        assert keystone.client_bytes > 0
    assert stat.S_IMODE(clouds_file.stat().st_mode) == 0o600


def test_a_cut_upload_leaves_the_image_queued(cloud: Cloud) -> None:
    """
    In the end: Glance may begin with an upload (`saving`) when its client is long gone.

    So `queued` may be seen before that too. An upload that meets the dead one gets 409, or 410 at its own end.
    """
    image = create(cloud, "autobackup", "vault")
    with Proxy.to(cloud.glance_url) as proxy:
        proxy.cut_after(2 * MIB)
        with pytest.raises(BROKEN):
            put(cloud, proxy, image, parts=16)
        assert (proxy.client_bytes, proxy.fault_count) == (2 * MIB, 1)

        statuses = []

        def is_taken() -> bool:
            statuses.append(put(cloud, proxy, image, parts=16).status)
            return statuses[-1] == 204

        wait_until(is_taken, within_s=15)
        assert set(statuses) <= {204, 409, 410}
        assert cloud.image_file(image).stat().st_size == 16 * 256 * 1024


def test_a_dropped_reply_leaves_the_image_active(cloud: Cloud) -> None:
    image = create(cloud, "autobackup", "vault")
    with Proxy.to(cloud.glance_url) as proxy:
        proxy.drop_reply()
        url = f"{proxy.url}/v2/images/{image}"
        assert cloud.call("autobackup", "vault", "GET", url).json()["status"] == "queued"  # not a PUT
        with pytest.raises(BROKEN):
            put(cloud, proxy, image, parts=4)

        assert proxy.fault_count == 1
        assert cloud.call("autobackup", "vault", "GET", url).json()["status"] == "active"
        assert cloud.image_file(image).stat().st_size == 4 * 256 * 1024


def test_an_early_answer_comes_through(cloud: Cloud) -> None:
    """Glance refuses and closes while the client still sends."""
    image = create(cloud, "autobackup", "vault")
    with Proxy.to(cloud.glance_url) as proxy, socket.create_connection(proxy.address, timeout=10) as client:
        client.sendall(f"PUT /v2/images/{image}/file HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".encode())
        client.sendall(b"x" * 1000)
        assert client.recv(4096).startswith(b"HTTP/1.1 401")


def test_a_refusing_proxy_is_like_no_server(echo: tuple[str, int]) -> None:
    with Proxy(*echo) as proxy, socket.create_connection(proxy.address, timeout=5) as open_one:
        assert echoed(open_one, b"hello")

        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            open_one.recv(1)
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(proxy.address)

        proxy.heal()
        with socket.create_connection(proxy.address, timeout=5) as healed:
            assert echoed(healed, b"hello")
            assert proxy.connection_count == 2


def test_a_stalled_proxy_goes_on_where_it_was(echo: tuple[str, int]) -> None:
    with Proxy(*echo) as proxy, socket.create_connection(proxy.address, timeout=5) as client:
        assert echoed(client, b"before")
        proxy.stall()
        time.sleep(0.1)  # a fault takes effect within a few hundredths of a second
        with socket.create_connection(proxy.address, timeout=5) as late:
            for one in (client, late):
                one.sendall(b"during")
                one.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    one.recv(1)
            proxy.heal()
            for one in (client, late):
                one.settimeout(5)
                assert one.recv(6) == b"during"


def test_a_slow_proxy_keeps_the_pace_and_never_pauses(echo: tuple[str, int]) -> None:
    with Proxy(*echo) as proxy, socket.create_connection(proxy.address, timeout=5) as client:
        proxy.slow(100_000)
        threading.Thread(target=client.sendall, args=[bytes(50_000)], daemon=True).start()
        began_s = last_s = time.monotonic()
        longest_pause_s, got = 0.0, 0
        while got < 50_000:
            got += len(client.recv(65536))
            now_s = time.monotonic()
            longest_pause_s, last_s = max(longest_pause_s, now_s - last_s), now_s

        assert 0.4 < time.monotonic() - began_s < 1.5
        assert longest_pause_s < 0.3


def test_a_cut_is_exact_and_happens_once(echo: tuple[str, int]) -> None:
    with Proxy(*echo) as proxy:
        proxy.cut_after(10)
        with socket.create_connection(proxy.address, timeout=5) as client:
            assert echoed(client, b"123456789")
            with pytest.raises(ConnectionResetError):
                echoed(client, b"0ab")
        assert proxy.client_bytes == 10
        with socket.create_connection(proxy.address, timeout=5) as client:
            assert echoed(client, b"x" * 100)


def create(cloud: Cloud, user: str, project: str, **properties: str) -> str:
    answer = try_create(cloud, user, project, **properties)
    assert answer.status == 201, str(answer)
    image: str = answer.json()["id"]
    return image


def try_create(cloud: Cloud, user: str, project: str, **properties: str) -> Answer:
    fields = {"name": "lab", "disk_format": "raw", "container_format": "bare", "visibility": "private", **properties}
    return cloud.call(user, project, "POST", f"{cloud.glance_url}/v2/images", json=fields)


def upload(cloud: Cloud, user: str, project: str, image: str, *, data: bytes | Iterator[bytes]) -> Answer:
    return cloud.call(user, project, "PUT", f"{cloud.glance_url}/v2/images/{image}/file", data=data, headers=OCTETS)


def put(cloud: Cloud, proxy: Proxy, image: str, *, parts: int) -> Answer:
    """Upload through *proxy*, chunked, in pieces of 256 KiB."""
    data = iter([bytes(256 * 1024)] * parts)
    url = f"{proxy.url}/v2/images/{image}/file"
    return cloud.call("autobackup", "vault", "PUT", url, data=data, headers=OCTETS)


def show(cloud: Cloud, user: str, project: str, image: str) -> dict[str, object]:
    answer = cloud.call(user, project, "GET", f"{cloud.glance_url}/v2/images/{image}")
    assert answer.status == 200, str(answer)
    seen: dict[str, object] = answer.json()
    return seen


@contextlib.contextmanager
def sdk(clouds_file: Path, entry: str) -> Iterator[openstack.connection.Connection]:
    config = openstack.config.OpenStackConfig(config_files=[str(clouds_file)]).get_one(entry)
    with contextlib.closing(openstack.connection.Connection(config=config)) as connection:
        yield connection


def processes(token: str) -> list[str]:
    return [left for left in find_leftovers(token, [], grace_s=0) if left.startswith("process ")]


def echoed(client: socket.socket, said: bytes) -> bool:
    client.sendall(said)
    heard = b""
    while len(heard) < len(said):
        heard += client.recv(4096)
    return heard == said


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that says what it hears."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        open_ones: list[socket.socket] = []

        def serve(client: socket.socket) -> None:
            with client, contextlib.suppress(OSError):
                while heard := client.recv(65536):
                    client.sendall(heard)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    open_ones.append(client)
                    threading.Thread(target=serve, args=[client], daemon=True).start()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)
        accepting.join()
