# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's DTensors as the peer of reshard's. dtensor_test.cpp has the same sizes and values.

  dtensor.py write DIR     4 ranks save a DTensor of each size in each layout: DIR, key <layout>.<size>
  dtensor.py read DIR      4 ranks load every key of reshard's checkpoint, <layout>.<size>, into each layout here, and compare
  dtensor.py boxes FILE    JSON: a list of [shape, mesh, coordinate, placements, local sizes, local offsets, local elements]; a placement is [],
                           [dim] or [dim, split factor]. Compares each with what PyTorch computes, and with what it cuts from a real tensor.
"""
import itertools
import json
import logging
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, zeros
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

import peer

# It would rather gather over flattened meshes, and says so for each that it cannot.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

SIZES = [(4, 4), (5, 3), (1, 2)]


def counting(size):
    n = 1
    for s in size:
        n *= s
    return torch.arange(1, n + 1, dtype=torch.float32).view(size)


def layouts():
    for mesh in (init_device_mesh("cpu", (4,)), DeviceMesh("cpu", [0, 2]), init_device_mesh("cpu", (2, 2))):
        for placements in itertools.product([Replicate(), Shard(0), Shard(1)], repeat=mesh.ndim):
            yield mesh, placements


def write_rank(rank, directory, port):
    peer.start_rank(rank, 4, port)
    state = {}
    for i, (mesh, placements) in enumerate(layouts()):
        for j, size in enumerate(SIZES):
            state[f"{i}.{j}"] = distribute_tensor(counting(size), mesh, placements)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(directory))
    peer.end_rank()


def read_rank(rank, directory, port):
    peer.start_rank(rank, 4, port)
    keys = list(dcp.FileSystemReader(directory).read_metadata().state_dict_metadata)
    loaded = 0
    for mesh, placements in layouts():
        state = {key: zeros(SIZES[int(key.split(".")[1])], device_mesh=mesh, placements=placements) for key in keys}
        dcp.load(state, storage_reader=dcp.FileSystemReader(directory), planner=dcp.DefaultLoadPlanner(flatten_state_dict=False))
        for key, tensor in state.items():
            loaded += 1
            if mesh.get_coordinate() is not None and not torch.equal(tensor.full_tensor(), counting(tensor.shape)):
                sys.exit(f"{key} into {placements} over {tuple(mesh.shape)}: another value on rank {rank}")
    if rank == 0:
        print(f"PyTorch loaded {len(keys)} tensors into {loaded // len(keys)} layouts", flush=True)
    dist.barrier()
    peer.end_rank()


def boxes(path):
    cases = json.load(open(path))
    kinds = (lambda: Replicate(), lambda d: Shard(d), lambda d, f: _StridedShard(d, split_factor=f))
    for shape, mesh, coordinate, placements, sizes, offsets, elements in cases:
        where = f"{shape} over {mesh} at {coordinate} by {placements}"
        placements = [kinds[len(p)](*p) for p in placements]
        wanted = _compute_local_shape_and_global_offset(tuple(shape), tuple(mesh), list(coordinate), placements)
        if wanted != (tuple(sizes), tuple(offsets)):
            sys.exit(f"{where}: PyTorch has sizes and offsets {wanted}, found {sizes} and {offsets}")
        n = 1
        for s in shape:
            n *= s
        local = torch.arange(n).view(shape)
        for count, i, placement in zip(mesh, coordinate, placements):
            if not placement.is_replicate():
                local = placement._split_tensor(local, count, with_padding=False, contiguous=False)[0][i]
        if list(local.shape) != sizes or local.flatten().tolist() != elements:
            sys.exit(f"{where}: PyTorch cuts {local.tolist()}, found {elements}")
    print(f"PyTorch computes the same for {len(cases)} cases", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "boxes":
        boxes(sys.argv[2])
    else:
        mp.spawn({"write": write_rank, "read": read_rank}[sys.argv[1]], args=(sys.argv[2], peer.free_port()), nprocs=4)
