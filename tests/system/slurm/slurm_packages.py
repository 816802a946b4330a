"""What a virtual Slurm cluster needs of the machine it runs on."""

from __future__ import annotations

import os
import shutil
import subprocess

PACKAGES = (
    *("slurmctld", "slurmd", "slurm-client", "slurmdbd"),
    *("munge", "mariadb-server-core", "iproute2"),
)
COMMANDS = ("slurmctld", "slurmd", "sbatch", "slurmdbd", "munged", "mariadbd", "ip", "nsenter")


def missing_commands() -> list[str]:
    """What is not installed yet."""
    return [name for name in COMMANDS if shutil.which(name) is None]


def install() -> None:
    """Install Debian's packages. Raises: RuntimeError with apt's words."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=600"]
    for command in (
        [*apt, "update"],
        [*apt, "install", "-y", "--no-install-recommends", *PACKAGES],
    ):
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()[-500:]}")


def obstacle() -> str | None:
    """Why no cluster can run here, or None; packages are installed when that is all it takes."""
    if os.geteuid() != 0:
        return "a virtual Slurm cluster needs root"
    if missing_commands():
        if shutil.which("apt-get") is None:
            return f"no {', '.join(missing_commands())} here, and no apt-get to install them"
        try:
            install()
        except RuntimeError as error:
            return f"Slurm cannot be installed: {error}"
    name = f"lgmprobe{os.getpid()}"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if probe.returncode != 0:
        return f"network namespaces are not allowed here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return None
