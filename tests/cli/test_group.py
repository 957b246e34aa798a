"""How threads wait and how many there are: settled by the command line before PyTorch loads, the user's word first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from domino_spec.bench.rows import session_record
from domino_spec.cli.group import SPIN_COUNT, available_cores, settle_threads

ROOT = Path(__file__).parent.parent
OURS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "KMP_BLOCKTIME")


def in_a_new_process(code: str, **variables: str) -> dict:
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    found = subprocess.run(
        [sys.executable, "-c", f"import json, os, sys\n{code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**kept, **variables},
        check=True,
    )
    return json.loads(found.stdout.splitlines()[-1])


TOLD = f"print(json.dumps({{n: os.environ[n] for n in {OURS!r} if n in os.environ}}))"
COMMAND = "from domino_spec.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"


def test_the_command_line_settles_what_the_user_left_open():
    told = in_a_new_process(f"sys.argv = ['domino-spec', '--version']\n{COMMAND}{TOLD}")
    assert told == {"GOMP_SPINCOUNT": str(SPIN_COUNT), "OMP_NUM_THREADS": str(available_cores())}


@pytest.mark.parametrize("chosen", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_what_the_user_has_set_stays(chosen):
    told = in_a_new_process(f"sys.argv = ['domino-spec', '--version']\n{COMMAND}{TOLD}", OMP_NUM_THREADS="3", **chosen)
    assert told == {"OMP_NUM_THREADS": "3", **chosen}


def test_importing_the_library_changes_no_environment():
    assert in_a_new_process(f"import domino_spec, domino_spec.cli\n{TOLD}") == {}


def test_nothing_is_set_once_pytorch_is_loaded():
    told: dict[str, str] = {}
    assert "torch" in sys.modules
    settle_threads(told)
    assert told == {}


def make_system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


CPU = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({CPU.format(i): f"{i % 4},{i % 4 + 4}" for i in range(8)}, 4),  # two threads a core
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "250000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1),  # a parent's, half a core
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),  # as a container sees it
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "600000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            },
            6,
        ),
        ({"proc/self/cgroup": "5:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}, 8),
    ],
)
def test_cores_are_those_that_affinity_and_quota_grant(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert available_cores(make_system(tmp_path, files)) == cores


def test_a_session_records_threads_variables_and_load(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    monkeypatch.setenv("KMP_BLOCKTIME", "1")
    session = json.loads(json.dumps(session_record(0)))
    threads = session["threads"]
    assert threads["environment"]["GOMP_SPINCOUNT"] == "5" and threads["environment"]["KMP_BLOCKTIME"] == "1"
    assert threads["num_threads"] >= 1 and threads["processors"] >= 1 and threads["cpu"]
    assert session["load_average"] is None or session["load_average"] >= 0
    assert session["steal_seconds"] is None or session["steal_seconds"] >= 0
