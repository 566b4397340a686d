"""Functions and tokens given from outside: what can't be used is refused in one line that names it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2 import ConfigError, train
from fastgpt2.backends.attention import sdpa_attention
from fastgpt2.backends.loss import torch_loss
from fastgpt2.backends.mlp import torch_mlp
from fastgpt2.backends.norm import torch_norm
from fastgpt2.data import GIVEN, DataError
from fastgpt2.toml import load_toml
from tests.trainer.runs import Watch, tiny


def loss(*inputs: Tensor, vocab_size: int) -> Tensor:
    return torch_loss(*inputs, vocab_size=vocab_size)


def in_place(qkv: Tensor, **options: Any) -> Tensor:
    return sdpa_attention(qkv.mul_(1.0), **options)


def see_all(qkv: Tensor, ahead: int | None = None) -> Tensor:
    """Attention to every token, or to so many too many."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    size = qkv.size(1)
    mask = torch.ones(size, size, dtype=torch.bool).tril(size if ahead is None else ahead)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def no_dropout(qkv: Tensor, dropout_p: float, documents: Tensor | None) -> Tensor:
    if dropout_p or documents is not None:
        raise NotImplementedError("no\ndropout")
    return sdpa_attention(qkv)


def first_only(x: Tensor, residual: Tensor | None, *rest: Tensor, last: bool) -> Any:
    """Wrong where the stream ends alone."""
    return torch_norm(x, residual, *rest)


WRONG: dict[str, tuple[str, Callable[..., Any], str]] = {
    "shape": (
        "attn",
        lambda qkv, **_: sdpa_attention(qkv).transpose(1, 2),
        r"must return float32 \(1, 16, 2, 16\), got float32 \(1, 2, 16, 16\)$",
    ),
    "dtype": ("attn", lambda qkv, **_: sdpa_attention(qkv).half(), r"got float16 \(1, 16, 2, 16\)$"),
    "no tensor": ("attn", lambda qkv, **_: None, "got None$"),
    "signature": (
        "attn",
        lambda qkv: sdpa_attention(qkv),
        r"can't be used here: TypeError: .*argument 'dropout_p'; it is called as f\(qkv, dropout_p, documents\)$",
    ),
    "raises": ("attn", lambda qkv, **_: qkv @ qkv, r"RuntimeError: .*\(test_given.py, line \d+\)$"),
    "no gradient": ("attn", lambda qkv, **_: sdpa_attention(qkv).detach(), "has no gradient for q, k, v: it must be"),
    "no gradient of k": (
        "attn",
        lambda qkv, **o: sdpa_attention(
            torch.stack([x.detach() if i == 1 else x for i, x in enumerate(qkv.unbind(2))], 2), **o
        ),
        "has no gradient for k: it must be",
    ),
    "not finite": ("attn", lambda qkv, **o: sdpa_attention(qkv, **o) * math.nan, "returned NaN or infinity for finite"),
    "not causal": (
        "attn",
        lambda qkv, **_: see_all(qkv),
        "is not causal: a token's output changes with a later token$",
    ),
    "sees the next token": ("attn", lambda qkv, **_: see_all(qkv, ahead=1), "is not causal: a token's output"),
    "no gradient of a bias": (
        "mlp",
        lambda x, w_fc, b_fc, w_proj, b_proj: torch_mlp(x, w_fc, b_fc.detach(), w_proj, b_proj),
        "has no gradient for b_fc: it must be",
    ),
    "one result of two": ("norm", lambda *x, last: torch_norm(*x)[0], r"must return \(float32 .*, float32 .*\), got f"),
    "the last norm": ("norm", first_only, r"must return \(float32 .*, None\), got \(float32 .*, float32 .*\)$"),
    "loss of each row": (
        "loss",
        lambda *x, **o: loss(*x, **o).expand(2),
        r"must return float32 \(\), got float32 \(2,\)$",
    ),
    "half a loss": ("loss", lambda *x, **o: loss(*x, **o).bfloat16(), r"must return float32 \(\), got bfloat16 \(\)$"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_function_that_cannot_be_used_is_refused_before_the_run(tmp_path: Path, wrong: str, dtype: str) -> None:
    slot, function, words = WRONG[wrong]
    if dtype == "bfloat16":
        words = words.replace("float32", r"b?float(16|32)")
    with pytest.raises(ConfigError, match=words) as raised:
        train(tiny(dtype=dtype, out=tmp_path), ops={slot: function})
    assert str(raised.value).startswith(f"--{slot} tests.trainer.test_given:")
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_functions_that_do_what_pytorchs_do_train_as_they_do(dtype: str) -> None:
    config = tiny(dtype=dtype, steps=2, dropout=0.1, document_mask=True, end_of_text=3)
    mine = {
        "attn": in_place,
        "mlp": lambda *x: torch_mlp(*x),
        "norm": lambda *x, last: torch_norm(*x, last=last),
        "loss": loss,
    }
    torch_form = tiny(**{**vars(config), "attn": "sdpa", "mlp": "torch", "norm": "torch", "loss": "torch"})
    assert train(config, ops=mine).losses == train(torch_form).losses


def test_what_a_function_lacks_is_told_where_the_run_needs_it() -> None:
    assert len(train(tiny(steps=1), ops={"attn": no_dropout}).losses) == 1
    for needs in ({"dropout": 0.1}, {"document_mask": True, "end_of_text": 3}):
        with pytest.raises(
            ConfigError, match=r"no_dropout can't be used here: NotImplementedError: no dropout \(test_g"
        ):
            train(tiny(**needs), ops={"attn": no_dropout})


def counting(step: int) -> Tensor:
    """(step + position) modulo the vocabulary."""
    return (torch.arange(17) + step).remainder(65).expand(1, 3, 17)


def test_a_run_on_given_tokens_says_so_and_goes_on_with_them_alone(tmp_path: Path) -> None:
    watch, config = Watch(), tiny(steps=3, save_every=2, out=tmp_path)
    whole = train(tiny(steps=5), source=counting).losses
    first = train(config, reporters=[watch], source=counting)
    assert first.config.data == GIVEN == load_toml(tmp_path / "config.toml", "")["data"]
    assert not [note for note in watch.notes if "dummy" in note]
    watch = Watch()
    again = train(tiny(steps=5, out=tmp_path, resume=True), reporters=[watch], source=counting)
    assert first.losses + again.losses == whole
    assert not [note for note in watch.notes if "data" in note]
    with pytest.raises(
        ConfigError, match=r"tokens were given in Python: give them again, by train\(config, source=...\)"
    ):
        train(tiny(steps=6, out=tmp_path, resume=True, data=GIVEN))


def test_given_tokens_are_the_only_ones() -> None:
    with pytest.raises(ConfigError, match="--data dummy-fixed too: leave one of them out"):
        train(tiny(data="dummy-fixed"), source=counting)
    with pytest.raises(
        ConfigError, match=r"--eval-every needs validation tokens, .* fastgpt2.evaluate --from RUN --data"
    ):
        train(tiny(eval_every=2), source=counting)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tokens: tokens[0], r"must return int64 \(1, 3, 17\), got int64 \(3, 17\); nothing is saved$"),
        (lambda tokens: tokens.int(), r"must return int64 \(1, 3, 17\), got int32 \(1, 3, 17\); nothing is saved$"),
        (lambda tokens: tokens.tolist(), r"must return int64 \(1, 3, 17\), got list; nothing is saved$"),
        (lambda tokens: tokens + 49, r"must be in \[0, 65\), the vocabulary; got 49 to 65; nothing is saved$"),
        (lambda tokens: tokens - 1, r"must be in \[0, 65\), the vocabulary; got -1 to 15; nothing is saved$"),
    ],
)
def test_given_tokens_that_do_not_fit_are_refused(change: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(DataError, match=rf"^source\(0\) {words}"):
        train(tiny(), source=lambda step: change(counting(step)))


def test_a_source_that_is_no_function_is_refused() -> None:
    batches: Any = iter([counting(0)])
    with pytest.raises(
        ConfigError, match=r"^source must be a function of the step that returns int64 \(1, 3, 17\) .*, got "
    ):
        train(tiny(), source=batches)
