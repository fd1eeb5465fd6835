# SPDX-License-Identifier: BSD-3-Clause
"""object_store_peer.py DIRECTORY: compares the checkpoint that was downloaded into DIRECTORY/theirs with what was saved, and writes one of its own
into DIRECTORY/ours."""
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
import torch.distributed.checkpoint as dcp

directory = sys.argv[1]
state = {"rows": torch.zeros(1000, 300), "half": torch.zeros(7, dtype=torch.bfloat16), "step": 0}
dcp.load(state, checkpoint_id=f"{directory}/theirs", no_dist=True)
assert torch.equal(state["rows"], torch.arange(300000, dtype=torch.float32).view(1000, 300)), state["rows"]
assert torch.equal(state["half"], torch.arange(7).bfloat16() / 4), state["half"]
assert state["step"] == 12, state["step"]
state["rows"] += 1
state["step"] = 13
dcp.save(state, checkpoint_id=f"{directory}/ours", no_dist=True)
