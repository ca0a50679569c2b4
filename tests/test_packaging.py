import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent


def built(folder: Path, project: str) -> Path:
    """The wheel of a project, built from the files that git knows, so that nothing left in the checkout slips in."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        source, copy = CHECKOUT / name, folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(os.readlink(source))
        else:
            copy.write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), project]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Of patchad."""
    return built(tmp_path_factory.mktemp("wheel"), ".")


@pytest.fixture(scope="module")
def runtime_wheel(tmp_path_factory) -> Path:
    """Of patchad-runtime."""
    return built(tmp_path_factory.mktemp("runtime"), "./runtime")


def test_the_wheel_holds_callbacks_configs_and_the_published_split(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    callbacks = {f"patchad/callbacks/{path.name}" for path in (CHECKOUT / "callbacks").glob("*.*")}
    configs = {f"patchad/{path.relative_to(CHECKOUT)}" for path in (CHECKOUT / "configs").rglob("*.yaml")}
    assert callbacks | configs | {"patchad/data/differnet_train_761.txt", "patchad/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "callbacks/", "configs/"))]


@pytest.mark.slow
def test_the_installed_wheel_runs_the_quickstart_outside_the_checkout(wheel, tmp_path):
    site, folder = tmp_path / "site", tmp_path / "elsewhere"
    folder.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    counts = [f"--data.layout.{part}=4" for part in ("train", "test_normal", "test_defective")]
    small = [*counts, "--data.image_size=[96,96]"]
    program = "import patchad.callbacks as c, patchad.__main__ as m; print(c.__file__); m.main()"
    run = [sys.executable, "-c", program, "fit", "--config", "quickstart", *small]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    finished = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert (folder / "runs/version_0/checkpoints/last.ckpt").is_file()
    assert finished.stdout.startswith(str(site))


def test_the_runtime_holds_what_scoring_imports_and_nothing_else(runtime_wheel):
    program = "import sys; from patchad.__main__ import command; command(['score']); print(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = set(finished.stdout.split())
    assert not imported & {"torch", "lightning_fabric", "pytorch_lightning", "scipy", "jaxtyping", "faiss"}
    names = zipfile.ZipFile(runtime_wheel).namelist()
    held = {name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in names if ".py" in name}
    assert held == {name for name in imported if name.partition(".")[0] == "patchad"}


def test_both_distributions_are_of_one_version_and_fit_together(wheel, runtime_wheel, tmp_path):
    """Whichever is installed last, the files are the same."""
    whole, part = zipfile.ZipFile(wheel), zipfile.ZipFile(runtime_wheel)
    shared = [name for name in part.namelist() if name.startswith("patchad/")]
    assert all(part.read(name) == whole.read(name) for name in shared)
    site = tmp_path / "site"
    target = ["--no-deps", "--no-index", "--quiet", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *target, wheel, runtime_wheel], check=True)
    program = "import patchad, importlib.metadata as m; print(m.version('patchad'), m.version('patchad-runtime'))"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=site)
    version = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    assert told.stdout.split() == [version, version], told.stderr
    needed = re.findall("^Requires-Dist: ([a-z]+)", part.read(metadata_of(part)).decode(), re.M)
    assert sorted(needed) == ["numpy", "onnxruntime", "openvino", "pillow"]
    assert "Requires-Dist: openvino; extra ==" in part.read(metadata_of(part)).decode()


def metadata_of(archive: zipfile.ZipFile) -> str:
    """The name of a wheel's metadata."""
    return next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))


def test_every_dependency_has_its_reason_beside_it():
    lines = (CHECKOUT / "pyproject.toml").read_text().splitlines()
    project = tomllib.loads("\n".join(lines))["project"]
    listed = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    for requirement in listed:
        assert any(f'"{requirement}",' in line and "#" in line.split('",')[1] for line in lines), requirement


def test_no_module_is_collected_twice(capsys):
    folders = [str(CHECKOUT / name) for name in ("patchad", "callbacks")]
    options = ["--collect-only", "-q", "--override-ini=addopts=--doctest-modules", f"--rootdir={CHECKOUT}"]
    assert pytest.main([*options, *folders]) == pytest.ExitCode.OK
    collected = capsys.readouterr().out.splitlines()
    assert not [line for line in collected if line.startswith("patchad/callbacks/")]
    assert len(collected) == len(set(collected))
