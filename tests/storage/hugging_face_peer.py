# SPDX-License-Identifier: BSD-3-Clause
"""The safetensors library and PyTorch as the peers of hugging_face_peer_test.cpp.

  check DIR        every tensor of DIR/expected.json, whole: read by the safetensors library and by PyTorch's HuggingFaceStorageReader
  write DIR        checkpoints of both, one a folder, each with its expected.json
  quantized DIR    quantized checkpoints, each with what it stands for in its expected.json
  same A B         two safetensors files hold the same tensors, byte for byte
"""
import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, QuantizedHuggingFaceStorageReader


# Dtypes that PyTorch has and its HuggingFaceStorageReader does not read.
UNKNOWN_TO_TORCH = {"float4_e2m1fn_x2", "float8_e8m0fnu"}


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def describe(tensor):
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(raw(tensor)).hexdigest(),
    }


def expect(directory, tensors):
    (Path(directory) / "expected.json").write_text(json.dumps({name: describe(t) for name, t in tensors.items()}))


def as_bytes_if_small(tensor):
    """Most operations know nothing of eight-bit floats."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def zeros(e):
    dtype = getattr(torch, e["dtype"])
    return torch.zeros(e["shape"], dtype=torch.uint8).view(dtype) if dtype.itemsize == 1 else torch.zeros(e["shape"], dtype=dtype)


def compare(found, expected, who):
    assert found.keys() == expected.keys(), f"{who}: keys {found.keys() ^ expected.keys()}"
    for name, tensor in found.items():
        assert describe(tensor) == expected[name], f"{who}: {name}: {describe(tensor)} is not {expected[name]}"


def check(directory):
    expected = json.loads((directory / "expected.json").read_text())
    files = sorted(directory.glob("*.safetensors"))
    assert files, "no files"
    found, parts = {}, False
    for file in files:
        with safe_open(file, framework="pt") as f:
            sharding = (f.metadata() or {}).get("DCP_SHARDING_INFO")
            parts = parts or sharding is not None
            assert f.metadata()["format"] == "pt"
            for name in f.keys():
                if sharding is None:
                    found[name] = f.get_tensor(name)
                    continue
                # A part goes to where the file says.
                part, offsets = f.get_tensor(name), json.loads(sharding)[name]["saved_offsets"]
                whole = found.setdefault(name, zeros(expected[name]))
                at = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape))
                as_bytes_if_small(whole)[at] = as_bytes_if_small(part)
    compare(found, expected, "safetensors")
    if not {e["dtype"] for e in expected.values()} & UNKNOWN_TO_TORCH:
        check_with_torch(directory, expected)
    if not parts:
        check_against_save_file(directory, files, found)


def check_with_torch(directory, expected):
    loaded = {name: zeros(e) for name, e in expected.items()}
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
    compare(loaded, expected, "HuggingFaceStorageReader")


def check_against_save_file(directory, files, found):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in found.values())
    for file in files:
        # What the library itself writes of the same tensors is the same file.
        mine = {name: found[name] for name, of in index["weight_map"].items() if of == file.name}
        save_file(mine, directory / "again", metadata={"format": "pt"})
        assert (directory / "again").read_bytes() == file.read_bytes(), f"{file} differs from save_file's"
        os.remove(directory / "again")


def tensors_of_all_dtypes():
    generator = torch.Generator().manual_seed(1)

    def bits(dtype, *shape):
        return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype).squeeze(-1)

    result = {
        name: bits(getattr(torch, name), 3, 4)
        for name in (
            "uint8 int8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64 complex64 "
            "float8_e5m2 float8_e4m3fn float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz float4_e2m1fn_x2"
        ).split()
    }
    result["flags"] = bits(torch.uint8, 5, 3) > 100
    result["scalar"] = torch.tensor(7)
    result["none"] = torch.zeros(0, 3)
    result["é\n\"x\""] = bits(torch.float32, 2)
    return result


def write_rank(rank, world_size, directory):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost"}
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(3)
    whole = {"rows": torch.randn(7, 5), "columns": torch.randn(4, 9), "replicated": torch.randn(3), "bias": torch.randn(8).bfloat16()}
    sharded = {
        "rows": distribute_tensor(whole["rows"], mesh, [Shard(0)]),
        "columns": distribute_tensor(whole["columns"], mesh, [Shard(1)]),
        "replicated": distribute_tensor(whole["replicated"], mesh, [Replicate()]),
        "bias": distribute_tensor(whole["bias"], mesh, [Shard(0)]),
    }
    for name, consolidate in (("torch_sharded", False), ("torch_consolidated", True)):
        folder = Path(directory) / name
        dcp.save(
            sharded,
            storage_writer=HuggingFaceStorageWriter(
                str(folder), save_distributed=True, enable_consolidation=consolidate, fqn_to_index_mapping={"rows": 1, "columns": 2, "replicated": 2, "bias": 1}
            ),
        )
        if rank == 0:
            expect(folder, whole)
    dist.destroy_process_group()


def write(directory):
    tensors = tensors_of_all_dtypes()
    folder = directory / "save_file"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expect(folder, tensors)

    folder = directory / "torch_plain"
    plain = {"a": torch.randn(4), "b.c": torch.randn(10, 3), "n": torch.arange(5)}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping={"a": 1, "b.c": 2, "n": 2})
    dcp.save(plain, storage_writer=writer, no_dist=True)
    expect(folder, plain)

    torch.multiprocessing.spawn(write_rank, (3, str(directory)), nprocs=3)


def mxfp4(reader, blocks, scales):
    """By the function of PyTorch's reader. Its load does not use it on more than the first few columns: the chunk in its catalogue
    keeps the size of the stored groups."""
    size = (*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1] * 2)
    everything = SimpleNamespace(storage_offsets=[0] * len(size), lengths=size)
    return reader._dequantize_tensor_mxfp4(blocks, scales, everything, 0, 0)


def quantized(directory):
    """Blocks of 128 and 48, cut at the edges, in the eight-bit dtypes; loaded by PyTorch's QuantizedHuggingFaceStorageReader."""
    generator = torch.Generator().manual_seed(5)
    for block, dtype in ((128, torch.float32), (48, torch.bfloat16), (48, torch.float16)):
        folder = directory / f"quantized_{block}_{str(dtype).removeprefix('torch.')}"
        folder.mkdir()
        wide, narrow, scales = {}, {}, {}
        for name, kind in (("a", torch.float8_e4m3fn), ("b", torch.float8_e5m2), ("c", torch.bfloat16)):
            wide[f"{name}.weight"] = torch.randn(300, 200, generator=generator).to(kind)
            shape = (-(-300 // block), -(-200 // block))
            scales[f"{name}.weight_scale_inv"] = torch.rand(shape, generator=generator) * 3
        narrow["bias"] = torch.randn(9, generator=generator)
        blocks = torch.randint(0, 256, (3, 4, 5, 16), dtype=torch.uint8, generator=generator)
        exponents = torch.randint(118, 133, (3, 4, 5), dtype=torch.uint8, generator=generator)
        files = {
            "model-00001-of-00002.safetensors": wide | {"x_blocks": blocks},
            "model-00002-of-00002.safetensors": narrow | scales | {"x_scales": exponents},
        }
        for file, tensors in files.items():
            save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        found = {name: torch.zeros(t.shape, dtype=dtype) for name, t in wide.items()} | {"bias": torch.zeros(9)}
        reader = QuantizedHuggingFaceStorageReader(str(folder), target_dtype=dtype, block_size=block)
        dcp.load(found, storage_reader=reader, no_dist=True)
        expect(folder, found | {"x_blocks": mxfp4(reader, blocks, exponents)})


def same(a, b):
    with safe_open(a, framework="pt") as x, safe_open(b, framework="pt") as y:
        assert set(x.keys()) == set(y.keys())
        for name in x.keys():
            assert describe(x.get_tensor(name)) == describe(y.get_tensor(name)), name
        print(len(list(x.keys())), "tensors are equal")


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    {"check": check, "write": write, "quantized": quantized, "same": same}[command](*map(Path, paths))
