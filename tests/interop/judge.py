# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch as the judge of checkpoints that reshard wrote. Every check prints one line; the first that fails ends the program with 1.

  judge.py whole DIR --digest FILE                      dcp.load into whole tensors, dcp_to_torch_save: equal to {key: SHA-256} in FILE
  judge.py values DIR                                    the values that interop_test.cpp saves
  judge.py objects DIR                                   the objects of peer.py
  judge.py peer DIR --digest FILE --ranks N              on 1 to N ranks each: everything as FSDP, fully_shard, DTensor, ShardedTensor and plain;
                                                         FILE: {"tensors": {key: SHA-256}, "lr": {optimizer: learning rate}}
  judge.py network DIR --digest FILE --ranks N           the same of the network and its optimizers alone
  judge.py fsdp DIR --digest FILE --ranks N --model linear|lm     FSDP on N ranks loads it
  judge.py continue DIR --ranks N --steps S --text T --seed K --log FILE [--save DIR]
                                                         FSDP and AdamW on N ranks go on training; losses go to FILE, the state at the end to DIR
"""
import argparse
import json
import os
import sys
import tempfile
import warnings

warnings.filterwarnings("ignore")
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import peer
from language_model import Block, LanguageModel, batch_of, read_text
from peer import digest, end_rank, free_port, start_rank


def compare(what, wanted, found):
    wrong = [k for k in wanted if wanted[k] != found.get(k)]
    if wrong or not wanted:
        sys.exit(f"{what}: {len(wrong)} of {len(wanted)} tensors differ: {', '.join(wrong[:5])}")
    print(f"{what}: {len(wanted)} tensors equal", flush=True)


def at_path(state, path):
    for key in path:
        state = state[key]
    return state


def whole(args, wanted):
    metadata = dcp.FileSystemReader(args.dir).read_metadata()
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(state, storage_reader=dcp.FileSystemReader(args.dir), planner=planner, no_dist=True)
    compare("dcp.load into whole tensors", wanted, {k: digest(v) for k, v in state.items()})
    with tempfile.TemporaryDirectory() as tmp:
        dcp_to_torch_save(args.dir, f"{tmp}/all.pt")
        nested = torch.load(f"{tmp}/all.pt", weights_only=True)
    compare("dcp_to_torch_save", wanted, {k: digest(at_path(nested, metadata.planner_data[k])) for k in wanted})


def values(args):
    """The values that interop_test.cpp saves."""
    wanted = {"int": 7, "big": 1 << 40, "float": 0.1, "text": "h\u00e9llo", "none": None, "flag": True, "list": [1, 2.5, "x"],
              "tuple": (0.9, 0.999), "raw": b"\x00\xff"}
    with tempfile.TemporaryDirectory() as tmp:
        dcp_to_torch_save(args.dir, f"{tmp}/all.pt")
        found = torch.load(f"{tmp}/all.pt", weights_only=True)["values"]
    for key, value in wanted.items():
        if found.get(key, "missing") != value or type(found[key]) is not type(value):
            sys.exit(f"value {key}: wanted {value!r}, found {found.get(key)!r}")
    print(f"{len(wanted)} values equal")


def objects(args):
    """Objects that only Python knows, after reshard loaded and saved them."""
    wanted = peer.objects()
    state = {"objects": dict.fromkeys(wanted)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(args.dir), no_dist=True)
    for key, value in wanted.items():
        found = state["objects"][key]
        if found != value or type(found) is not type(value):
            sys.exit(f"object {key}: wanted {value!r}, found {found!r}")
    print(f"{len(wanted)} objects equal")


def fill_with_sevens(model):
    """Not what any checkpoint holds."""
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.fill_(7.0)


def layouts(args, wanted):
    """Each tensor as PyTorch's ranks may hold it: rows, columns, a replica, irregular boxes. Every rank checks its own part."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    held, state = {}, {}
    for name in peer.DTYPES:
        dtype = getattr(torch, name)
        for group, placement in [("rows", Shard(1)), ("columns", Shard(0)), ("flat", Shard(2)), ("plain", Replicate())]:
            sizes, offsets = compute_local_shape_and_global_offset(peer.SHAPE, mesh, [placement])
            local = torch.zeros(sizes, dtype=torch.uint8).to(dtype) if dtype.is_floating_point and dtype.itemsize > 1 else torch.empty(sizes, dtype=dtype)
            state[f"{group}.{name}"] = DTensor.from_local(local, mesh, [placement], run_check=False, shape=torch.Size(peer.SHAPE), stride=(6, 2, 1))
            held[f"{group}.{name}"] = [(local, offsets, sizes)]
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(state, storage_reader=dcp.FileSystemReader(args.dir), planner=planner)
    boxed = {f"{g}.{n}": peer.irregular(getattr(torch, n), lambda _, sizes, n=n: torch.empty(sizes, dtype=getattr(torch, n)))
             for g in ("rows", "columns", "flat") for n in peer.DTYPES}
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(boxed, storage_reader=dcp.FileSystemReader(args.dir), planner=planner)
    for key, tensor in boxed.items():
        held[key] += [(s.tensor, s.metadata.shard_offsets, s.metadata.shard_sizes) for s in tensor.local_shards()]

    for i, name in enumerate(peer.DTYPES, 1):
        whole = peer.pattern(peer.SHAPE, getattr(torch, name), i)
        for group in ("rows", "columns", "flat", "plain"):
            if digest(whole) != wanted[f"{group}.{name}"]:
                sys.exit(f"{name}: the pattern here is not the one that was saved")
            for local, offsets, sizes in held[f"{group}.{name}"]:
                if digest(local) != digest(peer.part_of(whole, offsets, sizes)):
                    sys.exit(f"{group}.{name} at {tuple(offsets)}: another value on rank {dist.get_rank()}")


def network(args, wanted, groups):
    """The network and its optimizers into every kind of model that PyTorch has. dcp.load is strict: the first missing key fails."""
    for wrap in peer.wraps():
        model = peer.wrapped_network(wrap)
        fill_with_sevens(model)
        kinds = peer.optimizers(model, lr=7.0)
        defaults = {kind: {k: v for k, v in o.param_groups[0].items() if k != "params"} for kind, o in kinds.items()}
        state = {"model": get_model_state_dict(model), "optim": {kind: get_optimizer_state_dict(model, o) for kind, o in kinds.items()}}
        dcp.load(state, storage_reader=dcp.FileSystemReader(args.dir))
        set_model_state_dict(model, state["model"])
        for kind, optimizer in kinds.items():
            set_optimizer_state_dict(model, optimizer, state["optim"][kind])
            found = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
            expected = defaults[kind] | {"lr": groups[kind]}
            # LibTorch's numbers are all float where PyTorch may have int; bool and None stay what they are.
            def typed(group):
                return {k: (float(v) if type(v) is int else v, type(v) in (bool, type(None), tuple)) for k, v in group.items()}

            if typed(found) != typed(expected):
                sys.exit(f"{wrap}, {kind}: group wanted {expected}, found {found}")
        found = {k: digest(v) for k, v in peer.whole_state(model, kinds).items()}
        if dist.get_rank() == 0:
            compare(f"{wrap} on {dist.get_world_size()} ranks", {k: v for k, v in wanted.items() if k.startswith(("model.", "optim."))}, found)


def peer_rank(rank, args, expected, worlds):
    def body(_):
        if args.check == "peer":
            layouts(args, expected["tensors"])
        network(args, expected["tensors"], expected["lr"])

    peer.in_worlds(rank, worlds, body)


def make_model(name):
    model = torch.nn.Linear(8, 8) if name == "linear" else LanguageModel()
    fill_with_sevens(model)
    policy = torch.distributed.fsdp.wrap.ModuleWrapPolicy([Block]) if name == "lm" else None
    return FSDP(model, device_id=torch.device("cpu"), auto_wrap_policy=policy, use_orig_params=True)


def fsdp_rank(rank, args, wanted, port):
    start_rank(rank, args.ranks, port)
    model = make_model(args.model)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(args.dir))
    set_model_state_dict(model, state["model"])
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        mine = {k: v for k, v in wanted.items() if k.startswith("model.")}
        compare(f"FSDP on {args.ranks} ranks", mine, {f"model.{k}": digest(v) for k, v in full.items()})
    dist.barrier()
    dist.destroy_process_group()
    end_rank()


def continue_rank(rank, args, port):
    start_rank(rank, args.ranks, port)
    if args.float64:
        torch.set_default_dtype(torch.float64)
    model = make_model("lm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optimizer_state, "step": 0}
    dcp.load(state, storage_reader=dcp.FileSystemReader(args.dir))  # strict: the first missing key fails
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    text = read_text(args.text)
    batch, share = 12, 12 // args.ranks
    lines = []
    for step in range(state["step"], args.steps):
        data = batch_of(text, args.seed, step, rank * share, (rank + 1) * share)
        optimizer.zero_grad()
        logits = model(data[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        mean = loss.detach().double() / args.ranks
        dist.all_reduce(mean)
        lines.append(json.dumps({"step": step + 1, "loss": mean.item()}))
    if rank == 0:
        with open(args.log, "w") as f:
            f.write("\n".join(lines) + "\n")
    if args.save:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optim": optimizer_state, "step": args.steps}, checkpoint_id=args.save)
    if rank == 0:
        print(f"PyTorch FSDP on {args.ranks} ranks trained steps {state['step'] + 1} to {args.steps}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    end_rank()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("check", choices=["whole", "values", "objects", "peer", "network", "fsdp", "continue"])
    parser.add_argument("dir")
    parser.add_argument("--digest")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--model", choices=["linear", "lm"], default="linear")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log")
    parser.add_argument("--save")
    parser.add_argument("--float64", action="store_true")
    args = parser.parse_args()
    wanted = json.load(open(args.digest)) if args.digest else None
    if args.check == "whole":
        whole(args, wanted.get("tensors", wanted))
    elif args.check == "values":
        values(args)
    elif args.check == "objects":
        objects(args)
    elif args.check in ("peer", "network"):
        worlds = {n: free_port() for n in range(1, args.ranks + 1)}
        mp.spawn(peer_rank, args=(args, wanted, worlds), nprocs=args.ranks)
    elif args.check == "fsdp":
        mp.spawn(fsdp_rank, args=(args, wanted, free_port()), nprocs=args.ranks)
    else:
        mp.spawn(continue_rank, args=(args, free_port()), nprocs=args.ranks)


if __name__ == "__main__":
    main()
