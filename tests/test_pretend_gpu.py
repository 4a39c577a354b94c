"""Whole runs on a pretend GPU: what a GPU would refuse, and where the host would wait for it.

Tensors that belong on the GPU are marked; the arithmetic is that of the CPU, in fp32. Operations that mix both kinds fail, as
CUDA's do. Kernels, bf16, memory and streams need a real GPU: test_cuda.py.
"""

import importlib
import sys

import pytest
import torch
from helpers import ROOT, here, result
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import run
from tasks import files

GPU = torch.device("cuda", 0)
on_gpu = lambda t: getattr(t, "on_gpu", False)
# functions whose result or its size depends on values, so that the host has to wait for them
WAITS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "unique", "masked_select", "equal"}
ANY_DEVICE = {"copy_", "_has_compatible_shallow_copy_type"}


def mark(out, gpu):
    for leaf in tree_leaves(out):
        if isinstance(leaf, torch.Tensor):
            leaf.on_gpu = gpu
    return out


class PretendGpu(TorchFunctionMode):
    def __init__(self):
        self.waits = []  # where the host waited: (function, file:line)

    def wait(self, name):
        frame = sys._getframe(1)
        while frame.f_back and (frame.f_code.co_filename == __file__ or not frame.f_code.co_filename.startswith(str(ROOT))):
            frame = frame.f_back
        self.waits.append((name, f"{frame.f_code.co_filename.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"))

    def move(self, t, *args, **kwargs):
        """t.to(...)"""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        gpu = on_gpu(args[0]) if args and isinstance(args[0], torch.Tensor) else device.type == "cuda" if device else on_gpu(t)
        if gpu != on_gpu(t) and not (gpu and non_blocking):
            self.wait("to")
        return mark(t.to(dtype or t.dtype, copy=gpu != on_gpu(t)), gpu)

    def check(self, name, args, tensors):
        """Raise what CUDA raises where a function gets tensors of both devices."""
        index = []
        if name in ("__getitem__", "__setitem__", "index_put", "index_put_") and on_gpu(args[0]):
            index = [i for i in tree_leaves(args[1]) if isinstance(i, torch.Tensor)]
            if any(not on_gpu(i) or i.dtype == torch.bool for i in index):  # an index may come from the CPU
                self.wait(name)
        others = [t for t in tensors if not on_gpu(t) and t.ndim > 0 and not any(t is i for i in index)]
        if others and name not in ANY_DEVICE:
            where = [("cuda" if on_gpu(t) else "cpu", tuple(t.shape)) for t in tensors]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device: {where}")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        gpu = any(map(on_gpu, tensors))
        if name in ("__get__", "__set__"):  # of an attribute
            attribute = function.__self__.__name__
            if name == "__get__" and attribute in ("device", "is_cuda"):
                return gpu if attribute == "is_cuda" else GPU if gpu else torch.device("cpu")
            out = function(*args, **kwargs)
            mark(args[0] if attribute == "data" else out, on_gpu(args[-1] if name == "__set__" else args[0]))
            return out
        if name in ("to", "cpu"):
            return self.move(*args, **kwargs) if name == "to" else self.move(*args, "cpu")
        if name == "pin_memory":
            assert not gpu, "cannot pin a tensor that is on the GPU"
            return args[0]
        if name in ("_fused_adam_", "_fused_adamw_"):  # parameters, gradients
            assert all(t.is_contiguous() for t in (*args[0], *args[1])), f"{name}: layouts differ"
        if name in ("numpy", "__array__") and gpu:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if device := kwargs.get("device"):
            made_there = torch.device(device).type == "cuda"
            kwargs = kwargs | {"device": "cpu"}
            if made_there and name in ("tensor", "as_tensor"):
                self.wait(name)
        else:
            made_there = gpu
        assert not (made_there and kwargs.get("generator")), f"{name}: a generator of the CPU for a tensor on the GPU"
        if gpu:
            self.check(name, args, tensors)
            if name in WAITS:
                self.wait(name)
        out = function(*args, **kwargs)
        return out if out is None or any(out is t for t in tensors) else mark(out, made_there)


@pytest.fixture
def gpu(monkeypatch):
    answers = {"is_available": True, "device_count": 1, "set_device": None, "is_bf16_supported": False}
    for name, answer in {**answers, "get_device_name": "pretend"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    read, clip, name = torch.load, torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype"
    group = getattr(clip, name)
    monkeypatch.setattr(clip, name, lambda lists: {(GPU, dtype): of for (_, dtype), of in group(lists).items()})
    to_gpu = lambda where: where is not None and torch.device(where).type == "cuda"
    monkeypatch.setattr(
        torch, "load", lambda *a, map_location=None, **k: mark(read(*a, map_location="cpu", **k), to_gpu(map_location))
    )
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None, raising=False)
    monkeypatch.setattr(files, "read_ahead", lambda read, n: map(read, range(n)))  # the mode is that of one thread
    pretend, engine = PretendGpu(), torch.autograd._engine_run_backward

    def backward(*args, **kwargs):
        with pretend:  # off within a function; ORCA computes its embedded samples again
            return engine(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", backward)
    return pretend


RUNS = {"naive": "finetune --task cosmic", "scratch": "finetune --task advection1d --mode scratch",
        "lora": "finetune --task satellite --mode lora", "pare": "pare --task spherical --accumulate 2",
        "pare, fields": "pare --task darcy --source cifar10", "pare, released": "pare --task satellite --as-released",
        "orca": "orca --task satellite", "orca, files": "orca --task fsd50k", "mona": "mona --task cifar100",
        "mona, released": "mona --task openml61 --as-released", "recraft": "recraft --task satellite",
        "contrast": "contrast --task cifar100 --contrast-epochs 1",
        "contrast, fields": "contrast --task darcy2d --contrast-epochs 1",
        "lsg": "lsg --task cifar100 --gcn-steps 5"}  # fmt: skip
FEW = ["--scale", "tiny", "--n-train", 24, "--batch-size", 8, "--epochs", 1]


@pytest.mark.parametrize("command", RUNS.values(), ids=RUNS)
def test_a_run_mixes_no_devices(command, gpu, tmp_path):
    method, *options = command.split()
    with gpu:
        here(method, *options, *FEW, out=tmp_path)
    (folder,) = [path.parent for path in tmp_path.glob("*/result.json")]
    assert result(folder)["device"] == "pretend"


@pytest.mark.parametrize("command", ["finetune --task spherical", "finetune --task fsd50k", "pare --task satellite",
                                     "contrast --task darcy2d --contrast-epochs 0"])  # fmt: skip
def test_the_loop_waits_once_in_LOG_EVERY_steps(command, gpu, tmp_path, monkeypatch):
    """Between the first and the last reading of the loss the host waits for it alone, in mean_loss of run.py."""
    method, *options = command.split()
    module, readings = importlib.import_module(method), []
    mean_loss = module.mean_loss
    for part in (module, run):
        monkeypatch.setattr(part, "LOG_EVERY", 4)
    monkeypatch.setattr(module, "mean_loss", lambda *args: (readings.append(len(gpu.waits)), mean_loss(*args))[1])
    few = ["--scale", "tiny", "--n-train", 16, "--batch-size", 2, "--epochs", 1, "--steps-per-epoch", 12]
    with gpu:
        here(method, *options, *few, out=tmp_path)
    waits = gpu.waits[readings[0] : readings[-1]]
    assert len(readings) == 3 and [where.split(":")[0] for _, where in waits] == ["run.py", "run.py"], waits


@pytest.mark.parametrize(
    "command, few, more",
    [("mona --task satellite --n-train 16", ["--steps-per-epoch", 1], ["--steps-per-epoch", 3]),
     ("contrast --task satellite --n-train 48 --contrast-epochs 1", ["--contrast-samples", 24], ["--contrast-samples", 8])],
)  # fmt: skip
def test_stage_1_does_not_wait_in_each_step(command, few, more, gpu, tmp_path):
    method, *options = command.split()
    waits = []
    for steps in (few, more):
        gpu.waits.clear()
        with gpu:
            here(method, *options, *steps, "--batch-size", 8, "--epochs", 1, "--scale", "tiny", out=tmp_path / str(steps))
        waits.append(sorted(gpu.waits))
    assert waits[0] == waits[1]
