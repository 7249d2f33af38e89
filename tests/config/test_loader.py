"""Reading settings: every mistake at once and in its place, what the command line overrides, and that no file, however
broken or hostile, brings anything but settings or a ConfigError.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forkd.config.loader import MAX_FILE_SIZE, SettingOverride, load_settings, read_settings
from forkd.config.settings import Settings
from forkd.errors import ConfigError

Read = Callable[..., Settings]

LISTEN = "listen: [{address: 'tcp://127.0.0.1:0', handler: 'a:b'}]\n"


def override(key: str, value: str) -> SettingOverride:
    return SettingOverride(key, value, f"--set {key}={value}")


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def mistakes(path: Path | None, *overrides: SettingOverride) -> list[str]:
    """What is wrong, each without the file's name but with line and column."""
    with pytest.raises(ConfigError) as caught:
        load_settings(path, overrides)
    assert caught.value.status == os.EX_CONFIG
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return [str(problem).removeprefix(f"{path}:").strip() for problem in caught.value.problems]


@pytest.fixture
def wrong(tmp_path: Path) -> Callable[..., list[str]]:
    """The mistakes in a text."""
    return lambda text, *overrides: mistakes(write(tmp_path / "f.yaml", text), *overrides)


@pytest.fixture
def right(tmp_path: Path) -> Read:
    """The settings in a text."""
    return lambda text, *overrides: load_settings(write(tmp_path / "f.yaml", text), overrides)


PLANTED = """\
name: bad name
wokers: 4
workers: no
listen:
  - address: 127.0.0.1:80
    handler: chat.server
  - handler: a:b
    backlog: 22:22
  - address: tcp://127.0.0.1:0
    handler: a:b
    mode: 0660
    limits: {write_buffer: 64K, wirte_buffer: 1}
  - nonsense
workers: 4
boot_timeout: 30
drain_timeout: [30s]
log:
  level: !!python/name:os.system info
  to:
python_path: /srv
[a, b]: c
"""

FOUND = """\
1:7: name: 'bad name' is not a name; write up to 64 letters, digits, dots, dashes and underscores
2:1: wokers: unknown setting; did you mean 'workers'?
3:10: workers: 'no' is not a whole number
5:14: listen[0].address: '127.0.0.1:80' has no scheme; did you mean tcp://127.0.0.1:80?
6:14: listen[0].handler: 'chat.server' is not a handler; write module:attribute, as in chat.server:ChatProtocol
7:5: listen[1].address: is missing; where to listen: tcp://HOST:PORT, udp://HOST:PORT, unix:/path, \
unix:@name, unix-dgram: likewise, or fd:NAME (systemd's)
8:14: listen[1].backlog: '22:22' is not a whole number
11:11: listen[2].mode: means a unix socket's path, and tcp://127.0.0.1:0 has none
12:28: listen[2].limits.write_buffer: '64K' is not a size; write a number with B, KB, MB, GB, KiB, MiB, GiB, as in 64KiB
12:33: wirte_buffer: unknown setting; did you mean 'write_buffer'?
13:5: listen[3]: expected settings as `key: value`, found 'nonsense'
14:1: workers: given twice; the first is at FILE:3:1
15:15: boot_timeout: '30' has no unit; did you mean 30s?
16:16: drain_timeout: expected a duration, found a sequence
18:10: log.level: tags such as tag:yaml.org,2002:python/name:os.system have no meaning here
19:6: log.to: has no value; expected a path or journal or stderr
20:14: python_path: expected a sequence, found '/srv'; write [/srv]
21:1: a sequence: unknown setting; there are name, mode, workers, listen, setup, teardown
"""


def test_mistakes_are_found_at_once_with_line_and_column(wrong: Callable[..., list[str]], tmp_path: Path) -> None:
    found = wrong(PLANTED)
    expected = FOUND.replace("FILE", str(tmp_path / "f.yaml")).splitlines()
    assert [line.partition(", python_path")[0] for line in found] == expected


def test_wrong_value_has_its_default_in_what_could_be_read(tmp_path: Path) -> None:
    loaded = read_settings(write(tmp_path / "f.yaml", LISTEN + "workers: no\nboot_timeout: 5s\n"), (), {"name": "f"})
    assert [str(problem) for problem in loaded.problems] == [
        f"{tmp_path / 'f.yaml'}:2:10: workers: 'no' is not a whole number"
    ]
    assert (loaded.settings.name, loaded.settings.workers, loaded.settings.boot_timeout) == ("f", None, 5.0)


def test_problem_added_later_is_told_in_its_place(tmp_path: Path) -> None:
    loaded = read_settings(write(tmp_path / "f.yaml", LISTEN))
    loaded.add_problem("is not there", "listen", 0, "handler")
    loaded.add_problem("is not given", "listen", 0, "mode")
    assert [str(problem) for problem in loaded.problems] == [
        f"{tmp_path / 'f.yaml'}:1:50: listen[0].handler: is not there",
        "listen[0].mode: listen[0].mode: is not given",
    ]


def test_a_wrong_name_is_not_taken_for_the_default_daemons(tmp_path: Path) -> None:
    """Else `forkd stop` of a daemon whose file was broken since would stop another one."""
    loaded = read_settings(write(tmp_path / "chat.yaml", LISTEN + "name: bad name\n"), (), {"name": "chat"})
    assert len(loaded.problems) == 1
    assert loaded.settings.name == "chat"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["listen: is missing; the listeners, each with its own handler"]),
        ("# a comment\n", ["listen: is missing; the listeners, each with its own handler"]),
        ("{}", ["1:1: listen: is missing; the listeners, each with its own handler"]),
        ("listen: []\n", ["1:9: listen: is empty; a daemon needs a listener"]),
        ("- a\n- b\n", ["1:1: expected settings as `key: value`, found a sequence"]),
        ("just a word\n", ["1:1: expected settings as `key: value`, found 'just a word'"]),
        (
            "log:\n\tlevel: info\n",
            ["2:1: not YAML: found character '\\t' that cannot start any token; YAML is indented by"],
        ),
        ("a: b\n---\nc: d\n", ["2:1: not YAML: but found another document"]),
        ("a: [b\n", ["2:1: not YAML: expected ',' or ']', but got '<stream end>'"]),
        ("a: *b\n", ["1:4: not YAML: found undefined alias 'b'"]),
        (b"name: \xff\n", ["not YAML: unacceptable character #x00ff: invalid start byte"]),
        (b"name: \x07\n", ["not YAML: unacceptable character #x0007: special characters are not allowed"]),
        ("a: " + "[" * 200_000 + "]" * 200_000, ["is nested too deeply"]),
        ("a: " + "[" * 200_000, ["is nested too deeply"]),
        ("{a: " * 200_000, ["is nested too deeply"]),
        ("- " * 200_000, ["is nested too deeply"]),
        (b"#" * (10 << 20), [f"is over {MAX_FILE_SIZE} bytes, which no settings file needs"]),
        (LISTEN + "log:\n", ["2:5: log: expected settings as `key: value`, found nothing"]),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, str | bytes) else "",
)
@pytest.mark.timeout(100)
def test_a_file_that_holds_no_settings_is_told_in_one_sentence(
    wrong: Callable[..., list[str]], text: str | bytes, said: list[str]
) -> None:
    found = wrong(text)
    assert [line[: len(sentence)] for line, sentence in zip(found, said, strict=False)] == said
    assert len(found) == len(said), found


def test_a_file_that_cannot_be_read_is_told_in_one_sentence(tmp_path: Path) -> None:
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    assert mistakes(tmp_path / "none.yaml") == ["can't be read: No such file or directory"]
    assert mistakes(tmp_path) == ["can't be read: Is a directory"]
    assert mistakes(loop) == ["can't be read: Too many levels of symbolic links"]
    os.mkfifo(tmp_path / "pipe.yaml")
    assert mistakes(tmp_path / "pipe.yaml") == ["is a named pipe; name a file"]


def test_settings_are_read_from_a_pipe_of_a_shell() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"wokers: 1\n")
    os.close(writer)
    try:
        assert any("wokers" in one for one in mistakes(Path(f"/dev/fd/{reader}")))
    finally:
        os.close(reader)


def test_a_scalar_is_read_from_the_text_that_was_written(right: Read) -> None:
    found = right("listen: [{address: 'unix:/x', handler: a:b, mode: 0660, owner: 0123}]\nname: 10.50\n")
    assert (found.listen[0].mode, found.listen[0].owner, found.name) == (0o660, "0123", "10.50")


@pytest.mark.parametrize(
    "text",
    [
        "--- !!python/object:os.system\n" + LISTEN,
        LISTEN.replace("[", "!!python/tuple [", 1),
        LISTEN + "log: !!python/object/new:os.system {level: info}\n",
        LISTEN + "!!python/name:os.system name: x\n",
        LISTEN + "name: !!binary eA==\n",
        LISTEN + "name: !x y\n",
    ],
)
def test_a_tag_is_refused_wherever_it_stands(wrong: Callable[..., list[str]], text: str) -> None:
    assert ["have no meaning here" in line for line in wrong(text)] == [True]


@pytest.mark.parametrize(
    "text",
    [
        "listen: &x [*x]\n",
        LISTEN + "log: &x {level: *x}\n",
        LISTEN + "log: &x {log: *x}\n",
        LISTEN + "python_path: &x [*x]\n",
        "&x {listen: *x}\n",
        LISTEN + "x-a: &x {<<: *x}\n",
        LISTEN + "x-a: &x {b: {<<: [*x]}}\n",
    ],
)
def test_an_alias_of_itself_is_a_mistake_and_no_endless_loop(wrong: Callable[..., list[str]], text: str) -> None:
    assert wrong(text)
    assert wrong(text, override("listen.limits.write_buffer", "1"), override("log.format", "text"))


def test_an_alias_means_what_its_anchor_stands_for(right: Read) -> None:
    found = right("listen: [{address: 'tcp://127.0.0.1:0', handler: &h a:b}, {address: 'unix:@x', handler: *h}]\n")
    assert [listener.handler for listener in found.listen] == ["a:b", "a:b"]


MERGED = """\
x-limits: &limits {connections: 3, per_ip: 2}
x-listener: &listener
  handler: a:b
  backlog: 9
  limits: *limits
x-anything: [!!python/object:os.system 1, {y: 2}]
listen:
  - {<<: *listener, address: 'tcp://127.0.0.1:1'}
  - {address: 'tcp://127.0.0.1:2', backlog: 7, <<: [*listener, {backlog: 5, kind: streams}]}
  - {address: 'tcp://127.0.0.1:3', handler: a:c, limits: {<<: *limits, per_worker: 1, connections: 8}}
"""


def test_merge_keys_bring_in_what_is_not_given_itself(right: Read) -> None:
    one, two, three = right(MERGED).listen
    assert (one.handler, one.backlog, one.limits.connections, one.limits.per_ip) == ("a:b", 9, 3, 2)
    assert (two.handler, two.backlog, two.kind, two.limits) == ("a:b", 7, "streams", one.limits)
    assert (three.handler, three.limits.connections, three.limits.per_ip, three.limits.per_worker) == ("a:c", 8, 2, 1)


def test_an_override_of_one_alias_leaves_the_others(right: Read) -> None:
    found = right(MERGED, override("listen.0.limits.connections", "4"))
    assert [listener.limits.connections for listener in found.listen] == [4, 3, 8]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<<: 3\n", "<<: expected an alias of settings, as in <<: *NAME, found '3'"),
        ("<<: [{workers: 2}, x]\n", "<<: expected an alias of settings, as in <<: *NAME, found 'x'"),
        ("<<: {wokers: 2}\n", "wokers: unknown setting; did you mean 'workers'?"),
        ("log: {x-level: info}\n", "x-level: unknown setting here; it belongs at the top level"),
    ],
)
def test_merge_keys_and_ignored_keys_that_are_wrong(wrong: Callable[..., list[str]], text: str, said: str) -> None:
    assert any(said in one for one in wrong(text + LISTEN)), wrong(text + LISTEN)


@pytest.mark.timeout(100)
def test_merges_that_multiply_are_read_in_bounded_time(wrong: Callable[..., list[str]]) -> None:
    many = "".join(f", k{number}: 1" for number in range(1500))
    assert wrong(f"x-a: &a {{a: 1{many}}}\nx-b: [" + "{<<: *a}, " * 8000 + f"1]\n{LISTEN}")


LAUGHS = "".join(f"  - &a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]\n" for n in range(1, 12))


@pytest.mark.timeout(100)
def test_aliases_that_multiply_are_read_in_bounded_time(wrong: Callable[..., list[str]]) -> None:
    assert wrong(f"listen:\n  - &a0 [x]\n{LAUGHS}", override("listen.limits.write_buffer", "1"))


TWO = """\
listen:
  - {address: 'tcp://127.0.0.1:0', handler: a:b}
  - {address: 'unix:@x', handler: a:b, backlog: 7}
"""


@pytest.mark.parametrize(
    ("key", "value", "get", "expected"),
    [
        ("workers", "3", lambda s: s.workers, 3),
        ("log.level", "debug", lambda s: s.log.level, "debug"),
        ("python_path", "/x", lambda s: s.python_path, (Path("/x"),)),
        ("listen.0.allow", "10.0.0.0/8", lambda s: list(map(str, s.listen[0].allow)), ["10.0.0.0/8"]),
        ("listen.backlog", "128", lambda s: [one.backlog for one in s.listen], [128, 128]),
        ("listen.0.backlog", "128", lambda s: [one.backlog for one in s.listen], [128, 7]),
        ("listen.1.backlog", "128", lambda s: [one.backlog for one in s.listen], [4096, 128]),
        ("listen.limits.write_buffer", "1KiB", lambda s: [one.limits.write_buffer for one in s.listen], [1024, 1024]),
        ("python_path", "[/a, /b]", lambda s: s.python_path, (Path("/a"), Path("/b"))),
        ("python_path", "[]", lambda s: s.python_path, ()),
    ],
)
def test_an_override_sets_what_its_key_names(
    right: Read, key: str, value: str, get: Callable[[Settings], object], expected: object
) -> None:
    assert get(right(TWO, override(key, value))) == expected


def test_override_that_comes_last_holds_and_repairs_the_file(right: Read) -> None:
    found = right(TWO + "workers: no\nworkers: 0\n", override("workers", "zero"), override("workers", "5"))
    assert found.workers == 5


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("listen.5.backlog", "1", "there is no listen.5 to set it in"),
        ("listen.².backlog", "1", "²: unknown setting; there are address, handler"),
        ("nonsense.x", "1", "nonsense: unknown setting; there are name, mode, workers, listen"),
        ("wokers", "1", "wokers: unknown setting; did you mean 'workers'?"),
        ("log.levle", "info", "levle: unknown setting; did you mean 'level'?"),
        ("listen.levle", "info", "levle: unknown setting; there are address, handler"),
        ("workers", "", "workers: has no value; expected a whole number or auto"),
        ("workers", "no", "workers: 'no' is not a whole number"),
        ("log", "info", "log: expected settings as `key: value`, found 'info'"),
        ("name", "[a]", "name: expected a name, found a sequence"),
        ("name.x", "1", ""),
        ("listen.0.handler.x", "1", ""),
        ("python_path.0", "/x", ""),
        ("name", "x:²", "name: 'x:²' is not a name"),
        ("name", "x:" + "9" * 5000, "name: 'x:999"),
    ],
)
def test_wrong_override_is_told_with_its_option(
    wrong: Callable[..., list[str]], key: str, value: str, said: str
) -> None:
    found = wrong(TWO + "name: x\npython_path: [/a]\n", override(key, value))
    assert found
    assert all(line.startswith(f"--set {key}={value}: {said}") for line in found)


IN_BRACES = "[{address: 'tcp://[::1]:0', command: [sh, -c, \"echo a, b\"]}, {address: 'unix:@x', handler: a:b}]"


def test_override_may_hold_what_a_file_has_in_braces_and_quotes() -> None:
    message, limits = (
        ("listen.0.limits.message", '{"error": "busy"}'),
        ("listen.limits", "{connections: 3, per_worker: 2}"),
    )
    arguments = ("listen.1.args", '{one: "1", two: [2, "b, c"]}'), ("listen.1.args.three", "['x', 3]")
    given = [("listen", IN_BRACES), limits, message, *arguments, ("python_path", "['/a, b', /c]")]
    found = load_settings(None, [override(*one) for one in given], {"name": "given"})
    first, second = found.listen
    assert (str(first.address), first.command, str(second.address)) == (
        "tcp://[::1]:0",
        ("sh", "-c", "echo a, b"),
        "unix:@x",
    )
    assert [(one.limits.connections, one.limits.per_worker) for one in found.listen] == [(3, 2), (3, 2)]
    assert first.limits.message == '{"error": "busy"}'
    assert second.args == {"one": "1", "two": [2, "b, c"], "three": ["x", 3]}
    assert found.python_path == (Path("/a, b"), Path("/c"))


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("listen.1.args.x", "{name}", "{name}"),
        ("listen.1.args.x", '{"a": 1}', '{"a": 1}'),
        ("listen.1.args.x", " [a, b] ", " [a, b] "),
        ("listen.1.args.x", "[a, {b}]", ["a", "{b}"]),
        ("listen.0.command", "[awk, {print $1}]", ("awk", "{print $1}")),
        ("listen.0.command", "[find, -exec, rm, {}, ;]", ("find", "-exec", "rm", "{}", ";")),
        ("listen.0.command", "{a,b}", ("{a,b}",)),
        ("listen.0.command", " ['a, b', \"c\"] ", ("a, b", "c")),
        ("listen.0.limits.message", '["full"]', '["full"]'),
        ("listen.0.environment.X", "{'a': [1]}", "{'a': [1]}"),
        ("listen.1.allow", "[::1, 10.0.0.0/8]", (ip_network("::1"), ip_network("10.0.0.0/8"))),
        ("listen.1.allow", "['::1', 10.0.0.0/8]", (ip_network("::1"), ip_network("10.0.0.0/8"))),
    ],
)
def test_override_is_text_where_no_mapping_can_be(key: str, value: str, wanted: object) -> None:
    listen = IN_BRACES.replace("unix:@x", "tcp://127.0.0.1:0")
    found: Any = load_settings(None, [override("listen", listen), override(key, value)])
    for part in key.split("."):
        found = (
            found[int(part)] if part.isdecimal() else found[part] if isinstance(found, dict) else getattr(found, part)
        )
    assert found == wanted


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("listen.limits", "{connections: 3, per: 4}", "per: unknown setting; did you mean 'per_ip'?"),
        (
            "python_path",
            "['/a]",
            "not YAML: found unexpected end of stream; put each value that has more than letters in",
        ),
        ("listen.1.allow", "[::1, '10.0.0.0/8']", "not YAML: expected the node content, but found ':'; put each value"),
        ("listen", "[{handler: 'a:b}]", "not YAML: found unexpected end of stream"),
        ("python_path", "[&a [*a], 'x']", "python_path[0]: expected a path, found a sequence"),
        ("python_path", "[" * 5000 + "'x'" + "]" * 5000, "is nested too deeply"),
        (
            "listen",
            "[{address: tcp://[::1]:0}]",
            "not YAML: expected ',' or '}', but got '['; within braces an address",
        ),
        ("workers", "{a: 1}", "workers: '{a: 1}' is not a whole number"),
    ],
)
def test_override_in_braces_that_is_wrong_is_told(key: str, value: str, said: str) -> None:
    found = mistakes(None, override("listen", IN_BRACES), override(key, value))
    assert [line for line in found if not line.startswith(f"--set {key}={value}: {said}")] == []
    assert found


def test_settings_from_the_command_line_alone_need_no_file() -> None:
    listen = SettingOverride("listen", [{"address": "unix:@x", "handler": "a:b"}], "a:b")
    found = load_settings(None, [listen, override("listen.backlog", "9")], {"name": "given"})
    assert (found.name, str(found.listen[0].address), found.listen[0].backlog) == ("given", "unix:@x", 9)
    assert mistakes(None) == ["settings: listen: is missing; the listeners, each with its own handler"]
    assert mistakes(None, SettingOverride("listen", [{"address": "80", "handler": "a:b"}], "--listen 80")) == [
        "--listen 80: listen[0].address: '80' is not an address; write "
        "tcp://HOST:PORT or udp://HOST:PORT (an IPv6 host in brackets), unix:/path or unix:@name, the same after "
        "unix-dgram:, or fd:NAME (systemd's)"
    ]


def test_text_in_brackets_is_a_sequence_as_a_whole_value_alone() -> None:
    listen = SettingOverride("listen", [{"address": "[::1]", "handler": "[a:b]"}], "--listen [::1]")
    assert [line.partition(";")[0] for line in mistakes(None, listen)] == [
        "--listen [::1]: listen[0].address: '[::1]' is not an address",
        "--listen [::1]: listen[0].handler: '[a:b]' is not a handler",
    ]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8080", "unix:/tmp/x", "unix:@x"])
def test_listeners_on_one_address_are_a_mistake_at_the_second(wrong: Callable[..., list[str]], address: str) -> None:
    one = f"  - {{address: '{address}', handler: a:b}}\n"
    other = one.replace("x'", "y'").replace("8080", "8081")
    assert wrong(f"listen:\n{one}{other}{one}") == [
        f"4:15: listen[2].address: {address} is the address of listen[0] already"
    ]


def test_two_listeners_on_any_free_port_are_no_mistake(right: Read) -> None:
    found = right(TWO.replace("unix:@x", "tcp://127.0.0.1:0"))
    assert [str(one.address) for one in found.listen] == ["tcp://127.0.0.1:0"] * 2


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "unix:@x"])
def test_file_options_are_for_a_unix_sockets_path_alone(
    wrong: Callable[..., list[str]], right: Read, address: str
) -> None:
    text = f"listen:\n  - address: {address!r}\n    handler: a:b\n    mode: 0600\n    owner: root\n    group: '0'\n"
    has_none = f"means a unix socket's path, and {address} has none"
    assert wrong(text) == [
        f"4:11: listen[0].mode: {has_none}",
        f"5:12: listen[0].owner: {has_none}",
        f"6:12: listen[0].group: {has_none}",
    ]
    found = right(text.replace(address, "unix:/tmp/x")).listen[0]
    assert (found.mode, found.owner, found.group) == (0o600, "root", "0")


WORDS = re.findall(r"\S+", "name workers listen log level limits address handler a:b unix:/x 0 ~x/y 30s ... --- ? <<")
MARKS = re.findall(r"\S+", "[ ] { } &a *a ! !!str ' \" \\ | > # %YAML \\UFFFFFFFF %FF @ `")
PIECES = st.sampled_from([*WORDS, *MARKS, ": ", ":\n", "\n", "\n  ", "\n- ", ", ", " ", "\t", "\x85", "\u2028"])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "f.yaml"


@settings(deadline=None)
@given(text=st.one_of(st.text(), st.binary(), st.lists(PIECES, max_size=40).map("".join)))
@example(text='name: "\\UFFFFFFFF"\n')
@example(text="%YAML 1." + "9" * 5000 + "\n--- {}\n")
@example(text=LISTEN + "log: {to: ~no-such-user-here/x}\n")
@example(text=LISTEN.replace("'a:b'", "'a:b', limits: {write_buffer: " + "9" * 400 + "}"))
@example(text=b"\xff\xfe" + LISTEN.encode("utf-16-le"))
def test_any_file_brings_settings_or_a_config_error(scratch: Path, text: str | bytes) -> None:
    write(scratch, text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    changes = [override("listen.limits.write_buffer", "1"), override("log.level", "info")]
    for overrides in ([], changes):
        try:
            found = load_settings(scratch, overrides)
        except ConfigError as error:
            assert error.problems  # noqa: PT017 (either outcome is right)
        else:
            assert found.listen


@settings(deadline=None)
@given(key=st.text(), value=st.text())
def test_any_override_brings_settings_or_a_config_error(scratch: Path, key: str, value: str) -> None:
    write(scratch, TWO)
    try:
        found = load_settings(scratch, [override(key, value)])
    except ConfigError as error:
        assert error.problems  # noqa: PT017 (either outcome is right)
    else:
        assert found.listen
