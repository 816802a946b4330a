"""An S3 server for the tests of this folder: one for all of them, a bucket and a proxy for each."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fault_proxy import FaultProxy
from gateway import Gateway
from system_packages import CEPH, obstacle


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A running Ceph gateway; skips where it can be neither found nor installed."""
    if reason := obstacle(*CEPH):
        pytest.skip(reason)
    # The daemons' sockets want a short path.
    gateway = Gateway(tmp_path_factory.mktemp("ceph"))
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.stop()


@dataclass(frozen=True)
class Bucket:
    """An empty bucket of one test, seen through a proxy that can fail."""

    name: str
    gateway: Gateway
    proxy: FaultProxy

    @property
    def url(self) -> str:
        """`s3://...`, for the project's commands."""
        return f"s3://{self.name}"

    @property
    def environment(self) -> dict[str, str]:
        """Of a command that works with it: everything of this process, and the credentials."""
        return {**os.environ, **self.gateway.environment, "S3_ENDPOINT_URL": self.proxy.endpoint}

    def client(self) -> Any:
        """A boto3 client that talks to the server directly."""
        return self.gateway.client()

    def objects(self) -> dict[str, bytes]:
        """Everything in it."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {key: client.get_object(Bucket=self.name, Key=key)["Body"].read() for key in keys}

    def put(self, key: str, data: bytes) -> None:
        """Store an object."""
        self.client().put_object(Bucket=self.name, Key=key, Body=data)


@pytest.fixture
def bucket(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A new bucket, with this process's environment set for it.

    A test that has broken the gateway, or left it stopped, breaks no other.
    """
    gateway.mend()
    with FaultProxy(gateway.endpoint) as proxy:
        bucket = Bucket(f"bucket-{uuid.uuid4().hex[:12]}", gateway, proxy)
        bucket.client().create_bucket(Bucket=bucket.name)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        yield bucket
