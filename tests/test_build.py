"""What an installation has, with a C compiler and without: each from a copy of the checkout, in a fresh environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from forkd import __version__
from forkd.cli.files import DIRECTORIES
from forkd.cli.parser import SHELLS
from forkd.compiled import EXTENSIONS
from tests.support.needs import needs_compiler
from tests.support.paths import CHECKOUT

pytestmark = pytest.mark.xdist_group("build")

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
NO_COMPILER = f"forkd {__version__} (pure Python: it was installed without a C compiler)\n"

#: For a compiler that does not optimize, which takes longer than all the rest: nothing is measured here.
QUICK = {"CFLAGS": "-O0"}

#: A hook of the build backend, by name, and the directory for what it makes.
HOOK = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the checkout, without what was built there."""
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("forkd", *DIRECTORIES):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md"):
        shutil.copy(CHECKOUT / name, copy / name)
    return copy


def build(source: Path, hook: str, **environment: str) -> Path:
    """What a hook of the build backend has made."""
    result = subprocess.run(
        [sys.executable, "-c", HOOK, hook, "dist"],
        cwd=source, env=os.environ | QUICK | environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (made,) = (source / "dist").iterdir()
    return made


class Installation:
    """A fresh virtual environment; what forkd depends on it has of this one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True, timeout=60)
        (self.site,) = directory.glob("lib/python*/site-packages")
        (self.site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def install(self, *what: object, **environment: str) -> None:
        """Installs without network; pip may say nothing."""
        options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
        result = subprocess.run(
            [sys.executable, "-m", "pip", "--python", str(self.directory), "install", *options, *map(str, what)],
            env=os.environ | QUICK | environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert (result.returncode, result.stdout) == (0, ""), result.stderr
        assert "error" not in result.stderr.lower()

    def forkd(self, *arguments: object) -> str:
        """What a command of this installation prints."""
        environment = {name: value for name, value in os.environ.items() if name != "FORKD_PURE"}
        command = [str(self.directory / "bin/forkd"), *map(str, arguments)]
        result = subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        return result.stdout

    def extensions(self) -> list[str]:
        """The extension modules that it has."""
        return sorted(".".join(path.relative_to(self.site).parts) for path in (self.site / "forkd").rglob("*.so"))


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "environment")


def test_source_is_compiled_where_a_compiler_is(source: Path, installation: Installation, tmp_path: Path) -> None:
    needs_compiler()
    installation.install(source)
    assert installation.forkd("--version") == f"forkd {__version__} (compiled)\n"
    assert installation.extensions() == sorted(f"{name}{SUFFIX}" for name in EXTENSIONS)
    assert [path for path in source.glob("forkd/**/*") if path.suffix in (".c", ".so")] == []
    installation.forkd("files", tmp_path / "files")
    for name in DIRECTORIES:
        assert sorted(os.listdir(tmp_path / "files" / name)) == sorted(os.listdir(CHECKOUT / name))
    assert sorted(os.listdir(tmp_path / "files/completions")) == sorted(f"forkd.{shell}" for shell in SHELLS)
    assert "forkd" in installation.forkd("completion", "bash")


def test_source_distribution_needs_no_compiler(source: Path, installation: Installation) -> None:
    sdist = build(source, "build_sdist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"{name.replace('.', '/')}.pyx" for name in EXTENSIONS} | {"setup.py", "etc/forkd/example.yaml"} <= names
    installation.install(sdist, CC="false")
    assert installation.forkd("--version") == NO_COMPILER
    assert installation.extensions() == []
    assert (installation.site / "forkd/_files/completions/forkd.bash").exists()


@pytest.mark.parametrize("with_compiler", [True, False])
def test_editable_installation_compiles_in_place_or_not(
    source: Path, installation: Installation, tmp_path: Path, with_compiler: bool
) -> None:
    if with_compiler:
        needs_compiler()
    environment = {} if with_compiler else {"PATH": str(tmp_path)}  # nothing is there
    installation.install("--editable", source, **environment)
    expected = f"forkd {__version__} (compiled)\n" if with_compiler else NO_COMPILER
    assert installation.forkd("--version") == expected
    built = {path.relative_to(source) for path in source.glob("forkd/**/*.so")}
    assert built == ({Path(*name.split(".")).with_suffix(SUFFIX) for name in EXTENSIONS} if with_compiler else set())
    assert not list(source.glob("forkd/**/*.c"))


@pytest.mark.parametrize("pure", ["0", "1"])
def test_wheel_is_for_this_platform_or_for_all(source: Path, pure: str) -> None:
    needs_compiler()
    (source / "forkd/gone.py").write_text("")
    build(source, "build_wheel", FORKD_PURE="1").unlink()
    (source / "forkd/gone.py").unlink()
    wheel = build(source, "build_wheel", FORKD_PURE=pure)
    platform = sysconfig.get_platform().replace("-", "_")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name == f"forkd_server-{__version__}-" + (
        "py3-none-any.whl" if pure == "1" else f"{tag}-{tag}-{platform}.whl"
    )
    names = zipfile.ZipFile(wheel).namelist()
    assert "forkd/gone.py" not in names  # what an earlier build had
    assert {"forkd/py.typed", "forkd/_files/systemd/forkd@.service"} <= set(names)
    assert "forkd/master/admin/page.html" in names
    assert [name for name in names if name.endswith((".pyx", ".c")) or name.startswith("tests")] == []
    assert sum(name.endswith(".so") for name in names) == (0 if pure == "1" else len(EXTENSIONS))
