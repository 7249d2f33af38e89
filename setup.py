"""Builds what pyproject.toml can't declare: the compiled twin of the hot path, and the files that `forkd files` writes.

The extensions are compiled where a C compiler and Python's headers are, and left out where not, or where FORKD_PURE is
set: then the wheel is one for every platform. FORKD_SANITIZE=1 compiles them for the tests of `make sanitize`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from forkd.compiled import EXTENSIONS, PURE, stamp  # noqa: E402 (found from now on)

#: Directories that `forkd files` writes; a wheel has them below forkd/_files.
DATA = ("systemd", "etc/forkd")

#: Whether to compile with C's assertions and AddressSanitizer.
SANITIZE = os.environ.get("FORKD_SANITIZE", "0") not in ("", "0")


class BuildPy(build_py):
    """Puts units, example files and the shells' completions into a wheel; in an editable installation they are found
    in the checkout, and completions are made when they are wanted.
    """

    def run(self) -> None:
        """Starts from nothing: setuptools would pack what an earlier build has left, though its source is gone."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "forkd"), ignore_errors=True)
        super().run()
        if not self.editable_mode:
            self._add_files(Path(self.build_lib, "forkd", "_files"))

    def _add_files(self, directory: Path) -> None:
        import shtab  # noqa: PLC0415 (only a wheel needs it)

        from forkd.cli.parser import SHELLS, make_parser  # noqa: PLC0415

        for name in DATA:
            shutil.copytree(ROOT / name, directory / name)
        completions = directory / "completions"
        completions.mkdir()
        for shell in SHELLS:
            (completions / f"forkd.{shell}").write_text(shtab.complete(make_parser(), shell=shell))


class BuildExt(build_ext):
    """Compiles always, as file times say nothing of the version; what Cython makes of the sources stays in build/."""

    def initialize_options(self) -> None:
        """Sets options that the command line may override."""
        super().initialize_options()
        self.force = True
        self.cython_c_in_temp = True


def why_pure() -> str:
    """Why nothing is compiled; empty where it can be."""
    if os.environ.get(PURE, "0") not in ("", "0"):
        return f"{PURE} is set"
    try:
        import Cython  # noqa: PLC0415
    except ImportError:
        return "there is no Cython"
    if int(Cython.__version__.split(".")[0]) < 3:
        return f"Cython is older than 3: {Cython.__version__}"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    command = [*compiler, "-fsyntax-only", "-I", sysconfig.get_path("include"), "-x", "c", "-"]
    try:
        tried = subprocess.run(command, input=b"#include <Python.h>\n", capture_output=True, check=False)
    except OSError:
        return f"there is no C compiler ({compiler[0]})"
    return "" if tried.returncode == 0 else f"{compiler[0]} finds no headers of Python, or none of C"


def extensions() -> list[Extension]:
    """What is to be compiled."""
    if reason := why_pure():
        print(f"forkd: the hot path is not compiled but runs in Python: {reason}")
        return []
    found = []
    for name in EXTENSIONS:
        source = Path(*name.split(".")).with_suffix(".pyx")
        found.append(
            Extension(
                name,
                [str(source)],
                define_macros=[("FORKD_SOURCE", f'"{stamp(ROOT / source)}"')],
                extra_compile_args=["-O1", "-g", "-UNDEBUG", "-fsanitize=address"] if SANITIZE else ["-g0"],
                extra_link_args=["-fsanitize=address"] if SANITIZE else [],
                optional=True,
            )
        )
    return found


setup(ext_modules=extensions(), cmdclass={"build_py": BuildPy, "build_ext": BuildExt})
