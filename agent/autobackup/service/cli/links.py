"""
`link` and `links`: which backup stands on which image or base. `link` asks the agent, `links` the stores themselves.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.tree import Tree

from autobackup.container.header import HEADER_BYTES, decode
from autobackup.errors import AutobackupError, CloudRefused, CloudUnavailable, Damaged, Refused, Transient
from autobackup.model import AttemptId
from autobackup.rules.lineage import stood_on
from autobackup.service.cli.finding import find, run, where, words_of
from autobackup.service.cli.output import format_option, show_one, show_tree
from autobackup.service.cli.queue import LONG_ANSWER_S, ask, config_option, socket_option, socket_path
from autobackup.stores import OpenDestination


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """An image, a sealed base or a backup. *state*: what was found of it."""

    id: str
    kind: str
    name: str
    state: str


@click.command()
@click.argument("parent")
@click.argument("child")
@click.option("--show", "order", flag_value="GET", help="Only say whether they are linked.")
@click.option("--delete", "order", flag_value="DELETE", help="Undo it; the last link that goes releases the parent.")
@socket_option
@config_option
@format_option
def link(parent: str, child: str, order: str | None, path: Path | None, config: Path | None, fmt: str) -> None:
    """
    Link the backup CHILD to PARENT, an image or a sealed base: it is protected for as long as the link is there.

    The agent does that by itself for what it seals. A backup that was sealed on a parent is linked to it as long as it
    is there.
    """
    answer = ask(socket_path(path, config), order or "POST", f"/v1/link/{parent}/{child}", within_s=LONG_ANSWER_S)
    show_one(answer, fmt=fmt)


@click.command()
@click.argument("image")
@where()
@format_option
def links(image: str, places: list[OpenDestination], fmt: str) -> None:
    """Show what IMAGE (a backup, a sealed base, an image in Glance) stands on, and what stands on it."""

    async def look() -> tuple[list[_Node], _Node, list[_Node]]:
        unwell: list[AutobackupError] = []
        children = [node for place in places for node in await _children(place, image, unwell)]
        try:
            found = await find(image, places)
        except Refused:
            this = await _node(image, places)
            if this.state == "gone" and not children:
                raise
            return [], this, children
        node = await _node(found.stored.attempt, [found.place])
        try:
            header = decode(await found.place.store.read(found.stored.attempt, offset=0, length=HEADER_BYTES))
        except Damaged:
            return [], node, children
        ids = sorted(stood_on(header.parent)) or ([header.parent["image"]] if header.parent else [])
        parents = [await _node(one, [found.place, *places]) for one in ids]
        return parents, node, children

    parents, this, children = run(look)
    if fmt == "json":
        record = {**asdict(this), "parents": [asdict(one) for one in parents]}
        show_one({**record, "children": [asdict(one) for one in children]}, fmt=fmt)
    else:
        show_tree(_tree(parents, this, children))


COMMANDS = (link, links)


def _tree(parents: Sequence[_Node], this: _Node, children: Sequence[_Node]) -> Tree:
    root = Tree("", hide_root=True)
    at = root
    for parent in parents:
        at = root.add(_words(parent))
    middle = at.add(f"{_words(this)}  <-")
    for child in children:
        middle.add(_words(child))
    return root


def _words(node: _Node) -> str:
    return "  ".join(filter(None, (node.kind, node.id, node.name, node.state)))


async def _children(place: OpenDestination, parent: str, unwell: list[AutobackupError]) -> list[_Node]:
    try:
        return [await _node(one, [place]) for one in await place.store.children(parent)]
    except (Transient, Refused) as exc:
        unwell.append(exc)
        return []


async def _node(one: str, places: Sequence[OpenDestination]) -> _Node:
    """What *one* is, as the first of *places* that knows it says."""
    for place in places:
        try:
            stored = await place.store.stat(AttemptId(one))
            words = words_of(stored)
            if words:
                is_base = words.get("kind") == "base"
                name = words.get("instance_name", "")
                return _Node(id=one, kind="base" if is_base else "backup", name=name, state=place.destination.name)
        except (Refused, Damaged):
            pass
        try:
            image = None if place.parents is None else await place.parents.glance.get(one)
        except (CloudRefused, CloudUnavailable):
            image = None
        if image is not None:
            state = "protected" if image.protected else "not protected"
            return _Node(id=one, kind="image", name=image.properties.get("name", ""), state=f"{image.status}, {state}")
    return _Node(id=one, kind="unknown", name="", state="gone")
