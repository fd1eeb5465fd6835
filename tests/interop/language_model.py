# SPDX-License-Identifier: BSD-3-Clause
"""The twin of examples/train_lm in Python: same names, same arithmetic, same order of data."""
import pathlib

import torch
import torch.nn.functional as F

MASK = (1 << 64) - 1


class Block(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln1 = torch.nn.LayerNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.proj = torch.nn.Linear(width, width)
        self.ln2 = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)

    def forward(self, x):
        batch, context, width = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(batch, context, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, context, width))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class LanguageModel(torch.nn.Module):
    def __init__(self, context=64, width=64, heads=4, blocks=3):
        super().__init__()
        self.token = torch.nn.Embedding(256, width)
        self.position = torch.nn.Embedding(context, width)
        self.blocks = torch.nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.ln = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, 256, bias=False)

    def forward(self, data):
        x = self.token(data) + self.position(torch.arange(data.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


def read_text(root):
    """The texts and sources below a directory, or one file."""
    root = pathlib.Path(root)
    if not root.is_dir():
        return root.read_bytes()
    files = []
    for part in ("docs", "include", "src", "README.md"):
        below = root / part
        files += [below] if below.is_file() else [f for f in below.rglob("*") if f.is_file()]
    return b"".join(f.read_bytes() for f in sorted(files))


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def batch_of(text, seed, step, first, last, context=64):
    rows = []
    for i in range(first, last):
        where = mix(mix(mix(seed) ^ step) ^ i) % (len(text) - context - 1)
        rows.append(list(text[where : where + context + 1]))
    return torch.tensor(rows)
