"""The metrics of a running daemon: how they are written, that they are true, and that no counter ever goes back."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import ssl
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from prometheus_client.openmetrics.parser import text_fd_to_metric_families as openmetrics_families
from prometheus_client.parser import text_fd_to_metric_families

from forkd.master.admin.exposition import encoder_for
from forkd.master.admin.metrics import FAMILIES
from tests.support.admin import ask, service_of
from tests.support.certificates import Authority
from tests.support.changing_daemon import Changing
from tests.support.clients import dial, echoes, unshared_port
from tests.support.daemon import Daemon, Harness
from tests.support.needs import needs_program
from tests.support.paths import CHECKOUT
from tests.support.processes import eventually

ADMIN = "admin.address=tcp://127.0.0.1:0"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def metrics(where: Daemon | str) -> Values:
    """What a daemon tells, by name and labels."""
    text = io.StringIO(ask(where, "/metrics").body)
    samples = [one for family in text_fd_to_metric_families(text) for one in family.samples]
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for one in samples}


def sum_of(values: Values, name: str, **labels: str) -> float:
    return sum(value for (one, has), value in values.items() if one == name and labels.items() <= dict(has).items())


def test_metrics_are_in_order_and_of_both_forms(harness: Harness) -> None:
    needs_program("promtool")
    daemon = harness.daemon(settings=(ADMIN,)).start()
    plain = ask(daemon, "/metrics")
    assert plain.headers["Content-Type"].startswith("text/plain; version=")
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=plain.body, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    other = ask(daemon, "/metrics", accept=OPENMETRICS)
    assert other.headers["Content-Type"].startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics_families(io.StringIO(other.body))}  # type: ignore[no-untyped-call]
    assert set(FAMILIES) - names == {
        "forkd_certificate_expiry_timestamp_seconds",
        "forkd_listener_connections_limit",
    }


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        ("application/openmetrics-text", True),
        ('application/OpenMetrics-text ; q=0.5; version="1.0.0"', True),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=1.0.0;q=0.4", True),
        ("application/openmetrics-text; version=1.0.0; q=0", False),
        ("application/openmetrics-text; version=0.0.1", False),
        ("application/openmetrics-text; version=abc", False),
        ("application/openmetrics-text; version=\xe9\r\nX: y", False),
        ("text/plain; version=1.0.x; escaping=;", False),
        (";;=,", False),
        ("", False),
    ],
)
def test_form_of_metrics_is_one_of_two_whatever_is_accepted(accept: str, is_openmetrics: bool) -> None:
    encode, content_type = encoder_for(accept)
    other = "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert content_type == (other if is_openmetrics else "text/plain; version=0.0.4; charset=utf-8")
    assert encode([]).endswith(b"# EOF\n") == is_openmetrics


def test_master_outlives_what_clients_accept(harness: Harness) -> None:
    daemon = harness.daemon(settings=(ADMIN,)).start()
    for accept in (
        "application/openmetrics-text; version=abc",
        "text/plain; version=x",
        "application/openmetrics-text;",
    ):
        assert ask(daemon, "/metrics", accept=accept).status == 200
    assert ask(daemon, "http://localhost/metrics?x=/").status == 200


def test_limit_of_each_worker_is_one_of_the_listener(harness: Harness) -> None:
    daemon = harness.daemon(settings=(ADMIN, "listen.limits.per_worker=5"), workers=3).start()
    assert sum_of(metrics(daemon), "forkd_listener_connections_limit", listener=daemon.address) == 15


def test_metrics_tell_what_there_is(harness: Harness) -> None:
    address = "tcp://127.0.0.1:0"
    limited = {"address": address, "handler": "says:Says", "limits": {"connections": 2, "over": "refuse"}}
    site = Changing(harness, listen=[limited], admin={"address": address})
    daemon = site.daemon.start()
    clients = [site.greet()[0] for _ in range(2)]
    with dial(daemon.address) as third:
        assert third.recv(1) == b""
    eventually(lambda: sum_of(metrics(daemon), "forkd_refusals_total"), what="a refusal that is counted")
    found = metrics(daemon)
    assert sum_of(found, "forkd_connections") == len(clients)
    assert sum_of(found, "forkd_connections_accepted_total") == len(clients)
    assert sum_of(found, "forkd_refusals_total", reason="full") == 1
    assert sum_of(found, "forkd_workers", state="serving") == sum_of(found, "forkd_workers_wanted") == 2
    assert sum_of(found, "forkd_listener_connections_limit", listener=daemon.address) == 2
    assert sum_of(found, "forkd_listener_queue_limit", listener=daemon.address) > 0
    assert (sum_of(found, "forkd_ready"), sum_of(found, "forkd_draining")) == (1, 0)
    assert sum_of(found, "forkd_worker_pss_bytes") > 1 << 20
    assert sum_of(found, "forkd_listener_connections", listener=daemon.address) == 2
    for client in clients:
        assert echoes(client)
        client.close()
    ended = "forkd_connection_duration_seconds_count"
    eventually(lambda: sum_of(metrics(daemon), ended) == 2, what="the end of all clients")
    found = metrics(daemon)
    size = len(b"are you there?\n")
    assert sum_of(found, "forkd_listener_connections_served_total", listener=daemon.address) == 2
    assert sum_of(found, "forkd_received_bytes_total", listener=daemon.address) == 2 * size
    assert sum_of(found, "forkd_sent_bytes_total", listener=daemon.address) == 2 * (size + len("first"))
    assert sum_of(found, "forkd_connection_size_bytes_bucket", le="256.0") == 2
    assert sum_of(found, "forkd_connection_duration_seconds_count") == 2
    assert 0 < sum_of(found, "forkd_connection_duration_seconds_sum") < 60


def test_metrics_of_tls_count_each_connection_once(harness: Harness, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = map(str, authority.issue("localhost", "localhost"))
    tls = {"cert": cert, "key": key, "names": [{"cert": cert, "key": key}]}
    listen = [{"address": "tcp://127.0.0.1:0", "handler": "forkd.builtin:Echo", "tls": tls}]
    daemon = Changing(harness, listen=listen, admin={"address": "tcp://127.0.0.1:0"}).daemon.start()
    context = ssl.create_default_context(cafile=authority.cert)
    with context.wrap_socket(dial(daemon.address), server_hostname="localhost") as client:
        assert echoes(client)
        found = metrics(daemon)
        assert sum_of(found, "forkd_listener_connections") == 1
        expiry = "forkd_certificate_expiry_timestamp_seconds"
        assert 29 * 86_400 < sum_of(found, expiry, file=cert) - time.time() < 31 * 86_400
    with dial(daemon.address) as client:
        client.sendall(b"no hello\n")
        assert client.recv(100) != b"no hello\n"
    open_ones = "forkd_listener_connections"
    eventually(lambda: sum_of(metrics(daemon), "forkd_connection_duration_seconds_count") == 1, what="the client's end")
    eventually(lambda: sum_of(metrics(daemon), open_ones) == 0, what="the end of both")
    assert sum_of(metrics(daemon), "forkd_listener_connections_served_total") == 2


def went_back(before: Values, after: Values) -> list[str]:
    """Counters that are less than they were, or not there any more."""
    return [str(key) for key, value in before.items() if key[0].endswith("_total") and after.get(key, -1) < value]


def test_counters_never_go_back(harness: Harness) -> None:
    site = Changing(harness, admin={"address": "tcp://127.0.0.1:0"}, workers=3)
    daemon = site.daemon.start()
    daemon.expect("killed by SIGKILL", "reload: failed")
    where, before = service_of(daemon), Values()

    def look() -> Values:
        nonlocal before
        for _ in range(6):
            assert echoes(site.greet()[0])
        accepted = "forkd_connections_accepted_total"

        def later() -> Values | None:  # what is told is kept for a moment
            now = metrics(where)
            return now if sum_of(now, accepted) > sum_of(before, accepted) else None

        found = eventually(later)
        assert went_back(before, found) == []
        before = found
        return found

    look()
    victim = daemon.workers()[1]
    os.kill(victim, signal.SIGKILL)
    daemon.wait_workers(3, without={victim})
    assert sum_of(look(), "forkd_worker_deaths_total", cause="signal") == 1
    site.write(boot_timeout="0s")
    assert daemon.command("reload").returncode == 1
    assert sum_of(look(), "forkd_reloads_total", result="failure") == 1
    site.write(boot_timeout="60s")
    for verb in ("reload", "upgrade"):
        assert daemon.command(verb).returncode == 0
        look()
    assert daemon.command("scale", 1).returncode == 0
    assert sum_of(look(), "forkd_reloads_total", result="success") == 2


def test_prometheus_scrapes_a_daemon(harness: Harness, tmp_path: Path) -> None:
    needs_program("prometheus")
    daemon = harness.daemon(settings=(ADMIN,)).start()
    target, port = service_of(daemon).removeprefix("tcp://"), unshared_port()
    scrape = {"job_name": "forkd", "scrape_interval": "200ms", "scrape_timeout": "200ms"}
    config = {"scrape_configs": [scrape | {"static_configs": [{"targets": [target]}]}]}
    (tmp_path / "prometheus.json").write_text(json.dumps(config))  # which is YAML too
    command = ["prometheus", "--config.file=prometheus.json", f"--storage.tsdb.path={tmp_path}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as prometheus:
        try:
            assert echoes(harness.connect(daemon))
            query = quote("sum(forkd_connections_accepted_total) and sum(up) == 1")

            def asked() -> bool:
                assert prometheus.poll() is None, "Prometheus has ended"
                try:
                    answer = ask(f"tcp://127.0.0.1:{port}", f"/api/v1/query?query={query}")
                except OSError:  # it does not listen yet
                    return False
                found = json.loads(answer.body)["data"]["result"] if answer.status == 200 else []
                return bool(found) and float(found[0]["value"][1]) == 1

            eventually(asked, 60, what="a scrape by Prometheus")
        finally:
            prometheus.terminate()


def test_metrics_are_documented() -> None:
    page = (CHECKOUT / "docs/operations.md").read_text()
    rows = [f"| `{one.full_name}` | {one.kind} | {', '.join(one.labels)} | {one.doc} |" for one in FAMILIES.values()]
    assert re.findall(r"^\| `forkd_.*$", page, re.MULTILINE) == rows
