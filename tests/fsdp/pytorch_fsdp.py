# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's own FSDP trains the model of test_model.h from the same checkpoint on the same batches.

  pytorch_fsdp.py DIR RANKS LIMIT [DTYPE]    DIR/start: model, tokens [steps, batch, length]; DIR/end: model and losses as reshard left them

Prints the largest differences and fails if one is above LIMIT. The model is the twin of LanguageModelImpl, name for name. With a DTYPE the passes
compute in it (MixedPrecision: param_dtype), and gradients are reduced in float64.
"""
import os
import socket
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

VOCABULARY, WIDTH, LENGTH = 13, 6, 5


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.attention = torch.nn.MultiheadAttention(WIDTH, 2)
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH + 1)
        self.down = torch.nn.Linear(2 * WIDTH + 1, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        attended = x + self.attention(h, h, h)[0]
        out = attended + self.down(F.gelu(self.up(attended)))
        return out, out.square().mean()


class Head(torch.nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.weight = tied

    def forward(self, x):
        return x @ self.weight.t()


class LanguageModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.block0, self.block1, self.block2 = Block(), Block(), Block()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = Head(self.embedding.weight)
        self.register_buffer("positions", torch.zeros(LENGTH, WIDTH))
        self.block1.norm.weight.requires_grad_(False)
        self.block2.up.bias.requires_grad_(False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = (x + self.positions.to(x.dtype)).transpose(0, 1)
        extra = 0.0
        for block in (self.block0, self.block1, self.block0, self.block2):
            x, penalty = block(x)
            extra = extra + penalty
        logits = self.head(self.norm(x)).transpose(0, 1)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))
        return loss + 1e-2 * extra


def read(directory):
    reader = dcp.FileSystemReader(directory)
    entries = reader.read_metadata().state_dict_metadata
    state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}
    dcp.load(state, storage_reader=reader, planner=dcp.DefaultLoadPlanner(flatten_state_dict=False), no_dist=True)
    return state, {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}


def train(rank, directory, ranks, limit, dtype, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("cpu:gloo", rank=rank, world_size=ranks)
    start, weights = read(f"{directory}/start")
    model = LanguageModel()
    model.load_state_dict(weights)
    mixed = dtype and MixedPrecision(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float64)
    wrap = ModuleWrapPolicy([Block])
    sharded = FSDP(model, device_id=torch.device("cpu"), auto_wrap_policy=wrap, use_orig_params=True, mixed_precision=mixed)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=3e-3, eps=1e-8, weight_decay=0.01)
    losses = []
    for tokens in start["tokens"]:
        optimizer.zero_grad()
        loss = sharded(tokens.chunk(ranks)[rank])
        loss.backward()
        optimizer.step()
        mean = loss.detach().double() / ranks
        dist.all_reduce(mean)
        losses.append(mean)
    with FSDP.summon_full_params(sharded):
        # Names as they were before wrapping.
        mine = {k.replace("_fsdp_wrapped_module.", ""): v.detach().clone() for k, v in sharded.named_parameters(remove_duplicate=False)}
    if rank == 0:
        end, theirs = read(f"{directory}/end")
        missing = [k for k in theirs if k not in mine and k != "positions"]
        moved = max((mine[k] - weights[k]).abs().max().item() for k in mine)
        parameters = max((mine[k] - theirs[k]).abs().max().item() for k in mine)
        loss = (torch.stack(losses) - end["losses"]).abs().max().item()
        print(f"AdamW, {ranks} ranks, {len(losses)} steps, float64{f' in {dtype}' if dtype else ''}: largest difference from PyTorch's FSDP: "
              f"parameters {parameters:.1e}, loss {loss:.1e}", flush=True)
        if missing or moved < 1e-2 or not (parameters < limit and loss < limit):
            sys.exit(f"missing: {missing}; moved by {moved}")
    dist.barrier()
    dist.destroy_process_group()
    # PyTorch's threads may outlive what they belong to while the interpreter ends, and then abort a rank that did all it had to.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free_port = s.getsockname()[1]
    directory, ranks, limit, *dtype = sys.argv[1:]
    mp.spawn(train, args=(directory, int(ranks), float(limit), dtype[0] if dtype else None, free_port), nprocs=int(ranks))
