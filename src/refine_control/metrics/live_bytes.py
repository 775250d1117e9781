"""Bytes of the tensors that are alive while something runs, real ones or tensors of the meta device, and their peak.

On the meta device tensors have shapes and no data, so a step of a network that no memory here holds can be counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from refine_control.metrics.cost import flop_formulas


class _Spec(NamedTuple):
    """What a tensor of the meta device is."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Spec:
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def new(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class LiveBytes(TorchDispatchMode):
    """While entered, counts the storages on `device` that operators make, by the name of what is running.

    A storage counts once, whatever looks at it, until the last tensor lets it go. Memory inside of an operator (the
    workspace of a convolution) is not seen."""

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device, self.running = device, "rest"
        self.alive: Counter[str] = Counter()
        """Bytes by name."""
        self.total = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        """`alive` when there was most."""
        self.flops = 0
        """As `cost.count_flops` has them. Its mode around this one would keep what checkpointing recomputes."""
        self._formulas = flop_formulas()
        self._known: set[int] = set()
        self._specs: dict[Any, Any] = {}

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """What is made inside counts under this name; the innermost one is taken."""
        before, self.running = self.running, name
        try:
            yield
        finally:
            self.running = before

    def naming(self, name: Callable[..., str], fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, its tensors under the name that `name` gives for its arguments."""

        def call(*args: Any) -> Any:
            with self.named(name(*args)):
                return fn(*args)

        return call

    def hold(self, name: str, tensors: Iterable[torch.Tensor]) -> int:
        """Counts tensors that were there before, each storage once; their bytes, those counted before left out."""
        before = self.alive[name]
        with self.named(name):
            for tensor in tensors:
                self._count(tensor)
        return self.alive[name] - before

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key, size, name = storage._cdata, storage.nbytes(), self.running
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._free, key, size, name).atexit = False
        self.alive[name] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, self.alive.copy()

    def _free(self, key: int, size: int, name: str) -> None:
        self._known.remove(key)
        self.alive[name] -= size
        self.total -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._run(func, args, kwargs or {})
        if (formula := self._formulas.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._count(value)
        return out

    def _run(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The result; of an operator on the meta device that was called alike before, tensors like those of then.

        torch computes the shapes of many operators in Python, which takes most of the time."""
        if self.device != "meta" or _has_alias(func):
            return func(*args, **kwargs)
        key = func, *map(_key, args), *map(_key, kwargs.items())
        if key not in self._specs:
            out = func(*args, **kwargs)
            results = [value for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
            storages = {value.untyped_storage()._cdata for value in results if value.device.type == "meta"}
            if len(storages) == len(results) and not storages & self._known:  # each has memory of its own
                self._specs[key] = tree_map_only(torch.Tensor, _Spec.of, out)
            return out
        return _new_tensors(self._specs[key])


@cache
def _has_alias(func: Any) -> bool:
    """Whether an operator writes to its arguments or returns a view of one."""
    return any(each.alias_info for each in (*func._schema.arguments, *func._schema.returns))


def _key(value: Any) -> Any:
    """What an argument is, without values of tensors: hashable. 1 is another argument than 1.0 or True."""
    if isinstance(value, torch.Tensor):
        return value.device.type, value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    return type(value), value


def _new_tensors(specs: Any) -> Any:
    """Tensors of these specs, in the same lists and tuples."""
    if isinstance(specs, _Spec):
        return specs.new()
    return type(specs)(_new_tensors(each) for each in specs) if isinstance(specs, (list, tuple)) else specs
