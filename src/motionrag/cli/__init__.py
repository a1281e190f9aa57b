"""The command line: ``motionrag <verb> [positional] key=value ...``.

Every verb is a Hydra app over ``conf/<verb>.yaml`` whose work is ``run(cfg) -> dict`` in
``motionrag/cli/<verb>.py``. This module imports nothing heavy, so that ``--help`` answers at once; it

- turns what people type into Hydra overrides (a prompt may hold commas, quotes, brackets, equals signs),
- writes ``provenance.json`` and ``config.yaml`` into the run folder when a run starts and ``results.json``
  with the returned dict when it ends, and prints the dict's ``summary`` as one line,
- keeps the run's log (``VERB.log``): command, what the verb logs, warnings, summary or error,
- turns the user's mistakes into one line on standard error and exit code 2.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionrag import __version__
from motionrag.errors import MotionRAGError

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verb:
    """One sub-command: what it does, how it is typed, and which config key takes bare words."""

    about: str
    usage: str
    positional: str | None = None
    many: bool = False


VERBS: dict[str, Verb] = {
    "pack": Verb("video files and a table of captions -> shards", "table=clips.csv videos=DIR out=DIR"),
    "caption": Verb("a table of captions -> the same with motion captions", "table=clips.csv out=FILE"),
    "encode": Verb("shards -> a token store: features of every clip, computed once", "shards=DIR out=DB"),
    "index": Verb(
        "token store -> a retrieval database; add, remove, merge, inspect, verify", "[add|...] db=DB", "what"
    ),
    "retrieve": Verb(
        "print the reference clips for a prompt, and a contact sheet", '"PROMPT" db=DB k=3', "prompt"
    ),
    "train": Verb("train Stage 1 (motion adapter) or Stage 2 (CAMA)", "experiment=NAME"),
    "generate": Verb("image + prompt (+ database) -> mp4", 'image=FILE prompt="..." db=DB', "prompt"),
    "evaluate": Verb("a test split, or anyone's videos -> metrics, tables, clips", "protocol=NAME"),
    "import": Verb("the reference's checkpoints -> our weights", "release=NAME path=DIR out=DIR"),
    "export": Verb("our weights -> checkpoints of the reference", "release=NAME path=DIR out=DIR"),
    "sweep": Verb("what became of a sweep; run again what failed", "status|retry DIR", "what", many=True),
    "report": Verb("run folders -> one self-contained HTML page", "DIR...", "runs", many=True),
    "wandb": Verb(
        "the W&B workspace from code; log evaluations to W&B", "workspace|log DIR...", "what", many=True
    ),
    "describe": Verb("sizes, work and memory of a configuration, without its weights", "backbone=NAME"),
    "bench": Verb("measure the speed of one part", "adapter", "bench"),
    "demo": Verb("all of the above on the tiny configuration", ""),
}

# Short names: what is typed -> Hydra's key.
ALIASES = {"launcher": "hydra/launcher", "sweeper": "hydra/sweeper", "retrieval.k": "k"}
# Keys whose values are prose: taken literally, never as numbers, lists or sweeps.
TEXT_KEYS = frozenset({"prompt", "motion_prompt", "negative_prompt"})
# Keys with a number that may also be null; conf/VERB.yaml says what that means.
NULL_KEYS = frozenset({"near_duplicate"})
# Packages that only some choices need -> the extra of ours that brings them.
EXTRAS = {"bitsandbytes": "8bit", "optuna": "sweep", "wandb_workspaces": "wandb", "wandb": "wandb"}
# Hydra's own options: those that take the next word as their value, and the others.
OPTIONS_WITH_VALUE = frozenset(
    "--cfg -c --package -p --config-path -cp --config-name -cn --config-dir -cd --experimental-rerun".split()
)
OPTIONS = OPTIONS_WITH_VALUE | frozenset(
    "--hydra-help --resolve --run -r --multirun -m --shell-completion -sc --info -i".split()
)
OVERRIDE = re.compile(r"^(\+\+|\+|~)?[A-Za-z_][\w./@:$\-]*=")
DELETION = re.compile(r"^~[A-Za-z_][\w./@:$\-]*$")


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
                f"unknown verb '{verb}'{_suggest(verb, VERBS)}; verbs: {', '.join(VERBS)} (motionrag --help)"
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


# ---------------------------------------------------------------- words to overrides


def overrides_from_words(verb: str, words: list[str]) -> list[str]:
    """Hydra's command line for what was typed after the verb.

    Options and well-formed overrides stay as they are. A value that Hydra's grammar refuses, or would take
    for a sweep outside ``-m``, is quoted. Bare words become the verb's positional key; after ``--``
    everything is a bare word.
    """
    words = [_full_name(word) for word in words]
    multirun = "-m" in words or "--multirun" in words
    looks = {"--cfg", "-c", "--info", "-i"} & set(words)
    if not multirun and not looks and any(word.startswith("hydra/launcher=") for word in words):
        words, multirun = ["-m", *words], True  # Hydra's launchers run sweeps; this one has a single point
    bare: list[str] = []
    overrides: list[str] = []
    options: list[str] = []  # last: Hydra's parser wants all overrides in one stretch
    rest = iter(words)
    for word in rest:
        if word == "--":
            bare += rest
        elif word.startswith("-"):
            if word.split("=")[0] not in OPTIONS:
                raise MotionRAGError(
                    f"unknown option '{word}': options of {verb} are key=value without dashes "
                    f"(motionrag {verb} --help; words after -- are taken as they are)"
                )
            value = next(rest, None) if word in OPTIONS_WITH_VALUE else None
            options += [word] if value is None else [word, value]
        elif DELETION.match(word):
            overrides.append(word)
        elif OVERRIDE.match(word):
            overrides.append(_quoted_override(word, multirun))
        else:
            bare.append(word)
    return overrides + _positional_override(verb, bare) + options


def _full_name(word: str) -> str:
    match = re.match(r"(\+\+|\+)?([\w.]+)(=.*)", word, flags=re.S)
    if not match:
        return word
    plus, key, value = match[1] or "", match[2], match[3]
    if key.startswith(("launcher.", "sweeper.")):
        return f"{plus}hydra.{key}{value}"
    return f"{plus}{ALIASES.get(key, key)}{value}"


def _positional_override(verb: str, bare: list[str]) -> list[str]:
    spec = VERBS[verb]
    if not bare:
        return []
    if spec.positional is None:
        raise MotionRAGError(
            f"{verb} does not know what to do with '{bare[0]}': options are key=value (motionrag {verb} --help)"
        )
    if spec.many:
        return [f"{spec.positional}=[{','.join(_quote(word) for word in bare)}]"]
    if len(bare) > 1:
        raise MotionRAGError(
            f"{verb} takes one {spec.positional} and got {len(bare)}: put it in quotes, "
            f'motionrag {verb} "{" ".join(bare)}"'
        )
    return [f"{spec.positional}={_quote(bare[0])}"]


def _quoted_override(word: str, multirun: bool) -> str:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, value = word.split("=", 1)
    try:
        parsed = OverridesParser.create().parse_override(word)
        legal = multirun or not parsed.is_sweep_override()
    except HydraException:
        legal = False
    already_quoted = legal and len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if key.lstrip("+") in TEXT_KEYS:
        legal = already_quoted or (multirun and legal)
    return word if legal else f"{key}={_quote(value)}"


def _quote(text: str) -> str:
    """``text`` as a quoted string of Hydra's grammar that OmegaConf reads back literally."""
    from hydra.core.override_parser.types import Quote, QuotedString

    # `${` would start an interpolation: OmegaConf wants a backslash before it, and the backslashes that
    # are already there doubled.
    literal = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return QuotedString(text=literal, quote=Quote.single).with_quotes()


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
        line = _config_message(verb, overrides, error)
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
    """Raise MotionRAGError for a word or null where the verb's own config has a number or true/false.

    Keys of groups are checked by what is made of them.
    """
    from omegaconf import OmegaConf

    expected = {bool: "true or false", int: "a whole number", float: "a number"}
    for key, default in OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{verb}.yaml")).items():
        kind, value = type(default), OmegaConf.select(cfg, key)
        if kind not in expected or key not in cfg or (value is None and key in NULL_KEYS):
            continue
        if value is None:
            raise MotionRAGError(f"{key}=null: expected {expected[kind]} (motionrag {verb} --help)")
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (kind, int)):
            raise MotionRAGError(f"{key}={value}: expected {expected[kind]} (motionrag {verb} --help)")


def _short(path: Path) -> str:
    """``path`` relative to the working directory when it lies inside it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


# ---------------------------------------------------------------- mistakes


def user_message(error: BaseException) -> str | None:
    """One line for an error the user can fix, or None for a fault of the program.

    Looks through the errors' causes: Hydra wraps what a constructor raises.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, MotionRAGError):
            # a loader's worker hands it on with a traceback in it
            return str(link).rpartition("motionrag.errors.MotionRAGError: ")[2]
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            name = link.filename2 or link.filename  # of a copy the target
            what = (
                "no more is allowed in a file" if link.errno == errno.EFBIG else "no space left on the device"
            )
            where = f" while writing {name}" if name else ""
            return f"{what}{where}: free some or write to another place (out=DIR or hydra.run.dir=DIR)"
        if isinstance(link, OSError) and link.errno in (errno.EACCES, errno.EROFS):
            return f"no permission for {link.filename}: choose another place or change the rights"
        if isinstance(link, ModuleNotFoundError) and link.name in EXTRAS:
            return f"this needs {link.name}, which is not installed: pip install 'motionrag[{EXTRAS[link.name]}]'"
        link = link.__cause__
    return _omegaconf_message(error) or _foreign_option(error)


def _foreign_option(error: BaseException) -> str | None:
    """One line for an option that a `_target_` does not take, such as one an experiment sets for another backbone."""
    text = str(error)
    option = re.search(r"unexpected keyword argument '(\w+)'", text)
    target, key = re.search(r"call to target '([\w.]+)'", text), re.search(r"full_key: (\S+)", text)
    if not (option and target and key):
        return None
    tail = key[1].rpartition(".")[2]  # module.backbone is the config group backbone
    name = f"{tail if (conf_dir() / tail).is_dir() else key[1]}.{option[1]}"
    return f"{target[1]} takes no {option[1]}: leave it out with ~{name} (an experiment may set it for another choice)"


def _omegaconf_message(error: BaseException) -> str | None:
    omegaconf_errors = sys.modules.get("omegaconf.errors")
    if omegaconf_errors is None or not isinstance(error, omegaconf_errors.OmegaConfBaseException):
        return None
    key = getattr(error, "full_key", None)
    text = str(error).splitlines()[0]
    return f"config: {text}" if not key or key in text else f"config key {key}: {text}"


def _config_message(verb: str, words: list[str], error: Exception) -> str | None:
    """One line for what Hydra found wrong with the overrides or the config files."""
    from hydra.errors import HydraException, InstantiationException

    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        return (
            "a group of configs is set to something that is no name (GROUP=null?): choose one of its configs"
        )
    line = user_message(error)
    if line is not None or not isinstance(error, HydraException) or isinstance(error, InstantiationException):
        return line
    text = str(error)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        key = unknown[1].split("@")[0]
        known = _known_keys(verb, words)
        return f"unknown config key '{key}'{_suggest(key, known)} (motionrag {verb} --help lists the keys)"
    in_list = re.search(r"Could not load '([\w/]+)/([^/']+)'", text)  # of a list, such as metrics=[...]
    if in_list and (conf_dir() / in_list[1]).is_dir():
        group, name = in_list.groups()
        names = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
        return f"unknown {group} '{name}'{_suggest(name, names)}; available: {', '.join(names)}"
    choice = re.search(
        r"Could not find '([^']+)'\s+Available options in '([^']+)':(.*?)(?:\n\S|\Z)", text, flags=re.S
    )
    if choice:
        group, names = choice[2], choice[3].split()
        name = choice[1].removeprefix(group + "/")
        return f"unknown {group} '{name}'{_suggest(name, names)}; available: {', '.join(names)}"
    return " ".join(text.split())


def _known_keys(verb: str, words: list[str]) -> list[str]:
    """Dotted keys of the verb's config with the groups that the words choose."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            groups = [word for word in words if (conf_dir() / word.partition("=")[0]).is_dir()]
            cfg = compose(config_name=verb, overrides=groups)
    except HydraException:  # a required group: only the verb's own keys can be named
        loaded = OmegaConf.load(conf_dir() / f"{verb}.yaml")
        return [key for key in loaded if key != "defaults"]

    def keys(node: DictConfig, prefix: str) -> list[str]:
        found = []
        for key in node:
            found.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
                found += keys(child, f"{prefix}{key}.")
        return found

    return keys(cfg, "")


def _suggest(word: str, known: Any) -> str:
    """``, did you mean 'x'?`` or nothing."""
    from difflib import get_close_matches

    known = list(known)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:  # a key without its group: `lr` for `optimizer.lr`
        close = [key for key in known if key.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]][:1]
    return f", did you mean '{close[0]}'?" if close else ""
