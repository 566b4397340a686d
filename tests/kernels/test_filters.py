"""Every command that works on a choice refuses what chooses nothing, and names what there is to choose from."""

from __future__ import annotations

import shlex
from importlib import import_module

import pytest
import torch

from fastgpt2.console import run_command
from fastgpt2.fields import ConfigError

pytest.importorskip("triton", reason="Triton is published for Linux")


@pytest.mark.parametrize(
    ("command", "choices"),
    [
        ("fastgpt2.kernels.tools.inspect --op nosuch", "attention_forward"),
        ("fastgpt2.kernels.tools.inspect --op attention nosuch", "attention_forward"),
        ("fastgpt2.kernels.tools.inspect --op ''", "attention_forward"),
        ("fastgpt2.kernels.tools.inspect --op attention ''", "attention_forward"),
        ("fastgpt2.kernels.tools.inspect --size 7", "768"),
        ("fastgpt2.kernels.tools.inspect --size 64 7", "768"),
        ("fastgpt2.kernels.tools.inspect --op attention --size 768", "there are 16, 32, 64"),
        ("fastgpt2.kernels.tools.inspect --precision nosuch", "bfloat16"),
        ("fastgpt2.kernels.tools.inspect --arch nosuch", "sm_90"),
        ("fastgpt2.kernels.tools.tune --dry-run --arch sm_90 --op nosuch", "attention_forward"),
        ("fastgpt2.kernels.tools.tune --dry-run --arch sm_90 --op attention nosuch", "attention_forward"),
        ("fastgpt2.kernels.tools.tune --dry-run --arch sm_90 --op ''", "attention_forward"),
        ("fastgpt2.kernels.tools.tune --dry-run --arch sm_90 --size 7", "768"),
        ("fastgpt2.kernels.tools.tune --dry-run --arch sm_90 --op attention --size 768", "there are 16, 32, 64"),
        ("fastgpt2.kernels.tools.tune --dry-run --arch nosuch", "sm_90"),
        ("fastgpt2.kernels.tools.profile --op nosuch", "attention_forward"),
        ("fastgpt2.kernels.tools.profile --op attention nosuch", "attention_forward"),
        ("fastgpt2.kernels.tools.profile --op ''", "attention_forward"),
        ("fastgpt2.kernels.tools.profile --precision nosuch", "bfloat16"),
        ("fastgpt2.kernels.tools.sanitize --only nosuch", "attention"),
        ("fastgpt2.kernels.tools.sanitize --only attention nosuch", "attention"),
        ("fastgpt2.kernels.tools.sanitize --only ''", "attention"),
        ("fastgpt2.kernels.tools.sanitize --tool nosuch", "memcheck"),
        ("bench.gpu --only nosuch", "smoke"),
        ("bench.gpu --only smoke nosuch", "ceilings"),
        ("bench.gpu --only ''", "ceilings"),
        ("bench.cpu --cells nosuch", "float32-eager"),
        ("bench.cpu --candidates nosuch", "ours-auto"),
        ("bench.smoke --failed f --warm ours nosuch", "ours-auto"),
        ("bench.smoke --slot nosuch", "attn"),
        ("bench.kernel_profile nosuch", "ours-auto"),
        ("bench.kernel_profile ours-auto --without nosuch", "attn"),
    ],
)
def test_a_choice_of_nothing_is_status_2_and_names_what_there_is(command, choices, capsys) -> None:
    module, *arguments = shlex.split(command)
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: import_module(module).main(arguments))
    out, error = capsys.readouterr()
    assert out == ""
    (line,) = error.splitlines()
    assert line.startswith("error: ") and choices in line and arguments[-1] in line


def test_a_gpu_that_launches_none_of_the_kernels_profiles_nothing(monkeypatch) -> None:
    profile = import_module("fastgpt2.kernels.tools.profile")
    monkeypatch.setattr(profile, "find_tool", lambda name: "ncu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(
        ConfigError, match="this GPU launches none of gelu_mlp_forward_tma; it launches attention_forward"
    ):
        profile.main(["--op", "gelu_mlp_forward_tma"])
