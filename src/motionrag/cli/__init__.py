"""The command line: ``motionrag <verb> [positional] key=value ...``.

Every verb is a Hydra app over ``conf/<verb>.yaml`` whose work is ``run(cfg) -> dict`` in
``motionrag/cli/<verb>.py``. This module imports nothing heavy, so that ``--help`` answers at once; it

- turns what people type into Hydra overrides (``words.py``),
- writes ``provenance.json`` and ``config.yaml`` into the run folder when a run starts and ``results.json``
  with the returned dict when it ends, and prints the dict's ``summary`` as one line,
- keeps the run's log (``VERB.log``): command, what the verb logs, warnings, summary or error,
- turns the user's mistakes into one line (``mistakes.py``) on standard error and exit code 2.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionrag import __version__
from motionrag.cli.mistakes import config_message, suggest, user_message
from motionrag.cli.words import VERBS, overrides_from_words
from motionrag.errors import MotionRAGError

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

# Keys with a number that may also be null; conf/VERB.yaml says what that means.
NULL_KEYS = frozenset({"near_duplicate"})
# Lists of which a single word will do.
LONE_KEYS = frozenset({"others", "clips"})


def conf_dir() -> Path:
    """The folder of configs: ``conf/`` of the source tree when running from one, else the packaged copy."""
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    if (root / "pyproject.toml").is_file() and (root / "conf").is_dir():
        return root / "conf"
    return package / "conf"


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 2 for the user's mistakes, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(general_help())
            return 0
        if argv[0] == "--version":
            print(f"motionrag {__version__}")
            return 0
        verb, words = argv[0], argv[1:]
        if verb not in VERBS:
            raise MotionRAGError(
                f"unknown verb '{verb}'{suggest(verb, VERBS)}; verbs: {', '.join(VERBS)} (motionrag --help)"
            )
        options = words[: words.index("--")] if "--" in words else words
        if "-h" in options or "--help" in options:
            print(verb_help(verb))
            return 0
        return _launch(verb, words)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `motionrag ... | head` is not a mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = user_message(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2


# ---------------------------------------------------------------- help


def general_help() -> str:
    """The text of ``motionrag --help``."""
    lines = ["Retrieved motion for frozen image-to-video diffusion backbones.", ""]
    lines += ["usage: motionrag VERB [key=value ...]", ""]
    lines += [f"  {name:<9} {verb.about}" for name, verb in VERBS.items()]
    lines += ["", "motionrag VERB --help lists the verb's options; motionrag --version prints the version."]
    return "\n".join(lines)


def verb_help(verb: str) -> str:
    """The text of ``motionrag VERB --help``: usage and the commented config, read as plain text."""
    about, usage = VERBS[verb].about, VERBS[verb].usage
    lines = [
        f"motionrag {verb}: {about}",
        "",
        f"usage: motionrag {verb} {usage} [key=value ...]".replace("  ", " "),
    ]
    path = conf_dir() / f"{verb}.yaml"
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if text:
        lines += ["", f"Options (conf/{verb}.yaml; ??? must be given):", ""]
        lines += ["  " + line if line else "" for line in text.splitlines()]
    choices = _group_choices(text)
    if choices:
        lines += ["", "Choices:"]
        lines += [f"  {group}={'|'.join(names)}" for group, names in choices.items()]
    lines += [
        "",
        "--cfg job shows the resolved config, -m runs a sweep (key=1,2,3). Results: outputs/"
        f"{verb}/DATE_TIME, or hydra.run.dir=DIR.",
    ]
    return "\n".join(lines)


def _group_choices(text: str) -> dict[str, list[str]]:
    """Config groups named in a defaults list, with the files to choose from."""
    choices = {}
    for match in re.finditer(r"^\s*-\s+(?:optional |override )*/?([\w/]+)(?:@[\w.]+)?:", text, flags=re.M):
        folder = conf_dir() / match[1]
        if match[1] != "hydra" and folder.is_dir():
            choices[match[1]] = sorted(path.stem for path in folder.glob("*.yaml"))
    return choices


# ---------------------------------------------------------------- running


def _launch(verb: str, words: list[str]) -> int:
    overrides = overrides_from_words(verb, words)
    if not (conf_dir() / f"{verb}.yaml").is_file():
        raise MotionRAGError(
            f"no config {verb}.yaml in {conf_dir()}: the installation is incomplete, install motionrag again"
        )
    import hydra

    from motionrag.cli import launch

    launch.join(multirun="-m" in overrides or "--multirun" in overrides)
    if {"--cfg", "-c"} & set(overrides):  # shown resolved; no run folder is made, so its place is a word
        overrides = ["hydra.runtime.output_dir=RUN_FOLDER", *overrides]
        overrides += [] if "--resolve" in overrides else ["--resolve"]
    typed = ["motionrag", verb, *words]
    mistakes: list[str] = []

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=verb)
    def job(cfg: DictConfig) -> float | None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        # Lightning starts further processes with this line; Hydra needed it without the verb.
        sys.argv = [before[0], verb, *overrides]
        try:
            return _run_verb(verb, cfg, typed)
        except Exception as error:
            # In a sweep Hydra has to see the failure. In a single run it would add a line of its own.
            line = user_message(error)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                launch.fail_slurm_job()
                raise
            # into the log alone: main() prints it
            log.info("error: %s", line or error, exc_info=None if line else error)
            if line is None:
                raise
            mistakes.append(line)
            return None

    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand errors to main() instead of printing them
    # One bar for every part of every network that is loaded would bury ours; 0 shows them, downloads too.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    before = sys.argv
    sys.argv = [before[0], *overrides]
    try:
        job()
    except Exception as error:
        line = config_message(verb, overrides, error)
        if line is None:
            raise
        mistakes.append(line)
    finally:
        sys.argv = before
    if mistakes:
        print(f"error: {mistakes[0]}", file=sys.stderr)
    return 2 if mistakes else 0


def _run_verb(verb: str, cfg: DictConfig, typed: list[str]) -> float | None:
    """Check the config, record the run, do the work; returns ``objective`` of the results for sweepers."""
    from contextlib import nullcontext
    from importlib import import_module

    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from motionrag import provenance, sweeps
    from motionrag.cli import gpus, launch
    from motionrag.io import write_json

    check_kinds(verb, cfg)
    if missing := missing_keys(cfg):
        given = " ".join(f"{key}=..." for key in missing)
        raise MotionRAGError(
            f"{verb} needs {given}: motionrag {verb} {VERBS[verb].usage} (--help says what each key means)"
        )
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    first_process = launch.rank() == 0
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if in_sweep and "ckpt_path" in cfg and cfg.ckpt_path is None and sweeps.checkpoint(run_dir).is_file():
        cfg.ckpt_path = "last"  # this point was started before
    with sweeps.point(run_dir, user_message, first_process) if in_sweep else nullcontext():
        if first_process:
            provenance.write(run_dir, cfg, verb, typed)
            words = HydraConfig.get().overrides.task if in_sweep else typed[2:]
            log.info("motionrag %s %s", verb, shlex.join(words))
        if in_sweep and "n_jobs" in HydraConfig.get().launcher:  # joblib
            gpus.take(run_dir.parent, cfg)
        logging.captureWarnings(True)
        try:
            results: dict[str, Any] = import_module(f"motionrag.cli.{verb}").run(cfg)
        finally:
            logging.captureWarnings(False)
        if first_process:
            write_json(run_dir / "results.json", results)
            print(f"{verb}: {results['summary']} [{_short(run_dir / 'results.json')}]")
            log.info("%s: %s", verb, results["summary"])
    return results.get("objective")


def missing_keys(cfg: DictConfig) -> list[str]:
    """Keys whose own value is ``???``; those that merely refer to such a key are not the user's to fill."""
    from omegaconf import OmegaConf

    def walk(node: dict, prefix: str) -> list[str]:
        found = []
        for key, value in node.items():
            if value == "???":
                found.append(f"{prefix}{key}")
            elif isinstance(value, dict):
                found += walk(value, f"{prefix}{key}.")
        return found

    return walk(OmegaConf.to_container(cfg, resolve=False), "")


def check_kinds(verb: str, cfg: DictConfig) -> None:
    """Raise MotionRAGError for a word or null where the verb's own config has a number, true/false or a list.

    Keys of groups are checked by what is made of them.
    """
    from omegaconf import OmegaConf

    expected = {bool: "true or false", int: "a whole number", float: "a number", list: "a list"}

    def walk(defaults: dict, found: Any, prefix: str) -> None:
        for name, default in defaults.items():
            if not isinstance(found, dict) or name not in found or name == "defaults":
                continue
            key, kind, value = f"{prefix}{name}", type(default), found[name]
            if kind is dict:
                walk(default, value, f"{key}.")
            if kind not in expected:
                continue
            if isinstance(value, str) and "${" in value:
                value = OmegaConf.select(cfg, key)
            if value is None and key in NULL_KEYS:
                continue
            fits = isinstance(value, (kind, int)) and isinstance(value, bool) == (kind is bool)
            if kind is list:
                fits = isinstance(value, list) or (key in LONE_KEYS and value is not None)
            if not fits:
                said, what = "null" if value is None else value, expected[kind]
                if kind is list and value is not None:
                    what += f", {key}=[{value}]"
                raise MotionRAGError(f"{key}={said}: expected {what} (motionrag {verb} --help)")

    defaults = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{verb}.yaml"))
    walk(defaults, OmegaConf.to_container(cfg), "")


def _short(path: Path) -> str:
    """``path`` relative to the working directory when it lies inside it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
