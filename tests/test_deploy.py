"""deploy/: each file is right by the tools of those who read it, and names what there is."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from forkd.config.units import parse_duration
from forkd.master.admin.metrics import FAMILIES, HISTOGRAM
from tests.support.admin import ask
from tests.support.clients import dial, echoes
from tests.support.daemon import forkd
from tests.support.needs import needs_package, needs_program, needs_python_for_all, needs_root
from tests.support.network_namespaces import private_network
from tests.support.paths import CHECKOUT
from tests.support.processes import DEADLINE, children, eventually

DEPLOY = CHECKOUT / "deploy"
MANIFESTS = DEPLOY / "kubernetes/forkd.yaml"


def manifests() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all(MANIFESTS.read_text())}


def passes(*command: str, cwd: Path = DEPLOY) -> str:
    needs_program(command[0])
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_settings_are_in_order(tmp_path: Path) -> None:
    inner = tmp_path / "kubernetes.yaml"
    inner.write_text(manifests()["ConfigMap"]["data"]["forkd.yaml"])
    for path in (DEPLOY / "docker/forkd.yaml", inner):
        result = forkd("check", path, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")


def test_prometheus_takes_its_files() -> None:
    passes("promtool", "check", "config", "prometheus/prometheus.yaml")
    assert "rules found" in passes("promtool", "check", "rules", "prometheus/rules.yaml")


def test_haproxy_takes_its_file() -> None:
    assert "rror" not in passes("haproxy", "-c", "-f", "haproxy/haproxy.cfg")


def test_manifests_are_of_kubernetes_schema() -> None:
    needs_package("kubernetes_validate")
    validate = importlib.import_module("kubernetes_validate")
    for one in manifests().values():
        assert validate.validate(one, validate.latest_version(), strict=True)


def test_pod_has_time_to_leave_without_loss() -> None:
    found = manifests()
    settings = yaml.safe_load(found["ConfigMap"]["data"]["forkd.yaml"])
    pod = found["Deployment"]["spec"]["template"]["spec"]
    needed = parse_duration(settings["stop_delay"]) + parse_duration(settings["drain_timeout"]) + 6
    assert pod["terminationGracePeriodSeconds"] >= needed
    [container] = pod["containers"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    served = {"service": settings["listen"][0]["address"], "admin": settings["admin"]["address"]}
    assert served == {name: f"tcp://0.0.0.0:{port}" for name, port in ports.items()}
    assert {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe")} == {"/ready"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/live"


def test_rules_and_dashboard_name_metrics_that_there_are() -> None:
    known = {f"{one.name}_bucket" if one.kind == HISTOGRAM else one.full_name for one in FAMILIES.values()}
    texts = [path.read_text() for path in (DEPLOY / "prometheus/rules.yaml", DEPLOY / "grafana/forkd.json")]
    for text in texts:
        named = set(re.findall(r"\bforkd_\w+", text))
        assert len(named) > 5
        assert named <= known
    board = json.loads(texts[1])
    places = {(one["gridPos"]["x"], one["gridPos"]["y"]) for one in board["panels"]}
    assert len(places) == len(board["panels"])
    assert len({one["id"] for one in board["panels"]}) == len(board["panels"])


def test_image_is_made_of_what_git_has() -> None:
    """Environments are large, and a build of former sources would get into the wheel."""
    lines = (CHECKOUT / ".dockerignore").read_text().splitlines()
    ignored = (CHECKOUT / ".gitignore").read_text().splitlines()
    assert {".git", *(one.strip("/") if one.startswith("/") else f"**/{one.strip('/')}" for one in ignored)} <= {*lines}


def test_image_serves_as_a_number_below_a_root_that_is_read_only(tmp_path: Path, open_directory: Path) -> None:
    """As in the image: a user without a name, no privileges, nothing to write to but the run directory, process 1."""
    needs_root()
    needs_python_for_all()
    for program in ("unshare", "setpriv", "mount"):
        needs_program(program)
    lines = (DEPLOY / "docker/Dockerfile").read_text().splitlines()
    last = {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}
    user, group = last["USER"].split(":")
    assert user.isdigit()
    assert json.loads(last["ENTRYPOINT"]) == ["forkd", "run", "--run-directory", "/run/forkd"]
    inside = " && ".join(
        [
            f"mount -t tmpfs -o uid={user},mode=0700 tmpfs {open_directory}",
            "mount --bind / / && mount -o remount,ro,bind / && cd /",
            f"exec setpriv --reuid {user} --regid {group} --clear-groups --no-new-privs --bounding-set=-all "
            f"{sys.executable} -m forkd run --run-directory {open_directory} {DEPLOY}/docker/forkd.yaml",
        ]
    )
    log = tmp_path / "log"
    command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", inside]
    with private_network(), log.open("wb") as file:  # its ports are its own
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            eventually(lambda: "daemon is up" in log.read_text() or process.poll() is not None)
            with dial("tcp://127.0.0.1:7007") as client:
                assert echoes(client)
            assert ask("tcp://127.0.0.1:9101", "/ready").status == 200
            [master] = children(process.pid)
            os.kill(master, signal.SIGTERM)
            assert process.wait(DEADLINE) == 0, log.read_text()
        finally:
            for pid in children(process.pid):  # process 1 of its namespace: the others end with it
                os.kill(pid, signal.SIGKILL)
            process.wait(DEADLINE)
