"""Devices that are not there: tensors that lie on the CPU, say that they are on "pretended:0" or "pretended:1", and refuse to
be computed with across devices, as those of GPUs do. Copies between devices are counted."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


class _Backend:
    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


backend_registration._setup_privateuseone_for_python_backend("pretended", _Backend())


class PretendTensor(torch.Tensor):
    """A view of the CPU tensor `inner` on the device `pretended`."""

    @staticmethod
    def __new__(cls, inner, pretended):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=inner.device, dispatch_device=True,
        )  # fmt: skip

    def __init__(self, inner, pretended):
        self.inner, self.pretended = inner, torch.device(pretended)

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        if function is torch.ops.prim.device.default:
            return arguments[0].pretended
        raise AssertionError(f"{function} outside of pretended_devices()")


class _Pretending(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.copies = []  # (shape, from, to)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.prim.device.default:
            return arguments[0].pretended
        options = dict(options or {})
        tensors = [x for x in tree_flatten((arguments, options))[0] if isinstance(x, torch.Tensor)]
        # a number in a tensor goes along with tensors on any device
        devices = {x.device for x in tensors if isinstance(x, PretendTensor) or x.dim() > 0}
        target = options.get("device")
        if target is not None and torch.device(target).type == "pretended":
            options["device"] = torch.device("cpu")
        name = function.overloadpacket._qualified_op_name
        if len(devices) > 1 and name not in ("aten::copy_", "aten::index", "aten::index_put_"):
            raise RuntimeError(f"{name}: tensors on different devices, {sorted(map(str, devices))}")
        found = function(*tree_map(_inner, arguments), **tree_map(_inner, options))
        device = torch.device(target) if target is not None else tensors[0].device if tensors else torch.device("cpu")
        if target is None and devices and tensors and tensors[0].dim() == 0:
            device = next(iter(devices))
        if name == "aten::_to_copy" and tensors[0].device != device:
            self.copies.append((tuple(tensors[0].shape), str(tensors[0].device), str(device)))
        if name.endswith("_") and not name.endswith("__") and isinstance(arguments[0], torch.Tensor):
            return arguments[0]
        if device.type == "cpu":
            return found
        return tree_map(lambda x: PretendTensor(x, device) if isinstance(x, torch.Tensor) else x, found)


def _inner(x):
    return x.inner if isinstance(x, PretendTensor) else x


def _tensor(data, *, device=None, _original=torch.tensor, **options):
    """`torch.tensor`, which makes its result without asking modes."""
    made = _original(data, **options)
    return made if device is None else made.to(device)


@contextmanager
def pretended_devices():
    """Within it `.to("pretended:1")` works without a GPU. Yields the list of copies between devices, (shape, from, to)."""
    with mock.patch("torch.tensor", _tensor), _Pretending() as mode:
        yield mode.copies
