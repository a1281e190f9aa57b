"""Shards from folders, servers and commands, good and bad ones; the order of the stream."""

import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter, defaultdict
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motionrag.data import stream
from motionrag.data.datamodule import MotionDataModule, ShardClips
from motionrag.data.motionworld import make_dataset
from motionrag.data.packing import pack
from motionrag.data.stream import Order, Shards
from motionrag.data.video import UnreadableVideo
from motionrag.errors import MotionRAGError
from motionrag.io import read_json, write_json

SIZE = {"frames": 3, "height": 32, "width": 32}


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """Twelve synthetic clips in shards of three."""
    folder = tmp_path_factory.mktemp("packed")
    pack(make_dataset(folder, 12, seed=0), folder / "videos", folder / "shards", shard_size=3)
    return folder / "shards"


@pytest.fixture
def folder(packed, tmp_path):
    """A copy of them."""
    return shutil.copytree(packed, tmp_path / "shards")


class Server:
    """Serves a folder over HTTP; `faults[file]` says what goes wrong with it: 500, stall, drip, cut, short or flip."""

    def __init__(self, folder):
        self.faults, self.asked, self.end = {}, Counter(), Event()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=str(folder))

            def do_GET(self):
                name = self.path.strip("/")
                server.asked[name] += 1
                fault = server.faults.get(name)
                fault = fault.pop(0) if isinstance(fault, list) and fault else fault
                if not fault:
                    return super().do_GET()
                if fault == 500:
                    return self.send_error(500)
                data = bytearray((Path(folder) / name).read_bytes())
                self.send_response(200)
                if fault != "short":  # else nothing tells the client how much should come
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if fault == "drip":
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        if server.end.wait(0.05):
                            return
                elif fault == "flip":
                    data[len(data) // 2] ^= 1
                    self.wfile.write(data)
                else:
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                if fault == "stall":
                    server.end.wait(20)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.end.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(folder):
    server = Server(folder)
    yield server
    server.close()


def loader(clips, rank=0, world=1, **options):
    """Batches of a datamodule under a stand-in trainer."""
    data = MotionDataModule(clips, **{"batch_size": 2, "val_share": 0, **options})
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return data.train_dataloader()


# --- where shards are ----------------------------------------------------------------------------------------------


def test_a_folder_a_url_and_a_command_give_the_same_clips(folder, server, tmp_path):
    local = Shards(folder)
    assert len(local.table) == 12 and Counter(local.numbers()) == dict.fromkeys(range(4), 3)
    for place in (server.url, f"file://{folder}", f"pipe:cat {folder}/{{file}}"):
        remote = Shards(place, cache=tmp_path / "cache")
        assert remote.table.equals(local.table)
        assert all(remote.read(row) == local.read(row) for row in (11, 0, 1, 7))
    assert server.asked["clips-000000.tar"] == 1 and not server.asked["clips-000001.tar"]


def test_all_workers_share_what_one_has_fetched(server, tmp_path):
    clips = ShardClips(server.url, **SIZE, cache=tmp_path / "cache")
    seen = [b.clip_id for b in itertools.islice(loader(clips, workers=2), 6)]
    assert sorted(itertools.chain(*seen)) == clips.ids
    assert set(server.asked.values()) == {1}
    Shards(server.url, cache=tmp_path / "cache").read(0)  # and another run too; it asks for the index alone
    assert sum(server.asked.values()) == 7


def test_the_cache_stays_within_its_limit(server, tmp_path):
    sizes = [shard["bytes"] for shard in Shards(server.url, cache=tmp_path / "a").index["shards"]]
    limit = 2.5 * max(sizes)
    shards = Shards(server.url, cache=tmp_path / "b", cache_gb=limit / 1e9)
    for row in (0, 3, 6, 9, 0):
        shards.read(row)
        assert sum(path.stat().st_size for path in shards.folder.glob("*.tar")) <= limit
    assert server.asked["clips-000000.tar"] == 2
    with pytest.raises(MotionRAGError, match=r"cache_gb=.*give at least cache_gb=.*smaller buffer than 12"):
        shards.check_room(12)


def test_what_cannot_be_reached_is_named(server, tmp_path, folder, monkeypatch):
    options = {"cache": tmp_path / "cache", "tries": 1}
    server.faults["index.json"] = 500
    with pytest.raises(
        MotionRAGError, match=r"shards=http.*: index.json could not be fetched .* in 1 tries: 500"
    ):
        Shards(server.url, **options)
    with pytest.raises(MotionRAGError, match="ended with 7: no such bucket"):
        Shards("pipe:echo no such bucket >&2; exit 7", **options)
    with pytest.raises(MotionRAGError, match="nothing came for 0.1 s"):
        Shards("pipe:sleep 9", **options, timeout=0.1)
    monkeypatch.setattr(stream, "SLOWEST", 1_000_000)
    drip = f"case {{file}} in *.tar) while echo; do sleep 0.05; done;; *) cat {folder}/{{file}};; esac"
    with pytest.raises(UnreadableVideo, match="slower than 1000 kB/s"):
        Shards(f"pipe:{drip}", **options, timeout=0.2).read(3)
    with pytest.raises(MotionRAGError, match="shards=s4://x.*s4"):
        Shards("s4://x", **options)
    index = read_json(folder / "index.json")
    write_json(folder / "index.json", {key: value for key, value in index.items() if key != "table"})
    assert (
        Shards(folder).table["shard"].to_pylist()
        == ["clips-000000.tar"] * 3 + Shards(folder).table["shard"].to_pylist()[3:]
    )
    server.faults.clear()
    with pytest.raises(MotionRAGError, match="packed without clips.arrow"):
        Shards(server.url, **options)


def test_a_command_ends_with_what_interrupts_it(tmp_path, monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if self not in started:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        Shards("pipe:sleep 60", cache=tmp_path)
    assert started[0].returncode == -signal.SIGKILL


# --- shards that fail ----------------------------------------------------------------------------------------------


def test_a_server_that_recovers_is_asked_again(server, tmp_path):
    server.faults["clips-000001.tar"] = [500, "cut"]
    shards = Shards(server.url, cache=tmp_path / "cache")
    assert shards.read(3)
    assert server.asked["clips-000001.tar"] == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, "500"),
        ("stall", "(?i)timeout|timed"),
        ("drip", "(?i)timeout|timed"),
        ("cut", "(?i)payload|not enough data|cut off"),
        ("short", "cut off: [0-9]+ of [0-9]+ bytes came"),
        ("flip", "checksum is not the one in index.json"),
        ("gone", "clips-000001.tar"),
    ],
)
def test_a_shard_that_cannot_be_had_is_skipped_by_name(server, folder, tmp_path, fault, reason, monkeypatch):
    monkeypatch.setattr(stream, "SLOWEST", 10_000_000)
    if fault == "gone":
        (folder / "clips-000001.tar").unlink()
    else:
        server.faults["clips-000001.tar"] = fault
    clips = ShardClips(server.url, **SIZE, cache=tmp_path / "cache", timeout=0.2, tries=1)
    batches = list(itertools.islice(loader(clips), 6))
    assert all(len(batch) == 2 for batch in batches)
    skipped = {line for batch in batches for line in batch.skipped}
    assert {line.split(":")[0] for line in skipped} == set(clips.ids[3:6])
    message = skipped.pop().partition(": ")[2]
    assert message.startswith(f"clips-000001.tar could not be fetched from {server.url} in 1 tries: ")
    with pytest.raises(MotionRAGError, match=reason):
        raise MotionRAGError(message)
    assert server.asked["clips-000001.tar"] == 1  # not once for each of its clips
    assert not list(clips.stream.folder.glob(".*.partial"))


def test_a_full_cache_is_not_the_servers_fault(server, tmp_path):
    shards = Shards(server.url, cache=tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            MotionRAGError, match=r"clips.cache: File too large while writing .*: make room, name another"
        ):
            shards.read(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert server.asked["clips-000001.tar"] == 1
    assert not list(shards.folder.glob(".*.partial"))
    assert shards.read(3)  # there is room again


def fetch(url, cache):
    Shards(url, cache=cache).read(3)


def test_killed_while_fetching_it_leaves_no_half_shard_and_no_lock(server, tmp_path):
    server.faults["clips-000001.tar"] = "stall"
    process = multiprocessing.get_context("fork").Process(target=fetch, args=(server.url, tmp_path / "cache"))
    process.start()
    while not list(tmp_path.glob("cache/*/.*.tar.partial")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    server.faults.clear()
    assert len(Shards(server.url, cache=tmp_path / "cache").read(3)) > 1000


def test_a_damaged_folder_loses_only_what_is_damaged(folder):
    whole = Shards(folder)
    rows = {name: whole.table[name].to_pylist() for name in ("id", "shard", "offset", "bytes")}
    place = {row: (folder / rows["shard"][row], int(rows["offset"][row])) for row in range(12)}
    data = bytearray(place[1][0].read_bytes())
    data[place[1][1] + int(rows["bytes"][1]) // 2] ^= 4  # one bit of one video
    place[1][0].write_bytes(data)
    os.truncate(place[4][0], place[4][1] + 100)
    place[9][0].unlink()
    clips = ShardClips(folder, **SIZE)
    batches = list(itertools.islice(loader(clips), 6))
    skipped = dict(line.split(": ", 1) for batch in batches for line in batch.skipped)
    assert set(skipped) == {clips.ids[row] for row in (1, 4, 5, 9, 10, 11)}
    assert "damaged: its checksum is another one" in skipped[clips.ids[1]]
    assert "clips-000001.tar is cut off before its end" in skipped[clips.ids[4]]
    assert "clips-000003.tar is missing" in skipped[clips.ids[9]]
    assert {i for batch in batches for i in batch.clip_id} == set(clips.ids) - set(skipped)


def test_a_flipped_byte_in_the_table_is_an_error(folder):
    data = bytearray((folder / "clips.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "clips.arrow").write_bytes(data)
    with pytest.raises(MotionRAGError, match="clips.arrow is missing or damaged"):
        Shards(folder)


# --- the order -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    buffer=st.none() | st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_every_pass_holds_every_clip_once_whatever_the_buffer(sizes, buffer, seed):
    shards = np.repeat(np.arange(len(sizes)), sizes)
    order = Order(len(shards), seed, shards, buffer)
    for number in range(3):
        places = [order[number * len(shards) + i] for i in range(len(shards))]
        assert sorted(places) == list(range(len(shards)))
    assert [Order(len(shards), seed, shards, buffer)[i] for i in range(len(shards))] == [
        order[i] for i in range(len(shards))
    ]


def test_few_shards_are_in_use_at_a_time():
    shards = np.repeat(np.arange(200), 50)
    order = Order(10_000, 0, shards, buffer=500)
    first, last = {}, {}
    for position in range(10_000):
        shard = shards[order[position]]
        first.setdefault(shard, position)
        last[shard] = position
    in_use = [sum(first[s] <= p <= last[s] for s in first) for p in range(0, 10_000, 50)]
    assert max(in_use) <= 500 / 50 + 2
    starts = sorted(first.values())
    assert max(np.diff(starts)) < 200  # a new shard every 50 clips or so, not ten at once
    neighbours = Counter(np.diff([shards[order[p]] for p in range(10_000)]) == 0)
    assert neighbours[True] < 0.2 * 10_000  # well mixed: by chance one in ten
    assert [order[p] for p in range(100)] != [order[p] for p in range(10_000, 10_100)]
    assert [order[p] for p in range(100)] != [Order(10_000, 1, shards, 500)[p] for p in range(100)]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2)])
def test_a_bounded_buffer_shows_every_clip_once_to_any_number_of_processes(folder, world, workers):
    expected = [
        b.clip_id for b in itertools.islice(loader(ShardClips(folder, **SIZE, buffer=4), batch_size=4), 6)
    ]
    ranks = [
        itertools.islice(
            loader(ShardClips(folder, **SIZE, buffer=4), rank, world, batch_size=4 // world, workers=workers),
            6,
        )
        for rank in range(world)
    ]
    steps = [list(itertools.chain(*(b.clip_id for b in step))) for step in zip(*ranks, strict=True)]
    assert steps == expected
    passes = list(itertools.chain(*steps))
    assert sorted(passes[:12]) == sorted(passes[12:]) == sorted(set(passes))


def test_the_rate_is_drawn_for_each_sample(folder):
    clips = ShardClips(folder, **SIZE, fps=[4, 8], seed=3)
    drawn = defaultdict(set)
    for position in range(8):
        video = clips.read(0, position)["video"].numpy().tobytes()
        assert video == clips.read(0, position)["video"].numpy().tobytes()
        drawn[video].add(position)
    alone = [ShardClips(folder, **SIZE, fps=fps).read(0)["video"].numpy().tobytes() for fps in (4, 8)]
    assert set(drawn) == set(alone) and alone[0] != alone[1]


def test_clips_of_a_shard_that_is_gone_are_errors_of_their_own(folder):
    (folder / "clips-000000.tar").unlink()
    with pytest.raises(UnreadableVideo, match="shard .*clips-000000.tar is missing"):
        Shards(folder).read(0)
