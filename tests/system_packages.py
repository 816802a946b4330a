"""Debian packages that tests need: installed through apt where that is possible.

Tests install what they need. All at once, beforehand: python3 tests/system_packages.py
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SLURM = (
    ("slurmctld", "slurmd", "slurm-client", "slurmdbd", "munge", "mariadb-server-core", "iproute2"),
    ("slurmctld", "slurmd", "sbatch", "slurmdbd", "munged", "mariadbd", "ip", "nsenter"),
)
CEPH = (
    ("ceph-mon", "ceph-osd", "radosgw", "ceph-common"),
    ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool"),
)
CHROMIUM = (("chromium",), ("chromium",))
"""Packages, and the commands that they bring."""

LOCK = Path("/tmp/lgm-scale-tests-apt.lock")
"""Of all test processes of a machine: apt refuses where another one has just begun."""


def obstacle(packages: Sequence[str], commands: Sequence[str]) -> str | None:
    """Install packages unless their commands are here; why they cannot be had, or None."""
    if os.geteuid() != 0:
        missing = _missing(commands)
        return f"{missing} not installed, and installing needs root" if missing else None
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = _missing(commands)
        if not missing:
            return None
        if shutil.which("apt-get") is None:
            return f"{missing} not installed, and there is no apt-get"
        apt = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=600"]
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for step in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run(
                [*apt, *step], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                return f"apt-get {step[0]} failed: {done.stderr.strip()[-500:] or 'no message'}"
    return None


def _missing(commands: Sequence[str]) -> str:
    return ", ".join(name for name in commands if shutil.which(name) is None)


if __name__ == "__main__":
    for packages, commands in (SLURM, CEPH, CHROMIUM):
        reason = obstacle(packages, commands)
        print(f"{', '.join(packages)}: {reason or 'installed'}")
