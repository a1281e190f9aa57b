"""Sweeps: named folders, a table, finished points kept, one line for every mistake; data-parallel points inside."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from contextlib import ExitStack
from types import SimpleNamespace

import joblib
import pytest
from hydra.utils import instantiate
from joblib.externals.loky import get_reusable_executor
from omegaconf import OmegaConf

from motionrag import cli, sweeps
from motionrag.cli import gpus, launch
from motionrag.cli.words import overrides_from_words
from motionrag.errors import MotionRAGError

# ---------------------------------------------------------------- a verb that computes nothing


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Run `motionrag retrieve ... -m` with a verb that the test supplies; `sweep.seen` lists the configs it got."""
    conf = tmp_path / "conf"
    (conf / "hydra").mkdir(parents=True)
    for name in ("hydra/default.yaml", "sweep.yaml"):
        (conf / name).write_text((cli.conf_dir() / name).read_text())
    (conf / "retrieve.yaml").write_text(
        "defaults: [{hydra: default}, _self_]\nk: 9\nseed: 3\npath: a\nckpt_path: null\n"
    )
    monkeypatch.setattr(cli, "conf_dir", lambda: conf)
    monkeypatch.chdir(tmp_path)

    def main(*words, run=lambda cfg: {"summary": "ok", "score": cfg.k / 2}):
        def record(cfg):
            main.seen.append(OmegaConf.to_container(cfg))
            return run(cfg)

        module = type(sys)("motionrag.cli.retrieve")
        module.run = record
        monkeypatch.setitem(sys.modules, "motionrag.cli.retrieve", module)
        return cli.main(["retrieve", *words, "-m", "hydra.sweep.dir=S"])

    main.seen = []
    main.folder = tmp_path / "S"
    return main


def one_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def table(folder) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / "sweep.json").read_text())["points"]}


def folders(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_folders_and_table(sweep):
    assert sweep("retrieval.k=1,3", "seed=1,2", "path=b") == 0
    names = ["k=1_seed=1", "k=1_seed=2", "k=3_seed=1", "k=3_seed=2"]
    assert folders(sweep.folder) == names
    assert [(c["k"], c["seed"], c["path"]) for c in sweep.seen] == [
        (k, s, "b") for k in (1, 3) for s in (1, 2)
    ]
    row = table(sweep.folder)["k=3_seed=2"]
    assert row["parameters"] == {"k": "3", "seed": "2"} and row["seed"] == 2
    assert row["state"] == "finished" and row["metrics"] == {"score": 1.5} and row["error"] is None
    assert row["folder"] == str(sweep.folder / "k=3_seed=2")
    assert row["log"] == f"{row['folder']}/retrieve.log" and os.path.isfile(row["log"])
    rows = list(csv.DictReader((sweep.folder / "sweep.csv").open()))
    assert [row["name"] for row in rows] == names
    assert (rows[0]["k"], rows[0]["seed"], rows[0]["score"], rows[0]["state"]) == (
        "1",
        "1",
        "0.5",
        "finished",
    )


def test_reading_a_sweep_writes_only_what_changed(sweep):
    def inodes() -> list[int]:  # a written file is another one
        return [(sweep.folder / name).stat().st_ino for name in ("sweep.json", "sweep.csv")]

    assert sweep("k=1") == 0
    before = inodes()
    sweeps.write_table(sweep.folder)
    assert inodes() == before
    sweeps.mark_pruned(sweep.folder / "point")
    assert all(new != old for new, old in zip(inodes(), before, strict=True))
    (sweep.folder / "sweep.csv").unlink()
    sweeps.write_table(sweep.folder)
    assert "pruned" in (sweep.folder / "sweep.csv").read_text()


def test_a_log_has_command_warnings_summary_and_error(sweep, tmp_path, capsys):
    def run(cfg):
        warnings.warn("take care", stacklevel=1)
        return {"summary": "all is well"}

    assert sweep("k=1,2", "path=b", run=run) == 0
    log = (sweep.folder / "k=2/retrieve.log").read_text()
    for line in ("motionrag retrieve k=2 path=b", "UserWarning: take care", "retrieve: all is well"):
        assert log.count(line) == 1, log
    said = capsys.readouterr()
    assert "take care" in said.err and said.out.count("all is well") == 2 and "all is well" not in said.err
    sys.modules["motionrag.cli.retrieve"].run = lambda cfg: refuse("thing")
    assert cli.main(["retrieve", "k=1", "hydra.run.dir=R"]) == 2
    log = (tmp_path / "R/retrieve.log").read_text()
    assert "motionrag retrieve k=1 hydra.run.dir=R" in log and "error: no such thing" in log
    assert capsys.readouterr().err == "error: no such thing\n"


def test_finished_points_are_not_run_again(sweep, capsys):
    assert sweep("k=1,2") == 0
    assert sweep("k=1,2,4") == 0
    assert [config["k"] for config in sweep.seen] == [1, 2, 4]
    assert "2 of 3 points are finished" in capsys.readouterr().out
    assert folders(sweep.folder) == ["k=1", "k=2", "k=4"]


def test_a_failed_point_marks_only_itself(sweep, capsys):
    def run(cfg):
        if cfg.k == 2:
            raise MotionRAGError("no such\nthing")
        return {"summary": "ok"}

    assert sweep("k=1,2,3", run=run) == 2
    line = one_line(capsys)
    assert "1 of 3 points failed, the first k=2: no such thing" in line and "motionrag sweep retry" in line
    rows = table(sweep.folder)
    assert {name: row["state"] for name, row in rows.items()} == {
        "k=1": "finished",
        "k=2": "failed",
        "k=3": "finished",
    }
    assert rows["k=2"]["error"] == "no such thing"
    assert "no such thing" in (sweep.folder / "k=2/retrieve.log").read_text()
    sweep.seen.clear()
    assert sweep("k=1,2,3") == 0
    assert [config["k"] for config in sweep.seen] == [2]


def test_a_bug_in_a_point_leaves_its_traceback_in_the_log(sweep, capsys):
    assert sweep("k=1,2", run=lambda cfg: {"summary": {1: "ok"}[cfg.k]}) == 2
    assert "k=2: KeyError: 2 (log: " in one_line(capsys)
    assert "Traceback" in (sweep.folder / "k=2/retrieve.log").read_text()


def refuse(what):
    raise MotionRAGError(f"no such {what}")


def test_a_mistake_seen_by_a_constructor_is_named(sweep, capsys):
    """Hydra wraps what it raises."""
    target = {"_target_": f"{__name__}.refuse", "what": "folder"}
    assert sweep("k=1,2", run=lambda cfg: instantiate(target)) == 2
    assert "2 of 2 points failed, the first k=1: no such folder (log: " in one_line(capsys)
    assert table(sweep.folder)["k=2"]["error"] == "no such folder"
    assert "Traceback" not in (sweep.folder / "k=2/retrieve.log").read_text()


def test_full_disk(sweep, capsys):
    def run(cfg):
        if cfg.k == 2:
            raise OSError(errno.ENOSPC, "No space left on device", "last.ckpt")
        return {"summary": "ok"}

    assert sweep("k=1,2", run=run) == 2
    assert "no space left on the device while writing last.ckpt: free some" in one_line(capsys)
    assert table(sweep.folder)["k=1"]["state"] == "finished"


def test_mistakes_start_nothing(sweep, tmp_path, capsys):
    (tmp_path / "conf/size").mkdir()
    (tmp_path / "conf/size/small.yaml").write_text("width: 8\n")
    for words, expected in (
        (["k=glob(*)"], "the sweep has no points, k=glob(*) matches nothing"),
        (["kk=1,2"], "unknown config key 'kk', did you mean 'k'?"),
        (["+size=small,smal"], "unknown size 'smal', did you mean 'small'?"),  # the second of two points
    ):
        assert sweep(*words) == 2
        assert expected in one_line(capsys)
    assert not sweep.seen and not sweep.folder.exists()


def test_where_there_is_no_slurm(sweep, tmp_path, root, monkeypatch, capsys):
    (tmp_path / "conf/hydra/launcher").mkdir()
    launcher = "conf/hydra/launcher/slurm.yaml"
    (tmp_path / launcher).write_text((root / launcher).read_text())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sweep("k=1,2", "launcher=slurm") == 2
    assert 'launcher=slurm could not run the points (Could not detect "srun"' in one_line(capsys)
    assert {row["state"] for row in table(sweep.folder).values()} == {"waiting"}


def test_a_folder_belongs_to_one_setting(sweep, capsys):
    assert sweep("k=1,2", "path=b") == 0
    assert sweep("k=1,2", "path=c") == 2
    assert "run with other settings (different: path=b, path=c): choose another" in one_line(capsys)
    assert len(sweep.seen) == 2


def test_a_started_point_continues_from_its_checkpoint(sweep):
    def stop(cfg):
        sweeps.checkpoint(sweep.folder / f"k={cfg.k}").parent.mkdir()
        sweeps.checkpoint(sweep.folder / f"k={cfg.k}").touch()
        raise MotionRAGError("stopped")

    assert sweep("k=1,2", run=stop) == 2
    assert sweep("k=1,2") == 0
    assert [config["ckpt_path"] for config in sweep.seen] == [None, None, "last", "last"]


def test_names():
    assert sweeps.name_of({"backbone": "svd", "lr": "1e-3"}) == "backbone=svd_lr=1e-3"
    slash, dash = sweeps.name_of({"p": "a/b"}), sweeps.name_of({"p": "a-b"})
    assert "/" not in slash and slash != dash == "p=a-b"
    assert len(sweeps.name_of({"p": "x" * 300})) < 130


# ---------------------------------------------------------------- states


@pytest.fixture
def started(sweep):
    """A sweep with one finished point, whose `state.json` the test overwrites; returns its state as seen now."""
    assert sweep("k=1") == 0

    def state(**info) -> str:
        (folder,) = (path for path in sweep.folder.iterdir() if path.is_dir())
        info = {"state": "running", "host": socket.gethostname(), "pid": os.getpid(), "job": None, **info}
        info.setdefault("born", sweeps._born(os.getpid()))
        (folder / "state.json").write_text(json.dumps(info))
        return sweeps.write_table(sweep.folder)[0]["state"]

    return state


def test_a_loss_that_is_not_finite_is_no_value(tmp_path):
    log = tmp_path / "a/csv/version_0/metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("step,train/loss,val/loss\n0,0.5,0.25\n1,nan,\n")
    point = {"name": "a", "parameters": {}, "overrides": []}
    (tmp_path / "sweep.json").write_text(
        json.dumps({"schema": sweeps.SCHEMA, "launches": [], "points": [point]})
    )
    (row,) = sweeps.write_table(tmp_path)
    assert (row["step"], row["metrics"]) == (2, {"val/loss": 0.25})


def test_states_of_processes(started):
    assert started() == "running"
    assert started(pid=2**22 + 1) == "stopped"  # above every process id
    assert started(born="before the machine, or the container, started again") == "stopped"


def test_a_point_of_another_machine_that_gives_no_sign_is_dead(started, sweep, capsys):
    def silent(seconds):
        started(host="elsewhere", pid=1)
        os.utime(sweep.folder / "point/state.json", (time.time() - seconds,) * 2)
        return sweeps.write_table(sweep.folder)[0]

    assert silent(sweeps.SILENT - 60)["state"] == "running"
    (waited,) = sweeps.wait(sweep.folder, {"k=2"})  # not for what others run
    assert waited["state"] == "running"
    assert sweep("k=1") == 0 and len(sweep.seen) == 1
    assert "1 of 1 points are finished or being worked on" in capsys.readouterr().out
    row = silent(sweeps.SILENT + 60)
    assert row["state"] == "stopped" and row["error"].startswith("no sign of life from elsewhere since 2")
    assert sweep("k=1") == 0 and len(sweep.seen) == 2


def test_a_running_point_gives_signs_of_life(sweep, monkeypatch):
    monkeypatch.setattr(sweeps, "BEAT", 0.01)

    def run(cfg):
        path = sweep.folder / "point/state.json"
        os.utime(path, (0, 0))
        end = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        return {"summary": "ok", "seen": path.stat().st_mtime > 0}

    assert sweep("k=1", run=run) == 0
    assert json.loads((sweep.folder / "point/results.json").read_text())["seen"]
    assert not [thread for thread in threading.enumerate() if thread.name == "signs of life"]


def test_states_of_slurm_jobs(started, tmp_path, monkeypatch):
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho '7_0|RUNNING|x'\necho '7_1|PENDING|x'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=os.pathsep)
    assert [started(job=f"7_{i}", pid=1) for i in range(3)] == ["running", "queued", "stopped"]
    squeue.write_text("#!/bin/sh\nexit 1\n")
    assert started(job="7_2", pid=1) == "running"  # Slurm does not answer, but there is a sign of life


def test_status_names_what_is_wrong(sweep, capsys):
    def run(cfg):
        if cfg.k == 2:
            raise MotionRAGError("no such thing")
        return {"summary": "ok", "steps": 7, "score": cfg.k / 2}

    assert sweep("k=1,2", run=run) == 2
    capsys.readouterr()
    assert cli.main(["sweep", "status", "S", "metric=score"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["point", "state", "step", "score", "seconds", "log"]
    logs = [str(sweep.folder / name / "retrieve.log") for name in ("k=1", "k=2")]
    assert [lines[1][:4], lines[1][5]] == [["k=1", "finished", "7", "0.5"], logs[0]]
    assert [lines[2][:4], lines[2][5]] == [["k=2", "failed", "-", "-"], logs[1]]
    assert lines[3] == ["error:", "no", "such", "thing"]
    for words, expected in (
        (["status", "nothing"], "is no sweep"),
        (["show", "S"], "motionrag sweep retry DIR"),
    ):
        assert cli.main(["sweep", *words]) == 2
        assert expected in one_line(capsys)


def test_points_at_the_same_time(sweep, tmp_path, motionrag):
    assert sweep("k=1") == 0
    words = ["status", "S", "metric=score,k", "launcher=joblib", "launcher.n_jobs=2", "hydra.sweep.dir=T"]
    done = motionrag("sweep", *words)
    assert done.returncode == 0, done.stderr
    assert folders(tmp_path / "T") == ["metric=k", "metric=score"]
    assert {row["state"] for row in table(tmp_path / "T").values()} == {"finished"}
    log = (tmp_path / "T/metric=k/sweep.log").read_text()
    assert "motionrag sweep " in log and "sweep: 1 points, 1 finished" in log


def test_retry_tries_each_failed_point_once_and_says_what_failed_again(sweep, tmp_path, motionrag):
    def launches(sweep_of) -> list[str]:
        log = tmp_path / "T" / sweeps.name_of({"what": f"[status,{sweep_of}]"}) / "sweep.log"
        return [
            line for line in log.read_text().splitlines() if "motionrag sweep " in line and "what=" in line
        ]

    assert sweep("k=1") == 0
    for points in ("[status,S],[status,N]", "[status,S],[status,N],[status,M]"):
        assert motionrag("sweep", f"what={points}", "-m", "hydra.sweep.dir=T").returncode == 2
    assert [len(launches(name)) for name in "SNM"] == [1, 2, 1]
    again = motionrag("sweep", "retry", "T")
    assert again.returncode == 2
    assert (
        "error: 2 of 3 points are not finished, the first what=" in again.stderr
        and "is no sweep" in again.stderr
    )
    assert [len(launches(name)) for name in "SNM"] == [1, 3, 2]
    for name in "NM":
        shutil.copytree(tmp_path / "S", tmp_path / name)
    assert motionrag("sweep", "retry", "T").returncode == 0
    assert {row["state"] for row in table(tmp_path / "T").values()} == {"finished"}


def test_the_table_of_several_writers(sweep):
    """Points that end while others are planned take nothing out of the plan."""

    def plan(name):
        sweeps.plan(sweep.folder, "retrieve", [], [[f"k={name}"]], ["k"])

    threads = [threading.Thread(target=plan, args=(name,)) for name in range(12)]
    for thread in threads:
        thread.start()
        sweep.folder.is_dir() and (sweep.folder / "sweep.json").is_file() and sweeps.write_table(sweep.folder)
    for thread in threads:
        thread.join()
    assert len(table(sweep.folder)) == 12


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("trainer", "n_jobs", "expected"),
    [
        ({"accelerator": "gpu", "devices": 1}, -1, 4),
        ({"accelerator": "auto", "devices": 2}, -1, 2),
        ({"accelerator": "gpu", "devices": 2}, 2, 2),
        ({"accelerator": "gpu", "devices": "auto"}, -1, 1),
        ({"accelerator": "gpu", "devices": 2}, 3, "points of 2 GPU.* need 6, 4 there"),
        ({"accelerator": "gpu", "devices": [0, 2]}, 3, 3),
        ({"accelerator": "cpu", "devices": 2}, -1, -1),
        (None, -1, -1),
        ("device", -1, 4),  # evaluate, generate
    ],
)
def test_joblib_runs_as_many_points_as_there_are_gpus_for(four_gpus, trainer, n_jobs, expected):
    cfg = OmegaConf.create({"trainer": trainer} if isinstance(trainer, dict) else {str(trainer): None})
    if isinstance(expected, str):
        with pytest.raises(MotionRAGError, match=expected):
            gpus.points_at_once(n_jobs, cfg)
    else:
        assert gpus.points_at_once(n_jobs, cfg) == expected


def test_points_at_the_same_time_have_gpus_of_their_own(four_gpus, tmp_path, monkeypatch):
    cfg = OmegaConf.create({"trainer": {"accelerator": "gpu", "devices": 2}})

    def process(shown=None):
        """What another process would see: a lock of its own, the environment that all have at first."""
        monkeypatch.setattr(gpus, "_taken", [])
        monkeypatch.setattr(gpus, "_held", ExitStack())
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown) if shown else monkeypatch.delenv(
            "CUDA_VISIBLE_DEVICES", False
        )
        gpus.take(tmp_path, cfg)
        gpus.take(tmp_path, cfg)  # its next point
        return os.environ["CUDA_VISIBLE_DEVICES"], gpus._held

    (one, first), (two, second) = process(), process()
    assert (one, two) == ("0,1", "2,3")
    with pytest.raises(MotionRAGError, match="all 4 GPUs are taken by other points"):
        process()
    first.close()  # as when a process ends
    (three, third) = process()
    assert three == "0,1"
    for held in (second, third):
        held.close()
    assert process("GPU-a,GPU-b,GPU-c")[0] == "GPU-a,GPU-b"
    gpus._held.close()


# ---------------------------------------------------------------- words


def test_short_names():
    assert overrides_from_words("train", ["launcher=slurm", "launcher.partition=gpu", "retrieval.k=1,3"]) == [
        "hydra/launcher=slurm",
        "hydra.launcher.partition=gpu",
        "k=1,3",
        "-m",
    ]
    assert "-m" not in overrides_from_words("train", ["launcher=slurm", "--cfg", "job"])


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("trainer", "gpus", "expected"),
    [
        ({"accelerator": "cpu", "devices": 2, "strategy": "ddp"}, 0, 2),
        ({"accelerator": "cpu", "devices": "2"}, 0, 2),
        ({"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork"}, 0, 1),
        ({"accelerator": "cpu", "devices": "auto"}, 0, 1),
        ({"accelerator": "gpu", "devices": "auto"}, 4, 4),
        ({"accelerator": "gpu", "devices": -1}, 4, 4),
        ({"accelerator": "gpu", "devices": [0, 2]}, 4, 2),
        (
            {"accelerator": "cpu", "devices": 9},
            0,
            "9 processes wanted on the CPU, which takes 8 at most, 4 for each",
        ),
        ({"accelerator": "auto", "devices": "auto"}, 0, 1),
        ({"accelerator": "auto", "devices": 2}, 0, 2),
        ({"accelerator": "auto", "devices": 9}, 0, "9 processes wanted on the CPU"),
        ({"accelerator": "gpu", "devices": "two"}, 4, 1),
        ({"accelerator": "gpu", "devices": 8}, 4, "8 GPUs wanted, 4 there"),
        ({"accelerator": "gpu", "devices": 4, "num_nodes": 2}, 4, "needs launcher=slurm, or torchrun"),
    ],
)
def test_how_many_processes(trainer, gpus, expected, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    if isinstance(expected, str):
        with pytest.raises(MotionRAGError, match=expected):
            launch.processes(OmegaConf.create(trainer))
    else:
        assert launch.processes(OmegaConf.create(trainer)) == expected
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")  # torchrun has started them already
        assert launch.processes(OmegaConf.create(trainer)) == 1


def test_the_rank_that_failed_first_is_named():
    def failure(message, exitcode=1, timestamp=5):
        if exitcode > 0:
            message = {"message": message, "extraInfo": {"py_callstack": "..."}}
        return SimpleNamespace(message=message, exitcode=exitcode, timestamp=timestamp)

    lost = failure("RuntimeError: [gloo] Connection closed by peer", timestamp=4)
    killed = failure("Signal 9 (SIGKILL) received by PID 1", exitcode=-signal.SIGKILL)
    ended = failure("Signal 15 (SIGTERM) received by PID 1", exitcode=-signal.SIGTERM, timestamp=3)
    assert "process 1 of 3 was ended from outside (Signal 9" in launch._reason(
        {0: lost, 1: killed, 2: ended}, 3
    )
    assert launch._reason({0: lost, 1: failure("MotionRAGError: no clips")}, 2) == "no clips"
    silent = SimpleNamespace(message="To enable traceback see: ...", exitcode=1, timestamp=4)
    assert "process 1 of 2 ended with exit code 1: its output" in launch._reason({0: ended, 1: silent}, 2)


def test_processes_inside_a_process_of_joblib():
    """As in `launcher=joblib trainer=ddp_cpu`."""
    with joblib.parallel_config(backend="loky", n_jobs=2):
        (found,) = joblib.Parallel()([joblib.delayed(launch.start)(2, OmegaConf.create({"k": 3}), dict)])
    get_reusable_executor().shutdown()
    assert found == {"k": 3}


def test_a_rank_that_lost_its_peer_lets_the_dead_one_be_seen_first(monkeypatch):
    waited = []
    monkeypatch.setattr(launch.time, "sleep", waited.append)

    def fail(message):
        def work(cfg):
            raise RuntimeError(message)

        with pytest.raises(RuntimeError, match=message):
            launch._rank(work, {})

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fail("gloo/transport/tcp/pair.cc:534: Connection closed by peer")
    assert waited == [launch.PEER_LOST_WAIT]
    fail("a mistake of its own")
    assert waited == [launch.PEER_LOST_WAIT]


KILLER = """
import os, signal
import lightning as L

class Killer(L.Callback):
    def __init__(self, seed):
        self.seed = seed

    def on_train_batch_end(self, trainer, module, outputs, batch, idx):
        if self.seed == 2 and trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_two_processes_in_a_sweep_and_a_dead_one(motionrag, motionworld, root, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):  # as a user who has never heard of W&B
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    (tmp_path / "killer.py").write_text(KILLER)
    done = motionrag(
        *"train experiment=smoke trainer=ddp_cpu trainer.devices=2 seed=1,2 -m hydra.sweep.dir=S".split(),
        *f"make=null shards={motionworld}/shards db={motionworld}/db".split(),
        "+callbacks.killer={_target_: killer.Killer, seed: ${seed}}",
        PYTHONPATH=os.pathsep.join([str(root / "src"), str(tmp_path)]),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert "1 of 2 points failed, the first seed=2: process 1 of 2 was ended from outside (Signal 9" in line
    assert folders(tmp_path / "S") == ["seed=1", "seed=2"]
    for name in ("seed=1", "seed=2"):
        run = tmp_path / "S" / name
        assert len(list(run.glob("*.log"))) == 1
        assert len(list(run.glob("wandb/offline-run-*"))) == 1
        assert len(list(run.glob("csv/version_*"))) == 1
    logs = [(tmp_path / "S" / name / "train.log").read_text() for name in ("seed=1", "seed=2")]
    assert all("motionrag train experiment=smoke trainer=ddp_cpu" in log for log in logs)
    for line in ("trainable parameters", "step 1: train/loss ", "step 4: val/loss ", "train: 4 steps, "):
        assert logs[0].count(line) == 1, (line, logs[0])  # of the first process alone
    assert "was ended from outside (Signal 9" in logs[1]
    rows = table(tmp_path / "S")
    assert (rows["seed=1"]["state"], rows["seed=1"]["step"]) == ("finished", 4)
    assert rows["seed=2"]["state"] == "failed" and rows["seed=2"]["step"] in (1, 2)  # as far as it was logged
    assert {"train/loss", "val/loss"} <= rows["seed=1"]["metrics"].keys()
