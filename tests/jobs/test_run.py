"""``tinytron configure``, ``run``, ``checkpoints`` and ``restore``: as a user types them, also again and after failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, losses
from tests.jobs.conftest import TINY
from tinytron.cli.main import COMMANDS, main
from tinytron.cli.run import read_spec, run_stages
from tinytron.errors import CheckpointError, TinytronError
from tinytron.job import JobSpec
from tinytron.jobs.specs import read_stages
from tinytron.registry import load_module
from tinytron.utils.signals import STOP_SIGNALS

GPT = "gpt/train/pretrain"


def _tinytron(*words: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NPROC": str(processes), "NUM_GPUS": "0"}
    command = [sys.executable, "-m", "tinytron", *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)


def _folder(name: str) -> Path:
    return Path("out/checkpoints/general/default") / name


def _run_folder(name: str) -> Path:
    (found,) = [path for path in _folder(name).glob(f"{name}_????????") if path.is_dir()]
    return found


def test_train_continue_on_more_processes_and_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configure", GPT, "run.yaml", *TINY, "ckpt.save_every_steps=1", "train.do_val=true"]) == 0
    words = ("run", "mine", "run.yaml", "out")
    first = _tinytron(*words)
    assert first.returncode == 0, first.stderr
    assert "step 3 | saved" in first.stdout
    pointers = {name: (_folder("mine") / name).read_text() for name in ("latest", "best", "final")}
    assert pointers["latest"] == pointers["final"] == f"{_run_folder('mine').name}/00003_model.pt\n"
    assert (_folder("mine") / pointers["best"].strip()).is_file()
    log = losses((_run_folder("mine") / "log.txt").read_text())

    again = _tinytron(*words)
    assert again.stdout == f"mine is finished: {_folder('mine')}\n"
    more = _tinytron(*words, "train.max_steps=4", processes=2)
    assert more.returncode == 0, more.stderr
    assert "2 x cpu" in more.stdout
    assert "resuming after step 3" in more.stdout

    listed = _tinytron("checkpoints", "mine", "out").stdout
    assert "00004_model.pt  (latest" in listed
    back = _tinytron("restore", "mine", 1, "out")
    assert back.returncode == 0, back.stderr
    assert "later checkpoints are in" in back.stdout
    assert "resuming after step 1" in back.stdout
    after = losses((_run_folder("mine") / "log.txt").read_text())
    assert after[2] == log[2]
    assert "latest" in _tinytron("checkpoints", "mine", "out").stdout


@pytest.mark.slow
def test_weights_of_another_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["configure", GPT, "run.yaml", *TINY])
    assert _tinytron("run", "one", "run.yaml", "out", "-p", "ours").returncode == 0
    second = _tinytron("run", "two", "run.yaml", "out", "-g", "tuned", "--restore", "ours/default/one/final")
    assert second.returncode == 0, second.stderr
    (config,) = Path("out/checkpoints/general/tuned/two").glob("*/config.json")
    assert json.loads(config.read_text())["config"]["ckpt"]["init_from"].endswith("00003_model.pt")
    missing = _tinytron("run", "three", "run.yaml", "out", "--restore", "nobody")
    assert (missing.returncode, missing.stderr) == (
        2,
        "error: there is no job nobody; there are general/default/three, general/tuned/two, ours/default/one\n",
    )


def test_stages_are_restartable(module: str) -> None:
    """The first one is not done again after the second one has failed; overrides reach every stage that has the option."""
    common = ["--load", module]
    assert main(["configure", "say/text", "first.yaml", *common, "say.text=a"]) == 0
    assert main(["configure", "say/text", "second.yaml", *common, "say.text=b", "say.fail_once=please"]) == 0
    words = ("run", "pipe", "first.yaml", "out", "-s", "second.yaml", *common)
    failed = _tinytron(*words)
    assert failed.returncode == 3
    assert failed.stdout.splitlines() == [
        "stage 0 of 1: pipe_stage0 (say/text)",
        "said a",
        "stage 1 of 1: pipe_stage1 (say/text)",
    ]
    done = _tinytron(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"pipe_stage0 is finished: {_folder('pipe_stage0')}",
        "stage 1 of 1: pipe_stage1 (say/text)",
        "said b",
    ]
    other = _tinytron(*words, "say.text=c")
    assert [line for line in other.stdout.splitlines() if "said" in line] == ["said c", "said c"]


@pytest.mark.slow
def test_own_options_reach_the_trainer_and_its_identity(module: str) -> None:
    assert main(["configure", "my_model/train/pretrain", "run.yaml", "--load", module, *TINY]) == 0
    assert "my_loss_weight: 0.1  # weight of my loss" in Path("run.yaml").read_text()
    finished = _tinytron("run", "mine", "run.yaml", "out", "--load", module, "training.my_loss_weight=0.5")
    assert finished.returncode == 0, finished.stderr
    assert "weight 0.5" in finished.stdout
    description = json.loads((_run_folder("mine") / "config.json").read_text())
    assert description["config"]["own"] == {"training_my_loss_weight": 0.5}
    again = read_stages("mine", ["run.yaml"], "out", ["training.my_loss_weight=0.6"], load=[module])
    load_module(module)
    assert again[0].fingerprint != JobSpec.from_json((_folder("mine") / "job.json").read_text()).fingerprint


def test_configure_takes_over_what_fits(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["configure", GPT, "one.yaml", "model.hidden_size=96", "train.max_steps=9"])
    text = Path("one.yaml").read_text() + "\nsomething:\n  else: 1\n"
    Path("one.yaml").write_text(text)
    capsys.readouterr()
    words = ["configure", "my_model/train/pretrain", "two.yaml", "-p", "one.yaml", "--load", module]
    assert main([*words, "train.max_steps=8", "--chip", "h100", "-n", "8"]) == 0
    assert "left out, because my_model/train/pretrain has no such option: something.else" in capsys.readouterr().out
    written = Path("two.yaml").read_text()
    assert '\nrequest: {"chip": "h100", "min_chips": 8, "n_shards": 1}\n' in written
    assert "  hidden_size: 96 " in written
    assert "  max_steps: 8 " in written


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "mine", "none.yaml", "out"), "none.yaml cannot be read"),
        (("run", "a/b", "run.yaml", "out"), "name 'a/b' must be letters"),
        (("run", "mine", "run.yaml", "out", "-p", ".."), "project '..' must be letters"),
        (("run", "mine", "run.yaml", "out", "-s", "later.yaml"), "later.yaml cannot be read"),
        (
            ("run", "mine", "run.yaml", "out", "-j", "say/text"),
            "run.yaml is for the job gpt/train/pretrain, not for say/text",
        ),
        (("run", "mine", "nameless.yaml", "out"), "nameless.yaml does not say which job it is for"),
        (("run", "mine", "unknown.yaml", "out"), "there is no job gpt/train/pretrian; did you mean gpt/train/pretrain"),
        (("run", "mine", "run.yaml", "out", "model.hiden_size=8"), "there is no option model.hiden_size; did you mean"),
        (("run", "mine", "run.yaml", "out", "model.hidden_size=17"), "--hidden_size 17"),
        (("run", "mine", "run.yaml", "out", "--speed", "9"), "unknown argument --speed"),
        (("run", "mine", "required.yaml", "out"), "required.yaml: say.text is required by say/text"),
        (("configure", "gpt/train/pretrian", "x.yaml"), "did you mean gpt/train/pretrain"),
        (("configure", GPT, "x.yaml", "train.max_steps=many"), "train.max_steps=many must be a whole number"),
        (("configure", GPT, "run.yaml/x.yaml"), "cannot be written"),
        (("checkpoints", "mine", "out"), "has no checkpoint latest; it has saved none yet"),
        (("restore", "mine", "latest", "out"), "contains no job that was run"),
        (("restore", "../..", "latest", "out"), "name '../..' must be letters"),
        (("checkpoints", "mine", "out", "-g", ".."), "group '..' must be letters"),
        (("configure", GPT, "run.yaml", "train.max_steps=9"), "run.yaml already exists with other options"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(
    module: str, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["configure", GPT, "run.yaml", *TINY])
    main(["configure", "say/text", "required.yaml", "--load", module])
    Path("nameless.yaml").write_text("train:\n  max_steps: 1\n")
    Path("unknown.yaml").write_text("job: gpt/train/pretrian\n")
    capsys.readouterr()
    assert main(list(words)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert not Path("out").exists()


def test_every_command_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("jobs", "configure", "run", "checkpoints", "restore"):
        assert name in COMMANDS
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert f"usage: tinytron {name}" in capsys.readouterr().out


def test_a_job_without_checkpoints_cannot_go_back(module: str) -> None:
    load_module(module)
    main(["configure", "say/text", "run.yaml", "--load", module, "say.text=a"])
    assert main(["run", "mine", "run.yaml", "out", "--load", module]) == 0
    (spec,) = read_stages("mine", ["run.yaml"], "out", load=[module])
    from tinytron.jobs.kinds import job_class

    with pytest.raises(TinytronError, match="the job say/text has no checkpoints to go back to"):
        job_class(spec.job)(spec).go_back_to("latest")


def test_configure_keeps_a_file_that_was_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["configure", GPT, "run.yaml"]
    assert main([*words, "train.max_steps=9"]) == 0
    assert main([*words, "train.max_steps=9"]) == 0  # the same again changes nothing
    assert main(words) == 2
    assert "  max_steps: 9 " in Path("run.yaml").read_text()
    assert main([*words, "-p", "run.yaml", "train.seq_len=64"]) == 0
    assert "  max_steps: 9 " in Path("run.yaml").read_text()
    assert "  seq_len: 64 " in Path("run.yaml").read_text()


def test_a_job_that_is_running_is_left_alone(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["configure", "say/text", "run.yaml", "--load", module, "say.text=a"])
    words = ["run", "mine", "run.yaml", "out", "--load", module]
    assert main(words) == 0
    before = (_folder("mine") / "job.json").read_bytes()
    hold = "import sys; from tinytron.utils.lock import *; file = lock_folder(Path(sys.argv[1]), ''); "
    hold += "print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(_folder("mine"))]
    pipe = subprocess.PIPE
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        capsys.readouterr()
        assert main([*words, "say.text=b"]) == 2
        assert f"is in use by process {other.pid}" in capsys.readouterr().err
        assert main(["restore", "mine", "latest", "out"]) == 2
        assert "stop it first" in capsys.readouterr().err
        other.communicate("\n")
    assert (_folder("mine") / "job.json").read_bytes() == before
    assert main([*words, "say.text=b"]) == 0


def test_restore_reads_what_was_run(module: str) -> None:
    """Also in a folder that was moved since, and with options that are newer than the file."""
    main(["configure", "say/text", "run.yaml", "--load", module, "say.text=a"])
    assert main(["run", "mine", "run.yaml", "out", "--load", module]) == 0
    Path("out").rename("moved")
    file = Path("moved/checkpoints/general/default/mine/job.json")
    content = json.loads(file.read_text())
    del content["values"]["say.fail_once"]
    file.write_text(json.dumps(content))
    spec = read_spec(JobSpec("", "mine", "moved", {}))
    assert (spec.folder, dict(spec.values)) == (file.parent, {"say.text": "a", "say.fail_once": ""})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"load": 3}', '{"load": [], "job": 3, "name": "m", "root": "out"}'])
def test_a_damaged_description_is_one_line(tmp_path: Path, text: str) -> None:
    place = JobSpec("", "mine", str(tmp_path), {})
    place.folder.mkdir(parents=True)
    (place.folder / "job.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"job\.json is damaged; repeat the tinytron run command"):
        read_spec(place)


@pytest.mark.parametrize(
    ("stage", "number", "status", "says"),
    [
        ("signal.signal(signal.SIGTERM, lambda *_: os._exit(0))", signal.SIGTERM, 0, ""),
        ("signal.signal(signal.SIGTERM, lambda *_: (finish(), os._exit(0)))", signal.SIGTERM, 0, ""),
        ("signal.signal(signal.SIGINT, lambda *_: os._exit(130))", signal.SIGINT, 130, ""),
        ("signal.signal(signal.SIGINT, lambda *_: (finish(), os._exit(0)))", signal.SIGINT, 130, ""),
        ("pass", signal.SIGTERM, 143, "pipe_stage0 was stopped by SIGTERM\n"),
        (
            "signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), 9))",
            signal.SIGTERM,
            137,
            "error: pipe_stage0 was killed by SIGKILL (out of memory?)\n",
        ),
    ],
)
@pytest.mark.sample(2)
def test_a_signal_ends_the_stage_and_those_after_it(
    module: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    number: signal.Signals,
    status: int,
    says: str,
) -> None:
    """The signal reaches only the command, as from a scheduler; the stage ends as it likes, or is even finished."""
    for name in ("first", "second"):
        main(["configure", "say/text", f"{name}.yaml", "--load", module, f"say.text={name}"])
    load_module(module)
    specs = read_stages("pipe", ["first.yaml", "second.yaml"], "out", load=[module])
    marker, done = specs[0].folder / "done.json", json.dumps({"fingerprint": specs[0].fingerprint})
    code = f"import os, signal\ndef finish(): open({str(marker)!r}, 'w').write({done!r})\n{stage}\n"
    code += f"os.kill(os.getppid(), {int(number)})\nsignal.pause()\n"
    started = []
    popen = subprocess.Popen

    def start_stage(words: list[str]) -> subprocess.Popen[bytes]:
        started.append(words[-1])
        return popen([sys.executable, "-c", code])

    monkeypatch.setattr(subprocess, "Popen", start_stage)
    handlers = [signal.getsignal(each) for each in STOP_SIGNALS]
    capsys.readouterr()
    assert run_stages(specs) == status
    assert capsys.readouterr().err == says
    assert started == [str(specs[0].folder / "job.json")]
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == handlers
