# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch writes a checkpoint for reshard to read, and what is in it:  write.py DIR --ranks N --expected FILE

FILE: {"tensors": {fqn: SHA-256 of the whole tensor's row-major bytes}, "values": {fqn: repr-like JSON}}. The state holds plain tensors of every
dtype that can be saved, FSDP's flat parameters with Adam's state, fully_shard's and other DTensors (uneven, empty shards, two mesh dimensions
where the ranks allow it), nested containers and values.
"""
import argparse
import json
import os
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from judge import digest, free_port, start_rank

DTYPES = (
    "float32 float64 float16 bfloat16 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex32 complex64 complex128 "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 bcomplex32"
).split()


def pattern(shape, dtype, seed):
    """A tensor whose bytes count up."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = size
    for n in shape:
        count *= n
    raw = (torch.arange(count) * 7 + seed) % (2 if dtype == torch.bool else 251)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def network():
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))


def write_rank(rank, args, port):
    start_rank(rank, args.ranks, port)
    torch.manual_seed(3)
    mesh = init_device_mesh("cpu", (args.ranks,))
    state, wholes, values = {}, {}, {}

    state["plain"] = {name: pattern((3, 4), getattr(torch, name), i) for i, name in enumerate(DTYPES)}
    state["plain"]["scalar"] = torch.tensor(2.5)
    state["plain"]["empty"] = torch.empty(0, 3)
    state["plain"]["transposed"] = torch.arange(12.0).view(3, 4).t()
    state["plain"]["channels_last"] = torch.arange(48.0).view(1, 2, 4, 6).contiguous(memory_format=torch.channels_last)
    wholes.update({f"plain.{k}": v for k, v in state["plain"].items()})

    state["mesh"] = {}
    for name, shape, placement in [("even", (8, 6), Shard(0)), ("uneven", (5, 3), Shard(0)), ("columns", (3, 7), Shard(1)),
                                   ("tiny", (1, 4), Shard(0)), ("replica", (4, 4), Replicate())]:
        whole = pattern(shape, torch.float32, 1)
        state["mesh"][name] = distribute_tensor(whole, mesh, [placement])
        wholes[f"mesh.{name}"] = whole
    if args.ranks == 4:
        square = init_device_mesh("cpu", (2, 2))
        for name, placements in [("s0_s1", [Shard(0), Shard(1)]), ("s0_s0", [Shard(0), Shard(0)]), ("r_s1", [Replicate(), Shard(1)])]:
            whole = pattern((5, 6), torch.float64, 2)
            state["mesh"][name] = distribute_tensor(whole, square, placements)
            wholes[f"mesh.{name}"] = whole

    flat = FSDP(network(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.AdamW(flat.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        flat(torch.rand(4, 5)).sum().backward()
        optimizer.step()
    model_state, optimizer_state = get_state_dict(flat, optimizer)
    state["fsdp"], state["optim"] = model_state, optimizer_state
    full_model, full_optimizer = get_state_dict(flat, optimizer, options=StateDictOptions(full_state_dict=True))
    wholes.update({f"fsdp.{k}": v for k, v in full_model.items()})
    for fqn, entries in full_optimizer["state"].items():
        wholes.update({f"optim.state.{fqn}.{k}": v for k, v in entries.items()})

    sharded = fully_shard(network(), mesh=mesh)
    state["fully_shard"] = get_model_state_dict(sharded)
    wholes.update({f"fully_shard.{k}": v.full_tensor() for k, v in state["fully_shard"].items()})

    plain_values = {"int": 7, "big": 1 << 40, "float": 0.1, "text": "h\u00e9llo", "none": None, "flag": True, "list": [1, 2.5, "x"]}
    state["values"] = dict(plain_values)
    state["nested"] = [torch.arange(3), {"deep": {"n": 5}}]
    wholes["nested.0"] = state["nested"][0]
    values.update({f"values.{k}": v for k, v in plain_values.items()})
    values["nested.1.deep.n"] = 5

    dcp.save(state, storage_writer=dcp.FileSystemWriter(args.dir))
    if rank == 0:
        # FSDP1's own parameters were stepped, so their values come from the state that was saved.
        json.dump({"tensors": {k: digest(v) for k, v in wholes.items()}, "values": values}, open(args.expected, "w"))
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--expected", required=True)
    args = parser.parse_args()
    mp.spawn(write_rank, args=(args, free_port()), nprocs=args.ranks)


if __name__ == "__main__":
    main()
