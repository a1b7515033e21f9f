"""A GPU that is not there: tensors that say they are on `cuda` and refuse what CUDA refuses.

Inside `gpu()` all that a program makes on the device `cuda`, or moves there, lies in main memory under that name. An
operation on tensors of both devices raises, as do a copy to NumPy, random numbers from the other device's generator and
pinned memory that is not main memory. So a machine without a GPU finds where a program forgets its device. It can tell
nothing of speed, memory or rounding, nor of autocast, torch.compile and several processes.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda:0")
ACROSS = {"aten::copy_"}  # what may see both devices
JOINS = {"aten::cat", "aten::stack"}  # what takes no number of the CPU, either
INDEX = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # CUDA, by indices of the CPU


class OnGPU(torch.Tensor):
    """A tensor that says it is on the GPU; its values are the tensor `values`."""

    @staticmethod
    def __new__(cls, values, requires_grad=False):
        x = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=values.device,
            requires_grad=requires_grad,
        )
        x.values = values
        return x

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"OnGPU({self.values})"

    def __reduce_ex__(self, protocol):  # a file knows no device that is not there
        return self.values.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.name().split(".")[0]
        leaves = tree_leaves((args, kwargs))
        written = [a for s, a in zip(func._schema.arguments, args) if s.alias_info and s.alias_info.is_write]
        written += [kwargs["out"]] if "out" in kwargs else []
        here = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU)]
        indices = [id(x) for x in tree_leaves(args[1:2])] if name in INDEX and isinstance(args[0], OnGPU) else []
        wrong = [x for x in here if id(x) not in indices and (x.dim() or name in JOINS or any(x is w for w in written))]
        if wrong and name not in ACROSS:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
        there = [x for x in leaves if isinstance(x, OnGPU)]
        done = func(*tree_map_only(OnGPU, lambda x: x.values, args), **tree_map_only(OnGPU, lambda x: x.values, kwargs))
        if any(x.shape != x.values.shape or x.stride() != x.values.stride() for x in there):
            raise RuntimeError(f"{name}: changes a shape in place, which pretend.py cannot follow")
        if kwargs.get("device") is not None:  # the CPU's: Pretend leaves no other
            return done
        known = {id(x.values): x for x in there} | {id(x): x for x in here}  # what was changed in place is what it was
        return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else cls(x), done)


class Move(torch.autograd.Function):
    """To the other device, and the gradient back."""

    @staticmethod
    def forward(ctx, x, device, dtype, memory_format):
        ctx.was = x.device, x.dtype
        with torch._C.DisableTorchFunction():
            values = x.values if isinstance(x, OnGPU) else x.detach()
            values = values.to(dtype=dtype or x.dtype, memory_format=memory_format or torch.preserve_format, copy=True)
        return OnGPU(values) if device.type == "cuda" else values

    @staticmethod
    def backward(ctx, gradient):
        return move(gradient, *ctx.was), None, None, None


def move(x: torch.Tensor, device: torch.device, dtype=None, memory_format=None, copy=False) -> torch.Tensor:
    """x.to(device, ...)."""
    if device.type != x.device.type:
        return Move.apply(x, device, dtype, memory_format)
    with torch._C.DisableTorchFunction():
        return x.to(dtype=dtype or x.dtype, memory_format=memory_format or torch.preserve_format, copy=copy)


class Pretend(TorchFunctionMode):
    """Takes what names a device before PyTorch looks for it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        here = args[0] if args and isinstance(args[0], torch.Tensor) else None
        name = getattr(func, "__name__", "")
        if here is not None and name in ("to", "cpu", "cuda"):
            memory_format, copy = kwargs.pop("memory_format", None), kwargs.pop("copy", False)
            if name != "to":
                device, dtype = torch.device(name), None
            elif len(args) > 1 and isinstance(args[1], torch.Tensor):
                device, dtype = args[1].device, args[1].dtype
            else:
                device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            return move(here, device or here.device, dtype, memory_format, copy)
        if isinstance(here, OnGPU) and name in ("numpy", "__array__", "pin_memory"):
            raise TypeError(f"{name}: can't convert cuda:0 device type tensor; use Tensor.cpu() first")
        if here is not None and name == "pin_memory":
            return here
        if isinstance(here, OnGPU) and name == "tolist":
            return here.values.tolist()
        if isinstance(here, OnGPU) and name == "new_tensor":
            return OnGPU(here.values.new_tensor(*args[1:], **kwargs))
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if here is not None and device and name == "as_tensor":
            return move(here, device, kwargs.get("dtype"))
        if device and device.type == "cuda":
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
            if isinstance(here, OnGPU):
                return func(*args, **{k: v for k, v in kwargs.items() if k != "device"})
            made = func(*args, **kwargs | {"device": "cpu"})
            return OnGPU(made.detach().clone(), made.requires_grad)
        return func(*args, **kwargs)


@contextlib.contextmanager
def gpu(memory: int = 80 << 30):
    """Inside, `cuda` can be used as if there were one GPU with so many bytes free."""
    there = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda *_: (memory, memory),
        "get_device_name": lambda *_: "a GPU that is not there",
        "max_memory_allocated": lambda *_: 1 << 30,
        "is_current_stream_capturing": lambda: False,
    }
    submit = ThreadPoolExecutor.submit

    def there_too(pool, function, *args):  # a mode is of a thread
        def inside():
            with Pretend():
                return function(*args)

        return submit(pool, inside)

    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with (
            mock.patch.multiple(torch.cuda, **there),
            mock.patch.object(ThreadPoolExecutor, "submit", there_too),
            mock.patch("torch._ops.OpOverload.decompose", lambda *_, **__: NotImplemented),  # by the counter of FLOPs
            mock.patch("torch.accelerator.current_accelerator", lambda *_, **__: None),
            Pretend(),
        ):
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
