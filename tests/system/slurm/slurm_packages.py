"""What a virtual Slurm cluster needs of the machine it runs on."""

from __future__ import annotations

import os
import subprocess

import system_packages


def obstacle() -> str | None:
    """Why no cluster can run here, or None; packages are installed when that is all it takes."""
    if os.geteuid() != 0:
        return "a virtual Slurm cluster needs root"
    if reason := system_packages.obstacle(*system_packages.SLURM):
        return reason
    name = f"lgmprobe{os.getpid()}"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if probe.returncode != 0:
        return f"network namespaces are not allowed here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return None
