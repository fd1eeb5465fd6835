# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch and numpy as the judges of the command line.

  pytorch.py elements              every value of the small floating-point dtypes: "dtype bits value" on a line
  pytorch.py extract RESHARD DIR   numpy reads what `reshard extract` makes
"""
import subprocess
import sys
import warnings

warnings.filterwarnings("ignore")
import torch


def elements():
    for name in "float8_e5m2 float8_e4m3fn float8_e5m2fnuz float8_e4m3fnuz float8_e8m0fnu float16 bfloat16".split():
        dtype = getattr(torch, name)
        count = 256**dtype.itemsize
        raw = torch.arange(count).to(torch.uint8 if count == 256 else torch.int32)
        raw = raw if count == 256 else raw.to(torch.int16)
        for bits, value in enumerate(raw.view(dtype).to(torch.float64).tolist()):
            print(name, bits, value.hex() if value == value and abs(value) != float("inf") else value)


def extract(command, directory):
    import numpy

    names = "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 float32 float64 complex64 complex128".split()
    state = {name: (torch.arange(24) % 7).reshape(2, 3, 4).to(getattr(torch, name)) for name in names}
    state |= {"scalar": torch.tensor(2.5), "vector": torch.arange(5), "empty": torch.empty(0, 3), "transposed": torch.arange(6.0).reshape(2, 3).t()}
    torch.save(state, f"{directory}/all.pt")
    for key, tensor in state.items():
        subprocess.run([command, "extract", f"{directory}/all.pt", key, "-o", f"{directory}/{key}.npy"], check=True)
        found = numpy.load(f"{directory}/{key}.npy", allow_pickle=False)
        wanted = tensor.numpy()
        if found.dtype != wanted.dtype or found.shape != wanted.shape or not numpy.array_equal(found, wanted):
            sys.exit(f"{key}: {found!r}, wanted {wanted!r}")


if __name__ == "__main__":
    {"elements": elements, "extract": extract}[sys.argv[1]](*sys.argv[2:])
