# SPDX-License-Identifier: BSD-3-Clause
"""What the PyTorch side of the interop tests shares. interop_test.cpp has the same network, optimizers and boxes."""
import collections
import ctypes
import datetime
import enum
import hashlib
import os
import pathlib
import socket
import sys

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard

DTYPES = (
    "float32 float64 float16 bfloat16 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex32 complex64 complex128 "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 bcomplex32"
).split()

SHAPE = (5, 3, 2)
# An irregular tiling of SHAPE: (offsets, sizes).
BOXES = [((0, 0, 0), (2, 3, 2)), ((2, 0, 0), (3, 1, 2)), ((2, 1, 0), (3, 2, 1)), ((2, 1, 1), (3, 2, 1))]


def wraps():
    """How PyTorch holds a model: FSDP that gives ShardedTensors, FSDP over one flat parameter that gives DTensors, FSDP2, not sharded at all; on
    four ranks both FSDPs with two replicas, too."""
    return ("fsdp", "flat", "fully_shard", "plain") + (("hsdp", "hsdp2") if dist.get_world_size() == 4 else ())


class Color(enum.Enum):
    RED = 1


class Thing:
    """An object that only Python knows."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return type(other) is Thing and self.value == other.value


def objects():
    return {
        "thing": Thing([1, torch.arange(3).tolist()]),
        "date": datetime.date(2024, 2, 29),
        "path": pathlib.PurePosixPath("a/b"),
        "set": {1, 2},
        "complex": 1 + 2j,
        "enum": Color.RED,
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "int_keys": ({1: "one", 2: None},),
        "huge": 1 << 100,
        "array": bytearray(b"\x00\xff"),
        "range": range(3),
        "counter": (collections.Counter("aab"),),
    }


def digest(tensor):
    data = tensor.detach().cpu().contiguous()
    return hashlib.sha256(ctypes.string_at(data.data_ptr(), data.nbytes) if data.nbytes else b"").hexdigest()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_rank(rank, world, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo", rank=rank, world_size=world)


def end_rank():
    """Ends this process, without what the interpreter does last: PyTorch's threads may outlive what they belong to, and abort it."""
    sys.stdout.flush()
    os._exit(0)


def in_worlds(rank, worlds, body):
    """Runs body(world) in a process group of each size of `worlds`, {size: port}, that has this rank, and ends the rank."""
    for world, port in worlds.items():
        if rank < world:
            start_rank(rank, world, port)
            body(world)
            dist.barrier()
            dist.destroy_process_group()
    end_rank()


def pattern(shape, dtype, seed):
    """A tensor whose bytes count up."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = size
    for n in shape:
        count *= n
    raw = (torch.arange(count) * 7 + seed) % (2 if dtype == torch.bool else 251)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def part_of(whole, offsets, sizes):
    for d, (offset, size) in enumerate(zip(offsets, sizes)):
        whole = whole.narrow(d, offset, size)
    return whole


def irregular(dtype, fill):
    """A ShardedTensor of BOXES, dealt out to the ranks in turn; fill(offsets, sizes) gives each shard."""
    shards = [
        LocalShard.from_tensor_and_offsets(fill(offsets, sizes), list(offsets), dist.get_rank())
        for i, (offsets, sizes) in enumerate(BOXES)
        if i % dist.get_world_size() == dist.get_rank()
    ]
    return init_from_local_shards(shards, *SHAPE)


def wrapped_network(wrap):
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if wrap == "fully_shard":
        return fully_shard(model, mesh=mesh)
    if wrap in ("hsdp", "hsdp2"):
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        if wrap == "hsdp2":
            return fully_shard(model, mesh=square)
        hybrid = ShardingStrategy.HYBRID_SHARD
        return FSDP(model, device_id=torch.device("cpu"), use_orig_params=True, device_mesh=square, sharding_strategy=hybrid)
    if wrap == "fsdp":
        # DTensors on 4 ranks too: where a rank has no row of a ShardedTensor, PyTorch's load planner takes the checkpoint for one of before 2.4.
        with_mesh = {"device_mesh": mesh} if dist.get_world_size() > 3 else {}
        return FSDP(model, device_id=torch.device("cpu"), use_orig_params=True, **with_mesh)
    if wrap == "flat":
        return FSDP(model, device_id=torch.device("cpu"), use_orig_params=False, device_mesh=mesh)
    return model


def optimizers(model, lr):
    p, o = list(model.parameters()), torch.optim
    return {
        "AdamW": o.AdamW(p, lr=lr, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.02, amsgrad=True),
        "Adam": o.Adam(p, lr=lr, betas=(0.7, 0.9)),
        "SGD": o.SGD(p, lr=lr),
        "Momentum": o.SGD(p, lr=lr, momentum=0.9, nesterov=True),
        "Adagrad": o.Adagrad(p, lr=lr, lr_decay=0.1, initial_accumulator_value=0.25),
        "RMSprop": o.RMSprop(p, lr=lr, alpha=0.9, momentum=0.8, centered=True),
    }


def whole_state(model, kinds):
    """{fqn: whole tensor} of the model and its optimizers, by PyTorch's own gathering."""
    options = StateDictOptions(full_state_dict=True)
    wholes = {f"model.{k}": v for k, v in get_model_state_dict(model, options=options).items()}
    for kind, optimizer in kinds.items():
        for fqn, entries in get_optimizer_state_dict(model, optimizer, options=options)["state"].items():
            wholes.update({f"optim.{kind}.state.{fqn}.{k}": v for k, v in entries.items()})
    return wholes
