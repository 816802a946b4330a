"""The server and the proxy do what the other tests of this folder rely on."""

from __future__ import annotations

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    IncompleteReadError,
)

pytestmark = pytest.mark.servers

DATA = bytes(range(256)) * 100


def client_of(bucket, **changes):
    """A client that tries once, through the proxy, with the environment's credentials."""
    config = Config(retries={"total_max_attempts": 1}, read_timeout=120, connect_timeout=120)
    return boto3.client(
        "s3", **{"endpoint_url": bucket.proxy.endpoint, "config": config, **changes}
    )


def read(client, bucket, key="x") -> bytes:
    return client.get_object(Bucket=bucket.name, Key=key)["Body"].read()


def test_objects_survive_a_restarted_service(bucket, gateway):
    client = client_of(bucket)
    client.put_object(Bucket=bucket.name, Key="x", Body=DATA)
    assert read(client, bucket) == DATA
    gateway.stop_service()
    try:
        with pytest.raises((BotoCoreError, ClientError)):
            read(client_of(bucket, endpoint_url=gateway.endpoint), bucket)
    finally:
        gateway.start_service()
    assert read(bucket.client(), bucket) == DATA


def test_signatures_buckets_and_keys_are_checked(bucket):
    wrong = client_of(bucket, aws_access_key_id="tests-access-key", aws_secret_access_key="wrong")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        read(wrong, bucket)
    with pytest.raises(ClientError, match="NoSuchBucket"):
        client_of(bucket).get_object(Bucket="nowhere-to-be-found", Key="x")
    with pytest.raises(ClientError, match="NoSuchKey"):
        read(client_of(bucket), bucket, "nowhere")


def test_the_proxy_damages_every_nth_matching_answer(bucket):
    client = client_of(bucket)
    for key in ("x", "y"):
        client.put_object(Bucket=bucket.name, Key=key, Body=DATA)
    with bucket.proxy.failing("503", match="/x", every=2) as fault:
        assert read(client, bucket) == DATA
        with pytest.raises(ClientError, match="SlowDown"):
            read(client, bucket)
        assert read(client, bucket, "y") == DATA
        assert (fault.seen, fault.done) == (2, 1)
    assert read(client, bucket) == DATA


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("500", ClientError),
        ("expired", ClientError),
        ("reset", BotoCoreError),
        ("hang", BotoCoreError),
        ("truncate", (IncompleteReadError, BotoCoreError)),
    ],
)
def test_each_fault_is_what_it_says(bucket, mode, error):
    client = client_of(bucket)
    client.put_object(Bucket=bucket.name, Key="x", Body=DATA)
    once = Config(retries={"total_max_attempts": 1}, read_timeout=1 if mode == "hang" else 120)
    with bucket.proxy.failing(mode), pytest.raises(error):
        read(client_of(bucket, config=once), bucket)
    assert read(client, bucket) == DATA


def test_a_flipped_bit_arrives(bucket):
    client = client_of(bucket)
    client.put_object(Bucket=bucket.name, Key="x", Body=DATA)
    with bucket.proxy.failing("flip"):
        damaged = read(client, bucket)
    assert [i for i in range(len(DATA)) if DATA[i] != damaged[i]] == [len(DATA) // 2]


def test_a_server_goes_away_and_comes_back(bucket):
    client = client_of(bucket)
    client.put_object(Bucket=bucket.name, Key="x", Body=DATA)
    bucket.proxy.go_away()
    with pytest.raises(EndpointConnectionError):
        read(client, bucket)
    bucket.proxy.come_back()
    assert read(client, bucket) == DATA
