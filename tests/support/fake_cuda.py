"""Steps on CUDA tensors that have shapes and devices but no data, so that the host's side of the CUDA path runs on any
machine.

`pretend` makes torch believe in a GPU, for this process alone and for good; `Watch` notes, while it is on, what a GPU
would punish: copies that block, values read from the device, operators that got tensors of several devices. Kernels
are replaced by `Launches`, which returns results in their shapes.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import sys
import traceback
import types

import fake_cuda_driver

DRIVER = fake_cuda_driver.load()  # before torch, which asks for a driver once

import torch  # noqa: E402
import torch._subclasses.fake_tensor as fake  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402


def pretend() -> None:
    """Make torch believe in one GPU."""
    DRIVER.use_guard()
    for kind in ("cudnn", "flash", "mem_efficient"):  # of attention; they ask the GPU whether it has them
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    fake.init_gpu_context = lambda *a, **k: None
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    sizes = {"total_memory": 1 << 37, "L2_cache_size": 60 << 20, "regs_per_multiprocessor": 1 << 16, "warp_size": 32}
    sizes |= {"multi_processor_count": 132, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024}
    properties = types.SimpleNamespace(major=9, minor=0, name="fake", gcnArchName="", **sizes)
    stream = types.SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    event = types.SimpleNamespace(record=lambda *a: None, synchronize=lambda: None, query=lambda: True)
    torch.nn.Module._apply = _moved  # torch's own swaps the insides of tensors, which these do not allow
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "fake",
        "get_device_properties": properties,
        "is_current_stream_capturing": False,
        "is_bf16_supported": True,
        "current_stream": stream,
        "get_rng_state_all": [],
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "max_memory_allocated": 0,
        "Event": event,
        "_lazy_init": None,
    }.items():
        setattr(torch.cuda, name, lambda *a, _value=value, **k: _value)
    import evenstep.kernels.cuda as kernels

    plain = kernels.is_plain
    # They have no data, and what stands in for the launches needs none.
    kernels.is_plain = lambda x: plain(x) or isinstance(x, FakeTensor)
    kernels.all_plain = lambda tensors: all(map(kernels.is_plain, tensors))
    kernels.launches = lambda: Launches


class Launches:
    """In place of the functions of cuda_launch.py: results in their shapes, for tensors that are all on one device."""

    @staticmethod
    def _table(rows: int, count: int, *given: object) -> Tensor:
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        assert {x.device.type for x in tensors} == {"cuda"}, [x.device for x in tensors]
        return tensors[0].new_empty(rows, count, dtype=torch.float32)

    @classmethod
    def measure(cls, grads):
        return cls._table(2, len(grads), grads), cls._table(2, sum(-(-g.numel() // 16384) for g in grads), grads)

    @classmethod
    def clip_norms(cls, grads, known, limit, rescale):
        return cls._table(2, len(grads), grads, known, limit, rescale)

    @classmethod
    def adam_step_(cls, tensors, options, stable, capped, zero_history):
        assert options.shape == (22,) and options.dtype == torch.float64, options
        assert len(tensors.scalars) == len(tensors.params) * (5 if stable else 1)
        return cls._step(tensors, options)

    @classmethod
    def scale_step_(cls, tensors, options, rms, columns, floor):
        assert options.shape == (4,) and options.dtype == torch.float64, options
        return cls._step(tensors, options)

    @classmethod
    def _step(cls, tensors, options):
        from evenstep.optim.distributed import plain_parts

        lists = [getattr(tensors, field.name) for field in dataclasses.fields(tensors)]
        return cls._table(8, len(tensors.params), options, [list(plain_parts(x)) for several in lists for x in several])

    @classmethod
    def save_unless(cls, flags, places, tensors):
        here = [x for x in tensors if x.is_cuda]
        assert len(places) == len(tensors) and all(x.is_contiguous() for x in here)
        left_out = [i for i, x in enumerate(tensors) if not x.is_cuda]
        return types.SimpleNamespace(table=cls._table(1, 1, flags, here), pointers=[], left_out=left_out)

    @classmethod
    def restore_unless(cls, saved):
        cls._table(1, 1, saved.table)

    @classmethod
    def transformed_(cls, out, grads, numbers, columns):
        assert len(out) == len(grads) == len(columns)
        cls._table(1, 1, out, grads, numbers)

    @classmethod
    def adaclip(cls, peak, gain, ema, n, settings):
        assert settings.shape == (2,) and settings.dtype == torch.float64, settings
        return cls._table(3, len(peak), peak, gain, ema, n, settings)

    @classmethod
    def adagn(cls, raw, norm, gain, ema, rms, n, flags, settings):
        assert settings.shape == (4,) and settings.dtype == torch.float64, settings
        return cls._table(3, len(gain), raw, norm, gain, ema, rms, n, flags, settings), torch.empty_like(flags)

    @classmethod
    def scalars(cls, tensors):
        return cls._table(1, len(tensors), tensors)[0]

    @classmethod
    def read_scalars(cls, at):
        return cls._table(1, len(at), at)[0]

    @classmethod
    def keep_scalars(cls, at, new, finite):
        assert len(at) == len(finite) + new.numel()
        cls._table(1, 1, at, new, finite)


def _moved(module, fn, recurse=True):
    for child in module.modules():
        for kept in (child._parameters, child._buffers):
            for name, x in kept.items():
                if x is not None and not hasattr(x, "moved_to"):  # a tied one stays one
                    x.moved_to = fn(x.detach())
                    if kept is child._parameters:
                        x.moved_to = torch.nn.Parameter(x.moved_to, x.requires_grad)
                kept[name] = None if x is None else x.moved_to
    return module


READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique_dim"),
    *("_unique", "_unique2", "unique_consecutive", "bincount", "repeat_interleave.Tensor"),
}
"""Operators that make the host wait for a value of the device."""

BINARY = {
    *("add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "pow", "remainder", "fmod", "hypot", "atan2"),
    *("maximum", "minimum", "fmax", "fmin", "copysign", "eq", "ne", "lt", "le", "gt", "ge"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "logical_and", "logical_or", "logical_xor"),
}
"""Operators that take one 0-d tensor of the CPU among tensors of a device, as an argument of the kernel: no copy."""


class Watch(TorchDispatchMode):
    """Notes what would wait for the device, or fail on it, each with the line of evenstep that it came from.

    ``settled``: constants are where they belong by now, and any copy to the device is one too many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: collections.Counter[str] = collections.Counter()
        self.settled = False
        self.pinned: dict[int, object] = {}

    def note(self, what: str) -> None:
        ours = [f for f in traceback.extract_stack() if "/evenstep/" in f.filename]
        at = f"{ours[-1].filename.split('/evenstep/')[-1]}:{ours[-1].lineno}" if ours else "?"
        self.notes[f"{what} at {at}"] += 1

    def is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.pinned

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense" and args[0].device.type == "cpu":  # it has no value here, and may be read
            return 1.0 if args[0].is_floating_point() else args[0].dtype != torch.bool or True
        pins = name == "_pin_memory" or kwargs.pop("pin_memory", False)
        self._reads(name, func._overloadname, args, kwargs)
        out = args[0].clone() if name == "_pin_memory" else func(*args, **kwargs)
        if pins:
            storage = out.untyped_storage()
            self.pinned[storage._cdata] = storage  # kept, so that no other gets its address
        ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self._look(name, args, kwargs, ins, outs)
        return out

    def _reads(self, name, overload, args, kwargs):
        if not any(isinstance(t, Tensor) and t.is_cuda for t in tree_leaves((args, kwargs))):
            return
        if name in READS or f"{name}.{overload}" in READS:
            self.note(f"reads the device ({name})")
        indexed = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if indexed and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.note(f"reads the device ({name} by a mask)")

    def _look(self, name, args, kwargs, ins, outs):
        devices = {t.device.type for t in ins}
        if name in ("_to_copy", "copy_") and ins and outs:
            source, target = ins[-1], outs[0]
            if {source.device.type, target.device.type} == {"cpu", "cuda"}:
                waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
                host = source if source.device.type == "cpu" else target
                what = f"copy of {tuple(source.shape)} from {source.device.type} to {target.device.type}"
                if waits:
                    self.note(f"blocking {what}")
                elif not self.is_pinned(host):
                    self.note(f"{what} in memory that is not pinned, which blocks")
                elif self.settled and host is source:
                    self.note(f"{what} at a later step")
            return None
        if len(devices) < 2:
            return None
        host = [t for t in ins if t.device.type == "cpu"]
        if any(t.dim() for t in host) or name.startswith("evenstep::"):
            return self.note(f"mixed devices into {name}")
        if name == "where":
            return self.note("blocking copy of a 0-d tensor into where")
        if not (name.rstrip("_") in BINARY and len(host) == 1):
            return self.note(f"mixed devices into {name}")
        return None


def size(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def alike(tensors):
    """Groups of tensors that share a launch: those alike in dtype and alignment."""
    return len({(x.dtype, x.numel() % 16 == 0) for x in tensors})


LAUNCHED = {
    # Measuring, clipping and updating have a launch for each group of tensors that are alike; limits, numbers and the
    # report have one for all.
    "adam_step_": lambda tensors, options, stable, *_: alike(tensors.grads) * (2 + stable) + 2 + stable,
    "measure": lambda grads: alike(grads) + 1,
    "clip_norms": lambda grads, *_: alike(grads) + 1,
    "transformed_": lambda out, *_: alike(out),
    **dict.fromkeys(("adaclip", "adagn", "read_scalars", "keep_scalars"), lambda *_: 1),
    **dict.fromkeys(("save_unless", "restore_unless"), lambda *_: 1),
    "scalars": lambda *_: 0,
}
"""Function of cuda_launch.py -> its launches, by its arguments."""


class Counter(Watch):
    """Counts what would be launched while it is on, and bytes: ATen operators that make a tensor or change one that
    they return, and the Triton kernels of functions that are launched through `launches`."""

    operators = triton = moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        ins, outs = ([x for x in tree_leaves(y) if isinstance(x, Tensor) and x.is_cuda] for y in ((args, kwargs), out))
        if outs and not view and "empty" not in func._schema.name:
            self.operators += 1
            only_written = func._schema.name in ("aten::copy_", "aten::fill_", "aten::zero_")
            self.moved += size(outs) + size(ins[only_written:])
        return out

    def launches(self):
        """A stand-in for cuda_launch.py, which counts."""
        return types.SimpleNamespace(**{name: functools.partial(self._launched, name) for name in LAUNCHED})

    def _launched(self, name, *given):
        before = self.operators, self.moved  # what the stand-in does itself does not count
        self.triton += LAUNCHED[name](*given)
        found = getattr(Launches, name)(*given)
        self.operators, self.moved = before
        return found


def watched(work, steps=3, *, settles=True):
    """What `Watch` noted in the calls of ``work``, from the second on without any copy to the device if it
    ``settles``; an exception is noted too."""
    watch = Watch()
    try:
        for i in range(steps):
            watch.settled = settles and i > 0
            with watch:
                work()
    except Exception as problem:
        if os.environ.get("FAKE_CUDA_RAISE"):
            raise
        first = next(iter(str(problem).splitlines()), "")
        last = traceback.extract_tb(problem.__traceback__)
        ours = [f for f in last if "/evenstep/" in f.filename] or last
        at = f"{ours[-1].filename.split('/evenstep/')[-1]}:{ours[-1].lineno}"
        watch.notes[f"raises {type(problem).__name__}: {first[:160]} at {at}"] += 1
    return [f"{count} x {what}" for what, count in watch.notes.most_common()]


def main(every: int, parts: list[str]) -> None:
    """Print what every n-th case of the given parts (`fake_cuda_cases`) noted, as JSON: {case: notes}."""
    import itertools
    import json
    import warnings

    warnings.simplefilter("ignore")
    pretend()
    import fake_cuda_cases as cases

    found = {}
    for part in parts:
        for case, work in itertools.islice(getattr(cases, part)(), 0, None, every):
            with FakeTensorMode(allow_non_fake_inputs=True):
                found[f"{part}: {case}"] = work()
    print(json.dumps(found))


if __name__ == "__main__":
    sys.modules["fake_cuda"] = sys.modules["__main__"]
    main(int(sys.argv[1]), sys.argv[2:])
