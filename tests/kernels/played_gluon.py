"""Gluon played on the CPU: a kernel's own source, with its warp roles interleaved at random.

Triton interprets no Gluon. Here the source of a kernel runs as Python on torch tensors. Its functions are made into
generators that pause at every barrier, copy and product; which role goes on, or which copy lands, is drawn. Products
read their operands when they are waited for, as late as the hardware may.

A fault is an AssertionError: a deadlock, a tile overwritten while a product may read it, a tile read before its copy
has landed, a result used in flight, an arrival too many, bytes that nobody expected.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, TypeGuard

import torch
from torch import Tensor


@dataclass
class Role:
    """One of a program's roles, what it waits for, and the products that it hasn't waited for."""

    steps: Steps
    ready: Callable[[], bool] = lambda: True
    flying: list[Product] = field(default_factory=list)


@dataclass
class Barrier:
    arrivals: int
    missing: int
    bytes: int = 0
    phase: int = 0

    def change(self, arrivals: int = 0, bytes: int = 0) -> None:
        self.missing -= arrivals
        self.bytes += bytes
        assert self.missing >= 0, "an arrival too many"
        if self.missing == 0:
            assert self.bytes >= 0, "bytes that nobody expected"
            if self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.arrivals


class Ring:
    """Tiles or barriers in shared memory."""

    def __init__(self, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self.dtype, self.shape = dtype, list(shape)
        self.tiles = [Tile(torch.empty(self.shape[1:], dtype=dtype)) for _ in range(self.shape[0])]

    def index(self, i: int) -> Tile:
        assert 0 <= i < self.shape[0]
        return self.tiles[i]


@dataclass
class Tile:
    """A tile, or a view of one. `barrier`: of a ring of barriers."""

    data: Tensor
    landing: list[int] = field(default_factory=list)  # copies under way
    readers: list[int] = field(default_factory=list)  # products that may still read it
    barrier: Barrier | None = None

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def reshape(self, shape: Sequence[int]) -> Tile:
        return Tile(self.data.view(shape), self.landing, self.readers)

    def permute(self, order: Sequence[int]) -> Tile:
        return Tile(self.data.permute(*order), self.landing, self.readers)

    def load(self, layout: Any) -> Tensor:
        assert not self.landing, "a tile is read before its copy has landed"
        return self.data.clone()


@dataclass(eq=False)
class Product:
    a: Any
    b: Tile
    accumulator: Tensor | None

    def __post_init__(self) -> None:
        for tile in self.tiles():
            assert not tile.landing, "a tile is read before its copy has landed"
            tile.readers.append(id(self))

    def tiles(self) -> list[Tile]:
        return [x for x in (self.a, self.b) if isinstance(x, Tile)]

    def finish(self) -> None:
        a = self.a.data if isinstance(self.a, Tile) else self.a
        self.value = a.to(torch.float64) @ self.b.data.to(torch.float64)
        if self.accumulator is not None:
            self.value += self.accumulator
        for tile in self.tiles():
            tile.readers.remove(id(self))


@dataclass
class Pointer:
    memory: Tensor
    offset: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=SimpleNamespace(primitive_bitwidth=8 * self.memory.itemsize))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


@dataclass
class Descriptor:
    """A tensor of any rank, copied in boxes; what lies outside is zeros."""

    base: Tensor
    box: list[int]

    def __post_init__(self) -> None:
        self.dtype, self.layout = self.base.dtype, None
        self.block_type = SimpleNamespace(shape=self.box, nbytes=math.prod(self.box) * self.base.itemsize)

    def read(self, at: Sequence[Any]) -> Tensor:
        box = torch.zeros(self.box, dtype=self.dtype)
        part = self.base[tuple(slice(int(i), int(i) + n) for i, n in zip(at, self.box, strict=True))]
        box[tuple(slice(n) for n in part.shape)] = part
        return box


Steps = Iterator[Callable[[], bool]]
"""Where a role may pause: each is what it waits for."""


def always() -> bool:
    return True


class Machine:
    """Runs a kernel's programs, one after the other."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.program = self.programs = 0
        self.role: Role
        self.copies: list[Callable[[], None]] = []

    def specialize(self, roles: Sequence[tuple[Callable[..., Steps], tuple]], warps: Any, registers: Any) -> None:
        running = [Role(function(*given)) for function, given in roles]
        every = list(running)
        speed = self.draw.random()  # of copies: where it is low, one may land long after those that were issued later
        while running:
            ready = [role for role in running if role.ready()]
            assert ready or self.copies, "a deadlock: every role waits, no copy is under way"
            if self.copies and (not ready or self.draw.random() < speed):
                self.copies.pop(self.draw.randrange(len(self.copies)))()
                continue
            way = self.draw.choice(ready)
            self.role = way
            try:
                way.ready = next(way.steps)
            except StopIteration:
                running.remove(way)
        assert not self.copies, "a copy lands after the program has ended"
        assert not any(role.flying for role in every), "a product is never waited for"

    def wait(self, tile: Tile, parity: int) -> Steps:
        barrier = tile.barrier
        yield lambda: barrier.phase % 2 != parity

    def arrive(self, tile: Tile, pred: bool = True) -> Steps:
        yield always
        if pred:
            tile.barrier.change(arrivals=1)

    def expect(self, tile: Tile, bytes: int) -> Steps:
        yield always
        tile.barrier.change(arrivals=1, bytes=bytes)

    def init(self, tile: Tile, count: int) -> None:
        tile.barrier = Barrier(count, count)

    def copy(self, descriptor: Descriptor, at: Sequence[Any], barrier: Tile, tile: Tile) -> Steps:
        yield always
        assert not tile.readers, "a tile is overwritten while a product may read it"
        assert not tile.landing, "a tile is overwritten while a copy is under way"
        tile.data.fill_(math.nan)
        tile.landing.append(1)

        def land() -> None:
            assert not tile.readers, "a tile is overwritten while a product may read it"
            tile.data.copy_(descriptor.read(at))
            tile.landing.pop()
            barrier.barrier.change(bytes=-descriptor.block_type.nbytes)

        self.copies.append(land)

    def product(self, a: Any, b: Tile, accumulator: Tensor, *, use_acc: bool = True, is_async: bool) -> Steps:
        yield always
        assert is_async and isinstance(accumulator, Tensor), "a result is used in flight"
        found = Product(a, b, accumulator if use_acc else None)
        self.role.flying.append(found)
        return found

    def wait_for_products(self, outstanding: int, deps: Sequence[Any]) -> Steps:
        yield always
        flying = self.role.flying
        while len(flying) > outstanding:
            flying.pop(0).finish()
        assert not any(x in flying for x in deps if isinstance(x, Product)), "a result is used in flight"
        found = tuple(x.value if isinstance(x, Product) else x for x in deps)
        return found if len(found) > 1 else found[0]


def _static_assert(holds: bool, message: str) -> None:
    assert holds, message


def _load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
    found = torch.full(mask.shape, other, dtype=pointer.memory.dtype)
    found[mask] = pointer.memory.view(-1)[torch.as_tensor(pointer.offset).expand(mask.shape)[mask]]
    return found


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    where, mask = torch.broadcast_to(torch.as_tensor(pointer.offset), value.shape), mask.expand(value.shape)
    pointer.memory.view(-1)[where[mask]] = value[mask].to(pointer.memory.dtype)


def _language(machine: Machine) -> dict[str, Any]:
    """Gluon's and Triton's functions, by name."""
    return {
        "arange": lambda start, end, layout: torch.arange(start, end),
        "zeros": lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        "full": lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        "where": lambda condition, x, y: torch.where(condition, x, y),
        "max": lambda x, axis: x.amax(axis),
        "sum": lambda x, axis: x.sum(axis),
        "exp2": torch.exp2,
        "log2": torch.log2,
        "maximum": lambda x, y: torch.maximum(x, torch.as_tensor(y)) if isinstance(x, Tensor) else max(x, y),
        "minimum": min,
        "cdiv": lambda x, y: -(-x // y),
        "cast": lambda x, dtype: torch.as_tensor(x),
        "load": _load,
        "store": _store,
        "convert_layout": lambda x, layout: x,
        "allocate_shared_memory": lambda dtype, shape, layout: Ring(dtype, shape),
        "program_id": lambda axis: machine.program,
        "num_programs": lambda axis: machine.programs,
        "static_range": range,
        "warp_specialize": machine.specialize,
        "static_assert": _static_assert,
        "float32": torch.float64,
        "int32": torch.int32,
        "int64": torch.int64,
        **dict.fromkeys(("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout"), lambda *_: None),
    }


def play(
    module: ModuleType,
    shared: dict[str, Callable],
    values: dict[str, Any],
    seed: int,
    change: tuple[str, str] | None = None,
) -> tuple[Machine, dict[str, Any]]:
    """A module's Gluon functions as Python, on a machine.

    Args:
        shared: @triton.jit functions that the module uses under these names.
        values: of the module's constants, and of other modules' that the shared functions use.
        change: a fault to plant: a text of the module that is there once, and what takes its place.
    """
    machine = Machine(seed)
    language = _language(machine)
    gl = SimpleNamespace(**language)
    names: dict[str, Any] = {
        "gl": gl,
        "tl": gl,
        "mbarrier": SimpleNamespace(
            wait=machine.wait,
            arrive=machine.arrive,
            expect=machine.expect,
            init=machine.init,
            MBarrierLayout=lambda: None,
        ),
        "copy_tile": machine.copy,
        "warpgroup_mma": machine.product,
        "warpgroup_mma_wait": machine.wait_for_products,
        "warpgroup_mma_init": lambda value: value,
        "fence_async_shared": lambda: None,
        **values,
    }
    source = inspect.getsource(module)
    if change is not None:
        assert source.count(change[0]) == 1, change
        source = source.replace(*change)
    texts = [source, *(inspect.getsource(function.fn) for function in shared.values())]
    functions = [part for text in texts for part in ast.parse(text).body if _jitted(part)]
    pausing = _Pausing({*PAUSING, *shared, *(function.name for function in functions)})
    for function in functions:
        function.decorator_list = []
        function.body = [*ast.parse("if False: yield").body, *(pausing.visit(line) for line in function.body)]
    module_ = ast.fix_missing_locations(ast.Module(functions, []))
    exec(compile(module_, module.__name__, "exec", __future__.annotations.compiler_flag), names)
    names |= {name: names[function.fn.__name__] for name, function in shared.items()}
    return machine, names


PAUSING = ("mbarrier.wait", "mbarrier.arrive", "mbarrier.expect", "copy_tile", "warpgroup_mma", "warpgroup_mma_wait")


class _Pausing(ast.NodeTransformer):
    """Makes a call of one of these functions pause wherever the function does."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        return ast.YieldFrom(node) if ast.unparse(node.func) in self.names else node


def _jitted(part: ast.stmt) -> TypeGuard[ast.FunctionDef]:
    return isinstance(part, ast.FunctionDef) and any(
        ast.unparse(decorator).split("(")[0].endswith(".jit") for decorator in part.decorator_list
    )
