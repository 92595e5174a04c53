"""
What Nova calls this host, by its own configuration. Each row was read by oslo.config, too, in Nova's own environment;
but for an empty option, which is no name of a host, they agree.

A wrong name is not an error to Nova: it lists no server for it, and nothing is ever decided.
"""

import socket
from pathlib import Path

import pytest

from autobackup.errors import ConfigError
from autobackup.host.nova_conf import nova_host_name

OURS = socket.gethostname()


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    return tmp_path / "nova.conf"


def test_without_a_file_it_is_the_machines_name(conf: Path) -> None:
    assert nova_host_name(conf) == OURS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# host = compute-1\n",
        "[DEFAULT]\nmy_ip = 10.0.0.1\n",
        "[DEFAULT]\n#host = compute-1\n;host = compute-1\n",
        "[DEFAULT]\nhost =\n",
        "[DEFAULT]\nhost = \n[vnc]\nhost = compute-1\n",
        "[default]\nhost = compute-1\n",
        "[api]\nhost = compute-1\n[DEFAULT]\ncompute_host = compute-2\n",
        "[DEFAULT]\nHost = compute-1\n",
    ],
)
def test_without_the_option_it_is_the_machines_name(conf: Path, text: str) -> None:
    conf.write_text(text)
    assert nova_host_name(conf) == OURS


@pytest.mark.parametrize(
    "text",
    [
        "[DEFAULT]\nhost = compute-1\n",
        "[DEFAULT]\nhost=compute-1",
        "[DEFAULT]\nhost: compute-1\n",
        "[DEFAULT]\nhost =    compute-1   \n",
        '[DEFAULT]\nhost = "compute-1"\n',
        "[DEFAULT]\nhost = 'compute-1'\n",
        "\n# nova\n[DEFAULT]\n; first\nhost = compute-1\n",
        "[DEFAULT]\nhost = compute-0\nhost = compute-1\n",
        "[DEFAULT]\nhost = compute-0\n[api]\nhost = x\n[DEFAULT]\nhost = compute-1\n",
        "[api]\nhost = x\n[DEFAULT]\nhost = compute-1\n[api]\nhost = x\n",
        "[DEFAULT]\nlogging_context_format_string = %(asctime)s [%(request_id)s] %(message)s\nhost = compute-1\n",
        "[DEFAULT]\nenabled_filters = A,\n   B,\n   C\nhost = compute-1\n",
        '[DEFAULT]\npci = { "a": 1 }\npci = { "b": 2 }\nhost = compute-1\n',
        "[DEFAULT]\ntransport_url = rabbit://nova:p%40ss=w:rd@10.0.0.1:5672/\nhost = compute-1\n",
        "[DEFAULT]\r\nhost = compute-1\r\n",
    ],
)
def test_the_option_is_read_as_nova_reads_it(conf: Path, text: str) -> None:
    conf.write_bytes(text.encode())
    assert nova_host_name(conf) == "compute-1"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("host = compute-1.example.org", "compute-1.example.org"),
        ("host = %(x)s", "%(x)s"),
        ("host = a%b", "a%b"),
        ("host = a=b", "a=b"),
        ("host = a:b", "a:b"),
        ("host = a # no comment", "a # no comment"),
        ("host = a ; no comment", "a ; no comment"),
        ("host = 'a", "'a"),
        ("host = 'a\"", "'a\""),
        ("host = größe", "größe"),
    ],
)
def test_what_is_no_syntax_to_oslo_is_none_here(conf: Path, text: str, name: str) -> None:
    conf.write_text(f"[DEFAULT]\n{text}\n")
    assert nova_host_name(conf) == name


def test_bytes_that_are_no_text_elsewhere_in_the_file_are_no_trouble(conf: Path) -> None:
    conf.write_bytes(b"[DEFAULT]\ndescription = caf\xe9\nhost = compute-1\n")
    assert nova_host_name(conf) == "compute-1"


@pytest.mark.parametrize("text", ["host = $my_ip", "host = ${my_ip}", "host = node-$my_ip", "host = a\n  b"])
def test_what_nova_works_out_for_itself_is_asked_of_the_operator(conf: Path, text: str) -> None:
    conf.write_text(f"[DEFAULT]\nmy_ip = 10.0.0.1\n{text}\n")
    with pytest.raises(ConfigError, match=r"nova\.host") as told:
        nova_host_name(conf)
    assert str(conf) in str(told.value)


@pytest.mark.parametrize("text", ["host = compute-1\n", "[DEFAULT\nhost = compute-1\n", "= 1\n"])
def test_what_is_no_configuration_of_oslos_is_named(conf: Path, text: str) -> None:
    """Its first line alone: the file has passwords in it."""
    conf.write_text(text + "[database]\nconnection = mysql://nova:hunter2@db/nova\n")
    with pytest.raises(ConfigError, match=r"nova\.host") as told:
        nova_host_name(conf)
    assert str(told.value).startswith(f"nova_conf: {conf}: ")
    assert "hunter2" not in str(told.value)


def test_a_file_that_cannot_be_read_is_named_with_what_to_write_instead(conf: Path) -> None:
    """The tests run as root, whom no mode stops: a folder in its place does."""
    conf.mkdir()
    with pytest.raises(ConfigError, match=r"nova\.host") as told:
        nova_host_name(conf)
    assert str(told.value).startswith(f"nova_conf: {conf}: Is a directory")


def test_a_link_that_leads_nowhere_is_no_file(conf: Path) -> None:
    conf.symlink_to("nowhere")
    assert nova_host_name(conf) == OURS
