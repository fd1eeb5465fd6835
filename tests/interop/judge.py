# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch as the judge of checkpoints that reshard wrote. Every check prints one line; the first that fails ends the program with 1.

  judge.py whole DIR --digest FILE                      dcp.load into whole tensors, dcp_to_torch_save: equal to {key: SHA-256} in FILE
  judge.py values DIR                                    the values that interop_test.cpp saves
  judge.py fsdp DIR --digest FILE --ranks N --model linear|lm     FSDP on N ranks loads it
  judge.py continue DIR --ranks N --steps S --text T --seed K --log FILE    FSDP and AdamW on N ranks go on training; losses go to FILE
"""
import argparse
import ctypes
import hashlib
import json
import os
import socket
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
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from language_model import Block, LanguageModel, batch_of, read_text


def digest(tensor):
    data = tensor.detach().cpu().contiguous()
    return hashlib.sha256(ctypes.string_at(data.data_ptr(), data.nbytes) if data.nbytes else b"").hexdigest()


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


def start_rank(rank, world, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo", rank=rank, world_size=world)


def make_model(name):
    model = torch.nn.Linear(8, 8) if name == "linear" else LanguageModel()
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)  # not what any checkpoint holds
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
        print(f"PyTorch FSDP on {args.ranks} ranks trained steps {state['step'] + 1} to {args.steps}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("check", choices=["whole", "values", "fsdp", "continue"])
    parser.add_argument("dir")
    parser.add_argument("--digest")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--model", choices=["linear", "lm"], default="linear")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log")
    parser.add_argument("--float64", action="store_true")
    args = parser.parse_args()
    wanted = json.load(open(args.digest)) if args.digest else None
    if args.check == "whole":
        whole(args, wanted)
    elif args.check == "values":
        values(args)
    elif args.check == "fsdp":
        mp.spawn(fsdp_rank, args=(args, wanted, free_port()), nprocs=args.ranks)
    else:
        mp.spawn(continue_rank, args=(args, free_port()), nprocs=args.ranks)


if __name__ == "__main__":
    main()
