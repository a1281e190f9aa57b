"""The command line: words to overrides, run folders, and one line for every mistake."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from motionrag import cli, provenance
from motionrag.cli.words import overrides_from_words
from motionrag.errors import MotionRAGError

# ---------------------------------------------------------------- fakes


@pytest.fixture
def app(tmp_path, monkeypatch):
    """A config folder with one verb whose ``run`` the test supplies; returns a function that calls main."""
    conf = tmp_path / "conf"
    (conf / "hydra").mkdir(parents=True)
    (conf / "size").mkdir()
    shipped = cli.conf_dir() / "hydra" / "default.yaml"
    (conf / "hydra" / "default.yaml").write_text(shipped.read_text())
    (conf / "retrieve.yaml").write_text(
        "# find things\ndefaults: [{hydra: default}, {size: small}, _self_]\n"
        "prompt: ???\nagain: {text: '${prompt}'}\ndb: null\nk: 9\nseed: 3\nscale: 1.0\n"
        "draw: true\nnested: {rate: 1}\n"
    )
    (conf / "size" / "small.yaml").write_text("width: 1\n")
    (conf / "size" / "large.yaml").write_text("width: 2\n")
    monkeypatch.setattr(cli, "conf_dir", lambda: conf)
    monkeypatch.chdir(tmp_path)
    calls = []

    def main(*words, run=None):
        def record(cfg):
            calls.append(OmegaConf.to_container(cfg))
            return {"summary": "found it", "found": 1} if run is None else run(cfg)

        module = type(sys)("motionrag.cli.retrieve")
        module.run = record
        monkeypatch.setitem(sys.modules, "motionrag.cli.retrieve", module)
        return cli.main(["retrieve", *words])

    main.calls = calls
    return main


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---------------------------------------------------------------- help


def test_help_is_fast_and_light(root, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(root / "src")}
    code = (
        "import sys; from motionrag import cli; print([cli.main([*v, '--help']) for v in {}], *sys.modules)"
    )
    every = [[], *([verb] for verb in cli.VERBS)]
    done = subprocess.run(
        [sys.executable, "-c", code.format(every)], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    (*_, last) = done.stdout.splitlines()
    assert last.startswith(str([0] * len(every))) and "usage: motionrag report" in done.stdout
    assert "motionrag.cli" in last.split()
    assert not set(last.split()) & {"torch", "hydra", "omegaconf", "numpy", "yaml"}

    def seconds() -> float:  # of the CPU: other work on the machine does not count
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = seconds()
    for _ in range(3):
        command = [sys.executable, "-m", "motionrag.cli", "report", "--help"]
        subprocess.run(command, env=env, capture_output=True, check=True)
    assert (seconds() - before) / 3 < 0.5


def test_every_verb_has_config_code_and_help(capsys):
    for verb in cli.VERBS:
        assert (cli.conf_dir() / f"{verb}.yaml").is_file(), verb
        assert (cli.conf_dir().parent / "src/motionrag/cli" / f"{verb}.py").is_file(), verb
        assert cli.main([verb, "--help"]) == 0
        assert f"motionrag {verb}" in capsys.readouterr().out


def test_every_verb_composes_and_keeps_its_runs_in_outputs():
    for verb in cli.VERBS:
        with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
            cfg = compose(verb, return_hydra_config=True)
        assert "outputs/" in OmegaConf.to_container(cfg.hydra.run, resolve=False)["dir"], verb
        assert cfg.hydra.job.chdir is False


def test_help_comes_from_the_config_text(app, capsys):
    assert cli.main(["retrieve", "--help"]) == 0
    text = capsys.readouterr().out
    assert "# find things" in text and "k: 9" in text


def test_version_and_plain_call(capsys):
    assert cli.main([]) == 0
    assert "usage" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("motionrag ")


# ---------------------------------------------------------------- words to overrides


def read_back(*words: str, verb: str = "retrieve") -> dict:
    """What a config with these keys becomes under the words."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(overrides_from_words(verb, list(words)))
    # through OmegaConf, which resolves interpolations
    cfg = OmegaConf.create()
    for override in parsed:
        OmegaConf.update(cfg, override.key_or_group, override.value())
    return OmegaConf.to_container(cfg, resolve=True)


PROMPTS = [
    "a person juggles a ball",
    "red ball, then (slowly) a = b",
    "it's \"quoted\" and it's 'quoted'",
    "[1, 2, 3]",
    "{a: 1}",
    "1,2,3",
    "null",
    "12",
    "true",
    "choice(a, b)",
    "costs ${price} or $5",
    "back\\slash\\",
    "ends with quote'",
    "日本語、змея ♥",
    "two\nlines",
    " spaces around ",
    "E: mc^2 @ 50% & <b> #1 ~ ` | ; !?*",
    "",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_arrive_as_typed(prompt):
    assert read_back("--", prompt) == {"prompt": prompt}
    assert read_back(f"prompt={prompt}") == {"prompt": prompt}


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30))
def test_any_text_arrives_as_typed(prompt):
    assert read_back("--", prompt) == {"prompt": prompt}
    quoted = len(prompt) > 1 and prompt[0] == prompt[-1] and prompt[0] in "'\""
    if not quoted:  # Hydra's own quotes stay Hydra's
        assert read_back(f"prompt={prompt}") == {"prompt": prompt}


def test_words_keep_hydras_grammar():
    assert read_back("k=3", "nested.rate=0.5", "on=true", "list=[1,2]", "prompt='a, b'") == {
        "k": 3,
        "nested": {"rate": 0.5},
        "on": True,
        "list": [1, 2],
        "prompt": "a, b",
    }
    words = ["--cfg", "job", "+new=1", "++new=1", "~old", "~old=1", "-m", "k=1,2,3", "hydra/launcher=basic"]
    # options go last: Hydra's parser wants all overrides in one stretch
    assert overrides_from_words("retrieve", words) == [
        "+new=1",
        "++new=1",
        "~old",
        "~old=1",
        "k=1,2,3",
        "hydra/launcher=basic",
        "--cfg",
        "job",
        "-m",
    ]


def test_paths_with_odd_characters():
    assert read_back("image=my photo (1), copy=2.png", "db=a[1]{2}") == {
        "image": "my photo (1), copy=2.png",
        "db": "a[1]{2}",
    }


def test_report_takes_many_folders():
    assert read_back("a", "b,c (1)", "d'e", verb="report") == {"runs": ["a", "b,c (1)", "d'e"]}


def test_bare_words_where_none_belong(capsys):
    assert cli.main(["pack", "clips.csv"]) == 2
    assert "key=value" in one_line(capsys)
    assert cli.main(["retrieve", "a", "person", "juggles"]) == 2
    assert '"a person juggles"' in one_line(capsys)


def test_dashes_where_none_belong(capsys):
    assert cli.main(["retrieve", "--k=3"]) == 2
    assert "key=value without dashes" in one_line(capsys)


# ---------------------------------------------------------------- runs


def test_run_folder(app, tmp_path, capsys):
    assert app("a ball, (red)", "k=2", "size=large", "hydra.run.dir=here") == 0
    (config,) = app.calls
    assert (config["prompt"], config["k"], config["size"]["width"]) == ("a ball, (red)", 2, 2)
    assert capsys.readouterr().out.strip() == f"retrieve: found it [{os.path.join('here', 'results.json')}]"
    assert json.loads((tmp_path / "here/results.json").read_text())["found"] == 1
    record = json.loads((tmp_path / "here/provenance.json").read_text())
    assert record["argv"] == [
        "motionrag",
        "retrieve",
        "a ball, (red)",
        "k=2",
        "size=large",
        "hydra.run.dir=here",
    ]
    assert record["config"]["k"] == 2 and record["seed"] == 3
    assert {"torch", "motionrag", "lightning"} <= record["versions"].keys()
    assert record["date"] and record["python"] and record["platform"]
    assert OmegaConf.load(tmp_path / "here/config.yaml").prompt == "a ball, (red)"


def test_provenance_is_there_while_the_run_works(app, tmp_path):
    def run(cfg):
        assert (tmp_path / "here/provenance.json").is_file()
        return {"summary": "ok"}

    assert app("x", "hydra.run.dir=here", run=run) == 0


def test_further_processes_can_be_started_with_the_same_line(app):
    lines = []

    def run(cfg):
        lines.append(sys.argv[1:])
        return {"summary": "ok"}

    before = list(sys.argv)
    assert app("a, b", "k=2", run=run) == 0
    (line,) = lines
    assert sys.argv == before
    # what Lightning adds lands behind the overrides and means the same again
    assert cli.main([*line, "hydra.run.dir=again"]) == 0
    assert lines[1] == [*line, "hydra.run.dir=again"]


def test_default_run_folder(app, tmp_path):
    assert app("x") == 0
    (results,) = (tmp_path / "outputs" / "retrieve").glob("*/results.json")


def test_sweep(app, tmp_path):
    assert app("x", "k=1,2", "-m", "hydra.sweep.dir=sweep") == 0
    assert [call["k"] for call in app.calls] == [1, 2]
    assert json.loads((tmp_path / "sweep/k=2/provenance.json").read_text())["config"]["k"] == 2


def test_cfg_job_shows_the_config_and_runs_nothing(app, capsys):
    assert app("x", "k=4", "--cfg", "job") == 0
    assert OmegaConf.create(capsys.readouterr().out).k == 4
    assert not app.calls


def test_cfg_job_resolves_references(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "experiment=smoke", "seed=7", "--cfg", "job"]) == 0
    shown = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    assert shown["seeds"]["noise"] == shown["module"]["seed"] == 7
    assert shown["db"] == "RUN_FOLDER/data/db"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", cli.VERBS)
def test_cfg_job_of_every_verb(verb, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main([verb, "--cfg", "job"]) == 0
    assert "${" not in capsys.readouterr().out


def test_git_state(tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words],
            check=True,
            capture_output=True,
        )

    assert provenance.git_state(tmp_path) is None
    git("init")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-m", "one")
    assert provenance.git_state(tmp_path)["dirty"] is False
    (tmp_path / "f").write_text("2")
    assert provenance.git_state(tmp_path)["dirty"] is True
    (tmp_path / "sub").mkdir()
    assert provenance.git_state(tmp_path / "sub") is None  # somebody else's repository


# ---------------------------------------------------------------- mistakes


def test_unknown_verb(capsys):
    assert cli.main(["retreive"]) == 2
    assert "did you mean 'retrieve'" in one_line(capsys)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("kk=2", "unknown config key 'kk', did you mean 'k'?"),
        ("nested.rat=2", "unknown config key 'nested.rat', did you mean 'nested.rate'?"),
        ("rate=2", "unknown config key 'rate', did you mean 'nested.rate'?"),
        ("size=larg", "unknown size 'larg', did you mean 'large'?; available: large, small"),
        ("size=null", "a group of configs is set to something that is no name"),
        ("db=${nothing}", "nothing"),
        ("k=nine", "k=nine: expected a whole number (motionrag retrieve --help)"),
        ("k=2.5", "k=2.5: expected a whole number"),
        ("k=true", "k=True: expected a whole number"),
        ("k=null", "k=null: expected a whole number"),
        ("nested.rate=null", "nested.rate=null: expected a whole number (motionrag retrieve --help)"),
        ("nested.rate=fast", "nested.rate=fast: expected a whole number"),
        ("draw=null", "draw=null: expected true or false"),
        ("scale=big", "scale=big: expected a number"),
        ("draw=perhaps", "draw=perhaps: expected true or false"),
    ],
)
def test_mistakes_in_overrides(app, capsys, word, expected):
    assert app("x", word) == 2
    assert expected in one_line(capsys)
    assert not app.calls


@pytest.mark.parametrize(
    "word", ["scale=2", "db=null", "draw=false", "~k", "~nested.rate", "~nested", "nested.rate=1"]
)
def test_values_of_the_right_kind(app, word):
    assert app("x", word) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pack table=t videos=v out=o workers=null", "workers=null: expected a whole number"),
        ("pack table=t videos=v out=o max_bad=2", "max_bad=2: expected a share from 0 to 1"),
        ("caption table=t.csv out=o.csv max_bad=-1", "max_bad=-1: expected a share from 0 to 1"),
        (
            "generate image=x prompt=x references=a.mp4",
            "references=a.mp4: expected a list, references=[a.mp4]",
        ),
        ("generate image=x prompt=x out=video", "out=video: expected the name of an mp4 file"),
        ("evaluate shards=s db=d seeds=3", "seeds=3: expected a list, seeds=[3]"),
        ("evaluate shards=s db=d conditions=null", "conditions=null: expected a list"),
        ("pack table=t videos=v out=o short_side=small", "short_side=small: expected at least 16 pixels"),
        ("train shards=s db=d seed=null", "seed=null: expected a whole number"),
        ("train shards=s db=d data.workers=null", "data.workers=null: expected a whole number"),
        ("generate image=x prompt=x seed=null", "seed=null: expected a whole number"),
        ("generate image=x prompt=x guidance=-1", "guidance=-1: expected at least 0"),
        ("evaluate shards=s db=d guidance=-1", "guidance=-1: expected at least 0"),
        ("evaluate clips=a truth=b resamples=-1", "resamples=-1: expected a whole number from 0 on"),
        ("evaluate shards=s db=d save_clips=-1", "save_clips=-1: expected a whole number from 0 on"),
        (
            "evaluate shards=s db=d seeds=[0,x]",
            "seeds=[0, 'x']: expected at least one whole number, each once",
        ),
        ("evaluate shards=s db=d limit=0", "limit=0: expected at least 1 clip, or null for all"),
    ],
)
def test_values_out_of_range(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 2
    assert expected in one_line(capsys)


def test_unknown_choice_in_a_list(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "clips=a", "truth=b", "metrics=[action_scores]"]) == 2
    assert "unknown metrics 'action_scores', did you mean 'action_score'?; available: " in one_line(capsys)


def test_suggestions_know_the_chosen_configs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "image=x", "prompt=x", "backbone=svd_tiny", "backbone.mim_guidance=2"]) == 2
    assert "did you mean 'backbone.min_guidance'?" in one_line(capsys)


def test_missing_value(app, capsys):
    assert app("k=3") == 2
    assert "needs prompt=..." in one_line(capsys)


def test_user_error(app, capsys):
    def run(cfg):
        raise MotionRAGError("database db: k=9 is more\nthan 3 clips")

    assert app("x", run=run) == 2
    assert one_line(capsys) == "error: database db: k=9 is more than 3 clips"


def test_user_error_inside_a_constructor(app, capsys):
    def run(cfg):
        from hydra.utils import instantiate

        return instantiate({"_target_": "tests_cli_target.fail"})

    def fail():
        raise MotionRAGError("weights of another size")

    sys.modules["tests_cli_target"] = type(sys)("tests_cli_target")
    sys.modules["tests_cli_target"].fail = fail
    try:
        assert app("x", run=run) == 2
    finally:
        del sys.modules["tests_cli_target"]
    assert one_line(capsys) == "error: weights of another size"


def test_no_space_left(app, capsys):
    def run(cfg):
        raise OSError(errno.ENOSPC, "No space left on device", "x.npy")

    assert app("x", run=run) == 2
    line = one_line(capsys)
    assert "no space left" in line and "x.npy" in line


def test_interrupt(app, capsys):
    def run(cfg):
        raise KeyboardInterrupt

    assert app("x", run=run) == 130
    assert one_line(capsys) == "error: interrupted"


def test_a_bug_keeps_its_traceback(app):
    def run(cfg):
        return {}["x"]

    with pytest.raises(KeyError):
        app("x", run=run)


def test_real_process(motionrag):
    done = motionrag("report")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().splitlines() == [done.stderr.strip()]
    assert "needs runs=..." in done.stderr
