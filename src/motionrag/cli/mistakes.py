"""The user's mistakes in one line: what an exception means, and which word was probably meant.

Imports nothing heavy, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import re
import sys
from typing import Any

from motionrag.errors import MotionRAGError

# Packages that only some choices need -> the extra of ours that brings them.
EXTRAS = {"bitsandbytes": "8bit", "optuna": "sweep", "wandb_workspaces": "wandb", "wandb": "wandb"}


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
    from motionrag.cli import conf_dir

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


def config_message(verb: str, words: list[str], error: Exception) -> str | None:
    """One line for what Hydra found wrong with the overrides or the config files."""
    from hydra.errors import HydraException, InstantiationException

    from motionrag.cli import conf_dir

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
        return f"unknown config key '{key}'{suggest(key, known)} (motionrag {verb} --help lists the keys)"
    in_list = re.search(r"Could not load '([\w/]+)/([^/']+)'", text)  # of a list, such as metrics=[...]
    if in_list and (conf_dir() / in_list[1]).is_dir():
        group, name = in_list.groups()
        names = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
        return f"unknown {group} '{name}'{suggest(name, names)}; available: {', '.join(names)}"
    choice = re.search(
        r"Could not find '([^']+)'\s+Available options in '([^']+)':(.*?)(?:\n\S|\Z)", text, flags=re.S
    )
    if choice:
        group, names = choice[2], choice[3].split()
        name = choice[1].removeprefix(group + "/")
        return f"unknown {group} '{name}'{suggest(name, names)}; available: {', '.join(names)}"
    return " ".join(text.split())


def _known_keys(verb: str, words: list[str]) -> list[str]:
    """Dotted keys of the verb's config with the groups that the words choose."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf

    from motionrag.cli import conf_dir

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


def suggest(word: str, known: Any) -> str:
    """``, did you mean 'x'?`` or nothing."""
    from difflib import get_close_matches

    known = list(known)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:  # a key without its group: `lr` for `optimizer.lr`
        close = [key for key in known if key.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]][:1]
    return f", did you mean '{close[0]}'?" if close else ""
