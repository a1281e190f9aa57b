"""The processes of a data-parallel training, or of encoding: started here, or found around us (torchrun, Slurm).

A run with several devices gets one process per device, started by PyTorch's elastic agent (what torchrun uses) from the
resolved config. Nothing parses the command line twice, so a Hydra sweep stays one sweep, every run has one folder, and
memory of a run is gone when the next one starts. Under torchrun or `srun` with several tasks the processes exist
already and nothing is started.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from omegaconf import DictConfig, OmegaConf

from motionrag.errors import MotionRAGError
from motionrag.sweeps import slurm_job

# What torchrun tells its processes.
TORCHRUN = re.compile(r"(TORCHELASTIC_|MASTER_|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|ROLE_NAME$)")
SAME_PROCESS = ("ddp_fork", "ddp_spawn", "ddp_notebook")  # strategies that make their own processes
# What a rank says when another one is gone: never the reason.
PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "gloo",
    "SIGTERM",
)
PER_CORE = 4  # processes; more only take each other's memory
PEER_LOST_WAIT = 3  # seconds; the agent looks at its processes ten times a second
log = logging.getLogger(__name__)


def rank() -> int:
    """Global rank of this process, from the environment of torchrun or Slurm; 0 outside."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), 0))


def is_rank() -> bool:
    """Whether this is one of several processes that somebody else started."""
    tasks = os.environ.get(
        "SLURM_STEP_NUM_TASKS"
    )  # of srun; the job's number says nothing about this process
    return "TORCHELASTIC_RUN_ID" in os.environ or int(tasks or 1) > 1


def join(multirun: bool) -> None:
    """Make this process fit for being one of several, or for a Slurm job; elsewhere nothing.

    A sweep starts the processes of each point itself: of those that torchrun started on one machine the first runs it, as
    if torchrun were not there, and the others end. Raises MotionRAGError for a sweep on several nodes, or under srun.
    """
    if "SLURM_JOB_ID" in os.environ:
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            if (
                signal.getsignal(number) is signal.SIG_DFL
            ):  # "save now" must not end a process that has yet to start
                signal.signal(number, signal.SIG_IGN)
    if not is_rank():
        return
    if multirun:
        if os.environ.get("TORCHELASTIC_RUN_ID") is None or os.environ["GROUP_WORLD_SIZE"] != "1":
            raise MotionRAGError(
                "a sweep starts the processes of each point itself: call motionrag without srun, and without torchrun on "
                "several nodes, with trainer.devices=N (several nodes: launcher=slurm)"
            )
        if rank():
            raise SystemExit(0)
        for name in [name for name in os.environ if TORCHRUN.match(name)]:
            del os.environ[name]
        return
    os.environ["MOTIONRAG_RUN"] = (
        _shared_name()
    )  # conf/hydra/default.yaml: one folder, whenever each rank starts


def _shared_name() -> str:
    """A name that all processes of this run agree on."""
    if job := slurm_job():
        return f"slurm-{job}"
    from torch.distributed import TCPStore

    # torchrun's own store: open before, and after, every process group
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*where, is_master=False, timeout=timedelta(minutes=5))
    if rank() == 0:
        store.set("motionrag/run", time.strftime("%Y-%m-%d_%H-%M-%S"))
    return store.get("motionrag/run").decode()


def fail_slurm_job() -> None:
    """In a Slurm job of a sweep, let this process end with exit code 2.

    Hydra catches a point's error and submitit hands it over as a result, so that Slurm would call the job completed, and
    other tasks of it would wait for this one. Nothing happens in the processes of other launchers.
    """

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)  # an exit code cannot be changed any more; submitit has written the result

    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        atexit.register(leave)


def processes(trainer: DictConfig) -> int:
    """How many processes to start here for `trainer`; 1 when this process trains alone or is one of them.

    Raises MotionRAGError for more GPUs than there are, for more processes on the CPU than `PER_CORE` for each core, and
    for several nodes without torchrun or Slurm.
    """
    if is_rank() or trainer.get("strategy") in SAME_PROCESS:
        return 1
    if int(trainer.get("num_nodes", 1)) > 1:
        raise MotionRAGError(
            f"trainer.num_nodes={trainer.num_nodes} needs launcher=slurm, or torchrun on every node (docs/cluster.md)"
        )
    devices, accelerator = str(trainer.get("devices", "auto")), trainer.get("accelerator", "auto")
    listed = OmegaConf.is_list(trainer.get("devices")) or "," in devices
    if not listed and not devices.isdecimal() and devices not in ("auto", "-1"):
        return 1  # the trainer knows what is wrong with it
    wanted = len([d for d in devices.strip("[]").split(",") if d.strip()]) if listed else None
    wanted = wanted or (int(devices) if devices.isdecimal() else None)
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        return wanted or 1
    import torch

    there = torch.cuda.device_count() if accelerator != "cpu" else 0
    if accelerator == "cpu" or (accelerator == "auto" and not there):
        wanted, most = wanted or 1, PER_CORE * (os.cpu_count() or 1)
        if wanted > most:
            raise MotionRAGError(
                f"trainer: {wanted} processes wanted on the CPU, which takes {most} at most, {PER_CORE} for each core "
                "(choose with trainer.devices=N)"
            )
        if wanted > 1 and accelerator == "auto":
            print(f"no GPU here: {wanted} processes on the CPU")
        return wanted
    wanted = wanted or there
    if wanted > there:
        raise MotionRAGError(
            f"trainer: {wanted} GPUs wanted, {there} there (choose with trainer.devices=N, trainer=cpu)"
        )
    return wanted


def start(count: int, cfg: DictConfig, work: Callable[[DictConfig], dict[str, Any]]) -> dict[str, Any]:
    """Call `work` with `cfg` (resolved) in `count` processes on this machine; returns what rank 0 returned.

    When a rank fails the others are ended, by force after 30 s. Raises MotionRAGError with that rank's error; its
    traceback goes to the log.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its reports repeat the error
    # Ranks are forked from a process that has imported everything and done nothing: all runs of a sweep share the
    # seconds of importing, and no thread or GPU context is ever forked.
    resolved = OmegaConf.to_container(cfg, resolve=True)
    if multiprocessing.get_start_method() == "loky":  # in joblib's processes; no rank has heard of it
        multiprocessing.set_start_method(None, force=True)
    multiprocessing.set_forkserver_preload([work.__module__, *sorted(_modules(resolved))])
    # a rank that was killed leaves a semaphore behind; Python removes it and would warn after our error
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    logs = [h.baseFilename for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
    with tempfile.TemporaryDirectory(prefix="motionrag-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=os.path.basename(folder),
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            return elastic_launch(config, _rank)(work, resolved, logs)[0]
        except ChildFailedError as error:
            raise MotionRAGError(_reason(error.failures, count)) from None
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from None


def _modules(config: Any) -> set[str]:
    """What has to be imported for everything that a resolved config will instantiate.

    Of a class's method that is the class, which cannot be imported; its module then has been, and Python goes on.
    """
    if isinstance(config, dict):
        target = config.get("_target_")
        own = {target.rpartition(".")[0]} if isinstance(target, str) else set()
        return own.union(*map(_modules, config.values()))
    return set().union(*map(_modules, config)) if isinstance(config, list) else set()


def _rank(
    work: Callable[[DictConfig], dict[str, Any]], cfg: dict[str, Any], logs: Sequence[str] = ()
) -> dict[str, Any]:
    """One rank; it adds to the run's log files."""
    import torch

    from motionrag.cli.mistakes import user_message

    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    logging.basicConfig(  # as conf/hydra/default.yaml
        format="[%(asctime)s] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=logging.WARNING,
        handlers=[console, *map(logging.FileHandler, logs)],
    )
    logging.getLogger("motionrag").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.captureWarnings(True)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    try:
        return work(OmegaConf.create(cfg))
    except Exception as error:
        if _peer_lost(str(error)):
            # The agent reports one process, of two that ended between two looks the lower rank: let it see the other.
            time.sleep(PEER_LOST_WAIT)
        if line := user_message(error):
            raise MotionRAGError(line) from error
        raise


def _peer_lost(message: str) -> bool:
    return any(word in message for word in PEER_LOST)


def _reason(failures: dict[int, Any], count: int) -> str:
    """One line for the rank that failed first, not for those that lost it."""

    def order(number: int) -> tuple[bool, bool, int]:
        message = failures[number].message
        consequence = isinstance(message, dict) and _peer_lost(message["message"])
        return (
            consequence or "SIGTERM" in str(message),
            failures[number].exitcode >= 0,
            failures[number].timestamp,
        )

    number = min(failures, key=order)
    message = failures[number].message
    if failures[number].exitcode > 0 and not isinstance(message, dict):
        return f"process {number} of {count} ended with exit code {failures[number].exitcode}: its output says why"
    if not isinstance(message, dict):
        return f"process {number} of {count} was ended from outside ({message}): out of memory?"
    log.error("process %d of %d:\n%s", number, count, message["extraInfo"]["py_callstack"])
    return message["message"].removeprefix("MotionRAGError: ")
