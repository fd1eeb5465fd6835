# SPDX-License-Identifier: BSD-3-Clause
"""One rank of PyTorch in the measurements of benchmarks/run: the same tensors and the same commands as benchmarks/worker.cpp,
carried out by what the command names under "with": dcp, torch.save, torch_checkpointing, safetensors."""
import argparse
import ctypes
import gc
import json
import os
import shutil
import time
import warnings

warnings.filterwarnings("ignore")
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--pipes", required=True)
parser.add_argument("--count", type=int, default=8)
parser.add_argument("--rows", type=int, required=True)
parser.add_argument("--cols", type=int, required=True)
parser.add_argument("--dim", type=int, default=0)
args = parser.parse_args()

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.set_num_threads(1)
# `reshard launch` binds the store's port itself and hands rank 0 the socket.
listening = os.environ.get("RESHARD_MASTER_LISTEN_FD")
store = dist.TCPStore("127.0.0.1", int(os.environ.get("MASTER_PORT", 0)), world, rank == 0, master_listen_fd=int(listening) if listening else None)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))


def proc(file, name):
    with open(f"/proc/self/{file}") as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


COUNTERS = {"bytes_read": "rchar:", "bytes_written": "wchar:", "reads": "syscr:", "writes": "syscw:"}


def measured(action):
    dist.barrier()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    memory = proc("status", "VmRSS:") - proc("status", "RssFile:")  # without mapped files, the code of libraries above all
    before = {name: proc("io", key) for name, key in COUNTERS.items()}
    begin = time.perf_counter()
    action()
    result = {"seconds": time.perf_counter() - begin}
    result["peak_bytes"] = 1024 * (proc("status", "VmHWM:") - proc("status", "RssFile:") - memory)
    result.update({name: proc("io", key) - before[name] for name, key in COUNTERS.items()})
    return result


def wanted(number):
    whole = torch.arange(number, number + args.rows * args.cols, dtype=torch.int64).to(torch.float32).reshape(args.rows, args.cols)
    return whole.chunk(world, args.dim)[rank].clone(memory_format=torch.contiguous_format) if world > 1 else whole


local = [wanted(i) for i in range(args.count)]
names = [f"layer{i}.weight" for i in range(args.count)]
state = {name: DTensor.from_local(tensor, mesh, [Shard(args.dim)]) for name, tensor in zip(names, local)}
plain = dict(zip(names, local))
manager = None


def checkpointing():
    global manager
    if manager is None:
        from torch_checkpointing import CheckpointManager

        manager = CheckpointManager(CheckpointManager.Config.with_sync_save())
    return manager


def save(command):
    directory, kind = command["dir"], command["with"]
    if kind == "dcp":
        from torch.serialization import set_crc32_options

        set_crc32_options(command.get("crc", True))
        dcp.save(state, storage_writer=dcp.FileSystemWriter(directory, sync_files=command.get("sync", True), thread_count=command.get("threads", 1)))
    elif kind == "torch.save":
        os.makedirs(directory, exist_ok=True)
        torch.save(plain, f"{directory}/{rank}.pt")
    elif kind == "torch_checkpointing":
        checkpointing().save(directory, {"model": plain})
    elif kind == "safetensors":
        from safetensors.torch import save_file

        os.makedirs(directory, exist_ok=True)
        save_file(plain, f"{directory}/{rank}.safetensors")


def load(command):
    directory, kind = command["dir"], command["with"]
    torch.set_num_threads(command.get("threads", 1))
    if kind == "dcp":
        dcp.load(state, storage_reader=dcp.FileSystemReader(directory))
    elif kind == "torch.save":
        for name, tensor in torch.load(f"{directory}/{rank}.pt").items():
            plain[name].copy_(tensor)
    elif kind == "torch_checkpointing":
        checkpointing().load(directory, into={"model": plain})
    elif kind == "safetensors":
        from safetensors.torch import load_file

        for name, tensor in load_file(f"{directory}/{rank}.safetensors").items():
            if command.get("into", True):
                plain[name].copy_(tensor)
            else:  # its file is mapped: one byte of every page brings it in
                tensor.view(-1).view(torch.uint8)[::4096].max()


class Net(torch.nn.Module):
    def __init__(self, layers, width):
        super().__init__()
        for i in range(layers):
            self.add_module(f"layer{i}", torch.nn.Linear(width, width))
        with torch.no_grad():
            for parameter in self.parameters():
                k = torch.arange(parameter.numel())
                parameter.copy_(((k * 7919 % 2001 - 1000).double() / (1000 * width**0.5)).view(parameter.shape))

    def forward(self, x):
        for linear in self.children():
            x = x + linear(x).relu()
        return x


def train(command):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    width, parts = command["width"], {}

    def run():
        model = Net(command["layers"], width)
        if command["with"] == "FSDP":
            from torch.distributed.fsdp import FullyShardedDataParallel
            from torch.distributed.fsdp.wrap import ModuleWrapPolicy

            model = FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy({torch.nn.Linear}), device_id=torch.device("cpu"))
        else:
            from torch.distributed.fsdp import fully_shard

            for linear in model.children():
                fully_shard(linear, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        batch = (torch.arange(command["batch"] * width, dtype=torch.float32) % 17).view(-1, width) / 17

        def step():
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            return loss.item()

        step()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(command["steps"]):
            parts["loss"] = step()
        parts["seconds"] = time.perf_counter() - begin
        return model

    gc.collect()  # models have cycles
    ctypes.CDLL(None).malloc_trim(0)  # what earlier trainings left behind would hide what this one takes
    models = []
    result = {**measured(lambda: models.append(run())), **parts}
    dist.barrier()
    begin = time.perf_counter()
    get_model_state_dict(models[0])
    return {**result, "state_dict_seconds": time.perf_counter() - begin}


def carry_out(command):
    if command["do"] == "train":
        return train(command)
    if command["do"] == "save":
        return measured(lambda: save(command))
    if command["do"] == "load":
        return measured(lambda: load(command))
    if command["do"] == "async_save":
        if command["with"] == "torch_checkpointing":
            raise ValueError("its staging needs a GPU")
        pending = []
        result = measured(lambda: pending.append(dcp.async_save(state, storage_writer=dcp.FileSystemWriter(command["dir"], sync_files=command.get("sync", True)))))
        begin = time.perf_counter()
        pending[0].result()
        result["background"] = time.perf_counter() - begin
        return result
    if command["do"] == "clear":
        for tensor in local:
            tensor.zero_()
        return {}
    if command["do"] == "check":
        return {"wrong": sum(int((tensor != wanted(i)).sum()) for i, tensor in enumerate(local))}
    raise ValueError(f"unknown command {command}")


with open(f"{args.pipes}/in.{rank}") as commands, open(f"{args.pipes}/out.{rank}", "w") as answers:
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in commands:
        try:
            answer = carry_out(json.loads(line))
        except Exception as error:  # the other contestants go on
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
if manager is not None:
    manager.close()
dist.destroy_process_group()
