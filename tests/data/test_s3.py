"""Shards in a bucket: s3fs against a server on this machine that speaks S3."""

import itertools
import json
import logging
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from motionrag.data.datamodule import MotionDataModule, ShardClips
from motionrag.data.motionworld import make_dataset
from motionrag.data.packing import pack
from motionrag.data.stream import Shards
from motionrag.errors import MotionRAGError

SIZE = {"frames": 3, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Twelve synthetic clips in shards of three."""
    folder = tmp_path_factory.mktemp("packed")
    pack(make_dataset(folder, 12, seed=0), folder / "videos", folder / "shards", shard_size=3)
    return folder / "shards"


@pytest.fixture(scope="module")
def endpoint():
    """Address of a server that has no buckets yet."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(endpoint, packed, monkeypatch):
    """A client for a server with the shards at s3://clips/train, which the environment names as S3's users do it."""
    _post(endpoint, "reset")
    environment = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}
    # nothing of the machine's own settings, and no question to a cloud that it might run in
    environment |= {"EC2_METADATA_DISABLED": "true", "CONFIG_FILE": "none", "SHARED_CREDENTIALS_FILE": "none"}
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    client = boto3.client("s3")
    client.create_bucket(Bucket="clips")
    for path in packed.iterdir():
        client.upload_file(str(path), "clips", f"train/{path.name}")
    s3fs.S3FileSystem.clear_instance_cache()  # they know the environment that they were made in
    return client


def _post(endpoint, action, data=b""):
    """One of the server's own commands."""
    headers = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/{action}", data, headers)).read()


def batches(clips, count, **options):
    """Batches of a datamodule under a stand-in trainer."""
    data = MotionDataModule(clips, batch_size=2, val_share=0, **options)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1)
    return list(itertools.islice(data.train_dataloader(), count))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_that_of_the_folder(bucket, packed, tmp_path, workers):
    clips = ShardClips("s3://clips/train", **SIZE, cache=tmp_path / "cache")
    ours, local = batches(clips, 6, workers=workers), batches(ShardClips(packed, **SIZE), 6)
    assert sorted(i for batch in ours for i in batch.clip_id) == clips.ids
    for batch, other in zip(ours, local, strict=True):
        assert batch.clip_id == other.clip_id and batch.video.equal(other.video) and not batch.skipped


def test_a_shard_that_is_gone_is_skipped_by_name(bucket, tmp_path):
    bucket.delete_object(Bucket="clips", Key="train/clips-000001.tar")
    clips = ShardClips("s3://clips/train", **SIZE, cache=tmp_path / "cache", tries=1)
    read = batches(clips, 6)
    skipped = {line.split(":")[0]: line for batch in read for line in batch.skipped}
    assert set(skipped) == set(clips.ids[3:6]) and all(len(batch) == 2 for batch in read)
    reason = "clips-000001.tar could not be fetched from s3://clips/train in 1 tries: The specified key does not exist."
    assert skipped[clips.ids[3]] == f"{clips.ids[3]}: {reason}"


def test_what_is_wrong_is_said_in_one_line(bucket, endpoint, tmp_path, monkeypatch):
    def reason(place):
        with pytest.raises(MotionRAGError) as error:
            Shards(place, cache=tmp_path / "cache", tries=1)
        before = f"shards={place}: index.json could not be fetched from {place} in 1 tries: "
        assert str(error.value).startswith(before)
        return str(error.value).removeprefix(before)

    assert reason("s3://other/train") == "The specified bucket does not exist"
    assert reason("s3://clips/other") == "The specified key does not exist."
    try:
        _post(endpoint, "reset-auth", b"0")  # from now on keys are looked at
        assert "Access Key Id you provided does not exist" in reason("s3://clips/train")
    finally:
        _post(endpoint, "reset-auth", b"inf")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    s3fs.S3FileSystem.clear_instance_cache()
    assert reason("s3://clips/train") == "Unable to locate credentials"


def test_fsspecs_own_variable_names_the_endpoint(bucket, endpoint, packed, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", endpoint)  # read when fsspec is imported
    code = "import sys, json; from motionrag.data.stream import Shards\n"
    code += "print(json.dumps(Shards('s3://clips/train', cache=sys.argv[1]).index))"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == Shards(packed).index
