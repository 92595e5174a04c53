"""
`status` and `queue`: what the running agent says, over its unix socket, and the two orders that it takes.
"""

import http.client
import json
import socket
from pathlib import Path
from typing import Any, Final

import click

from autobackup.config import ApiSection
from autobackup.configfile import load
from autobackup.errors import Refused, Transient
from autobackup.service.cli.output import format_option, show_one, show_rows
from autobackup.units import format_duration

_ANSWER_S: Final = 10.0
LONG_ANSWER_S: Final = 600.0  # before a parent is let go, every header in a project may have to be read
socket_option = click.option(
    "--socket", "path", type=click.Path(path_type=Path), help=f"The agent's socket.  [default: {ApiSection().socket}]"
)
config_option = click.option("--config", type=click.Path(path_type=Path), help="Read the socket's path from here.")


@click.command()
@socket_option
@config_option
@format_option
def status(path: Path | None, config: Path | None, fmt: str) -> None:
    """What the agent holds and does. Exit status 5 if it does not answer."""
    show_one(ask(socket_path(path, config), "GET", "/v1/status"), fmt=fmt)


@click.group(invoke_without_command=True)
@socket_option
@config_option
@format_option
@click.pass_context
def queue(ctx: click.Context, path: Path | None, config: Path | None, fmt: str) -> None:
    """The jobs of this host, and the instances whose fate is not decided yet."""
    ctx.obj = socket_path(path, config)
    if ctx.invoked_subcommand is not None:
        return
    answer = ask(ctx.obj, "GET", "/v1/queue")
    if fmt == "json":
        click.echo(json.dumps(answer, indent=1))
        return
    rows = [
        {
            **job,
            "age": format_duration(job["age_s"]),
            "copies": " ".join(f"{copy['destination']}:{copy['state']}" for copy in job["copies"]),
        }
        for job in answer["jobs"]
    ]
    rows += [
        {**one, "job": "-", "state": "undecided", "age": format_duration(one["age_s"]), "last_error": one["reason"]}
        for one in answer["undecided"]
    ]  # fmt: skip
    columns = ("job", "instance", "name", "state", "age", "copies", "last_error")
    show_rows(rows, columns=columns, fmt=fmt, empty="No jobs.")


@queue.command()
@click.argument("job")
@socket_option
@config_option
@click.pass_obj
def retry(before: Path, job: str, path: Path | None, config: Path | None) -> None:
    """Try JOB again now; a parked one goes back to the queue."""
    where = socket_path(path, config) if path or config else before
    click.echo(f"{job}: {ask(where, 'POST', f'/v1/queue/{job}/retry')['state']}")


@queue.command()
@click.argument("job")
@click.option("--destination", help="Give up this copy alone; the others must still be proven before the scrub.")
@click.option("--confirm", is_flag=True, help="Required: what is discarded is let go, unbacked.")
@socket_option
@config_option
@click.pass_obj
def discard(
    before: Path, job: str, destination: str | None, path: Path | None, config: Path | None, *, confirm: bool
) -> None:
    """Give JOB up, or one of its copies. It goes on the receipt. The disks of a whole job are unlinked unbacked."""
    if not confirm:
        what = f"--destination {destination} " if destination else ""
        raise click.UsageError(
            f"this lets the last state of the instance go{' unbacked there' if destination else ''}; "
            f"say: autobackup queue discard {job} {what}--confirm"
        )
    where = socket_path(path, config) if path or config else before
    order = {"confirm": job, "destination": destination or ""}
    click.echo(f"{job}: {ask(where, 'POST', f'/v1/queue/{job}/discard', order)['state']}")


@queue.command()
@click.argument("instance")
@click.option("--confirm", is_flag=True, help="Required: nobody else has said that it was terminated.")
@socket_option
@config_option
@click.pass_obj
def take(before: Path, instance: str, path: Path | None, config: Path | None, *, confirm: bool) -> None:
    """Seal and prove the disks of INSTANCE (uuid), which waits undecided. They are let go then, and not overwritten."""
    _order("take", instance, socket_path(path, config) if path or config else before, confirm=confirm)


@queue.command("let-go")
@click.argument("instance")
@click.option("--confirm", is_flag=True, help="Required: what is let go is gone, unbacked.")
@socket_option
@config_option
@click.pass_obj
def let_go(before: Path, instance: str, path: Path | None, config: Path | None, *, confirm: bool) -> None:
    """Let go of the disks of INSTANCE (uuid), which waits undecided, without a backup."""
    _order("let-go", instance, socket_path(path, config) if path or config else before, confirm=confirm)


COMMANDS = (status, queue)


def _order(order: str, instance: str, where: Path, *, confirm: bool) -> None:
    if not confirm:
        raise click.UsageError(f"say: autobackup queue {order} {instance} --confirm")
    ask(where, "POST", f"/v1/instances/{instance}/{order}", {"confirm": instance})
    click.echo(f"{instance}: {order} ordered; autobackup queue shows what comes of it")


def socket_path(path: Path | None, config: Path | None) -> Path:
    if path is not None:
        return path
    return load(config).api.socket if config is not None else ApiSection().socket


def ask(path: Path, method: str, target: str, body: object = None, *, within_s: float = _ANSWER_S) -> Any:
    """What the agent that listens at *path* says. `Transient` if it does not answer, `Refused` with its reason."""
    connection = _UnixConnection(str(path), within_s)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, target, body=text, headers={"Content-Type": "application/json"} if text else {})
        response = connection.getresponse()
        answer = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise Transient(f"{path}: the agent does not answer ({exc}); is autobackup-agent running?") from exc
    finally:
        connection.close()
    if response.status >= 400:
        raise Refused(answer.get("error", f"{method} {target}: {response.status}"))
    return answer


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, within_s: float) -> None:
        super().__init__("localhost", timeout=within_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
