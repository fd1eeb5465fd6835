# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch writes checkpoints for reshard to read:  write.py DIR --ranks N      DIR/1 to DIR/N, by as many ranks

DIR/n.json: {"tensors": {fqn: SHA-256 of the whole tensor's row-major bytes}, "lr": {optimizer: learning rate}}. Each checkpoint holds every dtype as
plain tensors, DTensors (uneven, empty shards, two mesh dimensions where the ranks allow it) and ShardedTensors of irregular boxes, the network
in every kind of model with the state of every optimizer, nested containers, values, and objects that only Python knows.
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
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import peer
from peer import DTYPES, digest, free_port, pattern

LEARNING_RATES = {"AdamW": 0.05, "Adam": 0.04, "SGD": 0.03, "Momentum": 0.025, "Adagrad": 0.02, "RMSprop": 0.01}


def write(args, world):
    rank = dist.get_rank()
    torch.manual_seed(3)
    mesh = init_device_mesh("cpu", (world,))
    state, wholes = {}, {}

    state["dense"] = {name: pattern((3, 4), getattr(torch, name), i) for i, name in enumerate(DTYPES)}
    state["dense"]["scalar"] = torch.tensor(2.5)
    state["dense"]["empty"] = torch.empty(0, 3)
    state["dense"]["transposed"] = torch.arange(12.0).view(3, 4).t()
    state["dense"]["channels_last"] = torch.arange(48.0).view(1, 2, 4, 6).contiguous(memory_format=torch.channels_last)
    wholes.update({f"dense.{k}": v for k, v in state["dense"].items()})

    state["rows"], state["columns"], state["boxes"] = {}, {}, {}
    for i, name in enumerate(DTYPES):
        whole = pattern(peer.SHAPE, getattr(torch, name), i)
        for group, placement in [("rows", Shard(0)), ("columns", Shard(1))]:
            sizes, offsets = compute_local_shape_and_global_offset(peer.SHAPE, mesh, [placement])
            local = peer.part_of(whole, offsets, sizes)
            state[group][name] = DTensor.from_local(local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride())
        state["boxes"][name] = peer.irregular(whole.dtype, lambda offsets, sizes: peer.part_of(whole, offsets, sizes).contiguous())
        wholes.update({f"{group}.{name}": whole for group in ("rows", "columns", "boxes")})

    state["mesh"] = {}
    for name, shape, placement in [("even", (8, 6), Shard(0)), ("tiny", (1, 4), Shard(0)), ("replica", (4, 4), Replicate())]:
        whole = pattern(shape, torch.float32, 1)
        state["mesh"][name] = distribute_tensor(whole, mesh, [placement])
        wholes[f"mesh.{name}"] = whole
    if world == 4:
        square = init_device_mesh("cpu", (2, 2))
        for name, placements in [("s0_s1", [Shard(0), Shard(1)]), ("s0_s0", [Shard(0), Shard(0)]), ("r_s1", [Replicate(), Shard(1)])]:
            whole = pattern((5, 6), torch.float64, 2)
            state["mesh"][name] = distribute_tensor(whole, square, placements)
            wholes[f"mesh.{name}"] = whole

    for wrap in peer.wraps():
        model = peer.wrapped_network(wrap)
        kinds = peer.optimizers(model, lr=0.0)
        for kind, optimizer in kinds.items():
            optimizer.param_groups[0]["lr"] = LEARNING_RATES[kind]
        for _ in range(2):
            model.zero_grad()
            model(torch.rand(4, 5)).sum().backward()
            for optimizer in kinds.values():
                optimizer.step()
        state[wrap] = {"model": get_model_state_dict(model), "optim": {k: get_optimizer_state_dict(model, o) for k, o in kinds.items()}}
        wholes.update({f"{wrap}.{k}": v for k, v in peer.whole_state(model, kinds).items()})

    state["values"] = {"int": 7, "big": 1 << 40, "float": 0.1, "text": "h\u00e9llo", "none": None, "flag": True, "list": [1, 2.5, "x"],
                       "tuple": (0.9, 0.999), "raw": b"\x00\xff"}
    state["nested"] = [torch.arange(3), {"deep": {"n": 5}}]
    wholes["nested.0"] = state["nested"][0]
    state["objects"] = peer.objects()

    dcp.save(state, storage_writer=dcp.FileSystemWriter(f"{args.dir}/{world}"))
    if rank == 0:
        with open(f"{args.dir}/{world}.json", "w") as f:
            json.dump({"tensors": {k: digest(v) for k, v in wholes.items()}, "lr": LEARNING_RATES}, f)


def write_rank(rank, args, worlds):
    peer.in_worlds(rank, worlds, lambda world: write(args, world))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir")
    parser.add_argument("--ranks", type=int, default=4)
    args = parser.parse_args()
    os.makedirs(args.dir, exist_ok=True)
    mp.spawn(write_rank, args=(args, {n: free_port() for n in range(1, args.ranks + 1)}), nprocs=args.ranks)


if __name__ == "__main__":
    main()
