# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch as the peer of extension_peer_test.cpp. Tensors are patterns of their names, so that both sides know them.

  write DIR       DIR/zstd, DIR/rot13 (a transform of the test's own) and DIR/plain, by one rank each
  check DIR N     every tensor of a checkpoint that was saved through zstd, whole and in N parts; its value; all offsets
"""
import codecs
import io
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import zstandard
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension, ZStandard
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

SHAPES = {"rows": (600, 50), "columns": (40, 900), "flat": (70_000,), "scalar": (), "none": (0, 3)}


def whole(name):
    """Smooth, so that it compresses; another one for each name."""
    shape = SHAPES[name]
    count = torch.Size(shape).numel()
    return ((torch.arange(count, dtype=torch.int64) // 7 + len(name)) % 1000).to(torch.float32).reshape(shape)


class Rot13(StreamTransformExtension):
    @staticmethod
    def from_descriptor(version):
        return Rot13()

    @staticmethod
    def registry_name():
        return "stream.rot13"

    def get_descriptor(self):
        return "stream.rot13/1"

    def transform_to(self, output):
        class Writer(io.RawIOBase):
            def writable(self):
                return True

            def write(self, data):
                output.write(codecs.encode(bytes(data).decode("latin-1"), "rot13").encode("latin-1"))
                return len(memoryview(data))

            def flush(self):
                output.flush()

        return Writer()

    def transform_from(self, input):
        return io.BytesIO(codecs.encode(input.read().decode("latin-1"), "rot13").encode("latin-1"))


def write(directory):
    state = {name: whole(name) for name in SHAPES} | {"step": 7}
    for name, extensions in [("zstd", [ZStandard()]), ("rot13", [Rot13()]), ("plain", None)]:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(directory / name, _extensions=extensions), no_dist=True)


def check(directory, parts):
    reader = dcp.FileSystemReader(directory)
    metadata = reader.read_metadata()
    assert {n for n, e in metadata.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)} == set(SHAPES)
    for index, place in metadata.storage_data.items():
        assert place.transform_descriptors == ["stream.zstd/1"], index
        data = (directory / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
        archive = zstandard.ZstdDecompressor().decompressobj()
        content = archive.decompress(data)
        assert archive.eof and not archive.unused_data, index  # one frame, and nothing else
        torch.load(io.BytesIO(content), weights_only=True)
    state = {name: torch.full(shape, -1.0) for name, shape in SHAPES.items()} | {"step": 0}
    dcp.load(state, storage_reader=reader, no_dist=True)
    for name in SHAPES:
        assert torch.equal(state[name], whole(name)), name
    assert state["step"] == 7, state["step"]
    # As a rank of a resharded load would.
    for part in range(parts):
        planner = dcp.DefaultLoadPlanner()
        for name in ("rows", "columns"):
            local = whole(name).chunk(parts)[part]
            first = sum(c.shape[0] for c in whole(name).chunk(parts)[:part])
            target = {name: Part(torch.zeros_like(local), first, SHAPES[name])}
            dcp.load(target, storage_reader=dcp.FileSystemReader(directory), planner=planner, no_dist=True)
            assert torch.equal(target[name].local, local), (name, part)


class Part(torch.Tensor):
    """Rows of a larger tensor, for the planner of dcp.load."""

    @staticmethod
    def __new__(cls, local, first, size):
        part = torch.Tensor._make_wrapper_subclass(cls, size, dtype=local.dtype)
        part.local, part.first = local, first
        return part

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)

    def _box(self):
        return torch.Size([self.first, *[0] * (self.local.dim() - 1)]), self.local.size()

    def __create_chunk_list__(self):
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(offsets=self._box()[0], sizes=self._box()[1])]

    def __get_tensor_shard__(self, index):
        return self.local


if __name__ == "__main__":
    command, directory = sys.argv[1], Path(sys.argv[2])
    write(directory) if command == "write" else check(directory, int(sys.argv[3]))
