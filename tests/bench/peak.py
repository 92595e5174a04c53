"""What a process of ours has used at most, from the kernel: VmHWM counts from the exec, ru_maxrss from the fork."""

from pathlib import Path


def peak_rss_bytes(pid: int | str = "self") -> int:
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM")
