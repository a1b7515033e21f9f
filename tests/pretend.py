"""A GPU that is not there: tensors that say they are on `cuda` and refuse what CUDA refuses.

Inside `gpu()` all that a program makes on the device `cuda`, or moves there, lies in main memory under that name. An
operation on tensors of both devices raises, as do a copy to NumPy, random numbers from the other device's generator and
pinned memory that is not main memory. So a machine without a GPU finds where a program forgets its device. It can tell
nothing of speed, memory or rounding, and mixed precision is left out (torch.autocast looks for the real thing).
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda:0")
ACROSS = {"aten::copy_"}  # what may see both devices
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
        strangers = [x for x in leaves if elsewhere(x)]
        indices = [x for x in tree_leaves(args[1:2]) if elsewhere(x)] if name in INDEX else []
        if len(strangers) > len(indices) and name not in ACROSS:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
        wrapped = {id(x.values): x for x in leaves if isinstance(x, OnGPU)}
        done = func(*tree_map_only(OnGPU, lambda x: x.values, args), **tree_map_only(OnGPU, lambda x: x.values, kwargs))
        known = wrapped | {id(x): x for x in strangers}  # what was changed in place is the tensor that it was
        return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else cls(x), done)


def elsewhere(x) -> bool:
    """Whether x is a tensor of the CPU with dimensions: a number may come from anywhere."""
    return isinstance(x, torch.Tensor) and not isinstance(x, OnGPU) and x.dim() > 0


def move(x: torch.Tensor, device: torch.device, dtype=None, memory_format=None, copy=False) -> torch.Tensor:
    """x.to(device, ...)."""
    more = {} if memory_format is None else {"memory_format": memory_format}
    if device.type == x.device.type:
        with torch._C.DisableTorchFunction():
            return x.to(dtype=dtype or x.dtype, copy=copy, **more)
    assert x.is_leaf or not x.requires_grad, "no gradients between devices here"
    with torch._C.DisableTorchFunction():
        values = (x.values if isinstance(x, OnGPU) else x.detach()).to(dtype=dtype or x.dtype, copy=True, **more)
    return OnGPU(values) if device.type == "cuda" else values


class Pretend(TorchFunctionMode):
    """Takes what names a device before PyTorch looks for it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        here = args[0] if args and isinstance(args[0], torch.Tensor) else None
        name = getattr(func, "__name__", "")
        if here is not None and name in ("to", "cpu", "cuda"):
            if name == "to" and not (len(args) > 1 and isinstance(args[1], torch.Tensor)):
                memory_format, copy = kwargs.pop("memory_format", None), kwargs.pop("copy", False)
                device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            else:
                device, dtype, memory_format, copy = torch.device("cpu" if name == "cpu" else "cuda"), None, None, False
            return move(here, device or here.device, dtype, memory_format, copy)
        if isinstance(here, OnGPU) and name in ("numpy", "__array__", "pin_memory"):
            raise TypeError(f"{name}: can't convert cuda:0 device type tensor; use Tensor.cpu() first")
        if here is not None and name == "pin_memory":
            return here
        if isinstance(here, OnGPU) and name == "tolist":
            return here.values.tolist()
        if isinstance(here, OnGPU) and name == "new_tensor":
            return OnGPU(here.values.new_tensor(*args[1:], **kwargs))
        if "device" in kwargs and kwargs["device"] is not None and torch.device(kwargs["device"]).type == "cuda":
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
            made = func(*args, **kwargs | {"device": here.values.device if isinstance(here, OnGPU) else "cpu"})
            return made if isinstance(made, OnGPU) else OnGPU(made.detach(), made.requires_grad)
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
        "set_device": lambda *_: None,
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
