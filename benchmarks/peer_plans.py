# SPDX-License-Identifier: BSD-3-Clause
"""What PyTorch's coordinator does for R ranks that each hold one chunk [4, 1024] of T tensors [4 R, 1024], in one process: plans pickled and back,
duplicates dropped, the global plan, its validation, the catalogue pickled and back. Prints the seconds of each as JSON.

  peer_plans.py R T [DIR]      DIR: where to leave the catalogue as `.metadata`
"""
import json
import pathlib
import pickle
import sys
import time

import torch
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.default_planner import _validate_global_plan, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

ranks, tensors = int(sys.argv[1]), int(sys.argv[2])
phases, last = {}, time.perf_counter()


def passed(phase):
    global last
    phases[phase], last = time.perf_counter() - last, time.perf_counter()


def item(rank, number):
    chunk = ChunkStorageMetadata(offsets=torch.Size([4 * rank, 0]), sizes=torch.Size([4, 1024]))
    data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=torch.float32), size=torch.Size([4 * ranks, 1024]))
    return WriteItem(index=MetadataIndex(f"model.layers.{number}.weight", chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)


plans = [SavePlan([item(rank, number) for number in range(tensors)]) for rank in range(ranks)]
passed("local plans")
messages = [pickle.dumps(plan) for plan in plans]
passed("encode")
plans = [pickle.loads(message) for message in messages]
passed("decode")
plans = dedup_save_plans(plans, False)
passed("dedup")
plans, metadata = create_default_global_save_plan(plans)
passed("global plan")
_validate_global_plan(plans, metadata)
passed("validate")
metadata.storage_data = {item.index: _StorageInfo(f"__{rank}_0.distcp", 17_600 * i, 17_600) for rank, plan in enumerate(plans) for i, item in enumerate(plan.items)}
passed("place")
catalogue = pickle.dumps(metadata)
passed("encode the catalogue")
pickle.loads(catalogue)
passed("decode the catalogue")
if len(sys.argv) > 3:
    pathlib.Path(sys.argv[3], ".metadata").write_bytes(catalogue)
print(json.dumps({"seconds": sum(phases.values()), "phases": phases, "decode": phases["decode the catalogue"], "metadata_bytes": len(catalogue)}))
