"""local_processes.sh, slurm.sbatch and skypilot.yaml, with programs that play their parts."""

import os
import signal
import subprocess

import pytest
import yaml
from fake_machine import ROOT, copy_launch, executable, fake_python, script

# A process of a run; what number 1 does once all have started is up to the test, in $ONE.
PROCESS = """#!/usr/bin/env bash
[[ $1 != -c ]] || { echo 4711; exit; }
number=${!#}
number=${number#--process_id=}
echo "on ${JAX_LOCAL_DEVICE_IDS:-no} GPU: ${*:4}"
trap 'echo saved; exit 130' TERM
if ((number == 1)); then eval "$ONE"; else eval "$OTHERS"; fi
"""


@pytest.fixture
def clone(tmp_path):
    return copy_launch(tmp_path / "clone")


def local_processes(clone, number="2", *arguments, **variables):
    python = clone / ".venv/bin/python"
    if not python.exists():
        executable(python, PROCESS)
    variables = {"ONE": "", "OTHERS": "", **variables}
    return script(clone / "launch/local_processes.sh", number, "--", *arguments, **variables)


def test_local_processes_share_the_gpus_and_have_their_lines_marked(clone, tmp_path):
    executable(tmp_path / "bin/nvidia-smi", "#!/bin/sh\nprintf 'GPU %s\\n' 0 1 2 3\n")
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    result = local_processes(clone, "2", "--workdir=a run", PATH=path)
    assert result.returncode == 0 and result.stderr == ""
    said = "GPU: --workdir=a run --coordinator=localhost:4711 --num_processes=2 --process_id="
    assert sorted(result.stdout.splitlines()) == [f"[0] on 0,1 {said}0", f"[1] on 2,3 {said}1"]
    uneven = local_processes(clone, "3", PATH=path)
    assert uneven.returncode == 1 and "4 GPUs cannot be shared out evenly" in uneven.stderr


@pytest.mark.parametrize(
    ("one", "status", "said"),
    [
        ("sleep 0.3; exit 3", 3, "process 1 failed with status 3"),
        ("kill -KILL $$", 137, "process 1 was killed (signal 9)"),
        ("kill -SEGV $$", 139, "process 1 was ended by signal 11 (SEGV)"),
        ("exec sleep 60", 134, "process 0 was ended by JAX because another process was lost"),
    ],
)
def test_the_first_to_fail_is_named_and_the_others_end(clone, one, status, said):
    # One ends as JAX ends those that have lost another, the other waits for ever.
    others = "((number == 0)) && exit 134; exec sleep 60"
    result = local_processes(clone, "3", ONE=one, OTHERS=others, PATIENCE="2")
    assert result.returncode == status
    assert said in result.stderr.splitlines()[-1]  # behind bash's own notices


def test_ctrl_c_lets_all_processes_save(clone):
    executable(clone / ".venv/bin/python", PROCESS)
    waiting = "while true; do sleep 0.1; done"
    launcher = subprocess.Popen(
        [clone / "launch/local_processes.sh", "2", "--workdir=run"],
        env={"PATH": os.environ["PATH"], "ONE": waiting, "OTHERS": waiting},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started = {launcher.stdout.readline()[:3] for _ in range(2)}
    launcher.send_signal(signal.SIGINT)
    rest = launcher.communicate(timeout=30)[0]
    assert started == {"[0]", "[1]"}
    assert launcher.returncode == 130 and sorted(rest.split("\n")) == ["", "[0] saved", "[1] saved"]


def test_ctrl_c_while_processes_are_being_started_ends_all(clone):
    """The first asks for it, while the launcher starts the others."""
    waiting = "while true; do sleep 0.1; done"
    others = f"((number == 0)) && kill -INT $PPID; {waiting}"
    result = local_processes(clone, "30", OTHERS=others, ONE=waiting)
    assert "[0] saved" in result.stdout
    assert result.returncode in (130, 143)  # 143: of one that was ended before it could save


def slurm(clone, tmp_path, status: int, **variables):
    """Runs slurm.sbatch as Slurm does, from a copy elsewhere, srun ending with `status`."""
    fake_python(clone / ".venv/bin/python", tmp_path / "installs")
    record = 'printf "%s\\n" "$(basename "$0")" "JAX_PLATFORMS=$JAX_PLATFORMS" "$@"'
    executable(tmp_path / "bin/srun", f"#!/bin/bash\n{record}\nexit {status}\n")
    executable(tmp_path / "bin/scontrol", f"#!/bin/bash\n{record}\n")
    spooled = executable(tmp_path / "spool/script", (clone / "launch/slurm.sbatch").read_text())
    path = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12", "SLURM_SUBMIT_DIR": str(clone)}
    return script(spooled, "--workdir=/shared/a run", **path, **job | variables)


def test_slurm_starts_every_task_on_a_gpu_of_its_own(clone, tmp_path):
    result = slurm(clone, tmp_path, 0, SLURM_GPUS_ON_NODE="8")
    assert result.returncode == 0, result.stderr
    program, platforms, *arguments = result.stdout.splitlines()
    assert (program, platforms) == ("srun", "JAX_PLATFORMS=cuda,cpu")
    assert arguments == [
        "--kill-on-bad-exit=1", "--gpu-bind=none", "--cpus-per-task=12", "--label",
        ".venv/bin/python", "-u", "-m", "beit_jax.main", "--workdir=/shared/a run",
    ]  # fmt: skip
    assert "JAX_PLATFORMS=\n" in slurm(clone, tmp_path, 0).stdout


def test_slurm_queues_a_run_again_that_saved_in_time(clone, tmp_path):
    result = slurm(clone, tmp_path, 130)
    assert result.returncode == 0
    assert result.stdout.splitlines()[-4:] == ["scontrol", "JAX_PLATFORMS=", "requeue", "7"]
    failed = slurm(clone, tmp_path, 1)
    assert failed.returncode == 1 and "scontrol" not in failed.stdout
    assert "Job 7 failed with status 1" in failed.stderr and failed.stderr.count("\n") == 1


def test_slurm_is_told_before_the_time_is_up():
    lines = (ROOT / "launch/slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--signal=TERM@120", "--requeue", "--open-mode=append"} <= set(options)
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first_command:])


@pytest.mark.parametrize("nodes", [1, 2])
def test_skypilot_runs_the_command_on_every_machine(clone, tmp_path, nodes):
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    assert task["resources"]["use_spot"] and task["file_mounts"]["/runs"]["name"] == "${BUCKET}"
    assert task["setup"].split()[0] == "launch/worker.sh"
    python = clone / ".venv/bin/python"
    executable(python, "#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", task["run"]],
        cwd=clone,
        env={
            "PATH": "/usr/bin:/bin",
            **{name: value or "" for name, value in task["envs"].items()},
            "ARGUMENTS": "--config=configs/mim_base.py --config.data.workers=4",
            "SKYPILOT_NUM_NODES": str(nodes),
            "SKYPILOT_NODE_RANK": "1",
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    together = ["--coordinator=10.0.0.1:8476", "--num_processes=2", "--process_id=1"]
    assert result.stdout.splitlines() == [
        "-u", "-m", "beit_jax.main", "--workdir=/runs/mim", "--config=configs/mim_base.py",
        "--config.data.workers=4", *(together if nodes > 1 else []),
    ]  # fmt: skip
