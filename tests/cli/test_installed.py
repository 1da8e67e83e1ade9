"""A wheel, installed outside the repository: the command, its data files, the presets, and the quickstart."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers.corpus import make_texts
from tests.helpers.runs import ROOT, TINY
from tinytron import __version__

pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("setuptools")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that ``pip install tinytron`` would get, built from a copy of the tracked files; nothing is downloaded."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and (name.startswith("tinytron/") or "/" not in name):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``tinytron`` command of an environment with the wheel, which finds other packages here through a .pth file. An
    editable installation of the checkout, which is such a file itself, is not seen there."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(place), "platbase": str(place)}, scheme="venv")
    command = [sys.executable, "-m", "pip", "--python", paths["scripts"] + "/python", "install", "-q", "--no-deps"]
    # On PYTHONPATH, the checkout may have a tinytron.egg-info, which pip would take for an installed Tinytron.
    apart = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, cwd=place, env=apart)
    assert done.returncode == 0, done.stdout + done.stderr
    ours = sorted({sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")})
    (Path(paths["purelib"]) / "packages.pth").write_text("\n".join(ours) + "\n")
    return Path(paths["scripts"]) / "tinytron"


def call(command: Path, *words: object, cwd: Path) -> str:
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(command), *map(str, words)], cwd=cwd, capture_output=True, text=True, env=variables, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "tinytron").rglob("*.py")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "tinytron/observe/page").rglob("*") if path.is_file()}
    expected.add("tinytron/dispatch/job.sh")
    assert {name for name in names if not name.split("/")[0].endswith(".dist-info")} == expected
    (metadata,) = (name for name in names if name.endswith("/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert f"\nVersion: {__version__}\n" in text
    core = {line.split(": ")[1] for line in text.splitlines() if line.startswith("Requires-Dist: ") and ";" not in line}
    assert core == {"torch>=2.11", "numpy", "tqdm"}
    for extra in ("cut-cross-entropy", "flash-attn", "liger-kernel", "quickstart", "all", "dev"):
        assert f"Provides-Extra: {extra}\n" in text


def test_the_installed_command_runs_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    assert call(installed, "--version", cwd=tmp_path) == f"tinytron {__version__}\n"
    code = "import tinytron; from tinytron.observe.server import PAGE; "
    code += "print(tinytron.__file__, (PAGE / 'index.html').is_file())"
    place, found = call(installed.with_name("python"), "-c", code, cwd=tmp_path).split()
    assert Path(place).is_relative_to(installed.parents[1])
    assert found == "True"
    planned = call(installed, "plan", "--preset", "tiny", "--precision", "fp32", cwd=tmp_path)
    assert "parameters" in planned


@pytest.mark.slow
def test_the_quickstart_runs_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    texts = make_texts(45 * 6, longest=400)
    for number in range(45):
        (tmp_path / "texts" / f"{number}.txt").write_text("\n".join(texts[6 * number : 6 * number + 6]))
    sizes = ("--seq_len", 64, "--block_size", 64, "--total_batch_size", 128, "--max_steps", 2, "--vocab_size", 300)
    own = (*(flag for flag in TINY if flag != "--use_mock_data"), *sizes)
    report = call(installed, "quickstart", "--data", tmp_path / "texts", *own, cwd=tmp_path)
    assert "held-out bytes in bits per byte" in report
    (folder,) = (tmp_path / "log" / "quickstart").iterdir()
    assert (folder / "loss.png").stat().st_size > 1000
    assert call(installed, "watch", "--once", folder, cwd=tmp_path)
