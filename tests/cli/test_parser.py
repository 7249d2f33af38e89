"""The command line: what the grammar takes and refuses, what a TARGET means, and that `main` turns every mistake into
one message and a status.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from forkd import __version__
from forkd.cli import main
from forkd.cli.parser import make_parser, parse
from forkd.cli.settings import read_target, settings_of
from forkd.cli.target import run_directory_of
from forkd.compiled import describe
from forkd.config import values
from forkd.errors import ConfigError, UsageError

COMMANDS = [
    "run", "start", "restart", "check", "stop", "reload", "upgrade", "status", "list", "doctor", "clients", "scale",
    "logs", "top", "once", "call", "schema", "completion", "init", "files",
]  # fmt: skip

LISTEN = "listen: [{address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo'}]\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a runtime directory where nothing is, so that no daemon of this machine is meant."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path


def words(text: str) -> list[str]:
    return text.split()


def test_the_options_of_once_are_settings_of_its_mode() -> None:
    text = "once --timeout 5s --from 10.0.0.0/8 --from ::1 --adopt --fd 7 --pid-file /tmp/p --log /tmp/l --listen fd:"
    settings = settings_of(parse(words(text)))
    once = settings.once
    assert (settings.mode, settings.log.to, str(settings.listen[0].address)) == ("once", Path("/tmp/l"), "fd:")
    assert [str(network) for network in once.from_] == ["10.0.0.0/8", "::1/128"]
    assert (once.timeout, once.adopt, once.fd, once.pid_file) == (5.0, True, 7, Path("/tmp/p"))
    assert str(settings_of(parse(words("once --rendezvous tcp://[::1]:9"))).once.rendezvous) == "tcp://[::1]:9"
    assert settings_of(parse(["once"])).once.timeout is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the following arguments are required: COMMAND; see forkd --help"),
        ("stert", "there is no command 'stert'; did you mean 'start'?"),
        ("strat --workers 2", "did you mean 'start'?"),
        ("statsu --json", "did you mean 'status'?"),
        (
            "reboot-all",
            "there is no command 'reboot-all'; there are run, start, restart, check, stop, drain, resume, reload",
        ),
        ("--nonsense", "required: COMMAND"),
        ("start --nonsense", "unrecognized arguments: --nonsense; see forkd --help"),
        ("start --work 2", "unrecognized arguments: --work"),
        ("start --listen-on tcp://127.0.0.1:0", "unrecognized arguments: --listen-on"),
        ("status --js", "unrecognized arguments: --js"),
        ("reload --dif", "unrecognized arguments: --dif"),
        ("reload --workers 2", "unrecognized arguments: --workers"),
        ("upgrade --diff", "unrecognized arguments: --diff"),
        ("stop --no", "unrecognized arguments: --no"),
        ("stop --workers 2", "unrecognized arguments: --workers"),
        ("--vers", "required: COMMAND"),
        ("--vers schema", "unrecognized arguments: --vers"),
        ("start a b", "unrecognized arguments: b"),
        ("start --name", "argument --name: expected one argument; see forkd start --help"),
        ("scale", "the following arguments are required: N; see forkd scale --help"),
        ("clients --kill x", "argument --kill: 'x' is no ID; `forkd clients` shows them; see forkd clients --help"),
        ("clients --kill 0", "'0' is no ID"),
        ("clients --kill 18446744073709551616", "is no ID"),
        ("clients --kill 1 --kill-ip ::1", "not allowed with argument --kill"),
        ("clients --sort -age", "argument --sort: expected one argument"),
        ("scale x", "argument N: 'x' is not a number; see forkd scale --help"),
        ("scale 4 chat", "'chat' is not a number"),
        ("scale -- -1", "'-1' is not a number"),
        ("scale 2.5", "'2.5' is not a number"),
        ("call", "the following arguments are required: ADDRESS; see forkd call --help"),
        ("call unix:@x data --retries -1", "argument --retries: '-1' is not a number"),
        ("scale " + "9" * 5000, "is not a number"),
        ("completion ksh", "invalid choice: 'ksh'"),
        ("schema chat", "unrecognized arguments: chat"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line_with_status_64(
    text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words(text))
    assert said in str(caught.value)
    assert main(words(text)) == os.EX_USAGE == 64
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"forkd: {caught.value}\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_options_cannot_be_abbreviated(command: str) -> None:
    more = {"scale": ["1"], "completion": ["bash"], "files": ["x"], "init": ["x"], "call": ["unix:@x"]}.get(command, [])
    for option in ("--nam=x", "--run-dir=x", "--worker=1", "--jso", "--markd", "--unt=x"):
        with pytest.raises(UsageError, match=f"unrecognized arguments: {option}"):
            parse([command, *more, option])


@pytest.mark.parametrize(
    ("text", "target", "workers", "name"),
    [
        ("scale 4", None, 4, None),
        ("scale chat 4", "chat", 4, None),
        ("scale 4 --name x", None, 4, "x"),
        ("scale --name x 4", None, 4, "x"),
        ("scale --name x chat 4", "chat", 4, "x"),
        ("scale chat 4 --name x", "chat", 4, "x"),
        ("scale chat --name x 4", "chat", 4, "x"),
        ("scale 3 4", "3", 4, None),
    ],
)
def test_scale_takes_its_number_last_and_options_anywhere(
    text: str, target: str | None, workers: int, name: str | None
) -> None:
    found = parse(words(text))
    assert (found.target, found.workers, found.name) == (target, workers, name)


@pytest.mark.parametrize("text", ["start chat --workers 2 --name x", "start --workers 2 chat --name x"])
def test_options_stand_before_or_after_the_target(text: str) -> None:
    found = parse(words(text))
    assert (found.command, found.target, found.workers, found.name) == ("start", "chat", "2", "x")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_told_for_every_command_with_status_0(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*words(command), "--help"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: forkd {command}".rstrip())
    assert err == ""


def test_the_help_names_every_command_and_the_statuses() -> None:
    text = make_parser().format_help()
    assert [command for command in COMMANDS if not re.search(rf"^ +{command}\b", text, re.MULTILINE)] == []
    assert "64 wrong command line, 78 wrong settings" in text


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"forkd {__version__} ({describe()})\n"


def test_arguments_default_to_those_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["forkd", "schema", "--markdown"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("# Settings\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shells_completion_knows_the_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert [command for command in COMMANDS if command not in out] == []


def test_wrong_settings_are_told_one_a_line_with_status_78(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "chat.yaml").write_text(LISTEN + "workers: no\nwokers: 1\n")
    for command in ("check", "start", "run", "restart"):
        assert main([command, "chat.yaml", "--log-level", "loud"]) == os.EX_CONFIG == 78
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "was left alone" not in line]
        assert out == ""
        assert lines == [
            "--log-level: log.level: 'loud' is not one of debug, info, warning, error",
            "chat.yaml:2:10: workers: 'no' is not a whole number",
            "chat.yaml:3:1: wokers: unknown setting; did you mean 'workers'?",
            "forkd: 3 mistakes in the settings",
        ]
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("check nowhere", 64, "there is no 'nowhere': looked for /etc/forkd/nowhere.yaml and etc/forkd/nowhere.yaml"),
        ("check --set x", 64, "--set x: write KEY=VALUE"),
        ("check nowhere.yaml", 78, "nowhere.yaml: can't be read: No such file or directory"),
        ("check --workers 0", 78, "--workers: workers: 0 is not from 1 to 512"),
        ("check --set listen.5.backlog=1", 78, "--set listen.5.backlog=1: there is no listen.5 to set it in"),
        ("check --listen 80", 78, "--listen: listen[0].address: '80' is not an address"),
        ("check --name a/b", 78, "--name: name: 'a/b' is not a name"),
        ("scale 2 --run-directory run", 1, "forkd: echo is not running"),
        ("reload --run-directory run", 1, "forkd: echo is not running"),
        ("reload --diff --run-directory run", 1, "forkd: echo is not running"),
        ("upgrade --run-directory run", 1, "forkd: echo is not running"),
        ("status --run-directory=", 64, "--run-directory"),
        ("stop --run-directory=a\x1bb", 64, "--run-directory"),
        ("stop --name=../../x", 64, "--name"),
    ],
)
def test_a_mistake_is_one_message_on_stderr_and_a_status(
    text: str, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(text)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.splitlines()[-1].startswith("forkd: ")
    assert "Traceback" not in err


def test_handler_that_fails_to_import_is_told_with_a_traceback(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "broken_chat.py").write_text("1 / 0\n")
    text = f"check broken_chat:Chat --listen tcp://127.0.0.1:0 --set python_path=[{here}] --run-directory {here}/run"
    assert main(words(text)) == 78
    lines = capfd.readouterr().err.splitlines()
    assert lines[:2] == ["Traceback (most recent call last):", f'  File "{here}/broken_chat.py", line 1, in <module>']
    assert lines[-1] == "forkd: 1 mistake in the settings"
    assert "listen[0].handler: broken_chat:Chat: importing broken_chat failed: ZeroDivisionError" in lines[-2]


def test_an_interrupt_at_the_keyboard_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("forkd.cli.files.reference_page", interrupted)
    assert main(["schema", "--markdown"]) == 130


def test_target_defaults_to_the_echo() -> None:
    found = settings_of(parse(["run"]))
    assert (found.name, found.listen[0].handler) == ("echo", "forkd.builtin:Echo")
    assert [str(one.address) for one in found.listen] == ["tcp://127.0.0.1:7007"]


def test_a_handler_is_served_on_every_address_that_is_given() -> None:
    text = "run chat.server:Chat --listen unix:@a --listen tcp://[::1]:0 --set listen.backlog=9 --workers auto"
    found = settings_of(parse(words(text)))
    assert [(str(one.address), one.handler, one.backlog) for one in found.listen] == [
        ("unix:@a", "chat.server:Chat", 9),
        ("tcp://[::1]:0", "chat.server:Chat", 9),
    ]
    assert (found.name, found.workers) == ("chat.server.Chat", None)


def test_listeners_of_a_file_get_given_addresses_in_order(here: Path) -> None:
    (here / "chat.yaml").write_text(LISTEN)
    found = settings_of(parse(words("run ./chat.yaml --listen unix:@a --name other --set log.format=json")))
    assert ([str(one.address) for one in found.listen], found.name, found.log.format) == (["unix:@a"], "other", "json")
    with pytest.raises(ConfigError, match=r"^--listen unix:@b: there is no listen\.1 to set it in$"):
        settings_of(parse(words("run ./chat.yaml --listen unix:@a --listen unix:@b")))


@pytest.mark.parametrize(
    ("target", "name"),
    [("chat", "chat"), ("etc/forkd/chat.yaml", "chat"), ("web.1", "web.1"), ("./odd name.yml", "odd.name")],
)
def test_a_files_name_is_the_daemons_name(here: Path, target: str, name: str) -> None:
    (here / "etc" / "forkd").mkdir(parents=True)
    for path in ("etc/forkd/chat.yaml", "etc/forkd/web.1.yaml", "odd name.yml"):
        (here / path).write_text(LISTEN)
    assert read_target(parse(["check", target])).settings.name == name
    assert run_directory_of(parse(["stop", target])).name == name


@pytest.mark.parametrize("target", ["chat:Chat", "chat.server:Chat", "chat.server:Chat.Inner", "a_b.c_d:e"])
def test_the_handler_that_started_a_daemon_finds_it_again(target: str) -> None:
    started = settings_of(parse(["start", target]))
    found = run_directory_of(parse(["stop", target]))
    assert found.name == started.name
    assert found.path.name == started.name


@pytest.mark.parametrize("name", ["chat", "web.1", "a.b.c", "x-1_2"])
def test_the_name_that_a_daemon_was_given_finds_it_again(name: str) -> None:
    started = settings_of(parse(["start", "chat:Chat", "--name", name]))
    assert run_directory_of(parse(["stop", name])).name == started.name == name
    assert run_directory_of(parse(["stop", "--name", name])).name == name


def test_files_whose_letters_are_not_ascii_have_names_of_their_own(here: Path) -> None:
    targets = ["./grün.yaml", "./grön.yaml", "./gr.n.yaml", "./🦊.yaml", "./🐍.yaml", f"./{'x' * 70}.yaml"]
    names = [run_directory_of(parse(["stop", target])).name for target in targets]
    assert len(set(names)) == len(targets)
    assert all(values.NAME.parse(name) for name in names)
    assert names[2] == "gr.n"
    decomposed = unicodedata.normalize("NFD", targets[0])
    assert run_directory_of(parse(["stop", decomposed])).name == names[0]


def broken_settings(path: Path) -> None:
    path.write_text("name: bad name\nworkers: no\n")


def not_yaml(path: Path) -> None:
    path.write_text("a: [\n")


@pytest.mark.parametrize("breaking", [broken_settings, not_yaml, Path.unlink])
def test_daemon_is_found_with_a_broken_or_missing_file(here: Path, breaking: Callable[[Path], None]) -> None:
    path = here / "chat.yaml"
    path.write_text(LISTEN)
    before = run_directory_of(parse(["stop", str(path)]))
    breaking(path)
    after = run_directory_of(parse(["stop", str(path)]))
    assert (after.name, after.path) == (before.name, before.path)


def test_run_directory_of_the_file_yields_to_the_option(here: Path) -> None:
    (here / "chat.yaml").write_text(f"{LISTEN}name: other\nrun_directory: {here}/there\nworkers: no\n")
    found = run_directory_of(parse(["stop", "./chat.yaml"]))
    assert (found.name, found.path) == ("other", here / "there")
    assert run_directory_of(parse(words("stop ./chat.yaml --run-directory x"))).path == here / "x"
