"""What imports what: the package's rows, the two sides that never meet, and what a process never loads. And what a
package says of its modules.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

import forkd
from forkd.compiled import EXTENSIONS

ROOT = Path(forkd.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
#: The parts, lowest first. A module imports its own part and lower ones; `master` and `serve` are in one row.
ROWS = [
    ["errors", "signals", "states", "messages", "compiled"],
    ["config"],
    ["system"],
    ["worker"],
    ["builtin", "client", "drain", "ended", "framing", "metrics", "rdp"],
    ["master", "serve"],
    ["app"],
    ["cli"],
]
WORDS = {"errors", "signals", "states", "messages"}
#: The same for the parts of `serve`: what accepts knows nothing of what serves, and `worker` and `once` wire both.
SERVE_ROWS = [
    ["deadlines", "import_paths", "loop"],
    ["handlers", "lingering"],
    ["accept"],
    ["stream"],
    ["datagram"],
    ["queries", "handler_forks", "hooks"],
    ["once", "worker"],
    ["boot"],
]
SERVE = [module for module in MODULES if module.startswith("forkd.serve.")]


def imports(path: Path) -> Iterator[str]:
    """Every module of forkd that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "forkd")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            if node.module == "forkd":
                yield from (f"forkd.{alias.name}" for alias in node.names if f"forkd.{alias.name}" in MODULES)
            elif (node.module or "").startswith("forkd."):
                yield str(node.module)


def part(module: str, level: int = 1) -> str:
    return module.split(".")[level]


def row(module: str) -> int:
    return next(number for number, parts in enumerate(ROWS) if part(module) in parts)


def serve_row(module: str) -> int:
    return next(number for number, parts in enumerate(SERVE_ROWS) if part(module, 2) in parts)


def loaded(program: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after a program, and did not have before it."""
    before = "import json, sys; before = set(sys.modules)\n"
    after = "\nprint(json.dumps(sorted(set(sys.modules) - before)), file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", before + program + after], capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(result.stderr))


def test_every_module_belongs_to_a_row() -> None:
    of_rows = {one for parts in ROWS for one in parts}
    assert {part(module) for module in MODULES if "." in module} - {"__main__"} == of_rows


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name and name != "forkd.__main__"])
def test_module_imports_only_its_own_part_and_lower_rows(module: str) -> None:
    strays = [
        found
        for found in imports(MODULES[module])
        if part(found) != part(module) and row(found) >= row(module) and not {part(found), part(module)} <= WORDS
    ]
    assert strays == []


def test_every_serve_module_belongs_to_a_row() -> None:
    of_rows = {one for parts in SERVE_ROWS for one in parts}
    assert {part(module, 2) for module in SERVE} == of_rows


@pytest.mark.parametrize("module", SERVE)
def test_serve_module_imports_only_its_own_part_and_lower_rows(module: str) -> None:
    strays = [
        found
        for found in imports(MODULES[module])
        if found in SERVE and part(found, 2) != part(module, 2) and serve_row(found) >= serve_row(module)
    ]
    assert strays == []


def test_modules_import_each_other_in_no_circle() -> None:
    wanted = {module: set(imports(path)) & set(MODULES) for module, path in MODULES.items()}
    while free := [module for module, needs in wanted.items() if not needs & set(wanted)]:
        for module in free:
            del wanted[module]
    assert wanted == {}


@pytest.mark.parametrize(("side", "other"), [("master", "serve"), ("serve", "master")])
def test_master_and_serve_never_meet(side: str, other: str) -> None:
    modules = [module for module in MODULES if module.startswith(f"forkd.{side}.")]
    assert modules
    found = loaded("\n".join(f"import {module}" for module in modules))
    assert f"forkd.{side}" in found
    assert [module for module in found if module.startswith((f"forkd.{other}", "forkd.app", "forkd.cli"))] == []


def test_master_loads_neither_asyncio_nor_ssl_nor_a_handler() -> None:
    found = loaded("import forkd.master.master")
    assert "forkd.master.master" in found
    assert found & {"asyncio", "ssl", "_ssl", "forkd.builtin", "multiprocessing"} == set()


def test_daemon_loads_no_asyncio_before_a_worker_is_forked() -> None:
    found = loaded("import forkd.app.daemon, forkd.app.check")
    assert found & {"asyncio", "ssl"} == set()


def test_drain_query_loads_no_asyncio() -> None:
    found = loaded("import forkd.drain; assert not forkd.drain.draining()")
    assert "forkd.drain" in found
    assert "asyncio" not in found


def test_blocking_client_loads_no_asyncio_and_no_daemon() -> None:
    found = loaded("import forkd.client")
    own = {name for name in found if name.startswith("forkd.") and part(name) != "client"}
    assert own == {"forkd.config", "forkd.config.address"}
    assert found & {"asyncio", "ssl", "_ssl", "yaml"} == set()


def test_blocking_rdp_client_loads_no_asyncio() -> None:
    found = loaded("from forkd.rdp import GaveUp, RdpClient")
    assert "forkd.rdp.client" in found
    assert [module for module in found if module.startswith(("asyncio", "ssl", "forkd.config", "forkd.system"))] == []


@pytest.mark.parametrize("arguments", [["--help"], ["start", "--help"], ["--version"], ["stert"]])
def test_help_loads_no_yaml_and_nothing_of_the_daemon(arguments: list[str]) -> None:
    program = (
        f"import contextlib\nfrom forkd.cli import main\nwith contextlib.suppress(SystemExit): main({arguments!r})"
    )
    found = loaded(f"import os; sys.stderr, kept = open(os.devnull, 'w'), sys.stderr\n{program}\nsys.stderr = kept")
    assert "forkd.cli.parser" in found
    heavy = ("yaml", "asyncio", "ssl", "daemon", "forkd.app", "forkd.master", "forkd.serve", "forkd.system")
    extensions = {name for one in EXTENSIONS for name in (one, one.rpartition(".")[0], "forkd.serve")}
    assert [module for module in found - extensions if module.startswith(heavy)] == []


def test_grammar_loads_only_what_the_command_that_is_given_needs() -> None:
    found = loaded(
        "from forkd.cli.parser import parse; assert parse(['start', '--workers', '2', 'chat']).workers == '2'"
    )
    assert "forkd.cli.parser" in found
    assert found & {"difflib", "shutil", "forkd.compiled", "forkd.cli.target"} == set()


@pytest.mark.parametrize("module", ["control", "status", "clients", "daemons"])
def test_command_about_a_running_daemon_loads_no_settings(module: str) -> None:
    """A command is a process of its own, and most of its time goes into imports."""
    found = loaded(f"import forkd.cli.{module}")
    assert f"forkd.cli.{module}" in found
    heavy = {"asyncio", "ssl", "yaml", "hashlib", "logging", "setproctitle", "difflib", "unicodedata", "dataclasses"}
    assert found & heavy == set()
    own = {one for one in found if one.startswith("forkd.")}
    assert [one for one in own if one.startswith(("forkd.master", "forkd.serve", "forkd.app"))] == []
    read = {f"forkd.config.{name}" for name in ("address", "units", "values")}
    assert {one for one in own if one.startswith("forkd.config.")} <= read


def test_call_loads_the_client_and_nothing_of_a_daemon() -> None:
    found = loaded("import forkd.cli.call")
    assert {one for one in found if one.startswith("forkd.") and part(one) not in ("cli", "signals", "errors")} == {
        "forkd.client", "forkd.client.blocking", "forkd.config", "forkd.config.address", "forkd.config.units",
    }  # fmt: skip
    assert found & {"asyncio", "ssl", "json", "pathlib", "dataclasses"} == set()


def test_interpreter_ends_without_a_search_through_what_was_imported() -> None:
    """It is a fifth of what a command takes."""
    program = """
    import atexit, contextlib, gc
    atexit.register(lambda: print(gc.get_freeze_count() > 1000))  # the first that is registered is the last that runs
    from forkd.cli import main
    with contextlib.suppress(SystemExit):
        main(["--version"])
    """
    command = [sys.executable, "-c", dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "True"


def test_command_that_is_given_a_file_reads_its_settings_only() -> None:
    program = """
    import argparse
    from forkd.cli.target import wanted_daemon
    command = argparse.Namespace(target="./nowhere.yaml", name=None, run_directory=None)
    assert wanted_daemon(command).name == "nowhere"
    """
    found = loaded(dedent(program))
    assert {"yaml", "forkd.config.loader"} <= found
    assert [one for one in found if one.startswith(("forkd.master", "forkd.serve", "forkd.app"))] == []


def test_start_loads_nothing_that_serves() -> None:
    found = loaded("import forkd.cli.lifecycle")
    assert "forkd.app.daemon" in found
    assert [one for one in found if one.startswith(("asyncio", "ssl", "forkd.app.once", "forkd.serve.stream"))] == []


def test_once_loads_neither_a_master_nor_what_makes_a_daemon() -> None:
    found = loaded("import forkd.cli.once")
    assert "forkd.serve.once.server" in found
    heavy = ("daemon", "forkd.master", "forkd.serve.worker", "forkd.app.daemon", "forkd.serve.once.rendezvous")
    assert [module for module in found if module.startswith(heavy)] == []


def test_user_code_is_imported_by_one_module_only() -> None:
    """`cli.parser`, `cli.files`, `compiled` and `rdp` import forkd's own modules and shtab late, by names they have."""
    text = {module: path.read_text() for module, path in MODULES.items()}
    late = {module for module, source in text.items() if "import_module" in source or "__import__" in source}
    assert late == {"forkd.serve.handlers", "forkd.cli.parser", "forkd.cli.files", "forkd.compiled", "forkd.rdp"}


def test_fork_is_called_in_known_modules_only() -> None:
    found = {module for module, path in MODULES.items() if "os.fork(" in path.read_text()}
    assert found <= {"forkd.master.spawn", "forkd.app.detach", "forkd.app.check", "forkd.app.daemon"}
    assert "forkd.master.spawn" in found


@pytest.mark.parametrize("package", [name for name, path in MODULES.items() if path.name == "__init__.py"][1:])
def test_package_docstring_names_every_module(package: str) -> None:
    """A newcomer reads a package by its docstring, which has `name` in such quotes, or `name: ` at a line's begin."""
    text = ast.get_docstring(ast.parse(MODULES[package].read_text())) or ""
    named = {name or other for name, other in re.findall(r"`(\w+)`|^(\w+): ", text, re.MULTILINE)}
    children = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == package}
    assert children <= named
