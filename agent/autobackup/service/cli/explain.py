"""
`explain`: which rule wants an instance, and why. What the agent knows of its instances, held against a file's rules.

The file need not be the one that the agent runs with: a change is tried on this host's instances before it is made.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from autobackup.config import DEFAULT_PATH, Config
from autobackup.configfile import load
from autobackup.errors import Refused
from autobackup.model import DiskKind, InstanceRecord, Occasion, decode
from autobackup.rules.policy import Explanation, Plan, PlannedCopy, RuleAnswer, explain
from autobackup.rules.wishes import described
from autobackup.service.cli.output import format_option, show_rows, show_text
from autobackup.service.cli.queue import ask
from autobackup.service.witness import fingerprint, rulebook
from autobackup.units import format_bytes, format_duration

_APPLIES: Final = {True: "yes", False: "no", None: "cannot be told"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """One instance of this host, as the agent knows it."""

    record: InstanceRecord
    disk_bytes: int | None


@click.command("explain")
@click.argument("instance", required=False)
@click.option("--dry-run", is_flag=True, help="All instances of this host: what would be done with each, by rule.")
@click.option(
    "--config", "file", type=click.Path(path_type=Path), default=DEFAULT_PATH, show_default=True,
    help="The rules to go by: those of the agent, or ones to be tried.",
)  # fmt: skip
@click.option("--socket", "path", type=click.Path(path_type=Path), help="The agent's socket.  [default: the file's]")
@format_option
def explain_command(instance: str | None, file: Path, path: Path | None, fmt: str, *, dry_run: bool) -> None:
    """
    Say which rule would back INSTANCE up, and why: by uuid, the start of one, or name. Changes nothing.

    With --dry-run and no INSTANCE: one line for each instance of this host.
    """
    if (instance is None) != dry_run:
        raise click.UsageError("name an INSTANCE, or say --dry-run for all of this host")
    config = load(file)
    answer = ask(path or config.api.socket, "GET", "/v1/instances")
    if answer["rulebook"] != fingerprint(rulebook(config)):
        click.echo(f"note: the agent does not run with the rules of {file}; this is what it would do by them", err=True)
    held = [_held(one) for one in answer["instances"]]
    if instance is None:
        rows = [_row(one, config) for one in held]
        columns = ("instance", "name", "project", "rule", "on", "goes to", "disks", "owner's request")
        show_rows(rows, columns=columns, fmt=fmt, empty="No instances are held on this host.")
        return
    one = _find(instance, held)
    show_text(_lines(one, config), record=_as_json(one, config), fmt=fmt)


COMMANDS = (explain_command,)


def _held(said: Mapping[str, Any]) -> _Held:
    record = decode(InstanceRecord, json.dumps(said["record"]).encode(), where="the agent's answer")
    return _Held(record=record, disk_bytes=said["disk_bytes"])


def _find(words: str, held: Sequence[_Held]) -> _Held:
    near = [one for one in held if one.record.instance.startswith(words) or words in (one.record.name,)]
    if len(near) == 1:
        return near[0]
    if not near:
        raise Refused(f"no instance {words!r} is held on this host; autobackup explain --dry-run shows them all")
    raise Refused(f"{words!r} is {len(near)} instances: {', '.join(one.record.instance for one in near)}")


def _explained(one: _Held, config: Config, occasion: Occasion = Occasion.TERMINATE) -> Explanation:
    return explain(one.record, rulebook(config), occasion=occasion, disk_bytes=one.disk_bytes)


# ---- all of them ----------------------------------------------------------------------------------------------------


def _row(one: _Held, config: Config) -> dict[str, object]:
    plans = {occasion: _explained(one, config, occasion).plan for occasion in Occasion}
    wanted = [occasion for occasion, plan in plans.items() if plan is not None]
    plan = next((plan for plan in plans.values() if plan is not None), None)
    whole = _explained(one, config)
    request = "" if whole.request is None else described(whole.request)
    return {
        "instance": one.record.instance,
        "name": one.record.name,
        "project": one.record.server.project_name or one.record.owner_project,
        "rule": _rule_of(plan),
        "on": ", ".join(wanted),
        "goes to": "" if plan is None else ", ".join(_copy_words(copy, config) for copy in plan.copies),
        "disks": "" if plan is None else _disks_words(plan),
        "owner's request": f"{request}; not heeded: {whole.request_note}" if whole.request_note else request,
    }


def _rule_of(plan: Plan | None) -> str:
    if plan is None:
        return "none: not backed up"
    return plan.rule if plan.certain else f"{plan.rule}? {plan.missing}"


# ---- one of them ----------------------------------------------------------------------------------------------------


def _lines(one: _Held, config: Config) -> Iterator[str]:
    record, whole = one.record, _explained(one, config)
    size = "" if one.disk_bytes is None else f"; its root disk occupies {format_bytes(one.disk_bytes)}"
    yield f"{record.name or '(no name)'}  {record.instance}{size}"
    yield ""
    if not whole.answers:
        yield "There is no [[rule]]."
    for answer in whole.answers:
        does = "excludes" if answer.rule.exclude else "applies"
        yield f"rule {answer.rule.name!r} {does}: {_applies(answer)}"
        for held in answer.conditions:
            yield f"    {_APPLIES[held.holds]:14} {held.key} is {held.wanted}   (it is: {held.found})"
        if not answer.conditions:
            yield "    it has no conditions"
    yield ""
    if whole.request is None:
        heard = record.server.properties is not None or config.verdict != "nova"
        yield "its owner has asked for nothing" if heard else "what its owner asks for has not been heard yet"
    else:
        yield described(whole.request)
    if whole.request_note:
        yield f"    not heeded: {whole.request_note}"
    yield ""
    for occasion in Occasion:
        yield f"on {occasion + ':':16} {_plan_words(_explained(one, config, occasion).plan, config, occasion)}"


def _applies(answer: RuleAnswer) -> str:
    words = _APPLIES[answer.holds]
    if answer.holds is not False and tuple(answer.rule.on) != (Occasion.TERMINATE,):
        words += f", on {' and '.join(answer.rule.on)}"
    return f"{words}, but an earlier rule has decided" if not answer.is_asked else words


def _plan_words(plan: Plan | None, config: Config, occasion: Occasion) -> str:
    if plan is None:
        return "not backed up"
    if not plan.certain:
        return f"an operator will be asked: {plan.missing}"
    places = ", ".join(_copy_words(copy, config) for copy in plan.copies)
    end = plan.scrub_method if occasion is Occasion.TERMINATE else "let go, not overwritten"
    return f"into {places}; {_disks_words(plan)}; then {end} (by {plan.rule})"


def _disks_words(plan: Plan) -> str:
    return ", ".join(sorted(plan.disks, key=[kind.value for kind in DiskKind].index))


def _copy_words(copy: PlannedCopy, config: Config) -> str:
    template = copy.destination.rpartition(".")[0] if copy.request is not None else copy.destination
    destination = next((one for one in config.destination if one.name == template), None)
    own_s = None if destination is None else destination.retention_s
    asked_s = copy.request.retention_s if copy.request is not None else copy.retention_s
    kept_s = own_s if asked_s is None else asked_s
    kept = "kept until deleted" if kept_s is None else f"for {format_duration(kept_s)}"
    return f"{copy.destination} ({kept})"


def _as_json(one: _Held, config: Config) -> dict[str, object]:
    whole = _explained(one, config)
    plans = {occasion: _explained(one, config, occasion).plan for occasion in Occasion}
    return {
        "instance": one.record.instance,
        "name": one.record.name,
        "rules": [
            {
                "rule": answer.rule.name,
                "exclude": answer.rule.exclude,
                "applies": answer.holds,
                "on": list(answer.rule.on),
                "decided_earlier": not answer.is_asked,
                "conditions": [
                    {"key": held.key, "wanted": held.wanted, "found": held.found, "holds": held.holds}
                    for held in answer.conditions
                ],
            }
            for answer in whole.answers
        ],
        "request": None if whole.request is None else described(whole.request),
        "request_not_heeded": whole.request_note or None,
        "plans": {occasion: None if plan is None else _plan_json(plan) for occasion, plan in plans.items()},
    }


def _plan_json(plan: Plan) -> dict[str, object]:
    return {
        "rule": plan.rule,
        "certain": plan.certain,
        "missing": plan.missing,
        "copies": [{"destination": copy.destination, "retention_s": copy.retention_s} for copy in plan.copies],
        "disks": sorted(plan.disks),
        "scrub": plan.scrub_method,
    }
