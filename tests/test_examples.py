"""docs/examples: what a scheduler is given starts torchrun and fastgpt2 with flags that both know.

Nothing here starts Kubernetes, SkyPilot or Docker: their files were checked once, by kubernetes-validate 1.37, SkyPilot
0.14's own schema and hadolint 2.15.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_docs import ROOT, SETUP, check

EXAMPLES = ROOT / "docs" / "examples"


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_skypilots_task_starts_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    executable(tmp_path / ".venv" / "bin" / "torchrun", "#!/bin/bash\nprintf '%s\\n' \"$@\" > words\n")
    variables = {"NUM_NODES": "2", "NUM_GPUS_PER_NODE": "8", "TASK_ID": "7", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
    environment = {**os.environ, **{f"SKYPILOT_{name}": value for name, value in variables.items()}}
    subprocess.run(["bash", "-euc", task["run"]], cwd=tmp_path, env=environment, check=True, timeout=60)
    words = (tmp_path / "words").read_text().splitlines()
    assert words[words.index("--rdzv-endpoint") + 1] == "10.0.0.1:29500"
    check(["torchrun", *words], monkeypatch)
    assert list(task["volumes"]) == ["/shared"], "the run and its data lie on the volume"
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"].endswith(":8")


def test_kubernetes_pods_meet_at_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    command = container["command"]
    check(command, monkeypatch)
    assert f"--rdzv-endpoint={name}-0.{pod['subdomain']}:29500" in command
    assert (
        f"--nnodes={job['spec']['completions']}" in command and job["spec"]["parallelism"] == job["spec"]["completions"]
    )
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in command
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_image_holds_the_readmes_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    train, tests = (line.split(" && ") for line in lines if line.startswith(SETUP))
    image = (EXAMPLES / "Dockerfile").read_text().splitlines()
    assert f"RUN {' && '.join(tests[:-1])}" in image
    assert f"CMD {json.dumps(shlex.split(train[-1].removeprefix('.venv/bin/')))}" in image


# srun starts the command once a machine and passes signals on; the machines are this one.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM "${tasks[@]}"' TERM
for ((task = 0; task < SLURM_JOB_NUM_NODES; task++)); do "$@" & tasks+=($!); done
worst=0
for task in "${tasks[@]}"; do
    wait "$task"
    status=$?
    while kill -0 "$task" 2> /dev/null; do wait "$task"; status=$?; done
    ((worst = status > worst ? status : worst))
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf 'localhost\\nlocalhost\\n' ;;
    requeue) touch requeued ;;
esac
"""
SECONDS = 300
"""How long a job may take. It takes some; a busy machine may need more."""
SMALL = (
    "--n-layer 1 --n-head 2 --n-embd 32 --block-size 32 --batch-size 2 --device cpu --log-every 1 --save-every 1000000"
)


def slurm(folder: Path, machines: int, *arguments: str) -> subprocess.Popen[str]:
    """Start the batch script as the job 16. It leads a process group of its own."""
    (folder / ".venv").unlink(missing_ok=True)
    (folder / ".venv").symlink_to(sys.prefix)
    executable(folder / "bin" / "srun", SRUN)
    executable(folder / "bin" / "scontrol", SCONTROL)
    variables = {"ID": "16", "NODELIST": "node[0-1]", "NUM_NODES": str(machines)}
    environment = {
        **os.environ,
        **{f"SLURM_JOB_{name}": value for name, value in variables.items()},
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    words = ["bash", str(EXAMPLES / "slurm.sh"), *SMALL.split(), *arguments]
    log = (folder / "log").open("a")
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "runs" / "16" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def test_the_slurm_script_saves_before_its_time_is_up_and_its_requeued_job_resumes(tmp_path: Path) -> None:
    job = slurm(tmp_path, 2, "--steps", "20000")
    try:
        while not records(tmp_path):
            assert job.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        job.terminate()  # as Slurm does by --signal=B:TERM@120
        assert job.wait(timeout=SECONDS) != 0
        assert (tmp_path / "requeued").exists(), (tmp_path / "log").read_text()[-3000:]
        (tmp_path / "requeued").unlink()
        (saved,) = (tmp_path / "runs" / "16" / "checkpoints").glob("step-*")
        stopped = int(saved.name.removeprefix("step-"))
        job = slurm(tmp_path, 1, "--steps", str(stopped + 2))
        assert job.wait(timeout=SECONDS) == 0, (tmp_path / "log").read_text()[-3000:]
        assert not (tmp_path / "requeued").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGTERM)  # torchrun's processes are in groups of their own, which it ends
    assert [record["step"] for record in records(tmp_path)] == list(range(1, stopped + 3))
