"""The AliTok autoregressive model: the next token of a picture from its class and the tokens before it (arXiv 2506.05289).

Notable:
- Row t of the output is the distribution of token t; the sequence is [class, token 0 ... token N-1].
- Rotary positions in one dimension for the prefix and in two (half a head each) for the image.
- `generate` writes keys and values into a cache of fixed size and paints conditional and null halves in one batch.
- Sampling inverts the cumulative distribution at one uniform number a token, so an image's randomness is N numbers that
  `image_uniforms` derives from (seed, image) alone.

Letters in shapes: B images, T tokens so far, N tokens an image, V codes, H heads of D numbers, C = H * D.
"""
import functools
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import InputError, fill, generator, load_checkpoint


@dataclass
class ARConfig:
    """Shape of the model, and the classifier-free guidance that suits it. The defaults are the paper's B."""
    codebook_size: int = 4096
    grid: int = 16               # patches a side
    prefix: bool = True          # whether the tokenizer writes grid + 1 prefix tokens before the grid**2 of the image
    num_classes: int = 1000
    width: int = 768
    depth: int = 24
    heads: int = 16
    dropout: float = 0.1
    cfg_scale: float = 16.0
    cfg_power: float = 1.8

    def __post_init__(self):
        if self.width % self.heads or self.width // self.heads % 4:
            raise InputError(f"a width of {self.width} over {self.heads} heads gives no head dimension that is a multiple of 4")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is at least 0 and below 1, found {self.dropout}")

    @property
    def num_tokens(self):
        return self.grid ** 2 + self.prefix_tokens

    @property
    def prefix_tokens(self):
        return self.grid + 1 if self.prefix else 0


PRESETS = {
    "tiny": dict(width=160, depth=6, heads=5, dropout=0.0, cfg_scale=2.0, cfg_power=0.5),      # ours
    "B": dict(width=768, depth=24, heads=16, cfg_scale=16.0, cfg_power=1.8),
    "L": dict(width=1024, depth=24, heads=16, cfg_scale=6.0, cfg_power=0.7),
    "XL": dict(width=1280, depth=32, heads=16, cfg_scale=13.0, cfg_power=1.4),
}


# -----------------------------------------------------------------------------
# Rotary positions

def rotary_table(grid, prefix, head_dim):
    """cos and sin of every position's angles, (2, 1 + N, D/2), for [class, prefix, image].

    Class: zeros, so its query and key vanish (released weights rely on it). Prefix token k: position k over the whole head.
    Image token (r, c): the first half of the head turns by P + r, the second by P + c, P = `prefix` tokens.
    """
    def angles(positions, dim):
        return positions[:, None] / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    rows, columns = prefix + torch.arange(grid ** 2) // grid, prefix + torch.arange(grid ** 2) % grid
    image = torch.cat([angles(rows, head_dim // 2), angles(columns, head_dim // 2)], 1)
    theta = torch.cat([angles(torch.arange(prefix), head_dim), image])
    table = torch.stack([theta.cos(), theta.sin()])
    return torch.cat([torch.zeros_like(table[:, :1]), table], 1).float()


def rotate(x, table):
    """Turn the pairs (x0, x1), (x2, x3), ... of x (B, H, T, D) by the angles of table (2, T, D/2)."""
    cos, sin = table                          # float32, and so is the product: bfloat16 would blur the positions
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


# -----------------------------------------------------------------------------
# Blocks

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
        """x (B, T, C). With a cache (2, B, H, 1 + N, D), x is the single position `at` and sees the ones before it.

        at: an int, for which the cache is read as far as it is filled, or a tensor (1,), for which every shape stays the same
        and one compiled step, or one CUDA graph, serves all positions.
        """
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)        # (B, H, T, D) each
        q, k = rotate(self.q_norm(q.float()), table), rotate(self.k_norm(k.float()), table)
        mask = None
        if cache is not None and isinstance(at, int):
            cache[0, :, :, at:at + 1], cache[1, :, :, at:at + 1] = k, v
            k, v = cache[0, :, :, :at + 1], cache[1, :, :, :at + 1]
        elif cache is not None:
            k, v = (part.index_copy_(2, at, new.to(part.dtype)) for part, new in zip(cache, (k, v)))
            mask = (torch.arange(k.shape[2], device=k.device) <= at)[None]                   # (1, 1 + N)
        dtype = torch.float32 if v.device.type == "cpu" and v.requires_grad else v.dtype   # CPUs are slow at its bfloat16 gradient
        with torch.autocast(v.device.type, enabled=False):
            x = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, is_causal=cache is None,
                                               dropout_p=self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(B, T, C))


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


# -----------------------------------------------------------------------------

class ARModel(nn.Module):
    """Classes are (B,) int64; `num_classes` is the null class of classifier-free guidance. Tokens are (B, T) int64."""
    recompute = False            # save memory in training: compute what happens inside a block again in the backward pass

    def __init__(self, config):
        super().__init__()
        self.config = config
        # rows: V tokens, one unused, the classes, the null class
        self.embeddings = nn.Embedding(config.codebook_size + 1 + config.num_classes + 1, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.output = nn.Linear(config.width, config.codebook_size)
        self.register_buffer("table", rotary_table(config.grid, config.prefix_tokens, config.width // config.heads), persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.output.weight)

    def forward(self, tokens, classes):
        """Tokens (B, T), T <= N, and classes (B,) -> logits (B, T + 1, V); row t is the distribution of token t."""
        if tokens.shape[1] > self.config.num_tokens:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the {self.config.num_tokens} of an image")
        sequence = torch.cat([self.config.codebook_size + 1 + classes[:, None], tokens], 1)            # (B, 1 + T)
        x = self.drop(self.embeddings(sequence))
        table = self.table[:, :x.shape[1]]
        for block in self.blocks:
            x = (checkpoint(block, x, table, use_reentrant=False) if self.recompute and torch.is_grad_enabled()
                 else block(x, table))
        return self.output(self.norm(x))

    def halve(self):
        """Make the blocks' matrices bfloat16, half of what a step of sampling has to read; for use under autocast."""
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()
        return self

    def step(self, ids, at, caches):
        """One position of the sequence: embedding rows `ids` (B,) at place `at` -> logits (B, V). Fills the caches."""
        table = self.table[:, at:at + 1] if isinstance(at, int) else self.table.index_select(1, at)
        x = self.embeddings(ids)[:, None]
        for block, cache in zip(self.blocks, caches):
            x = block(x, table, cache, at)
        with torch.autocast(x.device.type, enabled=False):        # guidance would magnify bfloat16's rounding
            return self.output(self.norm(x.float()))[:, 0]

    def next_tokens(self, ids, at, caches, uniforms, strength, temperature, top_k, top_p):
        """Like `step`, and the tokens drawn: (B,), or (B/2,) from the conditional and null halves where strength is given."""
        logits = self.step(ids, at, caches)
        if strength is not None:
            conditional, null = logits.chunk(2)
            logits = null + strength * (conditional - null)
        return sample_tokens(logits, uniforms, temperature, top_k, top_p)

    @functools.cached_property
    def compiled_next_tokens(self):
        return torch.compile(self.next_tokens, mode="reduce-overhead", fullgraph=True, dynamic=False)

    @torch.no_grad()
    def generate(self, classes, uniforms=None, cfg_scale=None, cfg_power=None, temperature=1.0, top_k=None, top_p=None, kept=None,
                 compiled=False):
        """Paint classes (B,) int64 -> tokens (B, N) int64. kept: tokens (B, K) to go on from, by default none.

        uniforms: (B, N) numbers in [0, 1) that decide every choice, see `image_uniforms`; by default torch's generator
        draws them. cfg_scale 1 does without guidance and at half the work; None takes the scale and power of the config.
        compiled: by one compiled step, on a GPU one CUDA graph; for batches of a size that comes again. Nothing in the loop
        waits for the device.
        """
        config, device, B, N = self.config, self.table.device, len(classes), self.config.num_tokens
        cfg_scale = config.cfg_scale if cfg_scale is None else cfg_scale
        cfg_power = config.cfg_power if cfg_power is None else cfg_power
        if uniforms is None:
            uniforms = torch.rand(B, N, dtype=torch.float64)
        uniforms = uniforms.to(torch.float32 if device.type == "mps" else torch.float64).to(device)
        ids = config.codebook_size + 1 + classes.to(device)
        strengths = [None] * N
        if cfg_scale != 1:
            ids = torch.cat([ids, torch.full_like(ids, config.codebook_size + 1 + config.num_classes)])
            strengths = torch.tensor([guidance(t, N, cfg_scale, cfg_power) for t in range(N)], device=device)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.output.weight.dtype
        caches = torch.zeros(config.depth, 2, len(ids), config.heads, 1 + N, config.width // config.heads, device=device, dtype=dtype)
        tokens = torch.empty(B, N, dtype=torch.long, device=device)
        places, next_tokens = torch.arange(N, device=device), self.compiled_next_tokens if compiled else self.next_tokens
        if compiled:
            torch._dynamo.mark_static_address(caches)             # a CUDA graph then writes to it in place
        for t in range(N):
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            found = next_tokens(ids, places[t:t + 1] if compiled else t, caches, uniforms[:, t], strengths[t], temperature, top_k, top_p)
            tokens[:, t] = kept[:, t] if kept is not None and t < kept.shape[1] else found
            ids = tokens[:, t].repeat(1 if cfg_scale == 1 else 2)
        return tokens


# -----------------------------------------------------------------------------
# Sampling

def guidance(t, num_tokens, scale, power):
    """Strength of classifier-free guidance at token t: it grows from 1 to `scale` along a power-cosine over the image."""
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (t / num_tokens) ** power)) / 2


def sample_tokens(logits, uniforms, temperature=1.0, top_k=None, top_p=None):
    """Logits (B, V) and uniforms (B,) in [0, 1) -> tokens (B,): the first whose cumulative probability exceeds the uniform.

    temperature 0 takes the likeliest. top_k keeps the k likeliest, top_p the fewest whose probabilities reach p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = F.softmax(logits.to(uniforms.dtype) / temperature, -1)
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = probabilities.topk(top_k).values[:, -1:]
        probabilities = probabilities.where(probabilities >= smallest, 0)
    if top_p is not None and top_p < 1:
        ranked, order = (probabilities / probabilities.sum(-1, keepdim=True)).sort(-1, descending=True)
        beyond = ranked.cumsum(-1) - ranked >= top_p              # the likelier ones reach p already
        beyond[:, 0] = False
        probabilities = probabilities.where(~beyond.scatter(-1, order, beyond), 0)
    cumulative = probabilities.cumsum(-1)
    found = torch.searchsorted(cumulative, (uniforms[:, None] * cumulative[:, -1:]).contiguous(), right=True)
    return found[:, 0].clamp_max(logits.shape[-1] - 1)


def image_uniforms(seed, images, num_tokens):
    """The random numbers of images (a list of numbers k): (B, N) float64, a function of (seed, k) alone."""
    return torch.from_numpy(np.stack([generator("sample", seed, k).random(num_tokens) for k in images]))


# -----------------------------------------------------------------------------
# Checkpoints

def from_released(state):
    """A released state dict (alitok_{b,l,xl}.bin), whose names are ours -> a checkpoint of ours. None if it is none."""
    needed = ("output.weight", "embeddings.weight", "blocks.0.attn.q_norm.weight")
    if not any(name in state for name in needed):
        return None
    if not all(name in state for name in needed):
        raise InputError(f"this released AR model is not whole: {', '.join(n for n in needed if n not in state)} is missing")
    output, rows, q_norm = (state[name] for name in needed)
    codes, width = output.shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    preset = next((p for p in PRESETS.values() if (p["width"], p["depth"]) == (width, depth)), {})
    config = ARConfig(codebook_size=codes, num_classes=len(rows) - codes - 2, width=width, depth=depth,
                      heads=width // len(q_norm), cfg_scale=preset.get("cfg_scale", 1.0), cfg_power=preset.get("cfg_power", 1.0))
    return {"config": asdict(config), "model": state, "classes": None, "tokenizer": None}


def load_ar(path, device="cpu", grid=None):
    """The AR model of a file that train_ar.py wrote, or of a released one, in eval mode. InputError for any other file.

    grid: patches a side of its tokenizer, for released files, which do not tell (16 unless given). Beside the weights the
    model carries `classes` (names, or None) and `tokenizer` (the fingerprint its tokens belong to, None if unknown).
    """
    checkpoint = load_checkpoint(path, "ar", from_released)
    config = checkpoint["config"]
    if checkpoint["tokenizer"] is None and grid:
        config["grid"] = grid
    model = ARModel(ARConfig(**config))
    fill(model, checkpoint["model"], path)
    model.classes, model.tokenizer = checkpoint["classes"], checkpoint["tokenizer"]
    return model.to(device).eval()
