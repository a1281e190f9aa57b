"""The verbs, and what people type after them -> Hydra overrides: a prompt may hold commas, quotes, equals signs.

Imports nothing heavy, so that ``--help`` answers at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from motionrag.errors import MotionRAGError


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
# Hydra's own options: those that take the next word as their value, and the others.
OPTIONS_WITH_VALUE = frozenset(
    "--cfg -c --package -p --config-path -cp --config-name -cn --config-dir -cd --experimental-rerun".split()
)
OPTIONS = OPTIONS_WITH_VALUE | frozenset(
    "--hydra-help --resolve --run -r --multirun -m --shell-completion -sc --info -i".split()
)
OVERRIDE = re.compile(r"^(\+\+|\+|~)?[A-Za-z_][\w./@:$\-]*=")
DELETION = re.compile(r"^~[A-Za-z_][\w./@:$\-]*$")


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
            overrides.append(quoted_override(word, multirun))
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
        return [f"{spec.positional}=[{','.join(quote(word) for word in bare)}]"]
    if len(bare) > 1:
        raise MotionRAGError(
            f"{verb} takes one {spec.positional} and got {len(bare)}: put it in quotes, "
            f'motionrag {verb} "{" ".join(bare)}"'
        )
    return [f"{spec.positional}={quote(bare[0])}"]


def quoted_override(word: str, multirun: bool = False) -> str:
    """`key=value` with the value in quotes if Hydra would refuse it or take it for a sweep."""
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
    return word if legal else f"{key}={quote(value)}"


def quote(text: str) -> str:
    """``text`` as a quoted string of Hydra's grammar that OmegaConf reads back literally."""
    from hydra.core.override_parser.types import Quote, QuotedString

    # `${` would start an interpolation: OmegaConf wants a backslash before it, and the backslashes that
    # are already there doubled.
    literal = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return QuotedString(text=literal, quote=Quote.single).with_quotes()
