"""What is inspected, bounded and compiled for the tuner is what a launch compiles: the same entry in Triton's cache,
whatever each process had compiled before.

The launchers run here up to the compiler, on a driver of which only the GPU's architecture is played.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from bench.timing import ROOT

pytest.importorskip("triton", reason="Triton is published for Linux")

PROGRAM = """
import json
from dataclasses import replace
from unittest.mock import MagicMock
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from fastgpt2.kernels import attention_hopper_backward
from fastgpt2.kernels.specs import attention, cross_entropy, mlp, norm, tunings
from fastgpt2.kernels.tools import inspect
from fastgpt2.kernels.tools.profile import size_of
from fastgpt2.kernels.tuning import configurations

asked = []


def compile(src, target, options=None, **_):
    found = make_backend(target).parse_options({**(options or {}), **src.parse_options()})
    asked.append((src.name, src.hash(), found.hash()))
    return MagicMock()


triton.compile = triton.compiler.compile = compile
triton.runtime.driver.set_active(
    MagicMock(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
    )
)
# The backward for Hopper launches two kernels. The interpreter's table has none for the one that isn't tuned. It gets
# another than its own, which its own launch compiles.
attention_hopper_backward.lookup = lambda op, precision, size, device: replace(
    configurations("sm_90")[op, precision, size], num_stages=2
)
# Few rows, but as many as 16 divides: Triton compiles for that.
attention.EXAMPLE, norm.EXAMPLE_ROWS, cross_entropy.EXAMPLE_ROWS, mlp.EXAMPLE_ROWS = (2, 32, 768), 32, 32, 32
found = []
for op, tuning in tunings().items():
    size = size_of(op)
    for precision in ("bfloat16", "tf32"):
        config = configurations("sm_90").get((op, precision, size))
        if config is None:
            continue
        asked.clear()
        inspect._compile(inspect.Case(op, precision, size, "sm_90", config))
        (ours,) = asked
        launch = tuning.example(precision, size, torch.device("cpu"), 0)
        asked.clear()
        launch(config)
        found.append([op, precision, ours, [entry for entry in asked if entry[0] == ours[0]]])
print(json.dumps(found))
"""

# Triton parses a function when it computes its cache key. {} orders the kernels by name, or the other way.
KEYS = """
import ast, json
from triton.runtime import JITFunction

parse, early = JITFunction.parse, []


def watched(function):
    tree, globals = parse(function), function.__globals__
    callees = [globals.get(node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)]
    early.extend([function.__name__, f.__name__] for f in callees if isinstance(f, JITFunction) and f.hash is None)
    return tree


JITFunction.parse = watched
from fastgpt2.kernels.specs import all_kernels

kernels = all_kernels()
keys = [kernels[op].function.cache_key for op in {}(kernels)]
values = {{op: [[name, str(value)] for (name, _), (value, _) in kernel.function.used_global_vals.items()]
          for op, kernel in kernels.items()}}
print(json.dumps([early, sorted(keys), values]))
"""


def run(program: str) -> Any:
    """What a program that compiles, and so can't interpret, prints as JSON."""
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=compiling, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kernels_cache_key_does_not_depend_on_what_was_compiled_before() -> None:
    """With Triton 3.6 it does unless every function is hashed after those that it calls; later versions don't mind."""
    (early, keys, values), (*_, again) = run(KEYS.format("sorted")), run(KEYS.format("reversed"))[:2]
    assert early == [] and len(keys) >= 10 and keys == again
    # Triton 3.6 orders constants of one name by the addresses of their modules: they must be alike.
    for op, found in values.items():
        distinct = {(name, value) for name, value in found}
        assert len({name for name, _ in distinct}) == len(distinct), op


LATE = """
import json, os
import {imported}
import torch
os.environ["TRITON_INTERPRET"] = "1"
from fastgpt2.kernels.launch import why_unsupported
print(json.dumps(why_unsupported("It", torch.device("cpu"), torch.float32)))
"""


@pytest.mark.parametrize("imported", ["triton.language", "fastgpt2.kernels.attention"])
def test_an_interpreter_asked_for_too_late_is_told(imported: str) -> None:
    """Triton's own functions are as they were when it was imported, the kernels as they were when they were."""
    assert "before triton is imported" in run(LATE.format(imported=imported))


def test_a_launch_finds_in_tritons_cache_what_was_compiled_for_it() -> None:
    """Or the tuner, which compiles in parallel, would compile again one by one, on the GPU's time."""
    found = run(PROGRAM)
    assert len({op for op, *_ in found}) >= 10 and {"bfloat16", "tf32"} == {precision for _, precision, *_ in found}
    other = [(op, precision, ours, launched) for op, precision, ours, launched in found if launched != [ours]]
    assert not other, other
