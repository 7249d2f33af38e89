"""What mistakes are answered with: where, what, and what to do, in one line; no traceback and no bare errno."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from forkd.config.values import LOG_TARGET
from tests.support.daemon import Harness, forkd
from tests.support.needs import needs_python_for_all, needs_root

_LISTEN = "listen:\n  - address: tcp://127.0.0.1:0\n    handler: forkd.builtin:Echo\n"

# A settings file, and what is said of it.
SETTINGS = {
    "limits at the top level": (
        "limits: {connections: 3}\n",
        r"limits: unknown setting here; it belongs in an item of listen",
    ),
    "workers in a listener": ("", r"workers: unknown setting here; it belongs at the top level"),
    "log.level at the top level": ("level: info\n", r"level: unknown setting here; it belongs in log"),
    "idle at the top level": ("idle: 5s\n", r"idle: unknown setting here; it belongs in timeouts of an item of listen"),
    "cert in a section": ("log: {cert: /x}\n", r"it belongs in tls of an item of listen or in an item of names of tls"),
    "a merge key of text": ("<<: workers\n", r"<<: expected an alias of settings, as in <<: \*NAME, found 'workers'"),
    "one value for several": ("python_path: /x\n", r"python_path: expected a sequence, found '/x'; write \[/x\]"),
    "an address in a flow mapping": (
        "once: {rendezvous: tcp://[::1]:7007}\n",
        r"not YAML: .*an address with brackets is put in quotes",
    ),
    "stdout as a log": ("log: {to: stdout}\n", r"log.to: 'stdout' is no file to log to; write stderr"),
    "a dash as a log": ("log: {to: '-'}\n", r"log.to: '-' is no file to log to; write stderr"),
    "syslog as a log": (
        "log: {to: syslog}\n",
        r"'syslog' is no file to log to; write stderr, journal, or ./syslog for",
    ),
    "no log": ("log: {to: None}\n", r"log.to: 'None' is no file to log to; write stderr, journal"),
    "/dev/stdout as a log": ("log: {to: /dev/stdout}\n", r"log.to: '/dev/stdout' is no file to log to; write stderr"),
}

# A handler's module, what is named in it, and what is said of it.
HANDLERS = {
    "no async": (
        "def handle(reader, writer): ...",
        "h:handle",
        r"begins with async: async def handle\(reader, writer\)",
    ),
    "constructor arguments": (
        "import asyncio\nclass Shout(asyncio.Protocol):\n    def __init__(self, word): ...",
        "h:Shout",
        r"give what it wants: args: \{word: \.\.\.\}",
    ),
    "an instance": (
        "import asyncio\nclass Shout(asyncio.Protocol): ...\nshout = Shout()",
        "h:shout",
        r"is one object of Shout, and each client needs its own; give the class Shout",
    ),
    "a duck-typed class": (
        "class Shout:\n    def data_received(self, data): ...",
        "h:Shout",
        r"it has a protocol's methods: write class Shout\(asyncio.Protocol\)",
    ),
    "a wrong letter": ("class Shout: ...", "h:Shuot", r"has no attribute 'Shuot' \(/.*/h.py\); did you mean 'Shout'\?"),
    "a file's name": ("class Shout: ...", "h.py:Shout", r"'h.py' is a file's name; write the module's, as in h:"),
}


def checked(directory: Path, *arguments: object) -> str:
    result = forkd("check", *arguments, cwd=directory)
    assert result.returncode in (64, 78), result
    assert "Traceback" not in result.stderr
    assert "Errno" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("case", SETTINGS)
def test_mistake_in_settings_says_what_to_write(tmp_path: Path, case: str) -> None:
    text, wanted = SETTINGS[case]
    (tmp_path / "a.yaml").write_text(text + _LISTEN if text else _LISTEN + "    workers: 2\n")
    assert re.search(wanted, checked(tmp_path, "a.yaml"))


@pytest.mark.parametrize("case", HANDLERS)
def test_mistake_in_a_handler_says_what_to_write(tmp_path: Path, case: str) -> None:
    source, target, wanted = HANDLERS[case]
    (tmp_path / "h.py").write_text(source + "\n")
    assert re.search(wanted, checked(tmp_path, target, "--listen=tcp://127.0.0.1:0"))


# A factory that makes no protocol, and what is logged when a client comes.
FACTORIES = {
    "nothing": (": None", "returned None, not an asyncio.Protocol; end it with return and a new protocol"),
    "a_class": (
        ": asyncio.Protocol",
        r"returned the class Protocol, not .*; write return Protocol\(\), with parentheses",
    ),
    "a_coroutine": (": asyncio.sleep(0)", "returned a coroutine, not an asyncio.Protocol; write def, not async def"),
    "number": (": 7", "returned one object of int, not an asyncio.Protocol"),
}


def test_factory_that_makes_no_protocol_says_what_to_write(harness: Harness) -> None:
    lines = [f"{name} = lambda{made}\n{name}.__qualname__ = {name!r}\n" for name, (made, _) in FACTORIES.items()]
    (harness.directory / "h.py").write_text("import asyncio\n" + "".join(lines))
    listeners = [f"  - {{address: 'tcp://127.0.0.1:0', handler: 'h:{name}'}}\n" for name in FACTORIES]
    (harness.directory / "a.yaml").write_text("listen:\n" + "".join(listeners))
    daemon = harness.daemon(target="a.yaml", workers=1, listen=())
    daemon.expect(*(f"{name} {said}" for name, (_, said) in FACTORIES.items()))
    daemon.start()
    for listener in daemon.status()["listeners"]:
        with contextlib.suppress(ConnectionResetError):
            assert harness.connect(listener["address"]).recv(1) == b""
    daemon.wait_log("number returned")
    assert not any("Traceback" in record for record in daemon.records())
    assert daemon.status()["workers"][0]["errors"] == len(FACTORIES)


def test_datagram_factory_that_makes_no_protocol_is_told(harness: Harness) -> None:
    (harness.directory / "h.py").write_text("def make(): ...\n")
    daemon = harness.daemon(target="h:make", workers=1, listen=("udp://127.0.0.1:0",))
    daemon.expect("h:make: make returned None, not an asyncio.DatagramProtocol; end it with return")
    assert "Traceback" not in daemon.command("start").stderr


def test_handler_that_shadows_the_standard_library_is_told(tmp_path: Path) -> None:
    (tmp_path / "signal.py").write_text("class Shout: ...\n")
    program = "import sys, forkd.cli; sys.path.insert(0, '.'); sys.exit(forkd.cli.main())"  # as the command does
    command = [sys.executable, "-P", "-c", program, "check", "signal:Shout", "--listen=tcp://127.0.0.1:0"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "it is Python's own module, not" in result.stderr
    assert "give that file another name" in result.stderr


@pytest.mark.parametrize("target", ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/2", "second"])
def test_link_to_an_open_file_is_no_log(tmp_path: Path, target: str) -> None:
    (tmp_path / "second").symlink_to("third")
    (tmp_path / "third").symlink_to("/proc/self/fd/1")
    (tmp_path / "log").symlink_to(target)
    for path in (str(tmp_path / "log"), target if target.startswith("/") else str(tmp_path / target)):
        with pytest.raises(ValueError, match=f"^'{path}' is no file to log to; write stderr, journal"):
            LOG_TARGET.parse(path)


def test_message_in_double_quotes_is_as_in_single_ones(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(_LISTEN + '    limits: {over: refuse, message: "full\\r\\n"}\n')
    assert forkd("check", "a.yaml", cwd=tmp_path).returncode == 0


def test_output_that_is_full_is_told_in_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "forkd", "schema"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stderr) == (1, "forkd: No space left on device\n")


def test_run_directory_that_is_too_long_is_told(tmp_path: Path) -> None:
    result = forkd("start", "--listen=tcp://127.0.0.1:0", "--run-directory", tmp_path / ("x" * 120), cwd=tmp_path)
    assert result.returncode == 1
    assert re.search(r"run_directory .* is too long: .* bytes, and 107 is the most\n$", result.stderr)


def test_directory_that_is_gone_is_told_in_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    start = f"{sys.executable} -P -m forkd start --listen=tcp://127.0.0.1:0 --name gone"
    script = f"cd {gone} && rmdir {gone} && exec {start}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert result.returncode == 1
    assert result.stderr.startswith("forkd: there is no current directory: No such file or directory; start from")


def as_user(uid: int, directory: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as another user, with hardly an environment; `directory` may be one that it can't read."""
    needs_python_for_all()
    command = [sys.executable, "-P", "-m", "forkd", *map(str, arguments)]
    plain = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    changed = [*("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"), *command]
    return subprocess.run(changed, cwd=directory, env=plain, capture_output=True, text=True, timeout=60, check=False)


def said_in_one_line(result: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The one line that a command failed with."""
    assert result.returncode == status, result
    assert re.fullmatch(r"forkd: .+\n", result.stderr), result.stderr
    assert "Errno" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("verb", ["start", "once"])
def test_user_without_a_home_is_told_to_set_the_log(open_directory: Path, verb: str) -> None:
    said = said_in_one_line(as_user(54321, open_directory, verb, "--listen=tcp://127.0.0.1:0", TMPDIR="/nowhere"))
    assert said == "forkd: user 54321 has no home directory for the log; set log.to\n"


def test_user_who_may_write_nowhere_is_told_which_directory(open_directory: Path) -> None:
    where = f"--run-directory={open_directory}/run"
    said = said_in_one_line(as_user(54321, open_directory, "run", "--listen=tcp://127.0.0.1:0", where))
    why = f"user 54321 may make nothing in {open_directory}, which is user 0's"
    hint = "set run_directory, or XDG_RUNTIME_DIR, to another"
    assert said == f"forkd: can't make the directory {open_directory}/run: {why}; {hint}\n"


def test_current_directory_that_can_not_be_read_is_told(open_directory: Path) -> None:
    hidden = open_directory / "hidden"
    hidden.mkdir(mode=0o711)
    program = f"import os, sys; os.chdir({str(hidden)!r}); os.chmod('.', 0); os.execv(sys.argv[1], sys.argv[1:])"
    enter = [sys.executable, "-c", program, "/usr/bin/env", f"PYTHONPATH={Path(__file__).parents[2]}"]
    needs_python_for_all()
    changed = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", sys.executable, "-P", "-m", "forkd"]
    for arguments, said in (
        (["check", "h:Handler"], rf"there is no module 'h'.*user 54321 can't read {hidden}"),
        (["check", "nothing"], "there is no 'nothing': looked for .*; user 54321 can't look into etc/forkd"),
        (["stop", "nothing"], ""),
    ):
        result = subprocess.run([*enter, *changed, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert re.search(said, result.stderr), result.stderr
        assert "Traceback" not in result.stderr
        assert "ended the process" not in result.stderr


@pytest.mark.parametrize("verb", ["run", "start", "once", "check"])
def test_missing_proc_is_told_in_one_line(tmp_path: Path, verb: str) -> None:
    needs_root()
    script = 'mount --make-rprivate / && umount -l /proc && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-m", "forkd", verb]
    command += ["--listen=tcp://127.0.0.1:0", f"--set=log.to={tmp_path}/log", "--name=proc"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "there is no /proc (proc(5)), which forkd needs; mount it: mount -t proc" in said_in_one_line(result)


def with_descriptors(most: int, directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a command that may have so many descriptors once its modules are loaded."""
    program = f"""if True:
        import sys, forkd.cli, forkd.cli.lifecycle, forkd.app.once, forkd.serve.handlers, resource
        resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, {most}))
        sys.exit(forkd.cli.main())"""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("verb", ["start", "run", "once"])
def test_lack_of_descriptors_is_told_in_one_line(tmp_path: Path, verb: str) -> None:
    options = ("--listen=tcp://127.0.0.1:0", f"--set=log.to={tmp_path}/log", f"--run-directory={tmp_path}/run")
    for most in (5, 8):
        said = said_in_one_line(with_descriptors(most, tmp_path, verb, *options))
        assert "Too many open files" in said
        assert list(tmp_path.glob("run/*")) == []


def test_restart_without_descriptors_leaves_the_daemon_alone(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).start()
    daemon.expect("process ended: Too many open files")
    pid = daemon.pid
    for most in (5, 8, 10):
        said_in_one_line(with_descriptors(most, harness.directory, "restart", *daemon.identity, *daemon.options))
        assert sorted(file.name for file in daemon.run_directory.iterdir()) == ["control.sock", "pid"]
    assert daemon.pid == pid


def test_package_started_from_inside_it_is_told(tmp_path: Path) -> None:
    package = tmp_path / "chat"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "server.py").write_text("class Chat: ...\n")
    script = f"{sys.executable} -P -m forkd check chat.server:Chat --listen=tcp://127.0.0.1:0"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        ["sh", "-c", f"cd {package} && {script}"], capture_output=True, text=True, check=False, env=environment
    )
    assert f"in {package}, which is the package itself; start from {tmp_path}, or set python_path" in result.stderr


def test_other_process_at_the_control_socket_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir(mode=0o755)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(run / "control.sock"))
        sock.listen()
        options = ("--listen=tcp://127.0.0.1:0", f"--set=log.to={tmp_path}/log", f"--run-directory={run}")
        said = said_in_one_line(forkd("start", *options, cwd=tmp_path))
    assert re.search(rf"control.sock: .*pid {os.getpid()} listens there; end it, or set run_directory to another", said)


@pytest.mark.parametrize(
    ("error", "shown"), [("TypeError('x')", True), ("OSError(9, 'x')", True), ("OSError(28)", False)]
)
def test_traceback_is_for_mistakes_of_forkd_alone(tmp_path: Path, error: str, shown: bool) -> None:
    program = f"""if True:
        import sys, forkd.cli, forkd.cli.files
        def schema(command): raise {error}
        forkd.cli.files.schema = schema
        sys.exit(forkd.cli.main())"""
    result = subprocess.run(
        [sys.executable, "-c", program, "schema"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert ("Traceback" in result.stderr) == shown
    assert shown or result.stderr == "forkd: No space left on device\n"


@pytest.mark.parametrize("verb", ["once", "check", "run"])
def test_command_without_a_current_directory_is_told(tmp_path: Path, verb: str) -> None:
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    command = ["sh", "-c", script, "sh", sys.executable, "-P", "-m", "forkd", verb, "--listen=tcp://127.0.0.1:0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command += [f"--set=log.to={tmp_path}/log", f"--run-directory={tmp_path}/run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    said = said_in_one_line(result)
    assert said == "forkd: there is no current directory: No such file or directory; start from another one\n"


def test_log_that_may_not_be_written_is_told_with_the_setting(open_directory: Path) -> None:
    said = said_in_one_line(as_user(54321, open_directory, "start", "--listen=tcp://127.0.0.1:0", HOME="/nowhere"))
    assert said.endswith("/forkd/echo.log: Permission denied; set log.to to a file that this user may write\n")


def test_help_of_listen_names_datagrams(tmp_path: Path) -> None:
    assert "udp://HOST:PORT" in forkd("start", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    "arguments", [["run", "nowhere.yaml"], ["run", "--set", "wokers=1"], ["reload", "nowhere.yaml"]]
)
def test_error_is_an_error_in_the_journal_too(tmp_path: Path, arguments: list[str]) -> None:
    stream = tmp_path / "stream"
    with stream.open("wb") as stderr:
        found = os.fstat(stderr.fileno())
        environment = {**os.environ, "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        command = [sys.executable, "-m", "forkd", *arguments]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, stderr=stderr, timeout=60, check=False)
    assert ended.returncode
    assert stream.read_text()
    assert [line for line in stream.read_text().splitlines() if not line.startswith("<3>")] == []


ESCAPES = "\x1b]0;owned\x07\x9b31m\r\u202e"


@pytest.mark.parametrize("verb", ["check", "start", "run"])
def test_nothing_that_is_not_ours_controls_the_terminal(tmp_path: Path, verb: str) -> None:
    (tmp_path / "h.py").write_text(f"raise RuntimeError({ESCAPES + chr(0xD800)!r})\n")
    command = ["h:Shout", "--listen=tcp://127.0.0.1:0", "--run-directory", tmp_path / "run", "--set"]
    result = forkd(verb, *command, f"log.to={tmp_path / 'log'}", cwd=tmp_path)
    assert result.returncode != 0
    for said in (result.stdout, result.stderr):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said)
    assert r"\x1b]0;owned\x07\x9b31m" in result.stdout + result.stderr
