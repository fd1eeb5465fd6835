# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch as the peer of the format tools. The first thing that is wrong ends the program with 1.

  pytorch.py make FILE                       torch.save of everything that a state dict may hold
  pytorch.py from_torch FILE DIR             DIR is FILE as a checkpoint: equal to what torch_save_to_dcp makes of it
  pytorch.py from_dcp DIR FILE [DIR FILE ...]    FILE is DIR as one file: equal to what dcp_to_torch_save makes of it
  pytorch.py kinds DIR                       one torch.save file for each kind that is refused, or read
"""
import collections
import os
import pathlib
import sys
import tempfile
import warnings

warnings.filterwarnings("ignore")
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

DTYPES = (
    "float32 float64 float16 bfloat16 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex32 complex64 complex128 "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 bcomplex32"
).split()


def pattern(sizes, dtype, seed):
    n = torch.Size(sizes).numel() * dtype.itemsize
    raw = (torch.arange(n) * 7 + seed).remainder(2 if dtype == torch.bool else 251).to(torch.uint8)
    return raw.view(dtype).reshape(sizes) if n else torch.empty(sizes, dtype=dtype)


def everything():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3))
    model[2].register_parameter("tied", model[0].weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.rand(4, 5)).sum().backward()
    optimizer.step()
    base = torch.arange(60, dtype=torch.float32)
    grid = base.view(10, 6)
    complex_ = torch.randn(3, 4, dtype=torch.complex64)
    return collections.OrderedDict(
        model=model.state_dict(),
        optim=optimizer.state_dict(),
        dtypes={name: pattern((5, 3, 2), getattr(torch, name), i) for i, name in enumerate(DTYPES)},
        views={
            "grid": grid, "same": grid, "flat": base, "transposed": grid.t(), "slice": grid[2:7, 1:5:2], "column": grid[:, 3],
            "expanded": torch.tensor([1.0, 2.0]).expand(3, 2), "permuted": pattern((4, 3, 2), torch.int16, 5).permute(2, 0, 1),
            "channels_last": pattern((2, 3, 4, 5), torch.float16, 6).to(memory_format=torch.channels_last),
            "conj": complex_.conj(), "neg": torch.randn(3, 4, dtype=torch.complex64).conj().imag, "uint16_view": pattern((8, 4), torch.uint16, 9)[::2, 1:3],
        },
        scalar=torch.tensor(3.5), empty=torch.empty(0), empty2=torch.empty(4, 0, 3, dtype=torch.int8),
        parameter=torch.nn.Parameter(torch.ones(3)), buffer=torch.nn.Buffer(torch.ones(2)),
        large=pattern((300, 500), torch.float32, 11), large_transposed=pattern((500, 300), torch.float32, 12).t(),
        step=7, big=1 << 40, huge=1 << 100, negative=-5, pi=3.25, nothing=None, yes=True, text="h\u00e9llo \U0001f600", raw=b"\x00\xff",
        no_bytes=b"", list=[1, 2.5, "x"], nested_list=[[1, 2], [3]], tuple=(0.9, 0.999), deep_tuple=((1, (2,)), {"a": 1}),
        mixed=[1, torch.arange(4), {"in": torch.ones(2), "s": "text"}, None], tensors_in_tuple=(torch.arange(3), grid, grid[1]),
        size=torch.Size([2, 3]), dtype=torch.bfloat16, device=torch.device("cpu"), set={1, 2},
        default=collections.defaultdict(int, a=1, b=torch.ones(1)), counter=collections.Counter("hello"), gone={}, empty_list=[],
        ints={0: torch.zeros(2), 1: {"a": 1}}, floats={0.5: 1, True: 2, None: 3},
    )


def equal(a, b, path=""):
    """Same types, same bits."""
    if type(a) is not type(b):
        sys.exit(f"{path}: {type(a)} and {type(b)}")
    if isinstance(a, torch.Tensor):
        a, b = a.detach().resolve_conj().resolve_neg().contiguous(), b.detach().resolve_conj().resolve_neg().contiguous()
        if a.dtype != b.dtype or a.shape != b.shape or bytes(a.reshape(-1).view(torch.uint8).tolist()) != bytes(b.reshape(-1).view(torch.uint8).tolist()):
            sys.exit(f"{path}: {a} and {b}")
    elif isinstance(a, dict):
        if list(a) != list(b):
            sys.exit(f"{path}: keys {list(a)} and {list(b)}")
        for key in a:
            equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            sys.exit(f"{path}: {len(a)} and {len(b)} items")
        for i, (x, y) in enumerate(zip(a, b)):
            equal(x, y, f"{path}.{i}")
    elif a != b and not (a != a and b != b):
        sys.exit(f"{path}: {a!r} and {b!r}")


def count(state):
    return sum(count(v) for v in state.values()) if isinstance(state, dict) else 1


def from_torch(file, directory):
    with tempfile.TemporaryDirectory() as tmp:
        torch_save_to_dcp(file, f"{tmp}/theirs")
        theirs = dcp.FileSystemReader(f"{tmp}/theirs").read_metadata()
        ours = dcp.FileSystemReader(directory).read_metadata()
        if set(theirs.state_dict_metadata) != set(ours.state_dict_metadata):
            sys.exit(f"other keys: {set(theirs.state_dict_metadata) ^ set(ours.state_dict_metadata)}")
        for key, path in theirs.planner_data.items():
            if ours.planner_data[key] != path:
                sys.exit(f"{key}: path {ours.planner_data[key]}, wanted {path}")
        for key, entry in theirs.state_dict_metadata.items():
            mine = ours.state_dict_metadata[key]
            if type(mine) is not type(entry):
                sys.exit(f"{key}: {mine}, wanted {entry}")
            if isinstance(entry, TensorStorageMetadata) and (mine.size, mine.properties.dtype) != (entry.size, entry.properties.dtype):
                sys.exit(f"{key}: {mine}, wanted {entry}")
        dcp_to_torch_save(f"{tmp}/theirs", f"{tmp}/theirs.pt")
        dcp_to_torch_save(directory, f"{tmp}/ours.pt")
        wanted, found = torch.load(f"{tmp}/theirs.pt", weights_only=False), torch.load(f"{tmp}/ours.pt", weights_only=False)
        equal(wanted, {key: found[key] for key in wanted})
    # As a job would: into the model and tensors of its own.
    state = {"model": {k: torch.zeros_like(v) for k, v in everything()["model"].items()}, "step": 0, "text": ""}
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    equal({"model": dict(everything()["model"]), "step": 7, "text": "h\u00e9llo \U0001f600"}, state)
    print(f"from_torch: {len(theirs.state_dict_metadata)} keys equal")


def from_dcp(directory, file):
    with tempfile.TemporaryDirectory() as tmp:
        dcp_to_torch_save(directory, f"{tmp}/theirs.pt")
        wanted = torch.load(f"{tmp}/theirs.pt", weights_only=False)
        try:
            found = torch.load(file, weights_only=True)
        except Exception as error:  # then it holds what PyTorch's own file cannot have either
            try:
                torch.load(f"{tmp}/theirs.pt", weights_only=True)
            except Exception:
                found = torch.load(file, weights_only=False)
            else:
                sys.exit(f"{file}: {error}")
        equal(wanted, found)
    print(f"from_dcp: {directory}: {count(wanted)} leaves equal")


def kinds(directory):
    """Files of other kinds that torch writes."""
    plain = {"w": torch.arange(6.0)}
    at = pathlib.Path(directory)
    torch.save(plain, at / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(plain, at / "protocol4.pt", pickle_protocol=4)
    torch.save(torch.ones(2), at / "tensor.pt")
    torch.save({"a": {"s": torch.eye(3).to_sparse()}}, at / "sparse.pt")
    torch.save({"q": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, at / "quantized.pt")
    torch.save({"m": torch.empty(2, device="meta")}, at / "meta.pt")
    torch.save({"n": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, at / "nested.pt")
    torch.save(torch.nn.Linear(2, 2), at / "module.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(at / "script.pt"))
    torch.serialization.set_crc32_options(False)
    torch.save(plain, at / "no_crc.pt")
    torch.serialization.set_crc32_options(True)
    original = torch.utils.serialization.config.save.storage_alignment
    torch.utils.serialization.config.save.storage_alignment = 4096
    torch.save(plain, at / "aligned.pt")
    torch.utils.serialization.config.save.storage_alignment = original


if __name__ == "__main__":
    command, arguments = sys.argv[1], sys.argv[2:]
    if command == "make":
        torch.save(everything(), arguments[0])
    elif command == "from_torch":
        from_torch(*arguments)
    elif command == "from_dcp":
        for i in range(0, len(arguments), 2):
            from_dcp(*arguments[i : i + 2])
    elif command == "kinds":
        kinds(*arguments)
    else:
        sys.exit(__doc__)
