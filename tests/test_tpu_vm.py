"""launch/tpu_vm.sh against a gcloud that records what it is told and plays one worker."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_machine import ROOT, copy_launch, executable, fake_python, script

# scp copies into the worker's home; ssh runs its command there. `describe` answers $STATE.
GCLOUD = f"""#!{sys.executable}
import json, os, shutil, subprocess, sys
arguments = sys.argv[1:]
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(arguments) + "\\n")
verb, home = arguments[3], os.environ["WORKER_HOME"]
if verb == "describe":
    print(os.environ.get("STATE", ""))
elif verb == "scp":
    if "NO_COPY" in os.environ:
        sys.exit(1)
    shutil.copy(arguments[4], os.path.join(home, arguments[5].split(":")[1]))
elif verb == "ssh":
    command = next(a for a in arguments if a.startswith("--command=")).split("=", 1)[1]
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home).returncode)
"""


@pytest.fixture
def slice_of_one(tmp_path):
    """A function that runs tpu_vm.sh, with `home`, the worker's folder, and `calls` to gcloud."""
    clone = copy_launch(tmp_path / "clone")
    home, record = tmp_path / "home", tmp_path / "calls"
    home.mkdir()
    executable(tmp_path / "bin/gcloud", GCLOUD)
    python = fake_python(tmp_path / "bin/python3", tmp_path / "installs")
    subprocess.run(["git", "init", "--quiet", clone], check=True)

    def tpu_vm(*arguments: str, **variables: str):
        return script(
            clone / "launch/tpu_vm.sh",
            *arguments,
            **{
                "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
                "PYTHON": str(python),
                "RECORD": str(record),
                "WORKER_HOME": str(home),
                **variables,
            },
        )

    tpu_vm.home = home / "beit_jax"
    tpu_vm.calls = lambda: [json.loads(line) for line in record.read_text().splitlines()]
    yield tpu_vm
    if tpu_vm.home.exists():
        script(tpu_vm.home / "launch/worker.sh", "stop")


def logs(tpu_vm) -> str:
    return "".join(path.read_text() for path in tpu_vm.home.glob("logs/*.log"))


def pid(tpu_vm) -> int:
    return int(next(tpu_vm.home.glob("logs/*.pid")).read_text())


def alive(number: int) -> bool:
    state = Path(f"/proc/{number}/stat")
    return state.exists() and state.read_text().split()[2] != "Z"


def test_install_run_again_and_stop(slice_of_one):
    result = slice_of_one("install", "beit", "--zone=z")
    assert result.returncode == 0, result.stderr
    assert (slice_of_one.home / "setup.cfg").read_bytes() == (ROOT / "setup.cfg").read_bytes()

    hard = ["--config=configs/mim_base.py", "--workdir=gs://b/a run", "--x='$HOME' \"*\""]
    result = slice_of_one("run", "beit", "--zone=z", "--", *hard)
    assert result.returncode == 0, result.stderr
    first = pid(slice_of_one)
    assert alive(first)
    assert "".join(f"<{argument}>" for argument in hard) in logs(slice_of_one)

    assert slice_of_one("run", "beit", "--zone=z", "--", "--again").returncode == 0
    assert not alive(first) and alive(pid(slice_of_one))
    assert "<--again>" in slice_of_one("log", "beit", "--zone=z", "--worker=0").stdout

    assert slice_of_one("stop", "beit", "--zone=z").returncode == 0
    assert not alive(pid(slice_of_one))
    for call in slice_of_one.calls():
        assert call[:3] == ["compute", "tpus", "tpu-vm"] and "--zone=z" in call
        reads_log = any(argument.endswith("worker.sh log") for argument in call)
        assert ("--worker=0" if reads_log else "--worker=all") in call


def test_a_run_that_ends_at_once_shows_its_log_and_fails(slice_of_one):
    assert slice_of_one("install", "beit", "--zone=z").returncode == 0
    broken = "#!/bin/sh\necho no such config\nexit 1\n"
    executable(slice_of_one.home / ".venv/bin/python", broken)
    result = slice_of_one("run", "beit", "--zone=z", "--", "--config=nowhere.py")
    assert result.returncode == 1
    assert "no such config" in result.stderr and "ended at once" in result.stderr


@pytest.mark.parametrize(
    ("state", "verbs"),
    [
        ("", ["describe", "create"]),
        ("READY", ["describe"]),
        ("PREEMPTED", ["describe", "delete", "create"]),
    ],
)
def test_create_makes_what_is_missing(slice_of_one, state, verbs):
    create = ["create", "beit", "--zone=z", "--project=p", "--type=v5litepod-16", "--spot"]
    result = slice_of_one(*create, STATE=state)
    assert result.returncode == 0, result.stderr
    calls = slice_of_one.calls()
    assert [call[3] for call in calls] == verbs
    assert all("--project=p" in call for call in calls)
    if "create" in verbs:
        wanted = {"--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"}
        assert wanted <= set(calls[-1])


def test_dry_run_calls_nothing_that_changes_anything(slice_of_one):
    for arguments in (["install"], ["run", "--", "--mode=eval"], ["delete"]):
        verb, *rest = arguments
        result = slice_of_one(verb, "beit", "--zone=z", "--dry-run", *rest)
        assert result.returncode == 0 and "gcloud compute tpus tpu-vm" in result.stdout
    with pytest.raises(FileNotFoundError):
        slice_of_one.calls()


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        ([], "create, install, run, keep"),
        (["frobnicate", "beit"], "'frobnicate'"),
        (["run"], "Which slice"),
        (["run", "beit"], "--zone"),
        (["run", "beit", "--zone=z"], "--config=configs/mim_base.py"),
        (["run", "beit", "--zone=z", "--config=c.py"], "behind --"),
        (["create", "beit", "--zone=z"], "--type"),
        (["keep", "beit", "--zone=z", "--", "--x"], "--type"),
        (["keep", "beit", "--zone=z", "--type=v4-8"], "--config=configs/mim_base.py"),
        (["create", "beit", "--zone=z", "--type=v9-8"], "--version"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(slice_of_one, arguments, needle):
    result = slice_of_one(*arguments)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and needle in result.stderr


# What a run ends with each time it is started, and what becomes of the slice.
ENDS = """#!/usr/bin/env bash
[[ $1 != -c ]] || exit 0
times=$(cat {count} 2>/dev/null || echo 0)
echo $((times + 1)) >{count}
ends=({ends})
exec -a "python -m beit_jax.main" bash -c "sleep 0.2; ${{ends[times]}}"
"""


@pytest.mark.parametrize(
    ("ends", "status", "said", "logged"),
    [
        (
            ["kill -KILL \\$\\$", "exit 0"],
            0,
            "The run on beit has finished.",
            ["was killed (signal 9)", "has finished"],
        ),
        (["exit 1"], 1, "The run on beit has failed", ["failed with status 1"]),
        (["exit 134"] * 6, 1, "was lost 5 times in a row", ["was ended by JAX"] * 5),
    ],
)
def test_a_run_is_kept_until_it_has_finished_or_failed(
    slice_of_one, tmp_path, ends, status, said, logged
):
    assert slice_of_one("install", "beit", "--zone=z").returncode == 0
    count = tmp_path / "count"
    quoted = " ".join(f'"{end}"' for end in ends)
    executable(slice_of_one.home / ".venv/bin/python", ENDS.format(count=count, ends=quoted))
    kept = ["keep", "beit", "--zone=z", "--type=v4-32", "--", "--workdir=/shared/run"]
    result = slice_of_one(*kept, STATE="READY", PAUSE="0.1")
    assert result.returncode == status, result.stderr
    assert said in result.stdout + result.stderr
    last_lines = [line for line in logs(slice_of_one).splitlines() if "the process on" in line]
    for line, end in zip(last_lines, logged, strict=True):
        assert end in line
    assert "create" not in {call[3] for call in slice_of_one.calls()}


def test_the_end_of_an_earlier_run_is_not_that_of_one_that_could_not_start(slice_of_one, tmp_path):
    assert slice_of_one("install", "beit", "--zone=z").returncode == 0
    finished = ENDS.format(count=tmp_path / "count", ends='"exit 0"')
    executable(slice_of_one.home / ".venv/bin/python", finished)
    kept = ["keep", "beit", "--zone=z", "--type=v4-32", "--", "--workdir=/shared/run"]
    assert "has finished" in slice_of_one(*kept, STATE="READY", PAUSE="0.1").stdout
    result = slice_of_one(*kept, STATE="READY", PAUSE="0.1", NO_COPY="yes")
    assert result.returncode == 1 and "has finished." not in result.stdout
    assert "was lost 5 times in a row" in result.stderr


def test_a_lost_slice_is_made_again(slice_of_one):
    kept = ["keep", "beit", "--zone=z", "--type=v4-32", "--spot", "--dry-run", "--", "--workdir=/r"]
    result = slice_of_one(*kept, STATE="PREEMPTED")
    assert result.returncode == 0
    steps = [line for line in result.stdout.splitlines() if line.startswith("gcloud")]
    verbs = [step.split()[4] for step in steps]
    assert verbs == ["delete", "create", "scp", "ssh", "ssh", "ssh"]
    assert "--spot" in steps[1] and "/r" in steps[-1]


def test_a_dry_run_of_what_cannot_be_made_ends(slice_of_one):
    kept = ["keep", "beit", "--zone=z", "--type=v4-32", "--dry-run", "--", "--workdir=/r"]
    result = slice_of_one(*kept, STATE="CREATING")
    assert "state CREATING" in result.stderr and "lost" not in result.stdout


def test_a_busy_slice_is_left_alone(slice_of_one):
    result = slice_of_one("create", "beit", "--zone=z", "--type=v4-32", STATE="CREATING")
    assert result.returncode == 1 and "state CREATING" in result.stderr
    assert [call[3] for call in slice_of_one.calls()] == ["describe"]


def test_a_missing_gcloud_is_named(tmp_path):
    clone, programs = copy_launch(tmp_path / "clone"), tmp_path / "bin"
    programs.mkdir()
    (programs / "bash").symlink_to(shutil.which("bash"))  # and no gcloud
    result = script(clone / "launch/tpu_vm.sh", "stop", "beit", "--zone=z", PATH=str(programs))
    assert result.returncode == 1 and "gcloud is not installed" in result.stderr
