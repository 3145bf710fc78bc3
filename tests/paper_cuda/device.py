"""
A CUDA device made of paper: for machines without a GPU, to find what would stop on one.

    PAPER_CUDA=1 python -m pytest tests/paper_cuda/test_cuda.py

Tensors say that they are on cuda:0 and compute on the CPU. These things are as on a GPU: an
operation that mixes devices raises an error, torch.rand refuses a generator of the CPU, autocast
gives the dtypes that it gives on CUDA, SYNCS counts how often the program waits for the GPU, and
max_memory_allocated() counts bytes of tensors. Speed, rounding and what a kernel takes or lacks are
not. It needs a C++ compiler and torch's headers, and must be imported before torch.
"""
import ctypes
import functools
import importlib.util
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from pathlib import Path

if "torch" in sys.modules:
    raise ImportError("import device before torch")


def load_guard():
    """Compile device.cpp against the installed torch, which takes two seconds, and load it."""
    home, out = Path(importlib.util.find_spec("torch").origin).parent, tempfile.mkdtemp() + "/guard"
    subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", f"-I{home}/include",
                    Path(__file__).with_suffix(".cpp"), "-o", out, f"-L{home}/lib", "-lc10",
                    "-ltorch_cpu", f"-Wl,-rpath,{home}/lib", "-Wl,--no-as-needed"], check=True)
    return ctypes.CDLL(out, mode=ctypes.RTLD_GLOBAL)


guard = load_guard()

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

# Backward runs in the calling thread. The engine would have a thread for the GPU, if there were one
# before its first backward; it sometimes ends too late for Python, which is then aborted.
torch.autograd.set_multithreading_enabled(False)
torch.ones((), requires_grad=True).backward()
guard.install_guard()

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
SYNCS = Counter()  # how often the program waited for the GPU, by kind
ACROSS = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._index_put_impl_.default}
WAITING = {aten._local_scalar_dense.default: "item", aten.nonzero.default: "nonzero",
           aten._unique2.default: "unique", aten.unique_dim.default: "unique",
           aten.masked_select.default: "masked_select", aten.equal.default: "equal"}
NUMBERS = {aten._local_scalar_dense.default, aten.equal.default}


class Bytes:
    """The memory of one storage, as long as a tensor has it: now and peak are sums over all."""

    now = peak = 0
    of_storage = weakref.WeakValueDictionary()

    def __init__(self, size):
        Bytes.add(size)
        weakref.finalize(self, Bytes.add, -size).atexit = False

    @staticmethod
    def add(size):
        Bytes.now += size
        Bytes.peak = max(Bytes.peak, Bytes.now)

    @staticmethod
    def of(tensor):
        storage = tensor.untyped_storage()
        known = Bytes.of_storage.get(storage._cdata) or Bytes(storage.nbytes())
        Bytes.of_storage[storage._cdata] = known
        return known


class Paper(torch.Tensor):
    """A tensor on cuda:0; `elem` is the CPU tensor that it stands for."""

    @staticmethod
    def __new__(cls, elem):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(),
            dtype=elem.dtype, layout=elem.layout, device=CUDA)
        tensor.elem, tensor.bytes = elem, Bytes.of(elem)
        return tensor

    def __deepcopy__(self, memo):
        copied = super().__deepcopy__(memo)
        copied.bytes = Bytes.of(copied.elem)
        return copied

    def __tensor_flatten__(self):  # module.to() then swaps its parameters for these
        return ["elem"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Paper(inner["elem"])

    def __repr__(self):
        return f"Paper({self.elem})"

    def tolist(self):
        SYNCS["tolist"] += 1
        return self.elem.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __reduce_ex__(self, protocol):
        return rebuild, (self.elem.detach(), self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Sees what makes a tensor on CUDA out of nothing or out of a CPU tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        concerned = Paper in types or kwargs.get("device") is not None
        return compute(func, args, kwargs) if concerned else func(*args, **kwargs)


def rebuild(elem, requires_grad):
    return Paper(elem).requires_grad_(requires_grad)


def each_tensor(function, x):
    """x, a tensor or lists, tuples and dicts of them, with function(tensor) for each tensor."""
    if isinstance(x, torch.Tensor):
        return function(x)
    if isinstance(x, (list, tuple)):
        return type(x)([each_tensor(function, part) for part in x])
    if isinstance(x, dict):
        return {key: each_tensor(function, part) for key, part in x.items()}
    return x


def compute(func, args, kwargs):
    """An operation: check the devices of its tensors, compute it on the CPU, wrap what it gives."""
    tensors = []

    def unwrap(x):
        tensors.append(x)
        return x.elem if isinstance(x, Paper) else x
    args_, kwargs_ = each_tensor(unwrap, (args, kwargs))
    papers = [x for x in tensors if isinstance(x, Paper)]
    device = kwargs.get("device") and torch.device(kwargs["device"])
    here = device.type == "cuda" if device else bool(papers)  # does the result lie on CUDA?
    if device and device.type == "cuda":
        kwargs_["device"] = torch.device("cpu")
    if papers and func not in ACROSS:
        check_devices(func, args, tensors)
    if papers and func in WAITING:
        SYNCS[WAITING[func]] += 1
    if func is aten.copy_.default:
        (args[0].elem if isinstance(args[0], Paper) else args[0]).copy_(args_[1])
        return args[0]
    if func is aten._to_copy.default and here != bool(papers):
        SYNCS["copy to GPU" if here else "copy to CPU"] += args_[0].numel() > 0
        args_ = (args_[0].clone(), *args_[1:])
    out = func(*args_, **kwargs_)
    if not here or func in NUMBERS:
        return out
    out = each_tensor(lambda x: x if isinstance(x, Paper) else Paper(x), out)
    return return_and_correct_aliasing(func, args, kwargs, out) if papers and aliases(func) else out


@functools.cache
def aliases(func):
    """Whether it writes into its arguments or returns a view of them."""
    return any(argument.alias_info for argument in func._schema.arguments)


def check_devices(func, args, tensors):
    """Tensors of both devices raise an error, except numbers on the CPU, and indices there of a
    tensor on CUDA."""
    indices = []
    if func in INDEXING and isinstance(args[0], Paper):
        each_tensor(indices.append, args[1])
        SYNCS["copy to GPU"] += sum(not isinstance(x, Paper) and x.dim() > 0 for x in indices)
        if func is aten.index.Tensor:  # how many are True?
            SYNCS["nonzero"] += sum(x.dtype == torch.bool for x in indices)
    known = set(map(id, indices))
    if any(not isinstance(x, Paper) and x.dim() > 0 and id(x) not in known for x in tensors):
        raise RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and "
                           f"cpu ({func})")


def checked(make, *args, generator=None, device=None, **kwargs):
    """torch.rand and its like, which refuse a generator of another device: all are the CPU's."""
    if generator is not None and torch.device(device or "cpu").type == "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    return make(*args, generator=generator, device=device, **kwargs)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
    """scaled_dot_product_attention by its definition, in the dtype that autocast gives it."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = zeros.masked_fill(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, **kwargs)[0]


def install():
    """From here on there is one GPU, which has bf16."""
    torch.set_num_threads(1)  # of the CPU; its tensors are small
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda query, *args, **kwargs: (
        attention if isinstance(query, Paper) else sdpa)(query, *args, **kwargs)
    for name in ("rand", "randn", "randint", "randperm"):
        setattr(torch, name, functools.partial(checked, getattr(torch, name)))
    answers = dict(_lazy_init=None, is_available=True, is_initialized=True, device_count=1,
                   current_device=0, is_bf16_supported=True, is_current_stream_capturing=False,
                   manual_seed_all=None)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.max_memory_allocated = lambda *args: Bytes.peak
    torch.cuda.memory_allocated = lambda *args: Bytes.now
    torch.cuda.reset_peak_memory_stats = lambda *args: setattr(Bytes, "peak", Bytes.now)
    torch.serialization.add_safe_globals([rebuild])
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device=cuda): a copy, and seen
    Mode().__enter__()
    import transformers
    save = transformers.PreTrainedModel.save_pretrained
    transformers.PreTrainedModel.save_pretrained = lambda self, folder, **kwargs: save(
        self, folder, state_dict={name: x.detach().cpu() for name, x in self.state_dict().items()},
        **kwargs)
