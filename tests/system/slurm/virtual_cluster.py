"""A real Slurm on one machine: every node has its own network, host name and address.

    export PYTHONPATH=tests
    python tests/system/slurm/virtual_cluster.py up [NODES]     prints what to export, and stays up
    python tests/system/slurm/virtual_cluster.py down FOLDER

slurmctld, slurmdbd (on a private MariaDB, for sacct) and one slurmd per node run as plain
processes under one folder. A node is a network namespace behind a bridge, so that its link can be
taken down. Nothing outlives `down`: processes, namespaces, bridge and folder go.

Nodes have `gpus` generic resources that stand for nothing: jobs ask for GPUs as they do anywhere,
and compute on the CPU. Needs root, and the packages `system_packages.SLURM`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ports import keep_port
from slurm_packages import obstacle

STATE_FILE = "cluster.json"
SYSTEM_TABLES = ("mysql_system_tables.sql", "mysql_system_tables_data.sql")


def _wait(condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"virtual cluster: {what} did not happen within {seconds:.0f} s")
        time.sleep(0.3)  # each question to Slurm is a process


@dataclass
class VirtualCluster:
    """`with VirtualCluster(4) as cluster:`, then `cluster.run("sinfo")`.

    Args:
        num_nodes: Nodes n1, n2, ..., each its own network namespace.
        gpus: Generic resources per node, called gpu.
        lost_after: Seconds without an answer after which Slurm gives a node up.
    """

    num_nodes: int = 4
    gpus: int = 2
    lost_after: int = 15
    folder: Path = field(init=False)
    network: str = field(init=False, default="")
    processes: dict[str, int] = field(init=False, default_factory=dict)
    """Name -> leader of a process group of its own."""

    def __enter__(self) -> VirtualCluster:
        # Short: sockets live here, and their paths may have 107 bytes. Not in TMPDIR, which may be
        # this user's alone: munged wants folders through which everybody may walk.
        self.folder = Path(tempfile.mkdtemp(prefix="lgm-slurm-", dir="/tmp"))
        try:
            self._start()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def environment(self) -> dict[str, str]:
        """What makes Slurm's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes."""
        return [f"n{k}" for k in range(1, self.num_nodes + 1)]

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands; what it printed. Raises: RuntimeError with its words."""
        result = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=False
        )
        if check and result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
        return result.stdout.strip()

    def link(self, node: str, up: bool) -> None:
        """Plug a node's network cable in, or out."""
        self._ip("link", "set", self._interface(node), "up" if up else "down")

    def processes_on(self, node: str) -> list[int]:
        """Ids of all processes on a node."""
        result = subprocess.run(
            ["ip", "netns", "pids", self._namespace(node)], capture_output=True, text=True
        )
        return [int(word) for word in result.stdout.split()]

    def down(self) -> None:
        """End everything that belongs to this cluster."""
        self._end_processes_on_nodes()  # jobs first: slurmd starts and ends them
        for pid in reversed(self.processes.values()):
            _kill(-pid, signal.SIGTERM)
        for pid in self.processes.values():
            try:
                _wait(lambda pid=pid: not _alive(pid), "a daemon's end", 15)
            except RuntimeError:
                _kill(-pid, signal.SIGKILL)
        self._end_processes_on_nodes()  # what slurmd has left behind keeps a namespace alive
        for node in self.nodes:
            for kind, name in (("link", self._interface(node)), ("netns", self._namespace(node))):
                words = ["ip", kind, "del", name]
                subprocess.run(words, stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["ip", "link", "del", self._bridge], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end_processes_on_nodes(self) -> None:
        for node in self.nodes:
            for pid in self.processes_on(node):
                _kill(pid, signal.SIGKILL)

    # --- how it comes up ----------------------------------------------------------------------

    def _start(self) -> None:
        self._take_network()
        for name in ("run", "log", "state"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        self._remember()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        run, log = self.folder / "run", self.folder / "log"
        self._background(
            *("munged", "munged", "-F", f"--socket={run}/munge.socket", f"--key-file={key}"),
            *(f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log"),
            f"--seed-file={run}/munge.seed",
        )
        self._start_accounting()
        self._start_network()
        self._background("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            # A node has its own host name and shared memory, and knows the others' addresses. Not
            # `ip netns exec`: that one mounts another /sys, where slurmd misses control groups.
            # Jobs go before other workers' tests: they are the suite's longest chain.
            inside = (
                f"mount --bind {self.folder}/hosts /etc/hosts && mount -t tmpfs node /dev/shm && "
                f"hostname {node} && exec nice -n -5 slurmd -D"
            )
            self._background(
                *(node, "nsenter", f"--net=/run/netns/{self._namespace(node)}"),
                *("unshare", "--uts", "--mount", "sh", "-c", inside),
            )
        self.wait_until_idle()

    def clear(self) -> None:
        """End all jobs and plug all cables in; start anew if that does not give idle nodes."""
        try:
            if not all(map(_alive, self.processes.values())):
                raise RuntimeError("a daemon has ended")
            for node in self.nodes:
                self.link(node, up=True)
            self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
            self.wait_until_idle()
        except (RuntimeError, subprocess.CalledProcessError):
            self.down()
            self.processes.clear()
            self.__enter__()

    def wait_until_idle(self) -> None:
        """Wait for all nodes to be up and free; also for those that were given up."""
        names = f"nodename={','.join(self.nodes)}"
        self.run("scontrol", "update", names, "state=resume", check=False)

        def idle() -> bool:
            shown = self.run("sinfo", "-hN", "-p", "debug", "-t", "idle", check=False)
            return len(shown.split("\n")) == self.num_nodes

        _wait(idle, f"{self.num_nodes} idle nodes")

    def _start_accounting(self) -> None:
        self._kept = [keep_port() for _ in range(3)]
        port, dbd_port, controller = (kept.getsockname()[1] for kept in self._kept)
        run, log = self.folder / "run", self.folder / "log"
        database = self.folder / "database"
        database.mkdir()
        tables = "".join((Path("/usr/share/mysql") / name).read_text() for name in SYSTEM_TABLES)
        small = [f"--datadir={database}", "--innodb-log-file-size=16M", "--user=root"]
        subprocess.run(
            ["mariadbd", "--no-defaults", "--bootstrap", "--skip-grant-tables", *small],
            input=f"CREATE DATABASE mysql;\nUSE mysql;\n{tables}",
            text=True, check=True, capture_output=True,
        )  # fmt: skip
        (self.folder / "start.sql").write_text(
            "CREATE DATABASE slurm_acct;\n"
            "GRANT ALL ON slurm_acct.* TO slurm@localhost IDENTIFIED BY 'slurm';\n"
        )
        self._background(
            *("mariadbd", "mariadbd", "--no-defaults", *small),
            *("--bind-address=127.0.0.1", f"--port={port}", f"--socket={run}/mariadb.socket"),
            *("--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"),
            *("--performance-schema=OFF", f"--init-file={self.folder}/start.sql"),
        )
        ready = log / "mariadbd.out"
        _wait(lambda: "ready for connections" in ready.read_text(), "a running database")
        host = socket.gethostname().split(".")[0]
        self._write_configuration(host, controller, dbd_port)
        accounting = self.folder / "slurmdbd.conf"
        accounting.touch(0o600)
        accounting.write_text(
            f"AuthInfo=socket={run}/munge.socket\nDbdHost={host}\nDbdAddr=127.0.0.1\n"
            f"DbdPort={dbd_port}\nSlurmUser=root\nStorageType=accounting_storage/mysql\n"
            f"StorageHost=127.0.0.1\nStoragePort={port}\nStorageUser=slurm\nStoragePass=slurm\n"
            f"StorageLoc=slurm_acct\nPidFile={run}/slurmdbd.pid\n"
        )
        self._background("slurmdbd", "slurmdbd", "-D", SLURM_CONF=str(accounting))
        show = ("sacctmgr", "-n", "show", "cluster", "format=cluster")
        _wait(lambda: _succeeds(show, self.environment), "an answer of slurmdbd")
        self.run("sacctmgr", "-i", "add", "cluster", "virtual", check=False)

    def _write_configuration(self, host: str, controller: int, dbd_port: int) -> None:
        folder = self.folder
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={self.network}.{k} CPUs=8 RealMemory=16000 "
            f"Gres=gpu:{self.gpus}"
            for k, node in enumerate(self.nodes, start=1)
        )
        names = f"NodeName=n[1-{self.num_nodes}]"
        for number in range(self.gpus):  # Slurm counts files, and opens none
            (folder / f"gpu{number}").touch()
        devices = f"File={folder}/gpu[0-{self.gpus - 1}]"
        (folder / "gres.conf").write_text(f"AutoDetect=off\n{names} Name=gpu {devices}\n")
        # cred_expire: a requeued job waits for its old credential to end, two minutes by default,
        # and Slurm takes that default for values below 5.
        # Packages of Debian have no systemd-free cgroup plugin that works in a container.
        (folder / "slurm.conf").write_text(f"""\
ClusterName=virtual
SlurmctldHost={host}({self.network}.254)
SlurmctldPort={controller}
SlurmctldParameters=preempt_send_user_signal
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/run/munge.socket
AccountingStoreFlags=job_comment
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=2
SlurmdTimeout={self.lost_after}
KillWait=5
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=debug Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
""")
        own = "".join(f"{self.network}.{k} n{k}\n" for k in range(1, self.num_nodes + 1))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{self.network}.254 {host}\n{own}")

    def _take_network(self) -> None:
        """Make the bridge of a network that nobody here is in; another cluster gets another."""
        shown = subprocess.run(["ip", "addr"], capture_output=True, text=True, check=True).stdout
        for number in range(100, 200):
            self.network = f"10.77.{number}"
            if f"{self.network}." in shown or self._interface("") in shown:
                continue
            made = ["ip", "link", "add", self._bridge, "type", "bridge"]
            if subprocess.run(made, capture_output=True, check=False).returncode == 0:
                return
        raise RuntimeError("virtual cluster: no free network")

    def _start_network(self) -> None:
        self._ip("addr", "add", f"{self.network}.254/24", "dev", self._bridge)
        self._ip("link", "set", self._bridge, "up")
        for number, node in enumerate(self.nodes, start=1):
            space, outside = self._namespace(node), self._interface(node)
            self._ip("netns", "add", space)
            self._ip(
                *("link", "add", outside, "type", "veth"), *("peer", "name", "eth0", "netns", space)
            )
            self._ip("link", "set", outside, "master", self._bridge, "up")
            self._ip("-n", space, "addr", "add", f"{self.network}.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self._ip("-n", space, "link", "set", device, "up")

    @property
    def _tag(self) -> str:
        """Tells this cluster's interfaces from another's; names have 15 bytes at most."""
        return self.network.rsplit(".", 1)[1]

    @property
    def _bridge(self) -> str:
        return f"lgmbr{self._tag}"

    def _namespace(self, node: str) -> str:
        return f"lgm{self._tag}-{node}"

    def _interface(self, node: str) -> str:
        return f"lgmv{self._tag}-{node}"

    def _ip(self, *args: str) -> None:
        subprocess.run(["ip", *args], check=True, capture_output=True)

    def _background(self, name: str, *command: str, **environment: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process.pid
        self._remember()

    def _remember(self) -> None:
        """For `down` from another process."""
        state = {
            **{"num_nodes": self.num_nodes, "gpus": self.gpus, "network": self.network},
            "processes": self.processes,
        }
        (self.folder / STATE_FILE).write_text(json.dumps(state))


def _succeeds(command: tuple[str, ...], environment: dict[str, str]) -> bool:
    return (
        subprocess.run(command, env=os.environ | environment, capture_output=True).returncode == 0
    )


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _alive(pid: int) -> bool:
    """Whether a process runs; a child of ours that has ended is collected on the way."""
    try:
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return False
    except ChildProcessError:  # not ours
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main(argv: list[str]) -> int:
    """The command of the module's docstring."""
    if argv[:1] == ["down"] and len(argv) == 2:
        folder = Path(argv[1])
        state = json.loads((folder / STATE_FILE).read_text())
        cluster = VirtualCluster(state["num_nodes"], state["gpus"])
        cluster.folder, cluster.network = folder, state["network"]
        cluster.processes = state["processes"]
        cluster.down()
        return 0
    if argv[:1] != ["up"] or len(argv) > 2:
        print(__doc__)
        return 2
    reason = obstacle()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    cluster = VirtualCluster(int(argv[1]) if len(argv) == 2 else 4)
    cluster.__enter__()
    print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")
    print(f"# {sys.executable} {__file__} down {cluster.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
