"""Motion captions: rules, checks, a language model of our own making, and tables that lose nothing."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from motionrag import cli
from motionrag.cli.mistakes import user_message
from motionrag.data import captions
from motionrag.data.captions import LLMCaptioner, RuleCaptioner, caption_table, fault, rule_caption
from motionrag.errors import MotionRAGError

COLUMNS = {"caption": "caption", "motion_caption": "motion_caption", "video": "video", "id": "id"}

# ---------------------------------------------------------------- rules and checks


@pytest.mark.parametrize(
    ("caption", "motion"),
    [
        (
            "The video features a young woman in a long red dress and black boots. She is walking along a beach, "
            "holding a hat in her hand. The sky is blue. The style of the video is realistic.",
            "a person is walking along a beach",
        ),
        (
            "In the video, an old man with a white beard, wearing a blue shirt, turns his head to the left.",
            "a person turns his head to the left",
        ),
        ("A grey wolf in a forest turns its head to the side.", "a wolf turns its head to the side"),
        ("The camera pans right, then zooms out.", "the camera pans right, zooms out"),
        ("Two men in dark suits, who are shaking hands in an office.", "two people are shaking hands"),
        (
            "A serene landscape of a lake, surrounded by trees.",
            "a serene landscape of a lake",
        ),  # nothing moves
        ("", ""),
    ],
)
def test_rules(caption, motion):
    assert rule_caption(caption) == motion


def test_rules_keep_to_the_length():
    long = " ".join(f"A man walks past tree number {i} and waves at it." for i in range(20))
    assert len(rule_caption(long).split()) <= 30
    assert len(rule_caption("a man walks " + "very " * 99 + "slowly", max_words=12).split()) == 12


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("a person juggles a ball", ""),
        ("someone keeps the ball in the air with both feet", ""),
        (" ", "empty"),
        ("a person\njuggles a ball", "several lines"),
        ("**a person** juggles a ball", "markup"),
        ("<think>the man juggles a ball", "markup"),
        ("I'm sorry, but I cannot see the ball", "a refusal"),
        ("As an AI language model I juggle no ball", "a refusal"),
        ("No motion is described of the ball", "a refusal"),
        ("Here is the caption: a person juggles a ball", "an introduction"),
        ("Sure! A person juggles a ball", "an introduction"),
        ("Motion caption: a person juggles a ball", "an introduction"),
        ("The video shows a man who juggles a ball", "an introduction"),
        ("a person juggles " + "a ball " * 20, "longer than 30 words"),
        ("ball", "not a clause"),
        ("a man man juggles a ball", "repeats itself"),
        ("a ball, a ball and a ball", "repeats itself"),
        ("ball 1234 5678 9012 !!", "not a clause"),
        ("a person drives over there", "shares no word with the caption"),
    ],
)
def test_checks(answer, reason):
    assert fault("A man in a dark shirt keeps a white ball in the air with his feet.", answer, 30) == reason


# ---------------------------------------------------------------- tables


class Scripted:
    """A captioner that answers from a dict and remembers what it was asked."""

    name = "scripted"
    identity = {"captioner": "scripted"}

    def __init__(self, answers, second=None, stop_at=None):
        self.answers, self.second, self.stop_at, self.asked = answers, second or {}, stop_at, []

    def write(self, captions):
        self.asked += captions
        if self.stop_at in captions:
            raise KeyboardInterrupt
        return [self.answers[caption] for caption in captions]

    def write_again(self, caption, seed):
        self.asked.append(f"again: {caption}")
        return self.second.get(caption, "")


def save(path, rows):
    frame = pd.DataFrame(rows)
    {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".parquet": lambda: frame.to_parquet(path),
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
    }[path.suffix]()
    return path


ROWS = [
    {"video": "a.mp4", "caption": "a red ball rolls", "motion_caption": None, "score": "007"},
    {"video": "b.mp4", "caption": "a dog runs", "motion_caption": "own  words", "score": "1.50"},
    {"video": "c.mp4", "caption": "a red ball rolls", "motion_caption": " ", "score": None},
    {"video": "d.mp4", "caption": "a cat jumps", "motion_caption": None, "score": "NA"},
]
ANSWERS = {"a red ball rolls": "a ball rolls", "a cat jumps": "a cat jumps up"}


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_only_what_is_missing_is_written(tmp_path, suffix):
    captioner = Scripted(ANSWERS)
    table, out = save(tmp_path / f"t{suffix}", ROWS), tmp_path / f"out{suffix}"
    counts = caption_table(table, out, captioner, COLUMNS)
    assert counts == {"rows": 4, "had": 1, "written": 3, "from_cache": 0, "failed": []}
    assert captioner.asked == ["a red ball rolls", "a cat jumps"]  # equal captions once
    read = {".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])}
    read |= {".parquet": pd.read_parquet, ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False)}
    frame = read[suffix](out)
    assert list(frame.motion_caption) == ["a ball rolls", "own  words", "a ball rolls", "a cat jumps up"]
    assert [by if isinstance(by, str) else "" for by in frame.motion_caption_by] == [
        "scripted",
        "",
        "scripted",
        "scripted",
    ]
    assert [text if isinstance(text, str) else None for text in frame.score] == ["007", "1.50", None, "NA"]


def test_unusable_answers_are_tried_once_more_then_told_by_name(tmp_path):
    captioner = Scripted(
        {"a red ball rolls": "Sure! a ball rolls", "a cat jumps": "I'm sorry"},
        {"a red ball rolls": "a ball rolls"},
    )
    table = save(tmp_path / "t.csv", [*ROWS, {"video": "e.mp4", "caption": None}])
    with pytest.raises(
        MotionRAGError,
        match=r"t.csv: 2 of 5 rows get no motion caption from scripted, more than max_bad=0.1 allows: "
        r"d.mp4 \(a refusal, then empty\), e.mp4 \(no caption\); use another model",
    ):
        caption_table(table, tmp_path / "out.csv", captioner, COLUMNS)
    assert not (tmp_path / "out.csv").exists()
    asked = list(captioner.asked)
    assert asked[2:] == ["again: a red ball rolls", "again: a cat jumps"]
    counts = caption_table(table, tmp_path / "out.csv", captioner, COLUMNS, max_bad=0.5)
    assert captioner.asked == asked  # also what failed is known
    assert counts["failed"] == [
        {"row": 3, "clip": "d.mp4", "reason": "a refusal, then empty"},
        {"row": 4, "clip": "e.mp4", "reason": "no caption"},
    ]
    assert list(pd.read_csv(tmp_path / "out.csv").motion_caption.isna()) == [False, False, False, True, True]


def test_a_hopeless_captioner_stops_early(tmp_path):
    captions = [f"thing {i} moves" for i in range(50)]
    captioner = Scripted(dict.fromkeys(captions, "I cannot"))
    table = save(tmp_path / "t.csv", [{"caption": caption} for caption in captions])
    with pytest.raises(MotionRAGError, match="8 of 50 rows get no motion caption"):
        caption_table(table, tmp_path / "out.csv", captioner, COLUMNS, batch_size=4)
    assert len(captioner.asked) == 16


def test_killed_runs_and_longer_tables_pay_for_new_captions_only(tmp_path):
    captions = [f"ball number {i} rolls" for i in range(8)]
    answers = {caption: f"{caption} away" for caption in captions}
    rows = [{"caption": caption} for caption in captions]
    table, out = save(tmp_path / "t.csv", rows[:6]), tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        caption_table(table, out, Scripted(answers, stop_at=captions[4]), COLUMNS, batch_size=2)
    assert not out.exists()
    cache = tmp_path / "out.csv.cache.jsonl"
    assert len(cache.read_text().splitlines()) == 4
    with cache.open("a") as file:
        file.write('{"key": "half a li')  # what a kill in the middle of a write leaves
    captioner = Scripted(answers)
    assert caption_table(table, out, captioner, COLUMNS, batch_size=2)["from_cache"] == 4
    assert captioner.asked == captions[4:6]
    captioner = Scripted(answers)
    caption_table(save(tmp_path / "t.csv", rows), out, captioner, COLUMNS, overwrite=True)
    assert captioner.asked == captions[6:]
    assert list(pd.read_csv(out).motion_caption) == list(answers.values())
    captioner = Scripted(answers)
    captioner.identity = {"captioner": "another"}  # its answers are not theirs
    caption_table(table, out, captioner, COLUMNS, overwrite=True)
    assert captioner.asked == captions


class Killed(Scripted):
    """Is killed, without warning, when it is asked for `stop_at`."""

    def write(self, captions):
        if self.stop_at in captions:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(captions)


@pytest.mark.parametrize("while_writing", [False, True])
def test_after_kill_9_it_comes_to_the_same(tmp_path, while_writing):
    answers = {f"ball number {i} rolls": f"ball number {i} rolls away" for i in range(6)}
    table = save(tmp_path / "t.csv", [{"caption": caption} for caption in answers])
    out = tmp_path / "out.csv"
    caption_table(table, tmp_path / "whole.csv", Scripted(answers), COLUMNS, batch_size=2)

    def work():
        if while_writing:
            captions._WRITERS[".csv"] = lambda frame, path: (
                path.write_text("half"),
                os.kill(os.getpid(), signal.SIGKILL),
            )
        stop_at = None if while_writing else "ball number 4 rolls"
        caption_table(table, out, Killed(answers, stop_at=stop_at), COLUMNS, batch_size=2)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and not out.exists()
    captioner = Scripted(answers)
    caption_table(table, out, captioner, COLUMNS, batch_size=2)
    assert captioner.asked == list(answers)[6 if while_writing else 4 :]
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("what", ["cache", "table"])
def test_a_full_disk(tmp_path, small_files, suffix, what):
    """One line, no table; what was written is kept, and the same command goes on."""
    noise = (
        np.random.default_rng(0).integers(0, 2**63, 6 * 40).reshape(6, -1).tolist()
    )  # not to be compressed
    answers = {f"ball number {i} rolls": f"ball number {i} rolls away" for i in range(6)}
    rows = [{"caption": caption, "note": str(own)} for caption, own in zip(answers, noise, strict=True)]
    table, out = save(tmp_path / f"t{suffix}", rows), tmp_path / f"out{suffix}"
    whole = tmp_path / f"whole{suffix}"
    caption_table(table, whole, Scripted(answers), COLUMNS, batch_size=2)
    size = (tmp_path / f"whole{suffix}.cache.jsonl").stat().st_size
    with small_files(size // 2 - 1 if what == "cache" else size), pytest.raises(OSError) as caught:
        caption_table(table, out, Scripted(answers), COLUMNS, batch_size=2)
    assert user_message(caught.value).startswith("no more is allowed in a file")
    assert not out.exists() and not list(tmp_path.glob(".*"))
    captioner = Scripted(answers)
    caption_table(table, out, captioner, COLUMNS, batch_size=2)
    assert captioner.asked == list(answers)[2 if what == "cache" else 6 :]
    assert out.read_bytes() == whole.read_bytes()


def test_mistakes_with_tables(tmp_path):
    table = save(tmp_path / "t.csv", ROWS)
    for out, columns, message in (
        (tmp_path / "out.xls", COLUMNS, "expected a name that ends in .csv, .parquet, .jsonl"),
        (table, COLUMNS, "is there already; choose another name or add overwrite=true"),
        (
            tmp_path / "out.csv",
            COLUMNS | {"caption": "text"},
            "no column 'text' for caption; it has video, caption",
        ),
    ):
        with pytest.raises(MotionRAGError, match=message):
            caption_table(table, out, RuleCaptioner(), columns)
    cache = tmp_path / "out.csv.cache.jsonl"
    cache.write_text("not ours\n")
    with pytest.raises(MotionRAGError, match=r"out.csv.cache.jsonl: damaged .*delete it"):
        caption_table(table, tmp_path / "out.csv", RuleCaptioner(), COLUMNS)
    cache.unlink()

    class Nosy(Scripted):
        def write(self, captions):  # another run while this one writes
            with pytest.raises(MotionRAGError, match="out.csv is being written by another process"):
                caption_table(table, tmp_path / "out.csv", RuleCaptioner(), COLUMNS)
            return super().write(captions)

    caption_table(table, tmp_path / "out.csv", Nosy(ANSWERS), COLUMNS)


# ---------------------------------------------------------------- language model

PROMPT = "tell the motion : {caption}"
TAUGHT = {
    "a man in a red coat juggles three balls": "a person juggles three balls",
    "on a grey road a small white car turns left": "a car turns left",
    "a lake": "Sorry , I cannot tell",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two folders: a model with random weights, and one that was taught three answers."""
    folder = tmp_path_factory.mktemp("llm")
    special = ["<pad>", "<unk>", "</s>"]
    words = " ".join([PROMPT, "user answer", *TAUGHT, *TAUGHT.values()]).replace("{caption}", "").split()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*special, *words]))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}answer :"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=2, bos_token_id=None, **sizes)
    )
    for name in ("random", "taught"):
        if name == "taught":
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            texts = [f"user : {PROMPT.format(caption=c)} answer : {a} </s>" for c, a in TAUGHT.items()]
            batches = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
            for _ in range(40):
                for ids in batches:  # each alone, without padding: batches of unequal length must not matter
                    model(input_ids=ids, labels=ids).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "prompt.txt").write_text(PROMPT)
    return folder


def test_a_random_model_writes_nothing_usable(models, tmp_path):
    captioner = LLMCaptioner(
        str(models / "random"), prompt=models / "prompt.txt", max_new_tokens=40, device="cpu"
    )
    table = save(
        tmp_path / "t.csv", [{"id": f"clip{i}", "caption": caption} for i, caption in enumerate(TAUGHT)]
    )
    with pytest.raises(MotionRAGError, match=r"3 of 3 rows get no motion caption from llm:random.*clip0 \("):
        caption_table(table, tmp_path / "out.csv", captioner, COLUMNS)
    counts = caption_table(table, tmp_path / "out.csv", captioner, COLUMNS, max_bad=1)
    assert [item["clip"] for item in counts["failed"]] == ["clip0", "clip1", "clip2"]
    before = torch.random.get_rng_state()
    first = captioner.write_again("a lake", seed=0)
    captioner.write_again("something else", seed=0)
    assert captioner.write_again("a lake", seed=0) == first != captioner.write_again("a lake", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_from_the_command_line(models, tmp_path, monkeypatch, capsys):
    """A batch of captions of unequal length; one is answered with a refusal."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "t.csv", [{"id": f"clip{i}", "caption": caption} for i, caption in enumerate(TAUGHT)])
    words = ["caption", "table=t.csv", "out=out.parquet", "captioner=llm", f"captioner.model={models}/taught"]
    words += [f"captioner.prompt={models}/prompt.txt", "captioner.device=cpu", "hydra.run.dir=run"]
    assert cli.main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: t.csv: 1 of 3 rows get no motion caption from llm:taught, more than max_bad=0.1"
    )
    assert "clip2 (a refusal)" in error
    assert cli.main([*words, "max_bad=0.4"]) == 0
    out = capsys.readouterr().out
    assert "no motion caption for clip2: a refusal" in out
    assert "2 motion captions by llm:taught (3 captions were known), 0 were there, 1 of 3 rows without" in out
    frame = pd.read_parquet("out.parquet")
    assert list(frame.motion_caption.fillna("")) == [*list(TAUGHT.values())[:2], ""]
    assert list(frame.motion_caption_by.fillna("")) == ["llm:taught", "llm:taught", ""]
    assert json.loads((tmp_path / "run/results.json").read_text())["failed"][0]["clip"] == "clip2"


def test_mistakes_with_models(models, tmp_path):
    with pytest.raises(MotionRAGError, match=r"captioner model '.*nowhere' cannot be loaded \(.*a hub id"):
        LLMCaptioner(str(tmp_path / "nowhere"))
    (tmp_path / "prompt.txt").write_text("tell me")
    with pytest.raises(MotionRAGError, match=r"prompt.txt: the text has no \{caption\}"):
        LLMCaptioner(str(models / "taught"), prompt=tmp_path / "prompt.txt")
    with pytest.raises(MotionRAGError, match="none.txt: no such file"):
        LLMCaptioner(str(models / "taught"), prompt=tmp_path / "none.txt")
    assert "{caption}" in LLMCaptioner(str(models / "taught"), device="cpu").prompt  # the packaged one


def test_the_packaged_prompt_is_in_the_package():
    import motionrag.data

    assert "motion_caption.txt" in os.listdir(os.path.dirname(motionrag.data.__file__))
