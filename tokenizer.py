"""The AliTok tokenizer: a picture to N integers and back (arXiv 2506.05289).

Notable:
- The encoder writes N = g*g + g + 1 latent tokens for a g x g grid of patches: g + 1 prefix tokens, then one a patch.
- Stage 1 decodes them causally: patch i is painted from tokens <= i alone, and the gradient teaches the encoder to write
  tokens that depend forward only. The prefix gives the first row, which has no history, something to lean on; its outputs
  paint an auxiliary strip (the first patch, then the first row) so that it earns its keep.
- Stage 2 (`swap_decoder`) freezes everything that decides a token id and trains a bidirectional decoder for a crisp picture.
- Dead codebook entries are brought back by online clustering, whose statistics are shared by all ranks.

Letters in shapes: B images, g patches a side, p pixels a patch, P = g + 1 prefix tokens, N tokens, K codes of D numbers.
"""
import hashlib
import math
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import InputError, fill, load_checkpoint


@dataclass
class TokenizerConfig:
    """Everything that decides the shape of a tokenizer. The defaults are the paper's, for ImageNet at 256 x 256."""
    image_size: int = 256
    patch_size: int = 16
    encoder: str = "bidirectional"   # or "causal": the rule read literally, see `causal_encoder_mask`
    decoder: str = "causal"          # stage 1; "bidirectional" after the swap, or in an ordinary tokenizer from the start
    prefix: bool = True              # without: no prefix tokens and no strip, for comparison
    encoder_width: int = 768
    encoder_depth: int = 12
    decoder_width: int = 1024
    decoder_depth: int = 24
    head_dim: int = 64
    codebook_size: int = 4096
    codebook_dim: int = 32
    buffer_tokens: int = 32          # learned tokens in front of a bidirectional decoder; a causal one has one
    init: str = "paper"              # or "narrow", see `init_weights`

    def __post_init__(self):
        if self.patch_size < 1:
            raise InputError(f"a patch has at least 1 pixel, found {self.patch_size}")
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise InputError(f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}")
        if self.codebook_size < 2:
            raise InputError(f"a codebook needs at least 2 entries, found {self.codebook_size}")
        for name, choices in (("encoder", ("bidirectional", "causal")), ("decoder", ("causal", "bidirectional")),
                              ("init", ("paper", "narrow"))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {' or '.join(choices)}, found {getattr(self, name)!r}")
        for name in ("encoder_width", "decoder_width"):
            if getattr(self, name) % self.head_dim:
                raise InputError(f"{name} {getattr(self, name)} is not a multiple of the head dimension {self.head_dim}")

    @property
    def grid(self):
        return self.image_size // self.patch_size

    @property
    def prefix_tokens(self):
        return self.grid + 1 if self.prefix else 0

    @property
    def num_tokens(self):
        return self.grid ** 2 + self.prefix_tokens


PRESETS = {
    # Ours: small enough for two CPU cores, for the built-in pictures.
    "tiny": dict(image_size=64, patch_size=8, encoder_width=128, encoder_depth=2, decoder_width=128, decoder_depth=4,
                 head_dim=64, codebook_size=1024, codebook_dim=8, buffer_tokens=8, init="narrow"),
    "imagenet256": dict(),
    "imagenet512": dict(image_size=512),      # ours: the paper does not say; 1057 tokens, or 273 with --patch-size 32
}


# -----------------------------------------------------------------------------
# Transformer parts

class Attention(nn.Module):
    """Multi-head self-attention over all tokens, over the earlier ones (`causal`), or under a boolean mask."""

    def __init__(self, width, head_dim):
        super().__init__()
        self.heads = width // head_dim
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal=False, mask=None):
        B, T, C = x.shape
        q, k, v = self.in_proj(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)   # (B, H, T, D) each
        dtype = torch.float32 if v.device.type == "cpu" and v.requires_grad else v.dtype   # CPUs are slow at its bfloat16 gradient
        with torch.autocast(v.device.type, enabled=False):
            x = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Pre-LayerNorm transformer block."""

    def __init__(self, width, head_dim):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, head_dim)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x, causal=False, mask=None):
        x = x + self.attn(self.ln_1(x), causal, mask)
        return x + self.mlp(self.ln_2(x))


def apply_blocks(blocks, x, recompute, *how):
    """All blocks in turn; with `recompute`, what happens inside them is not kept but computed again in the backward pass."""
    for block in blocks:
        x = checkpoint(block, x, *how, use_reentrant=False) if recompute and torch.is_grad_enabled() else block(x, *how)
    return x


def learned(count, width):
    """Learned tokens or positions, (count, width), of the paper's scale."""
    return nn.Parameter(torch.randn(count, width) * width ** -0.5)


# -----------------------------------------------------------------------------
# Encoder: picture -> latents

def own_patches(config):
    """The patch that each latent paints, (N,): in the prefix the strip's (the first patch, then the first row), then all."""
    patches = torch.arange(config.grid ** 2)
    return torch.cat([patches[:1], patches[:config.grid], patches]) if config.prefix else patches


def causal_encoder_mask(config):
    """Who may look at whom in a causal encoder: (T, T) bool, T = g*g patches then N latents, True = row sees column.

    A patch sees patches up to itself. A latent sees latents up to itself and patches up to its own.
    """
    patches, total = config.grid ** 2, config.grid ** 2 + config.num_tokens
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    mask[patches:, :patches] = torch.arange(patches) <= own_patches(config)[:, None]
    return mask


class Encoder(nn.Module):
    """ViT over [patches, learned latent tokens]; only the latents come out: (B, 3, H, W) -> (B, N, D)."""
    recompute = False                # save memory in training, see `apply_blocks`

    def __init__(self, config):
        super().__init__()
        c, width = config, config.encoder_width
        self.patch_embed = nn.Conv2d(3, width, c.patch_size, stride=c.patch_size)
        self.patch_positions = learned(c.grid ** 2, width)
        self.latent_tokens = learned(c.num_tokens, width)
        self.latent_positions = learned(c.num_tokens, width)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, c.head_dim) for _ in range(c.encoder_depth))
        self.ln_post = nn.LayerNorm(width)
        self.to_latent = nn.Linear(width, c.codebook_dim)
        mask = causal_encoder_mask(c) if c.encoder == "causal" else None
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("own_patches", own_patches(c), persistent=False)

    def forward(self, images):
        patches = self.patch_embed(images).flatten(2).transpose(1, 2) + self.patch_positions           # (B, g*g, C)
        latents = (self.latent_tokens + self.latent_positions).expand(len(images), -1, -1)             # (B, N, C)
        x = self.ln_pre(torch.cat([patches, latents.to(patches.dtype)], dim=1))
        x = apply_blocks(self.blocks, x, self.recompute, False, self.mask)
        return self.to_latent(self.ln_post(x[:, patches.shape[1]:]))


# -----------------------------------------------------------------------------
# Quantizer: latents -> token ids, and the codebook that makes them

class Quantizer(nn.Module):
    """Nearest codebook entry with a straight-through gradient, and online clustering (CVQ) against dead codes."""
    COMMITMENT = 0.25
    DECAY = 0.99

    def __init__(self, size, dim):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(size, dim))
        self.register_buffer("usage", torch.zeros(size))     # p: running share of the tokens each code receives
        self.seen = None                                     # what `observe` gathered since the last update
        self.blend = 1.0                                     # in training: 0 passes latents as they are, 1 quantizes them

    def forward(self, z):
        """Latents (B, N, D) -> quantized latents (B, N, D), tokens (B, N) int64, quantizer loss (scalar)."""
        with torch.autocast(z.device.type, enabled=False):   # distances need float32
            z = z.float()
            distances = self.distances(z)
            tokens = distances.argmin(1).view(z.shape[:2])
            codes = F.embedding(tokens, self.codebook)
            blend = self.blend if self.training else 1.0
            loss = F.mse_loss(codes, z.detach()) + blend * self.COMMITMENT * F.mse_loss(z, codes.detach())
            if self.training and torch.is_grad_enabled():     # frozen in stage 2 and in the discriminator's steps
                self.observe(z.detach().flatten(0, 1), tokens.flatten(), distances)
            return z + blend * (codes - z).detach(), tokens, loss

    @torch.no_grad()
    def distances(self, z):
        """Squared Euclidean distances of latents (B, N, D) to the codes, up to a constant a latent: (B*N, K)."""
        return self.codebook.pow(2).sum(1) - 2 * z.flatten(0, 1) @ self.codebook.T

    @torch.no_grad()
    def observe(self, z, tokens, distances):
        """Remember how often each code was used and, for each code, the closest latent. z (M, D), distances (M, K)."""
        counts = torch.bincount(tokens, minlength=len(self.codebook)).float()
        nearest = (distances + z.pow(2).sum(1, keepdim=True)).min(0)
        found = (counts, nearest.values, z[nearest.indices])
        if self.seen is not None:                            # a further micro-batch of the same step
            closer = nearest.values < self.seen[1]
            found = (self.seen[0] + counts, torch.where(closer, nearest.values, self.seen[1]),
                     torch.where(closer[:, None], found[2], self.seen[2]))
        self.seen = found

    @torch.no_grad()
    def revive(self, skip=False):
        """Once an optimiser step: pull codes that are hardly used onto latents of this batch, over all ranks (CVQ).

        A code used as often as the average one does not move; one that is never used becomes the latent nearest to it.
        Ranks exchange counts and one candidate a code. skip: whether to leave all as it is, a boolean on any device.
        """
        counts, distance, candidate = self.seen
        self.seen = None
        if dist.is_initialized():
            dist.all_reduce(counts)
            offers = torch.cat([distance[:, None], candidate], 1)                                      # (K, 1 + D)
            gathered = [torch.empty_like(offers) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, offers)
            gathered = torch.stack(gathered)                                                           # (ranks, K, 1 + D)
            best = gathered[:, :, 0].argmin(0)
            candidate = gathered[best, torch.arange(len(best), device=best.device), 1:]
        good = 1.0 - torch.as_tensor(skip).float()
        self.usage.lerp_(counts / counts.sum(), (1 - self.DECAY) * good)
        alpha = good * torch.exp(-self.usage * len(self.codebook) * 10 / (1 - self.DECAY) - 1e-3)
        self.codebook.lerp_(candidate.nan_to_num(0, 0, 0), alpha[:, None])

    def use(self):
        """Share of codes in use: those that lately received more than a hundredth of the average code's tokens."""
        return (self.usage * len(self.codebook) > 0.01).float().mean()


# -----------------------------------------------------------------------------
# Decoder: latents -> picture

class PixelHead(nn.Module):
    """Each token paints one patch: (B, rows*cols, C) -> (B, 3, rows*p, cols*p) in [0, 1]."""

    def __init__(self, width, patch_size):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(width, patch_size ** 2 * 3)
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x, rows, cols):
        p = self.patch_size
        x = self.proj(x).view(-1, rows, cols, p, p, 3).permute(0, 5, 1, 3, 2, 4)                       # (B, 3, r, p, c, p)
        return self.conv(x.reshape(-1, 3, rows * p, cols * p)).float().sigmoid()      # bfloat16 is coarser than 8 bits


class Decoder(nn.Module):
    """Transformer over [learned tokens, latents]: (B, N, D) -> picture (B, 3, H, W) and the prefix strip, in [0, 1].

    causal (stage 1): one learned token in front, every token sees only earlier ones, and the prefix outputs paint the strip
    (B, 3, p, (g+1)*p). bidirectional (stage 2): `buffer_tokens` learned tokens in front, no strip (None).
    """
    recompute = False                # save memory in training, see `apply_blocks`

    def __init__(self, config):
        super().__init__()
        c, width = config, config.decoder_width
        self.grid, self.prefix = c.grid, c.prefix_tokens
        self.causal = c.decoder == "causal"
        self.from_latent = nn.Linear(c.codebook_dim, width)
        self.buffer_tokens = learned(1 if self.causal else c.buffer_tokens, width)
        self.positions = learned(len(self.buffer_tokens) + c.num_tokens, width)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, c.head_dim) for _ in range(c.decoder_depth))
        self.ln_post = nn.LayerNorm(width)
        self.image_head = PixelHead(width, c.patch_size)
        self.strip_head = PixelHead(width, c.patch_size) if self.causal and c.prefix else None

    def forward(self, z):
        x = self.from_latent(z)
        x = torch.cat([self.buffer_tokens.to(x.dtype).expand(len(x), -1, -1), x], dim=1) + self.positions
        x = self.ln_pre(x)
        x = apply_blocks(self.blocks, x, self.recompute, self.causal)
        x = self.ln_post(x[:, len(self.buffer_tokens):])                                               # (B, N, C)
        image = self.image_head(x[:, self.prefix:], self.grid, self.grid)
        strip = self.strip_head(x[:, :self.prefix], 1, self.prefix) if self.strip_head else None
        return image, strip


# -----------------------------------------------------------------------------

class Tokenizer(nn.Module):
    """Encoder, quantizer and decoder. Images are (B, 3, H, W) floats in [0, 1], tokens (B, N) int64, prefix first."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = Quantizer(config.codebook_size, config.codebook_dim)
        self.decoder = Decoder(config)
        init_weights(self, config.init)
        nn.init.trunc_normal_(self.quantizer.codebook, std=0.02 if config.init == "paper" else 0.5)

    def forward(self, images):
        """What training needs: picture, strip (None without causal decoder or prefix), quantizer loss, tokens."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.quantizer.codebook.requires_grad):
            z, tokens, quantizer_loss = self.quantizer(self.encoder(images))
        image, strip = self.decoder(z)
        return image, strip, quantizer_loss, tokens

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) float in [0, 1] -> tokens (B, N) int64: prefix first, then the patches in raster order."""
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size) or not images.is_floating_point():
            raise ValueError(f"encode wants floats (B, 3, {size}, {size}), found {images.dtype} {tuple(images.shape)}")
        with torch.autocast(images.device.type, enabled=False):
            z = self.encoder(images).float()
            return self.quantizer.distances(z).argmin(1).view(z.shape[:2])

    @torch.no_grad()
    def decode(self, tokens):
        """Tokens (B, N) int64 -> images (B, 3, H, W) float in [0, 1]."""
        if tokens.ndim != 2 or tokens.shape[1] != self.config.num_tokens:
            raise ValueError(f"decode wants tokens (B, {self.config.num_tokens}), found {tuple(tokens.shape)}")
        return self.decoder(F.embedding(tokens, self.quantizer.codebook))[0]

    def swap_decoder(self):
        """Stage 2: a new bidirectional decoder; encoder, latent tokens and codebook are frozen, so token ids stay."""
        self.config = TokenizerConfig(**{**asdict(self.config), "decoder": "bidirectional"})
        device = self.quantizer.codebook.device
        self.requires_grad_(False)
        self.decoder = Decoder(self.config)
        init_weights(self.decoder, self.config.init)
        self.decoder.to(device)
        return self

    def fingerprint(self):
        """Sixteen hex digits that name whatever decides a token id: the encoder's weights and mask, and the codebook."""
        digest = hashlib.sha256(self.config.encoder.encode())
        for name, value in sorted({**self.encoder.state_dict(), "codebook": self.quantizer.codebook}.items()):
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def init_weights(model, scheme):
    """paper: truncated normal 0.02 for linear and conv weights, biases zero.

    narrow (ours, for small models in few steps): the same signal at any width. The last convolution starts as the identity;
    from 0.02 it is close to singular, and a small model paints in grey for thousands of steps. Queries start equal to keys,
    and a latent's position equal to that of its own patch: at first, like attends to like. The codebook starts as wide as
    the latents.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            nn.init.trunc_normal_(module.weight, std=0.02 if scheme == "paper" else 0.02 * (768 / fan_in) ** 0.5)
            nn.init.zeros_(module.bias)
    for module in model.modules() if scheme == "narrow" else ():
        if isinstance(module, PixelHead):
            nn.init.dirac_(module.conv.weight)
        if isinstance(module, Attention):
            queries, keys, _ = module.in_proj.weight.data.chunk(3)
            keys.copy_(queries)
        if isinstance(module, Encoder):
            module.latent_positions.data.copy_(module.patch_positions[module.own_patches])


# -----------------------------------------------------------------------------
# Checkpoints

# What the released AliTok.pth calls its parts, and what they are called here.
RELEASED_NAMES = {
    "latent_tokens": "encoder.latent_tokens",
    "encoder.positional_embedding": "encoder.patch_positions",
    "encoder.latent_token_positional_embedding": "encoder.latent_positions",
    "encoder.conv_out": "encoder.to_latent",
    "quantize.embedding.weight": "quantizer.codebook",
    "decoder.decoder_embed": "decoder.from_latent",
    "decoder.class_embedding": "decoder.buffer_tokens",
    "decoder.latent_token_positional_embedding": "decoder.positions",
    "decoder.ffn.0": "decoder.image_head.proj",
    "decoder.conv_out": "decoder.image_head.conv",
    "decoder.ffn_aux.0": "decoder.strip_head.proj",
    "decoder.conv_out_aux": "decoder.strip_head.conv",
    "encoder.transformer": "encoder.blocks",
    "decoder.transformer": "decoder.blocks",
}


def from_released(state):
    """A released state dict, or a stage-1 training checkpoint that keeps one under `model_state` -> a checkpoint of ours.

    Widths, depths, codebook, tokens and patch come from the shapes. None if this is no such file.
    """
    state = state.get("model_state", state)
    if not any(name in state for name in ("quantize.embedding.weight", "encoder.latent_token_positional_embedding")):
        return None
    renamed = {}
    for name, value in state.items():
        for theirs, ours in RELEASED_NAMES.items():
            if name == theirs or name.startswith(theirs + "."):
                name = ours + name[len(theirs):]
                break
        if name in ("encoder.to_latent.weight", "decoder.image_head.proj.weight", "decoder.strip_head.proj.weight"):
            value = value.flatten(min(1, value.ndim - 1))     # a 1 x 1 convolution there, a linear layer here
        renamed[name] = value
    needed = {"quantizer.codebook": 2, "encoder.patch_embed.weight": 4, "encoder.patch_positions": 2, "decoder.buffer_tokens": 2}
    wrong = [f"{name} is missing" if name not in renamed else f"{name} is {tuple(renamed[name].shape)}, not {ndim}-dimensional"
             for name, ndim in needed.items() if name not in renamed or renamed[name].ndim != ndim]
    if wrong:
        raise InputError(f"this released tokenizer does not fit the model: {'; '.join(wrong)}")
    codes, dim = renamed["quantizer.codebook"].shape
    width, _, patch, _ = renamed["encoder.patch_embed.weight"].shape
    buffer, decoder_width = renamed["decoder.buffer_tokens"].shape
    depths = {part: len({name.split(".")[2] for name in renamed if name.startswith(part + ".blocks.")})
              for part in ("encoder", "decoder")}
    config = TokenizerConfig(image_size=math.isqrt(len(renamed["encoder.patch_positions"])) * patch, patch_size=patch,
                             decoder="causal" if "decoder.strip_head.proj.weight" in renamed else "bidirectional",
                             encoder_width=width, encoder_depth=depths["encoder"], decoder_width=decoder_width,
                             decoder_depth=depths["decoder"], codebook_size=codes, codebook_dim=dim)
    if config.decoder == "bidirectional":
        config.buffer_tokens = buffer
    renamed.setdefault("quantizer.usage", torch.zeros(codes))
    return {"config": asdict(config), "model": renamed}


def load_tokenizer(path, device="cpu"):
    """The tokenizer of a file that train_tokenizer.py wrote, or of a released one, in eval mode. InputError for others."""
    checkpoint = load_checkpoint(path, "tokenizer", from_released)
    model = Tokenizer(TokenizerConfig(**checkpoint["config"]))
    if model.config.decoder == "bidirectional":
        model.requires_grad_(False)
    fill(model, checkpoint["model"], path)
    return model.to(device).eval()


def load_causal_decoder(path, device="cpu"):
    """The tokenizer of a file with its stage-1 decoder, which train_tokenizer.py keeps beside the stage-2 one.

    InputError when the file has none, as the released one, or one trained with --decoder bidirectional.
    """
    checkpoint = load_checkpoint(path, "tokenizer", from_released)
    state, config = checkpoint["model"], TokenizerConfig(**{**checkpoint["config"], "decoder": "causal"})
    if checkpoint["config"]["decoder"] != "causal":
        if not checkpoint.get("causal_decoder"):
            raise InputError(f"{path} keeps no causal decoder to paint with token by token; name a file that train_tokenizer.py "
                             "wrote, without --decoder bidirectional")
        state = {**{name: value for name, value in state.items() if not name.startswith("decoder.")},
                 **{f"decoder.{name}": value for name, value in checkpoint["causal_decoder"].items()}}
    model = Tokenizer(config)
    fill(model, state, path)
    return model.to(device).eval()
