"""A real S3 server for tests: SeaweedFS in one process, which can be stopped and restarted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blip_scale import launcher

ACCESS_KEY, SECRET_KEY = "blip", "scale-secret"
START_TIMEOUT_S = 60


class S3Server:
    """A SeaweedFS with one bucket on free ports of this machine, storing its data in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bucket = "sets"
        # SeaweedFS adds 10,000 for the gRPC port of each. All are drawn together, so none is equal.
        first = launcher.free_port(1, 2, 3, *range(10_000, 10_004))
        self._ports = dict(
            zip(("master", "volume", "filer", "s3"), range(first, first + 4), strict=True)
        )
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True)
        identity = {
            "name": "test",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    @property
    def port(self) -> int:
        return self._ports["s3"]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for Streaming and boto3."""
        return environment(self.endpoint)

    def start(self, wait: bool = True) -> None:
        """Start the server on its ports, and wait until it accepts objects."""
        command = [str(Path(sys.executable).parent / "weed"), "-logtostderr", "server"]
        command += [f"-dir={self.folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += ["-s3", f"-s3.config={self.folder / 's3.json'}", f"-s3.port={self.port}"]
        command += [f"-{name}.port={self._ports[name]}" for name in ("master", "volume", "filer")]
        command += ["-master.volumeSizeLimitMB=64", "-volume.max=20", "-s3.iam=false"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # fixed ports
        command += ["-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        if wait:
            self._await_health()

    def _await_health(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.client().create_bucket(Bucket=self.bucket)
            except Exception as error:  # still starting, or the bucket exists already
                if "BucketAlready" in str(error):
                    return self._await_reads(deadline)
                assert self._process is not None
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"weed does not start:\n{self._last_words()}") from error
                time.sleep(0.2)
            else:
                return self._await_reads(deadline)

    def _await_reads(self, deadline: float) -> None:
        client = self.client()
        while time.monotonic() < deadline:
            try:
                client.put_object(Bucket=self.bucket, Key="alive", Body=b"yes")
                assert client.get_object(Bucket=self.bucket, Key="alive")["Body"].read() == b"yes"
                return
            except Exception:  # the volume server joins the master some seconds later
                time.sleep(0.2)
        raise RuntimeError(f"weed takes no objects:\n{self._last_words()}")

    def _last_words(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]

    def stop(self) -> None:
        """Kill the server, keeping its data."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self) -> Any:
        """A boto3 client."""
        from boto3.session import Session
        from botocore.config import Config

        session = Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1")
        config = Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=20)
        return session.client("s3", endpoint_url=self.endpoint, config=config)

    def upload(self, folder: Path) -> str:
        """Upload the files of a folder under a new prefix, and return s3://bucket/prefix."""
        prefix = f"{folder.name}-{uuid.uuid4().hex[:8]}"
        client = self.client()
        for path in sorted(folder.iterdir()):
            client.upload_file(str(path), self.bucket, f"{prefix}/{path.name}")
        return f"s3://{self.bucket}/{prefix}"

    def put(self, address: str, content: bytes) -> None:
        """Overwrite the object s3://bucket/key."""
        self.client().put_object(Bucket=self.bucket, Key=self._key(address), Body=content)

    def get(self, address: str) -> bytes:
        """Content of the object s3://bucket/key."""
        answer = self.client().get_object(Bucket=self.bucket, Key=self._key(address))
        return bytes(answer["Body"].read())

    def delete(self, address: str) -> None:
        """Delete the object s3://bucket/key."""
        self.client().delete_object(Bucket=self.bucket, Key=self._key(address))

    def names(self, prefix: str) -> set[str]:
        """Names of the objects whose address begins with s3://bucket/prefix."""
        listed = self.client().list_objects_v2(Bucket=self.bucket, Prefix=self._key(prefix))
        return {entry["Key"].rpartition("/")[2] for entry in listed.get("Contents", [])}

    def _key(self, address: str) -> str:
        return address.removeprefix(f"s3://{self.bucket}/")


def environment(endpoint: str) -> dict[str, str]:
    """Environment variables that point Streaming and boto3 to an endpoint."""
    return {
        "S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",  # only our own retries are tested
    }


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Run the server, with an environment that points to it."""
    for name, value in _server.environment.items():
        monkeypatch.setenv(name, value)
    return _server
