"""The AliTok autoregressive model: the next token of a picture from its class and the tokens before it.

Notable:
- Row t of the output is the distribution of token t; the sequence is [class, token 0 ... token N-1].
- Rotary positions have one dimension for the prefix and two (half a head each) for the image.
- Sampling inverts the cumulative distribution at one uniform number a token, see `image_uniforms`.

In shapes: B images, T tokens so far, N tokens an image, V codes, H heads of D numbers, C = H * D.
"""
import functools
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (InputError, attention, generation_order, generator, load_checkpoint, load_fitting,
                  load_weights)

@dataclass
class ARConfig:
    """Shape of the model, and how it is best sampled. The defaults are the paper's B, without guidance."""
    codebook_size: int = 4096
    grid: int = 16               # patches a side
    prefix_tokens: int | None = None     # before the grid**2 tokens of the image. None: grid + 1
    num_classes: int = 1000
    width: int = 768
    depth: int = 24
    heads: int = 16
    dropout: float = 0.1
    cfg_scale: float = 1.0       # of classifier-free guidance, see `guidance`
    cfg_power: float = 1.0
    temperature: float = 1.0     # the demo's is 0.6

    def __post_init__(self):
        if self.prefix_tokens is None:
            self.prefix_tokens = self.grid + 1
        if self.width % self.heads or self.width // self.heads % 4:
            raise InputError(f"width {self.width} / {self.heads} heads: no multiple of 4. A head of tiny has "
                             "32, of B 48, of L 64, of XL 80: give --width a multiple of that")

    @property
    def num_tokens(self):
        return self.grid ** 2 + self.prefix_tokens

PRESETS = {
    "tiny": dict(width=160, depth=6, heads=5, dropout=0.0, cfg_scale=2.0, cfg_power=0.5),      # ours
    "B": dict(width=768, depth=24, heads=16, dropout=0.1, cfg_scale=16.0, cfg_power=1.8),
    "L": dict(width=1024, depth=24, heads=16, dropout=0.1, cfg_scale=6.0, cfg_power=0.7),
    "XL": dict(width=1280, depth=32, heads=16, dropout=0.1, cfg_scale=13.0, cfg_power=1.4),
}

def rotary_table(grid, prefix_tokens, head_dim):
    """cos and sin of every position's angles, (2, 1 + N, D/2), for [class, prefix, image]. Class: zeros, so
    all scores with its key are 0, as in released weights. Prefix token k: position k, over the whole head.
    Image token: half of the head turns by P + its row, the other half by P + its column."""
    def angles(positions, dim):
        return positions[:, None] / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    order = generation_order(grid)
    rows, columns = prefix_tokens + order // grid, prefix_tokens + order % grid
    image = torch.cat([angles(rows, head_dim // 2), angles(columns, head_dim // 2)], 1)
    theta = torch.cat([angles(torch.arange(prefix_tokens), head_dim), image])
    return F.pad(torch.stack([theta.cos(), theta.sin()]), (0, 0, 1, 0)).float()

def rotate(x, table):
    """Turn the pairs (x0, x1), (x2, x3), ... of x (B, H, T, D) by the angles of table (2, T or none, D/2)."""
    cos, sin = table                       # float32, and so is the rotation: bfloat16 blurs positions
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

# ---- Transformer parts ---------------------------------------------------------------------------

class Attention(nn.Module):
    """Causal self-attention with RMS-normalised, rotated queries and keys, and an optional static cache."""
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_norm = nn.RMSNorm(config.width // config.heads, eps=1e-5)
        self.k_norm = nn.RMSNorm(config.width // config.heads, eps=1e-5)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x, table, cache=None, at=0):
        """x (B, T, C). With a cache of keys and values, (B, H, 1 + N, D) each, x is position `at` alone. at:
        an int, and the cache is read as far as it is filled; or a tensor (1,), and every shape stays the
        same, so that one compiled step, or one CUDA graph, serves all positions."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))                  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # (B, H, T, D) each
        q, k = self.q_norm(q.type_as(self.q_norm.weight)), self.k_norm(k.type_as(self.k_norm.weight))
        q, k = rotate(q, table), rotate(k, table)
        mask = None
        if cache is not None and isinstance(at, int):
            for cached, new in zip(cache, (k, v)):
                cached[:, :, at:at + 1] = new
            k, v = (cached[:, :, :at + 1] for cached in cache)
        elif cache is not None:
            k, v = (cached.index_copy_(2, at, new.to(cached.dtype)) for cached, new in zip(cache, (k, v)))
            mask = (torch.arange(k.shape[2], device=k.device) <= at)[None]                        # (1, 1 + N)
        x = attention(q, k, v, mask, cache is None, self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).flatten(2).to(qkv.dtype))

class MLP(nn.Module):
    """SwiGLU; the hidden width is 8/3 of the width, rounded up to a multiple of 256."""
    def __init__(self, width):
        super().__init__()
        hidden = -(-(8 * width // 3) // 256) * 256
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, eps=1e-5)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.width, eps=1e-5)
        self.mlp = MLP(config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, table, cache=None, at=0):
        x = x + self.drop(self.attn(self.norm1(x), table, cache, at))
        return x + self.drop(self.mlp(self.norm2(x)))

# ---- The whole --------------------------------------------------------------------------------------

class ARModel(nn.Module):
    """Tokens are (B, T) int64, classes (B,) int64; class `num_classes` is the null class of guidance."""
    def __init__(self, config):
        super().__init__()
        self.config, self.caches = config, {}
        rows = config.codebook_size + 1 + config.num_classes + 1  # V tokens, one unused, classes, null class
        self.embeddings = nn.Embedding.from_pretrained(torch.empty(rows, config.width), freeze=False)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.output = nn.Linear(config.width, config.codebook_size)
        with torch.device("cpu"):                                 # also where all else has no values
            table = rotary_table(config.grid, config.prefix_tokens, config.width // config.heads)
        self.register_buffer("table", table, persistent=False)
        for name, parameter in self.named_parameters():           # RMSNorm's gains stay 1
            if parameter.ndim > 1 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)              # on "meta" it would only load the compiler
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.output.weight)

    def forward(self, tokens, classes):
        """Tokens (B, T), classes (B,) -> logits (B, T + 1, V); row t is the distribution of token t."""
        rows = torch.cat([self.config.codebook_size + 1 + classes[:, None], tokens], 1)
        x = self.drop(self.embeddings(rows))                                                   # (B, 1 + T, C)
        table = self.table[:, :x.shape[1]]
        for block in self.blocks:
            x = block(x, table)
        return self.output(self.norm(x))

    def step(self, rows, at, caches):
        """One position: embedding rows (B,) at place `at` of the sequence -> logits (B, V). Fills caches."""
        table = self.table[:, at]
        x = self.embeddings(rows)[:, None].to(self.blocks[0].norm1.weight.dtype)
        for block, cache in zip(self.blocks, caches):
            x = block(x, table, cache, at)
        return self.output(self.norm(x.float()))[:, 0]            # in float32: guidance magnifies rounding

    def next_tokens(self, rows, at, caches, uniforms, strength, *sampling):
        """`step`, then tokens drawn: (B,), or (B/2,) from conditional and null halves, given strength."""
        logits = self.step(rows, at, caches)
        if strength is not None:
            conditional, null = logits.chunk(2)
            logits = null + strength * (conditional - null)
        return sample_tokens(logits, uniforms, *sampling)

    @functools.cached_property
    def compiled_next_tokens(self):
        return torch.compile(self.next_tokens, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def caches_for(self, batch):
        """A list of (keys, values), one a block, (batch, H, 1 + N, D) each, in the blocks' dtype, on a CPU in
        float32. Kept between batches of one size: at a new address CUDA graphs would record again."""
        c, on_cpu = self.config, self.table.device.type == "cpu"
        like = self.table if on_cpu else self.blocks[0].norm1.weight
        shape = (batch, c.heads, 1 + c.num_tokens, c.width // c.heads)
        kind = shape, like.dtype, like.device
        if kind not in self.caches:
            self.caches.clear()                                   # frees the old ones first
            caches = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.blocks]
            if on_cpu:                                            # keys lie as the product reads them
                caches = [(keys.mT.contiguous().mT, values) for keys, values in caches]
            self.caches[kind] = caches
        return self.caches[kind]

    @torch.no_grad()
    def generate(self, classes, uniforms=None, top_k=None, kept=None, compiled=False, **sampling):
        """Paint classes (B,) int64 -> tokens (B, N) int64. uniforms: (B, N) numbers in [0, 1) that decide
        every choice, see `image_uniforms`; by default torch's. kept: tokens (B, K) to go on from. compiled:
        by one compiled step, on a GPU one CUDA graph; for batches of a size that comes again. sampling: other
        cfg_scale, cfg_power or temperature than the config's. Scale 1 is no guidance, and half the work."""
        config, device = replace(self.config, **sampling), self.table.device
        B, N, scale, power = len(classes), config.num_tokens, config.cfg_scale, config.cfg_power
        if uniforms is None:
            uniforms = torch.rand(B, N, dtype=torch.float64)
        uniforms, classes, strengths = uniforms.to(device).double(), classes.to(device), [None] * N
        if scale != 1:
            classes = torch.cat([classes, torch.full_like(classes, config.num_classes)])
            strengths = torch.tensor([guidance(t, N, scale, power) for t in range(N)], device=device)
        rows = config.codebook_size + 1 + classes
        caches, next_tokens, places = self.caches_for(len(rows)), self.next_tokens, range(N)
        if compiled:
            next_tokens, places = self.compiled_next_tokens, torch.arange(N, device=device).split(1)
            for cached in itertools.chain(*caches):
                torch._dynamo.mark_static_address(cached)         # a CUDA graph then writes to it in place
        tokens = classes.new_empty(B, N)
        for t in range(N):                                        # nothing here waits for the device
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            tokens[:, t] = next_tokens(rows, places[t], caches, uniforms[:, t], strengths[t],
                                       config.temperature, top_k)
            if kept is not None and t < kept.shape[1]:
                tokens[:, t] = kept[:, t]
            rows = tokens[:, t].repeat(1 if scale == 1 else 2)
        return tokens

def start_from(model, old, classes):
    """Fine-tuning: take over from the model `old` every tensor that fits. Names of `classes` that it knows
    keep their embedding; others start as its null class. Nameless classes, if as many, count as the same."""
    load_fitting(model, old.state_dict())
    first, null = old.config.codebook_size + 1, old.config.num_classes
    if old.output.weight.shape == model.output.weight.shape:
        known = old.classes or (classes if len(classes) == null else [])
        sources = [first + (known.index(name) if name in known else null) for name in (*classes, None)]
        rows = old.embeddings.weight.data
        model.embeddings.weight.data = torch.cat([rows[:first], rows[sources]])

# ---- Sampling ---------------------------------------------------------------------------------------

def guidance(t, num_tokens, scale, power):
    """Strength of guidance at token t: it grows from 1 to `scale` along a power-cosine over the image."""
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (t / num_tokens) ** power)) / 2

def sample_tokens(logits, uniforms, temperature=1.0, top_k=None):
    """Logits (B, V), uniforms (B,) -> tokens (B,), the first whose cumulative probability is beyond the
    uniform. temperature 0 takes the likeliest; top_k keeps the k likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = F.softmax(logits.to(uniforms.dtype) / temperature, -1)
    if top_k and top_k < logits.shape[-1]:
        smallest = probabilities.topk(top_k).values[:, -1:]
        probabilities = probabilities.where(probabilities >= smallest, 0)
    cumulative = probabilities.cumsum(-1)
    thresholds = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, thresholds.contiguous(), right=True)[:, 0]
    return tokens.clamp_max(logits.shape[-1] - 1)

def image_uniforms(seed, images, num_tokens):
    """The random numbers of images (a list of numbers k): (B, N) float64, a function of (seed, k) alone."""
    return torch.from_numpy(np.stack([generator("sample", seed, k).random(num_tokens) for k in images]))

# ---- Checkpoints ------------------------------------------------------------------------------------

def from_released(state):
    """A released state dict (alitok_{b,l,xl}.bin), whose names are ours -> ours. KeyError for others."""
    codes, width = state["output.weight"].shape
    heads = width // len(state["blocks.0.attn.q_norm.weight"])
    depth = sum(name.endswith("norm1.weight") for name in state)
    config = dict(codebook_size=codes, num_classes=len(state["embeddings.weight"]) - codes - 2,
                  width=width, depth=depth, heads=heads)
    for preset in PRESETS.values():
        if (preset["width"], preset["depth"]) == (width, depth):
            config |= preset                                      # its guidance, too
    return {"config": config, "model": state, "classes": None, "tokenizer": None}

def load_ar(path, device="cpu", grid=16, prefix_tokens=None):
    """The AR model of a file of train_ar.py, or of a released one for a tokenizer with this grid and prefix,
    in eval mode, with `classes` (names, or None) and `tokenizer` (a fingerprint, or None)."""
    saved = load_checkpoint(path, "ar", from_released)
    if saved["tokenizer"] is None:
        saved["config"] |= dict(grid=grid, prefix_tokens=prefix_tokens)
    with torch.device("meta"):                                    # without random weights
        model = ARModel(ARConfig(**saved["config"]))
    load_weights(model, saved["model"], path)
    model.classes, model.tokenizer = saved["classes"], saved["tokenizer"]
    return model.float().to(device).eval()                        # files may hold float16
