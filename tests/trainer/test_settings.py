"""Every setting of TrainConfig takes effect, bad ones are refused, and the device settles those left open."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fastgpt2 import ConfigError, ModelConfig, TrainConfig, train
from fastgpt2.config import preset_name
from fastgpt2.data import DummyTokens
from fastgpt2.ops import Ops
from fastgpt2.parallel import joined
from fastgpt2.run import Run, build, inductor_recomputing_elementwise, settle
from fastgpt2.settings import Settled, resolve
from fastgpt2.slots import SLOTS
from tests.trainer import runs
from tests.trainer.runs import Watch, tiny


def of_model(name: str) -> Callable[[TrainConfig], Any]:
    return lambda config: getattr(build(config).model.config, name)


def of_groups(name: str) -> Callable[[TrainConfig], Any]:
    """The value in each group: parameters with weight decay, then those without."""
    return lambda config: [group[name] for group in build(config).state.optimizer.param_groups]


def asked_of_ops(name: str) -> Callable[[TrainConfig], Any]:
    def asked(config: TrainConfig) -> Any:
        with (
            mock.patch("fastgpt2.run.settle", lambda c, ranks: (resolve(c, cuda=False), torch.device("cpu"))),
            mock.patch("fastgpt2.run.make_ops", return_value=(Ops(), {})) as make,
        ):
            build(config)
        choices, site = make.call_args.args
        return (choices | vars(site))[name]

    return asked


def rates(config: TrainConfig) -> list[float]:
    run, used = build(config), []
    for step in range(3):
        run.step(step, run.next_tokens(step))
        used.append(run.state.optimizer.param_groups[0]["lr"])
    return used


def norm_of_a_step(config: TrainConfig) -> float:
    run = build(config)
    run.step(0, run.next_tokens(0))
    return run._norm().item()


def batch_shape(config: TrainConfig) -> tuple[int, ...]:
    return tuple(build(config).next_tokens(0).shape)


def deterministic(config: TrainConfig) -> bool:
    class Algorithms(Watch):
        def started(self, run: Run) -> None:
            self.deterministic = torch.are_deterministic_algorithms_enabled()

    watch = Algorithms()
    train(config, reporters=[watch])
    return watch.deterministic


def compiler(config: TrainConfig) -> Any:
    """The arguments of model.compile as on a GPU, on the meta device; None if it isn't called."""
    with (
        mock.patch("fastgpt2.run.settle", lambda c, ranks: (resolve(c, cuda=True), torch.device("meta"))),
        mock.patch("fastgpt2.model.GPT.compile") as compile_,
    ):
        build(config)
    return compile_.call_args and compile_.call_args.kwargs


def logged_steps(config: TrainConfig) -> list[int]:
    watch = Watch()
    train(config, reporters=[watch])
    return [record["step"] for record in watch.records if "loss" in record]


def saved_steps(config: TrainConfig) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        train(dataclasses.replace(config, out=Path(folder) / "run"))
        return runs.saved_steps(Path(folder) / "run")


def validated_sequences(config: TrainConfig) -> int:
    """The number of sequences that one validation draws."""
    with mock.patch("fastgpt2.data.DummyTokens.tokens", autospec=True, side_effect=DummyTokens.tokens) as tokens:
        train(config)
    sources = [call.args[0] for call in tokens.call_args_list]
    return sum(source.rows.batch_size for source in sources if source.stream == "val")


def seconds_to_wait(config: TrainConfig) -> float:
    """How long the run would wait for another process."""
    with mock.patch("fastgpt2.training.joined", side_effect=joined) as join:
        train(config)
    return join.call_args.args[1]


ELEMENTWISE = {"dynamic": False, "fullgraph": True, "backend": inductor_recomputing_elementwise}
STREAM_GRADIENT = {"dtype": "bfloat16", "norm": "triton"}
ONE_EVALUATION = {"eval_every": 6, "grad_accum": 2, "steps": 6}
ARRIVALS: list[tuple[str, Any, Callable[[TrainConfig], Any], Any, dict[str, Any]]] = [
    # setting, value, how to observe it, what must be observed, other settings
    ("model", "tiny", of_model("n_embd"), 64, {"n_embd": None}),
    ("n_layer", 3, of_model("n_layer"), 3, {}),
    ("n_head", 4, of_model("n_head"), 4, {}),
    ("n_head", 4, asked_of_ops("head_dim"), 8, {}),
    ("n_embd", 64, of_model("n_embd"), 64, {}),
    ("n_embd", 64, asked_of_ops("n_embd"), 64, {}),
    ("block_size", 8, of_model("block_size"), 8, {}),
    ("block_size", 8, batch_shape, (1, 3, 9), {}),
    ("vocab_size", 80, of_model("vocab_size"), 80, {}),
    ("vocab_size", 80, lambda config: build(config).source.vocab_size, 80, {}),  # type: ignore[attr-defined]
    ("dropout", 0.2, of_model("dropout"), 0.2, {}),
    ("dropout", 0.2, asked_of_ops("dropout"), 0.2, {}),
    ("document_mask", True, of_model("end_of_text"), 3, {"end_of_text": 3}),
    ("end_of_text", 5, of_model("end_of_text"), 5, {"end_of_text": 3, "document_mask": True}),
    ("data", "dummy-fixed", lambda config: build(config).source.fixed, True, {}),  # type: ignore[attr-defined]
    ("batch_size", 5, batch_shape, (1, 5, 17), {}),
    ("grad_accum", 2, batch_shape, (2, 3, 17), {}),
    ("global_batch", 6, batch_shape, (2, 3, 17), {}),
    ("steps", 4, lambda config: len(train(config).losses), 4, {}),
    ("lr", 0.25, rates, [0.25, 0.25, 0.25], {}),
    ("warmup_steps", 2, rates, [0.25, 0.5, 0.5], {"lr": 0.5}),
    ("schedule", "linear", rates, pytest.approx([0.5, 0.41, 0.32]), {"lr": 0.5}),
    ("schedule", "cosine", rates, pytest.approx([0.5, 0.4570288, 0.3445288]), {"lr": 0.5}),
    ("optimizer", "adamw", lambda config: type(build(config).state.optimizer), torch.optim.AdamW, {}),
    ("weight_decay", 0.5, of_groups("weight_decay"), [0.5, 0.0], {"optimizer": "adamw"}),
    ("beta1", 0.5, of_groups("betas"), [(0.5, 0.999)] * 2, {}),
    ("beta2", 0.5, of_groups("betas"), [(0.9, 0.5)] * 2, {}),
    ("grad_clip", 0.05, norm_of_a_step, pytest.approx(0.05, rel=1e-4), {}),
    ("seed", 1, lambda config: build(config).source.seed, 1, {}),  # type: ignore[attr-defined]
    ("dtype", "float64", lambda config: build(config).parameters[0].dtype, torch.float64, {}),
    ("dtype", "bfloat16", asked_of_ops("dtype"), torch.bfloat16, {}),
    ("dtype", "tf32", asked_of_ops("tf32"), True, {}),
    ("stream", "bfloat16", lambda config: build(config).model.stream, torch.bfloat16, {"dtype": "bfloat16"}),
    ("stream", "bfloat16-gradient", asked_of_ops("stream_gradient"), torch.bfloat16, STREAM_GRADIENT),
    ("deterministic", False, deterministic, False, {}),
    ("attn", "naive", asked_of_ops("attn"), "naive", {}),
    ("mlp", "triton", asked_of_ops("mlp"), "triton", {}),
    ("norm", "triton", asked_of_ops("norm"), "triton", {}),
    ("loss", "chunked", asked_of_ops("loss"), "chunked", {}),
    ("compile", True, compiler, {"dynamic": False, "fullgraph": True, "backend": "inductor"}, {}),
    ("recompute", "elementwise", compiler, ELEMENTWISE, {"compile": True}),
    ("recompute", "blocks", lambda config: build(config).model.recompute, True, {}),
    ("eval_every", 2, lambda config: [step for step, _ in train(config).val_losses], [2, 4, 6], {}),
    ("eval_every", 4, logged_steps, [1, 4, 6], {}),
    ("eval_sequences", 9, validated_sequences, 9, ONE_EVALUATION),
    ("save_every", 2, saved_steps, [4, 6], {}),
    ("save_every", 4, logged_steps, [1, 4, 6], {}),
    ("save_every", 0, saved_steps, [], {}),
    ("keep_checkpoints", 3, saved_steps, [4, 5, 6], {"save_every": 1}),
    ("keep_checkpoints", 0, saved_steps, [1, 2, 3, 4, 5, 6], {"save_every": 1}),
    ("log_every", 2, logged_steps, [1, 2, 4, 6], {}),
    ("timeout", 5.0, seconds_to_wait, 5.0, {}),
]


@pytest.mark.parametrize(
    ("name", "value", "arrived", "expected", "others"),
    [pytest.param(*row, id=f"{row[0]}={row[1]}") for row in ARRIVALS],
)
def test_every_setting_arrives(
    name: str, value: Any, arrived: Callable[[TrainConfig], Any], expected: Any, others: dict[str, Any]
) -> None:
    assert arrived(tiny(**others | {name: value})) == expected
    assert arrived(tiny(**others)) != expected


@pytest.mark.parametrize(
    ("asked", "compiled", "cuda", "settled"),
    [
        (None, True, False, "elementwise"),
        (None, True, True, "none"),
        (None, False, False, "none"),
        ("none", True, False, "none"),
        ("elementwise", True, True, "elementwise"),
        ("blocks", True, False, "blocks"),
    ],
)
def test_what_is_recomputed_is_settled_by_the_device_unless_asked_for(
    asked: Any, compiled: bool, cuda: bool, settled: str
) -> None:
    assert resolve(tiny(recompute=asked, compile=compiled), cuda=cuda).recompute == settled


@pytest.mark.parametrize(("asked", "backend"), [(None, inductor_recomputing_elementwise), ("none", "inductor")])
def test_a_cpu_compiles_as_it_was_asked(asked: Any, backend: Any) -> None:
    with mock.patch("fastgpt2.model.GPT.compile") as compile_, mock.patch("fastgpt2.run.shutil.which"):
        build(tiny(compile=True, recompute=asked))
    assert compile_.call_args.kwargs["backend"] == backend


def test_no_setting_is_left_out() -> None:
    # Tested below and in test_resume, test_cuda_graph and test_equal.
    elsewhere = {"device", "out", "resume", "cuda_graph", "parallel", "shard_size", "reshard"}
    unseen = {f.name for f in dataclasses.fields(TrainConfig)} ^ ({name for name, *_ in ARRIVALS} | elsewhere)
    assert not unseen, f"ARRIVALS needs a row for each setting, a value and where it arrives: {', '.join(unseen)}"


LEAST = [
    *((ModelConfig, name, 1) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")),
    *(
        (TrainConfig, name, 1)
        for name in ("batch_size", "grad_accum", "global_batch", "steps", "eval_sequences", "log_every")
    ),
    *((TrainConfig, name, 0) for name in ("eval_every", "save_every", "keep_checkpoints", "warmup_steps", "seed")),
    *((TrainConfig, name, 0) for name in ("lr", "weight_decay", "grad_clip")),
]


@pytest.mark.parametrize(("kind", "name", "least"), LEAST)
def test_a_number_has_a_least_value(kind: Callable[..., Any], name: str, least: int) -> None:
    others = {"n_head": 1} if name == "n_embd" else {}
    assert getattr(kind(**others, **{name: least}), name) == least
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be at least {least}, got {least - 1}"):
        kind(**others, **{name: least - 1})


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_a_decay_is_below_1(name: str) -> None:
    for good in (0.0, 0.9999):
        TrainConfig(**{name: good})
    for bad in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=rf"--{name} must be in \[0, 1\), got {bad}"):
            TrainConfig(**{name: bad})


def test_nothing_that_decides_the_computation_is_left_open() -> None:
    assert None not in [getattr(build(tiny()).config, name) for name in Settled.__annotations__]
    with pytest.raises(ConfigError, match="--steps must be a whole number, got None"):
        dataclasses.replace(build(tiny()).config, steps=None)


# -------------------------------------------------------------------------------------------------- devices


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Pretend to have two GPUs with 80 GiB and the given compute capability."""

    def install(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: mock.Mock(total_memory=80 << 30))

    return install


@pytest.mark.parametrize(
    ("changes", "capability", "dtype", "device"),
    [
        ({}, (9, 0), "bfloat16", "cuda"),
        ({}, (7, 5), "float32", "cuda"),
        ({"dtype": "tf32", "device": "cuda:1"}, (8, 0), "tf32", "cuda:1"),
        ({"dtype": "bfloat16"}, (8, 0), "bfloat16", "cuda"),
        ({"dtype": "float16"}, (7, 5), "float16", "cuda"),
    ],
)
def test_a_gpu_settles_what_was_left_open(two_gpus, changes, capability, dtype, device) -> None:
    two_gpus(capability)
    config, on = settle(TrainConfig(**changes))
    assert (preset_name(config.model_config()), config.batch_size, config.dtype) == ("gpt2", 32, dtype)
    assert on == torch.device(device)
    # Settled values aren't stored as if asked for: another machine may settle others.
    assert (config.model, config.device) == (None, changes.get("device"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, r"bfloat16 needs compute capability 8.0, this GPU has \(7, 5\): use --dtype float16"),
        ({"dtype": "tf32"}, "--dtype tf32 needs an NVIDIA GPU of compute capability 8.0 or newer: use --dtype float32"),
        ({"device": "cuda:2"}, "--device cuda:2: there are 2 CUDA GPUs, numbered from 0"),
        ({"device": "cpu", "dtype": "tf32"}, "--dtype tf32 needs an NVIDIA GPU"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(two_gpus, changes, message) -> None:
    two_gpus((7, 5))
    with pytest.raises(ConfigError, match=message):
        settle(TrainConfig(**changes))


def test_defaults_suit_the_device() -> None:
    without, with_gpu = resolve(TrainConfig(), cuda=False), resolve(TrainConfig(), cuda=True, memory_bytes=80 << 30)
    assert (preset_name(without.model_config()), without.batch_size, without.dtype) == ("mini", 8, "float32")
    assert (preset_name(with_gpu.model_config()), with_gpu.batch_size, with_gpu.dtype) == ("gpt2", 32, "bfloat16")
    assert resolve(TrainConfig(), cuda=True, bf16=False).dtype == "float32"
    sizes = {gib: resolve(TrainConfig(), cuda=True, memory_bytes=gib << 30).batch_size for gib in (4, 8, 16, 24, 48)}
    assert sizes == {4: 1, 8: 4, 16: 8, 24: 16, 48: 32}
    assert resolve(TrainConfig(model="gpt2"), cuda=False, data_vocab_size=257).vocab_size == 257
    assert resolve(TrainConfig(vocab_size=300), cuda=False, data_vocab_size=257).vocab_size == 300
    with pytest.raises(ConfigError, match="--vocab-size 256 is smaller than the vocabulary of --data dummy: 257"):
        resolve(TrainConfig(vocab_size=256), cuda=False, data_vocab_size=257)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 33}, "--n-embd 33 is not divisible by --n-head 2: .*try --n-embd 32"),
        ({"model": "gpt2", "block_size": 2048}, "--block-size 2048 is over the 1024 positions of gpt2"),
        ({"model": "gpt2-mdium"}, "--model must be one of .*, got 'gpt2-mdium'; did you mean 'gpt2-medium'"),
        ({"dtype": "float16"}, "--dtype float16 needs a CUDA GPU"),
        ({"dtype": "bf16"}, "--dtype must be one of .*, got 'bf16'; did you mean 'bfloat16'"),
        ({"device": "gpu"}, "--device 'gpu' is not cpu, cuda, cuda:N or mps"),
        (
            {"attn": "flash"},
            f"--attn must be one of auto, {', '.join(SLOTS['attn'])} or module:function, got 'flash'",
        ),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"lr": float("nan")}, "--lr must be a finite number, got nan"),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\), got 1.0"),
        ({"weight_decay": 0.1}, "--weight-decay needs --optimizer adamw"),
        ({"resume": True}, "--resume needs --out"),
        ({"data": "/nowhere"}, "--data /nowhere: no such file or folder"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        train(tiny(**changes))
    assert "\n" not in str(error.value)
