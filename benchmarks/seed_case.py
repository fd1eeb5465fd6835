# SPDX-License-Identifier: BSD-3-Clause
"""examples/seed_case in PyTorch, one rank of it: FSDP of a Linear(8, 8) is saved and loaded into another one, on the same ranks or on the even and
the odd ones.

  reshard launch -n 4 -- python seed_case.py [--load halves] DIR
"""
import argparse
import os
import warnings

warnings.filterwarnings("ignore")
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import StateDictType

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("directory")
parser.add_argument("--load", default="all", choices=["all", "halves"])
args = parser.parse_args()

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
listening = os.environ.get("RESHARD_MASTER_LISTEN_FD")
store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), world, rank == 0, master_listen_fd=int(listening) if listening else None)
dist.init_process_group("cpu:gloo", store=store, rank=rank, world_size=world)
half = None
if args.load == "halves":
    half = [dist.new_group(list(range(parity, world, 2))) for parity in (0, 1)][rank % 2]


def build(group):
    return FSDP(torch.nn.Linear(8, 8, device="meta"), process_group=group, device_id=torch.device("cpu"))


def are_equal(a, b):
    with FSDP.summon_full_params(a), FSDP.summon_full_params(b):
        return torch.equal(a.weight, b.weight), torch.equal(a.bias, b.bias)


torch.manual_seed(0)
model = build(None)
model(torch.rand(8, 8)).sum().backward()
with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
    dcp.save({"model": model.state_dict()}, storage_writer=dcp.FileSystemWriter(args.directory))
other = build(half)
assert are_equal(model, other) == (False, False)
with FSDP.state_dict_type(other, StateDictType.SHARDED_STATE_DICT):
    state = {"model": other.state_dict()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(args.directory))
    other.load_state_dict(state["model"])
assert are_equal(model, other) == (True, True)
dist.barrier()
# Everything is checked: what the process would still tear down has been known to crash.
os._exit(0)
