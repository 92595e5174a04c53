"""
`make demo-rules`: everything that Nova does with a server, on a real libvirtd and QEMU, and what the agent makes of it.

Hard reboots, rebuilds, resizes, shelves and evacuations look like deletes on the host; Nova's record tells them apart,
also where its API is ill. A watcher looks at every disk that lives. The last line is one JSON object; the exit status
is 0 only if every verdict was the expected one, and no such disk was touched.
"""

import json
import sys
from typing import Any

import libvirt
from tests.demo import say
from tests.lab.hypervisor import Hypervisor
from tests.lab.nova_plays import Result, Row, Scenario, perform
from tests.lab.nova_scenarios import SCENARIOS
from tests.lab.workspace import workspace


def main() -> int:
    """Play them all, many at a time; leave nothing behind."""
    libvirt.registerErrorHandler(lambda *_: None, None)
    with workspace() as place, Hypervisor() as hypervisor:
        say(f"libvirtd and QEMU (TCG) are up; {len(SCENARIOS)} scenarios, many at a time, with a fake Nova's API")
        result = perform(SCENARIOS, hypervisor, place, say=tell)
    say(f"{result.watched_count} disks were watched while they lived; touched: {len(result.touched)}")
    for words in result.touched:
        say(f"TOUCHED {words}")
    print(json.dumps(last_line(result)))
    return 1 if result.wrong or result.touched else 0


def last_line(result: Result) -> dict[str, Any]:
    """What the demo ends with."""
    rows = [row for scenario in SCENARIOS for row in result.rows[scenario.name]]
    return {
        "scenarios": [{"name": row.name, "expected": row.expected, "verdict": row.verdict} for row in rows],
        "wrong": len(result.wrong),
        "live_inodes_touched": len(result.touched),
    }


def tell(_scenario: Scenario, rows: list[Row]) -> None:
    for row in rows:
        why = f": {row.reason}" if row.reason else ""
        wrong = "" if row.is_right else f"  WRONG, expected {row.expected} {row.problem}"
        say(f"{row.name:54} {row.verdict}{why}{wrong}")


if __name__ == "__main__":
    sys.exit(main())
