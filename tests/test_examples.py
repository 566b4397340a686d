"""docs/examples: what a scheduler is given starts torchrun and fastgpt2 with flags that both know.

Nothing here starts Kubernetes, SkyPilot or Docker: their files were checked once, by kubernetes-validate 1.37, SkyPilot
0.14's own schema and hadolint 2.15.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

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
