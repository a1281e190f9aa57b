"""Motion captions: what moves and how, said in one clause, out of captions that tell everything.

Two captioners, rules and a language model, with one method: ``write(captions)``. :func:`caption_table` adds what
they write to a table where ``motion_caption`` is missing, after checking it (:func:`fault`).
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.progress import track

from motionrag.data.sources import check_max_bad, read_frame
from motionrag.errors import MotionRAGError
from motionrag.io import atomic_path, only_writer


class Captioner(Protocol):
    """What writes motion captions."""

    #: who wrote a caption; kept in the table beside it
    name: str
    #: all that its answers depend on (JSON-able); part of the cache's keys
    identity: Mapping[str, Any]

    def write(self, captions: Sequence[str]) -> list[str]:
        """One answer for each caption."""

    def write_again(self, caption: str, seed: int) -> str:
        """Another answer for a caption whose first one was not usable; the same one for the same seed."""


# ---------------------------------------------------------------- checks

_REFUSAL = re.compile(
    r"^(i'?m |i am |i |sorry|unfortunately|as an? )|language model|\bas an ai\b|"
    r"\b(can ?not|can't|unable to|not able to)\b.{0,20}\b(provide|determine|describe|help|assist|see|view|fulfill?)\b|"
    r"\bno (visible |apparent |clear )?(motion|movement|caption)\b.{0,20}\b(described|mentioned|given|provided)\b"
)
_PREAMBLE = re.compile(
    r"^(sure|certainly|of course|okay|ok\b|here (is|are)|here's|(the )?(motion )?(caption|clause|description|answer|output)\b"
    r"|motion\s*:|in (this|the) (video|clip)|(this|the) (video|clip)\b|based on)"
)
_MARKUP = re.compile(r"[<>{}\[\]|`#*_\\]|https?:")
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")

#: Words that tell nothing about which motion it is.
_COMMON = frozenset(
    "about after again also another around away back camera each from into other over past people person that their "
    "them then there these they this those three through toward towards two under while with woman women video".split()
)


def fault(caption: str, answer: str, max_words: int) -> str:
    """Why ``answer`` is no motion caption for ``caption``, "" if it is one.

    It has to be one line of 2 to ``max_words`` words, no refusal, no introduction, no markup, no loop (a word twice
    in a row, or a longer one three times), and to share a word (its first four letters) with the caption: what
    shares none is about something else.
    """
    text = answer.strip()
    words = _WORD.findall(text)
    if not text:
        return "empty"
    if "\n" in text:
        return "several lines"
    if _MARKUP.search(text):
        return "markup"
    if _REFUSAL.search(text.lower()):
        return "a refusal"
    if _PREAMBLE.search(text.lower()):
        return "an introduction"
    if len(text.split()) > max_words:
        return f"longer than {max_words} words"
    if len(words) < 2 or sum(map(len, words)) < 0.6 * len(text):
        return "not a clause"
    counts = Counter(word for word in map(str.lower, words) if len(word) > 3)
    if any(map(str.__eq__, words, words[1:])) or max(counts.values(), default=0) > 2:
        return "repeats itself"
    if not _stems(text) & _stems(caption):
        return "shares no word with the caption"
    return ""


def _stems(text: str) -> set[str]:
    return {word[:4] for word in _WORD.findall(text.lower()) if len(word) > 2 and word not in _COMMON}


# ---------------------------------------------------------------- rules

_VERBS = """
accelerate adjust applaud apply approach arrive ascend balance bat beat bend blink blow bob bounce bow box brake
breathe brush burn burst carry carve cast catch chase chew chop circle clap clean climb close collide cook crash
crawl cross crouch curl cut cycle dance dart descend dig dip dive drag draw dribble drift drink drive drop eat
embrace emerge enter erupt examine exercise exit expand explode extend fade fall fan feed fight fill fish flap
flicker flip float flow flutter fly fold follow frown gallop gather gesture glide grab grin grow hammer hang hit hop
hover hug hurl inch jog juggle jump kick kiss knead kneel knit land laugh launch lay lead lean leap leave lick lift
light limp load lower lunge march melt merge mix move nibble nod open orbit overtake pace paddle paint pan park pass
pat pedal peel perform pet pick pitch place plant play pluck point poke pour press proceed pull pump punch push put
race raise reach read recede retreat revolve ride ripple rise roam rock roll rotate row rub run rush sail salute sand
saw scatter scoop scroll scrub sculpt sew shake shave shift shine shoot shove shrug shuffle sing sink sip skate
ski skip slam slap slice slide slip slow smash smile smoke snap snowboard sort spar speak speed spill spin splash
spray spread sprint squat squeeze stack stagger stalk stamp steer step stir stop stretch stride strike stroke stroll
strum surf sway sweep swerve swim swing swirl swoop take talk tap tear throw thrust tie tilt toss touch tow trail
travel tremble trot tumble turn twirl twist type unfold unwrap vibrate walk wag wander wash wave weave whip whirl
whisk wink wipe wobble work wrap wrestle write yawn zoom
""".split()
_IRREGULAR = """
ate beaten beat bent blew blown brought caught clung come came coming crept drank drawn drew driven drove eaten fallen
fed fell flew flown flung fought gone going goes go grew grown held hung laid led left lit lying ran ridden rode risen
rose rung sang sank shaken shook slid slung spoke spread sprang spun struck sung swam swept swung taken taking
taught threw thrown took tore went wept wore wound wove written wrote
""".split()


def _forms(verb: str) -> list[str]:
    """Verb, third person, participles: regular ones."""
    if verb.endswith("e"):
        return [verb, verb + "s", verb + "d", verb[:-1] + "ing"]
    if verb.endswith("y") and verb[-2] not in "aeou":
        return [verb, verb[:-1] + "ies", verb[:-1] + "ied", verb + "ing"]
    third = verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "z")) else "s")
    doubled = verb + verb[-1] if re.fullmatch(r".*[^aeiou][aeiou][bdglmnprt]", verb) else verb
    return [verb, third, verb + "ed", verb + "ing", doubled + "ed", doubled + "ing"]


_MOTION = frozenset(form for verb in _VERBS for form in _forms(verb)) | frozenset(_IRREGULAR)
#: Forms that are as often nouns or adjectives: motion only after a noun phrase's end, which rules cannot see.
_NOUNS = frozenset(
    """bat beat bow box brush cast circle close cut dance dive draw drink drive exercise exit fall fan fish fly fold
    land light lights left lead lean load park paint pan plant plants play pet pump race rock rocks row sail sand saw
    smile smoke spring step steps stack stroke taps tie trail trails wave waves work works wound speed felt slip""".split()
)

_PERSON = re.compile(r"\b(man|woman|boy|girl|lady|guy|gentleman|someone|male|female)\b")
_PEOPLE = re.compile(r"\b(men|women|boys|girls|ladies|guys|gentlemen)\b")
_OPENING = re.compile(
    r"^(in (the|this) (video|clip|scene|footage),? |(the|this|a) (short )?(video|clip|footage|scene|image) "
    r"(clip )?(also )?(shows|features|captures|depicts|presents|begins with|opens with|starts with|is of|is about) )"
)
_LOOKS = """
red yellow green blue purple pink brown black white grey gray silver gold golden beige tan dark light bright
pale colorful colourful young old elderly middle-aged smiling bearded long-haired dark-haired blonde blond bald
beautiful pretty lovely cute small large big tall little plain striped patterned checkered floral padded sleeveless
metal steel wooden plastic wool leather denim cotton traditional modern casual formal indoor outdoor sunny snowy
grassy
""".split()
_WORN = """
suit tie shirt t-shirt shirts dress jacket coat vest sweater sweatshirt hoodie cardigan top blouse skirt jeans pants
trousers shorts uniform uniforms sportswear outfit outfits clothes clothing attire costume robe hat cap helmet hood
glasses sunglasses goggles mask gloves scarf headscarf boots shoes sneakers sleeve sleeves beard mustache moustache
hair ponytail bun braids tattoo tattoos necklace earrings makeup make-up fur feathers stripes spots
""".split()
_PLACES = """
room kitchen bathroom bedroom office gym hall corridor studio classroom school hospital church restaurant cafe bar
shop store street road sidewalk city town village park garden yard lawn field meadow grass forest woods desert beach
shore mountain mountains hill river lake pond pool ocean sea sky background foreground wall walls window house
building buildings stage stadium arena court cage aquarium zoo farm barn station airport car bus train boat setting
environment area scene light daylight sunlight night snow asphalt floor ground
""".split()


def _any(words: Sequence[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_LINKS = """and or of to from into onto toward towards across along over past through around up down in on at with inside
outside beside near behind under while as then who which that""".split()
_SOME = rf"(?:(?!\b(?:{_any(_LINKS)})\b)[\w'-]+ ){{0,5}}?"
_DRESSED = re.compile(
    rf",? \b(?:(?:wearing|dressed in|clad in|with|in) {_SOME}(?:{_any(_WORN)})|(?:dressed|clad) in (?:{_any(_LOOKS)}))\b"
    rf"(?:(?:,| and|, and) {_SOME}(?:{_any(_WORN)})\b)*"
)
_WHERE = re.compile(
    r",? \b(?:in front of|in|on|at|inside|outside|beside|near|against|before|behind|beneath|under|among|amid) "
    rf"{_SOME}(?:{_any(_PLACES)})\b(?: (?:{_any(_PLACES)})\b)*(?: of (?:an? |the )?[\w-]+)?"
)
_LOOK = re.compile(rf"\b(?:{_any(_LOOKS)})(?:,? and (?:{_any(_LOOKS)})|, (?:{_any(_LOOKS)}))* (?=[a-z])")
_HEAD_ENDS = re.compile(
    r"[,;]| (?:with|in|on|at|of|wearing|dressed|clad|who|that|which|is|are|was|were|standing|sitting|seated|and then) "
)


def rule_caption(caption: str, max_words: int = 30) -> str:
    """The motion of an English caption by fixed rules: no model, the same answer always.

    Keeps the sentences and clauses that hold a verb of motion (of a list), with the subject before them; drops
    clothes, colours and places; calls men and women persons; lower case, no full stop. At most ``max_words``
    words, whole clauses as far as they fit. A caption without such a verb gives its first clause.
    """
    text = " ".join(caption.split()).replace("\u2019", "'")
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", text) if part]
    kept: list[str] = []
    for sentence in sentences:
        kept += _moving_clauses(sentence)
    if not kept:
        kept = [_bare(_opened(sentences[0]).split(",")[0])] if sentences else []
    words: list[str] = []
    for clause in kept:
        more = clause.split()
        if words and len(words) + len(more) > max_words:
            break
        words = [*words[:-1], words[-1] + ",", *more] if words else more
    return " ".join(words[:max_words]).strip(" ,;.")


def _opened(sentence: str) -> str:
    return _OPENING.sub("", sentence.strip().rstrip(".!?").lower())


def _moves(clause: str) -> bool:
    words = _WORD.findall(clause)
    # The first word of a noun phrase is no verb: "a dance", "the waves".
    pairs = zip(["", *words], words, strict=False)
    return any(
        word in _MOTION
        and not (word in _NOUNS and before not in ("", "and", "to", "they", "it", "he", "she"))
        for before, word in pairs
    )


def _moving_clauses(sentence: str) -> list[str]:
    sentence = _opened(sentence)
    subject = _HEAD_ENDS.split(sentence + " ", maxsplit=1)[0].strip()
    kept = []
    for clause in re.split(r"[,;:]\s+(?:and |while |as |then )?|\s+while\s+", _bare(sentence)):
        if not _moves(clause):
            continue
        first, *rest = clause.split()
        if first in ("he", "she"):
            clause = " ".join(["a person", *rest])
        elif (
            not kept
            and (first in _MOTION - _NOUNS or first in ("who", "which"))
            and len(subject.split()) <= 6
        ):
            clause = " ".join([_bare(subject), *(rest if first in ("who", "which") else [clause])])
        kept.append(clause)
    return kept


def _bare(clause: str) -> str:
    """Without clothes, places and colours; men and women as persons."""
    clause = f" {clause}"
    for pattern in (_DRESSED, _WHERE):
        clause = pattern.sub("", clause)
    clause = _LOOK.sub("", clause)
    clause = _PEOPLE.sub("people", _PERSON.sub("person", clause))
    clause = re.sub(r"\ban (?=[^aeiou])", "a ", clause)
    clause = re.sub(r"\ba (?=[aeiou])(?!uni|one|use)", "an ", clause)
    return " ".join(clause.split()).strip(" ,;")


class RuleCaptioner:
    """:func:`rule_caption` as a captioner."""

    name = "rules"
    identity = {"captioner": "rules/1"}

    def write(self, captions: Sequence[str]) -> list[str]:
        return [rule_caption(caption) for caption in captions]

    def write_again(self, caption: str, seed: int) -> str:
        """Rules have one answer only."""
        return rule_caption(caption)


# ---------------------------------------------------------------- language model

#: Descriptions are cut here: no motion is told only after so many characters, and prompts have to fit.
_LONGEST = 3000


class LLMCaptioner:
    """An instruction model of the transformers library, on this machine.

    model: a folder or hub id of a causal language model in safetensors with its tokenizer; its chat template is
    used if there is one. prompt: a text file with ``{caption}`` in it; None: the packaged one. max_new_tokens: of
    an answer; enough for more words than may be, so that a cut-off answer is too long instead of wrong. temperature:
    of a second try (the first is greedy). device: None: a GPU if there is one. dtype: of the weights. Raises
    :class:`MotionRAGError` if the model cannot be loaded or the prompt has no place for the caption.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        prompt: str | Path | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.7,
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.prompt = _read_prompt(prompt)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, padding_side="left")
            self._model = AutoModelForCausalLM.from_pretrained(
                model, revision=revision, dtype=dtype, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise MotionRAGError(
                f"captioner model {model!r} cannot be loaded ({reason}); give a folder with config.json, "
                "model.safetensors and a tokenizer, or a hub id that is cached or can be fetched"
            ) from error
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device).eval()
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.name = f"llm:{Path(model).name if Path(model).is_dir() else model}"
        self._answer = {"max_new_tokens": max_new_tokens, "pad_token_id": self._tokenizer.pad_token_id}
        self._temperature = temperature
        self.identity = {
            "captioner": "llm/1",
            "model": str(model),
            "revision": revision or getattr(self._model.config, "_commit_hash", None),
            "prompt": self.prompt,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "dtype": dtype,
        }

    def write(self, captions: Sequence[str]) -> list[str]:
        """The model's most likely answers, all captions in one batch."""
        return self._generate(captions, do_sample=False)

    def write_again(self, caption: str, seed: int) -> str:
        """A sampled answer, alone: the same for the same seed whatever came before."""
        import torch

        with torch.random.fork_rng(devices=[self._device] if self._device.startswith("cuda") else []):
            digest = hashlib.sha256(f"{seed}\0{caption}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            return self._generate([caption], do_sample=True, temperature=self._temperature)[0]

    def _generate(self, captions: Sequence[str], **how: Any) -> list[str]:
        import torch

        prompts = [
            self.prompt.replace("{caption}", " ".join(caption.split())[:_LONGEST]) for caption in captions
        ]
        template = self._tokenizer.chat_template
        if template:
            prompts = [
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,  # templates that know no such thing ignore it
                )
                for prompt in prompts
            ]
        inputs = self._tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            add_special_tokens=not template,
            return_token_type_ids=False,
        ).to(self._device)
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, **self._answer, **how)
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return [
            text.strip().strip("\"'").strip().rstrip(".")
            for text in self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        ]


def _read_prompt(path: str | Path | None) -> str:
    source = (
        importlib.resources.files("motionrag.data") / "motion_caption.txt" if path is None else Path(path)
    )
    if not source.is_file():
        raise MotionRAGError(f"captioner.prompt={path}: no such file; expected a text with {{caption}} in it")
    text = source.read_text(encoding="utf-8").strip()
    if "{caption}" not in text:
        raise MotionRAGError(f"captioner.prompt={path}: the text has no {{caption}} to put the caption")
    return text


# ---------------------------------------------------------------- tables


def caption_table(
    table: str | Path,
    out: str | Path,
    captioner: Captioner,
    columns: Mapping[str, str],
    max_words: int = 30,
    max_bad: float = 0.1,
    batch_size: int = 16,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Copy ``table`` to ``out``, with motion captions where there were none, and who wrote each.

    Rows that have one keep it. Equal captions are written once. An answer that :func:`fault` finds wrong is tried
    once more (with ``seed``); if that is wrong too, the row stays without, and is told with the reason. Answers are
    kept in ``OUT.cache.jsonl`` under a hash of caption and captioner's identity, written after every batch, so that
    a killed run goes on where it was and a longer table pays for its new rows only.

    table, out: CSV, parquet or JSON lines. columns: names of ``caption``, ``motion_caption`` and of ``video`` or
    ``id``, by which rows are told. max_bad: largest share (0..1) of rows that may stay without. Returns counts:
    rows, had, written, from_cache (captions), failed (row, clip, reason). Raises :class:`MotionRAGError` for a bad
    table, an ``out`` that is there, a second process that writes it, or too many failures; the cache stays.
    """
    out, table = Path(out), Path(table)
    if out.suffix.lower() not in _WRITERS:
        raise MotionRAGError(f"out={out}: expected a name that ends in {', '.join(_WRITERS)}")
    if out.exists() and not overwrite:
        raise MotionRAGError(f"out={out} is there already; choose another name or add overwrite=true")
    check_max_bad(max_bad)
    frame = read_frame(table)
    caption, motion = columns["caption"], columns["motion_caption"]
    if caption not in frame:
        raise MotionRAGError(
            f"{table.name}: no column '{caption}' for caption; it has {', '.join(map(str, frame))}; "
            "name the right one with columns.caption=NAME"
        )
    texts = [_text(value) for value in frame[caption]]
    had = [_text(value) for value in frame[motion]] if motion in frame else [""] * len(frame)
    wanted = list(dict.fromkeys(text for text, own in zip(texts, had, strict=True) if text and not own))

    out.parent.mkdir(parents=True, exist_ok=True)
    cache_file = out.with_name(f"{out.name}.cache.jsonl")
    busy = f"out={out} is being written by another process; wait until it has ended or choose another name"
    with only_writer(cache_file, busy):
        cache = _Cache(cache_file, captioner.identity | {"max_words": max_words, "seed": seed})
        answers = {text: answer for text in wanted if (answer := cache.get(text))}
        missing = [text for text in wanted if text not in answers]
        rows = Counter(text for text, own in zip(texts, had, strict=True) if not own)
        bad = rows[""] + sum(rows[text] for text, answer in answers.items() if "fault" in answer)
        for start in track(range(0, len(missing), batch_size), description="captioning"):
            batch = missing[start : start + batch_size]
            new = {
                text: _checked(text, answer, captioner, max_words, seed)
                for text, answer in zip(batch, captioner.write(batch), strict=True)
            }
            cache.add(new)
            answers |= new
            bad += sum(rows[text] for text, answer in new.items() if "fault" in answer)
            if bad > max_bad * len(frame):
                break
    name = next((columns[key] for key in ("id", "video") if columns.get(key) in frame), None)
    clips = [str(clip) for clip in (frame[name] if name else range(len(frame)))]
    result, failed = list(had), []
    for row, (text, own) in enumerate(zip(texts, had, strict=True)):
        answer = {} if own else answers.get(text, {"fault": "not tried" if text else "no caption"})
        result[row] = own or answer.get("motion_caption", "")
        if "fault" in answer and answer["fault"] != "not tried":
            failed.append({"row": row, "clip": clips[row], "reason": answer["fault"]})
    if len(failed) > max_bad * len(frame):
        told = ", ".join(f"{item['clip']} ({item['reason']})" for item in failed[:5])
        raise MotionRAGError(
            f"{table.name}: {len(failed)} of {len(frame)} rows get no motion caption from {captioner.name}, more than "
            f"max_bad={max_bad:g} allows: {told}; use another model or prompt, or raise max_bad"
        )
    written = [not own and bool(new) for own, new in zip(had, result, strict=True)]
    before = frame[motion] if motion in frame else [None] * len(frame)
    frame[motion] = [old if own else new or None for own, old, new in zip(had, before, result, strict=True)]
    authors = frame["motion_caption_by"] if "motion_caption_by" in frame else [None] * len(frame)
    frame["motion_caption_by"] = [
        captioner.name if new else old for new, old in zip(written, authors, strict=True)
    ]
    with atomic_path(out) as temporary:
        _WRITERS[out.suffix.lower()](frame, temporary)
    return {
        "rows": len(frame),
        "had": sum(map(bool, had)),
        "written": sum(written),
        "from_cache": len(wanted) - len(missing),
        "failed": failed,
    }


_WRITERS = {
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False),
    ".jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True, force_ascii=False),
}


def _text(value: Any) -> str:
    return " ".join(value.split()) if isinstance(value, str) else ""


def _checked(caption: str, answer: str, captioner: Captioner, max_words: int, seed: int) -> dict[str, str]:
    """The answer, or a second one, or what is wrong with both."""
    first = fault(caption, answer, max_words)
    if not first:
        return {"motion_caption": answer}
    again = captioner.write_again(caption, seed)
    second = fault(caption, again, max_words)
    return (
        {"fault": first if first == second else f"{first}, then {second}"}
        if second
        else {"motion_caption": again}
    )


class _Cache:
    """Answers by caption, kept in a file that grows by whole lines."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._salt = json.dumps(identity, sort_keys=True)
        self._answers: dict[str, dict[str, str]] = {}
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a killed run may have left half a line
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        for line in whole.splitlines():
            try:
                answer = json.loads(line)
                self._answers[answer.pop("key")] = answer
            except (ValueError, KeyError, AttributeError) as error:
                raise MotionRAGError(
                    f"{path}: damaged ({error}); delete it: the captions are written again"
                ) from error

    def _key(self, caption: str) -> str:
        return hashlib.sha256(f"{self._salt}\0{caption}".encode("utf-8", "surrogatepass")).hexdigest()

    def get(self, caption: str) -> dict[str, str] | None:
        """``motion_caption``, or ``fault`` if no answer was usable; None: never asked."""
        return self._answers.get(self._key(caption))

    def add(self, answers: Mapping[str, dict[str, str]]) -> None:
        """Keep answers, on disk before this returns."""
        lines = []
        for caption, answer in answers.items():
            self._answers[self._key(caption)] = answer
            lines.append(json.dumps({"key": self._key(caption), **answer}, ensure_ascii=False) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
