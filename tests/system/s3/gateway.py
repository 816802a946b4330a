"""A real S3 server on loopback for tests: a Ceph RADOS Gateway that keeps its objects in memory.

One monitor, one object store daemon, one gateway: about 1 GB of memory, ten seconds to start. It
checks signatures, buckets and sizes as a real object store does, which a mock does not. By hand:

    PYTHONPATH=tests python tests/system/s3/gateway.py FOLDER

prints the environment that clients need and serves until it is interrupted.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from ports import keep_port
from system_packages import CEPH, obstacle

ACCESS_KEY = "tests-access-key"
SECRET_KEY = "tests-secret-key"
START_TIMEOUT = 300.0  # on a machine with other work
MEMORY_BYTES = 4 << 30  # that the object store may take, not what it takes at once


class Gateway:
    """The three daemons. They end with the process that started them.

    Args:
        folder: Where their configuration, keys and logs go; emptied at the start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept = [keep_port() for _ in range(3)]
        self.port, *self._monitor_ports = (kept.getsockname()[1] for kept in self._kept)
        self.access_key, self.secret_key = ACCESS_KEY, SECRET_KEY
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def endpoint(self) -> str:
        """URL of the S3 service."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What S3 clients read, the streaming library's and Composer's included."""
        return {
            "S3_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start all three and make the user. Raises: TimeoutError, CalledProcessError."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("run", "log", "mon", "osd", "rgw"):
            (self.folder / name).mkdir(parents=True)
        self._write_configuration()
        self._run("ceph-mon", "--mkfs", "-i", "a", *self._monitor_seed())
        self._spawn("mon", "ceph-mon", "-f", "-i", "a")
        self._wait(lambda: self._succeeds("ceph", "--connect-timeout", "2", "mon", "stat"))
        store = str(uuid.uuid4())
        self._run("ceph", "osd", "new", store)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", store)
        self._spawn("osd", "ceph-osd", "-f", "-i", "0")
        self._wait(lambda: "1 up" in self._run("ceph", "osd", "stat"))
        self.start_service()
        keys = ("--access-key", self.access_key, "--secret", self.secret_key)
        self._run("radosgw-admin", "user", "create", "--uid=tests", "--display-name=tests", *keys)
        # The first object of all makes the pools, which takes seconds.
        client = self.client()
        client.create_bucket(Bucket="first")
        client.put_object(Bucket="first", Key="first", Body=b"first")

    def client(self) -> Any:
        """A patient boto3 client."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(retries={"mode": "standard", "max_attempts": 10}),
        )

    def start_service(self) -> None:
        """Start the S3 service on the same port as before; the objects are still there."""
        frontend = f"--rgw_frontends=beast endpoint=127.0.0.1:{self.port}"
        self._spawn("rgw", "radosgw", "-f", "-n", "client.rgw", frontend)
        self._wait(self._answers)

    def stop_service(self) -> None:
        """End the S3 service: clients get refused connections. Objects survive.

        Politely: after a kill the next one's writes wait half a minute for the dead one.
        """
        process = self._running.pop("rgw")
        process.terminate()
        process.wait()

    def mend(self) -> None:
        """Start everything, without its objects, unless all of it runs and answers."""
        running = [process.poll() is None for process in self._running.values()]
        if len(running) == 3 and all(running):
            with contextlib.suppress(TimeoutError):
                self._wait(self._answers)
                return
        self.stop()
        self.start()

    def stop(self) -> None:
        """End everything."""
        for process in reversed(list(self._running.values())):
            process.send_signal(signal.SIGKILL)  # nothing of it is worth keeping
            process.wait()
        self._running.clear()

    def _write_configuration(self) -> None:
        v2, v1 = self._monitor_ports
        self.monitor = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
        self.cluster = str(uuid.uuid4())
        shared = {
            "fsid": self.cluster,
            "mon host": self.monitor,
            "keyring": f"{self.folder}/keyring",
            "run dir": f"{self.folder}/run",
            "log file": f"{self.folder}/log/$name.log",
            "admin socket": f"{self.folder}/run/$name.asok",
            "crash dir": f"{self.folder}/log",
            "mon data": f"{self.folder}/mon",
            "mon data avail crit": "0",  # else no monitor starts where a disk is 95 % full
            "osd data": f"{self.folder}/osd",
            "rgw data": f"{self.folder}/rgw",
            "ms bind ipv6": "false",
            # One store in memory, and pools of one copy that may live with that.
            "osd objectstore": "memstore",
            "memstore device bytes": str(MEMORY_BYTES),
            "osd op queue": "wpq",
            "osd crush chooseleaf type": "0",
            "osd pool default size": "1",
            "osd pool default min size": "1",
            "osd pool default pg num": "4",
            "osd pool default pg autoscale mode": "off",
            "mon allow pool size one": "true",
            "mon max pg per osd": "1000",
            "mon warn on pool no redundancy": "false",
            "auth allow insecure global id reclaim": "false",
            "rgw enable usage log": "false",
        }
        lines = ["[global]", *(f"{key} = {value}" for key, value in shared.items())]
        (self.folder / "ceph.conf").write_text("\n".join(lines) + "\n")

    def _monitor_seed(self) -> list[str]:
        """Make the monitor's map and everybody's keys; the arguments that name them."""
        monitor_map, keyring = f"{self.folder}/monmap", f"{self.folder}/keyring"
        made = ("monmaptool", "--create", "--clobber", "--fsid", self.cluster)
        self._run(*made, "--addv", "a", self.monitor, monitor_map)
        everything = (
            "--cap",
            "mon",
            "allow *",
            "--cap",
            "osd",
            "allow *",
            "--cap",
            "mgr",
            "allow *",
        )
        self._run("ceph-authtool", "--create-keyring", keyring)
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        for name in ("client.admin", "osd.0", "client.rgw"):
            self._run("ceph-authtool", keyring, "--gen-key", "-n", name, *everything)
        return ["--monmap", monitor_map, "--keyring", keyring]

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CEPH_CONF": f"{self.folder}/ceph.conf"}

    def _run(self, *command: str) -> str:
        result = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False,
            timeout=START_TIMEOUT,
        )  # fmt: skip
        if result.returncode != 0:
            raise RuntimeError(f"{command[0]} ended with {result.returncode}: {result.stderr}")
        return result.stdout

    def _succeeds(self, *command: str) -> bool:
        try:
            self._run(*command)
        except (RuntimeError, subprocess.TimeoutExpired):
            return False
        return True

    def _spawn(self, name: str, *command: str) -> None:
        """Start a daemon that is killed when this process ends, however it ends.

        From the main thread: to Linux, the parent is the thread that started it.
        """
        log = (self.folder / "log" / f"{name}.out").open("ab")
        self._running[name] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()

    def _answers(self) -> bool:
        """Whether it answers a request; it listens some time before it does."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            client.request("GET", "/")
            return client.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            client.close()

    def _wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not ready():
            ended = [name for name, process in self._running.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                what = f"no answer after {START_TIMEOUT:.0f} s"
                if ended:
                    words = (self.folder / "log" / f"{ended[0]}.out").read_text(errors="replace")
                    what = f"{ended[0]} ended: {words[-500:]}"
                raise TimeoutError(f"{what}; see {self.folder}/log")
            time.sleep(0.1)


def main() -> int:
    """Serve until interrupted."""
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    if reason := obstacle(*CEPH):
        sys.exit(f"error: {reason}")
    gateway = Gateway(Path(sys.argv[1]).absolute())
    gateway.start()
    try:
        for name, value in gateway.environment.items():
            print(f"export {name}={value}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        gateway.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
