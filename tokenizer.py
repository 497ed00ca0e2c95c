"""The AliTok tokenizer: a picture to N integers and back (arXiv 2506.05289).

Notable:
- The encoder writes N = P + g*g tokens for g x g patches: P = g + 1 prefix tokens, then one per patch.
- Stage 1 decodes them causally: patch i is painted from tokens <= i alone, so the gradient penalises a token
  that needs a later one. The first row has no history; the prefix gives it one. The prefix outputs paint a
  strip (the first patch, then the first row), which makes the prefix carry that row.
- Stage 2 (`swap_decoder`) freezes all that decides a token id and trains a bidirectional decoder.
- Codes that no latent uses are brought back by online clustering (CVQ), with statistics shared by all ranks.

In shapes: B images, g patches a side, p pixels a patch, P prefix tokens, N tokens, K codes of D numbers.
"""
import hashlib
import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from data import InputError, attention, generation_order, load_checkpoint, load_fitting, load_weights

@dataclass
class TokenizerConfig:
    """All that decides the shape of a tokenizer. The defaults are the paper's, for ImageNet at 256 x 256."""
    image_size: int = 256
    patch_size: int = 16
    encoder: str = "bidirectional"   # or "causal", see `causal_encoder_mask`
    decoder: str = "causal"          # "bidirectional" in stage 2, and in an ordinary tokenizer
    prefix_tokens: int | None = None     # None: g + 1. Also g (no first patch in the strip), or 0 (no strip)
    encoder_width: int = 768
    encoder_depth: int = 12
    decoder_width: int = 1024
    decoder_depth: int = 24
    head_dim: int = 64
    codebook_size: int = 4096
    codebook_dim: int = 32
    buffer_tokens: int = 32          # learned tokens in front of a bidirectional decoder; a causal one has 1
    init: str = "paper"              # or "narrow", see `init_weights`

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise InputError(f"image size {self.image_size} is no multiple of patch size {self.patch_size}")
        if self.prefix_tokens is None:
            self.prefix_tokens = self.grid + 1
        if self.prefix_tokens not in (0, self.grid, self.grid + 1):
            raise InputError(f"{self.prefix_tokens} prefix tokens; give 0, {self.grid} or {self.grid + 1}")
        if sorted(generation_order(self.grid).tolist()) != list(range(self.grid ** 2)):
            raise InputError("generation_order must name every patch of the grid exactly once")

    @property
    def grid(self):
        return self.image_size // self.patch_size

    @property
    def num_tokens(self):
        return self.grid ** 2 + self.prefix_tokens

PRESETS = {
    "tiny": TokenizerConfig(     # ours: small enough for two CPU cores, for the built-in pictures
        image_size=64, patch_size=8, encoder_width=128, encoder_depth=2, decoder_width=128, decoder_depth=4,
        codebook_size=1024, codebook_dim=8, buffer_tokens=8, init="narrow"),
    "imagenet256": TokenizerConfig(),
    "imagenet512": TokenizerConfig(image_size=512),           # ours: the paper does not say; 1057 tokens
}

# ---- Transformer parts ------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention, (B, T, C) -> (B, T, C); `causal`, or under a boolean mask (T, T)."""
    def __init__(self, width, head_dim):
        super().__init__()
        self.heads = width // head_dim
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal=False, mask=None):
        qkv = self.in_proj(x).unflatten(2, (3, self.heads, -1))              # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # (B, H, T, D) each
        x = attention(q, k, v, mask, causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))

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

def learned(count, width):
    """Learned tokens or positions, (count, width), of the paper's scale."""
    values = torch.empty(count, width)
    return nn.Parameter(values if values.is_meta else values.normal_(std=width ** -0.5))

# ---- Encoder: picture -> latents --------------------------------------------------------------------

def own_patches(config):
    """The patch that each of the N tokens paints, as row * g + column. Prefix: the first patch, then the
    first g in the order of generation (by default the first row). Image tokens: every patch."""
    order = generation_order(config.grid)
    strip = torch.cat([order[:1], order[:config.grid]])
    return torch.cat([strip[len(strip) - config.prefix_tokens:], order])     # P = g: without the first patch

def causal_encoder_mask(config):
    """Who sees whom in a causal encoder: (T, T) bool, T = g*g patches, then N latents. True: row sees column.
    A patch sees patches up to itself. A latent sees latents up to itself, and patches up to its own."""
    patches, total = config.grid ** 2, config.grid ** 2 + config.num_tokens
    place = generation_order(config.grid).argsort()           # when each patch is painted
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    mask[:patches, :patches] = place <= place[:, None]
    mask[patches:, :patches] = place <= place[own_patches(config)][:, None]
    return mask

class Encoder(nn.Module):
    """ViT over [patches, learned latent tokens]. Only the latents come out: (B, 3, H, W) -> (B, N, D)."""
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
        with torch.device("cpu"):                             # also where all else is built without values
            mask = causal_encoder_mask(c) if c.encoder == "causal" else None
            self.register_buffer("mask", mask, persistent=False)
            self.register_buffer("own_patches", own_patches(c), persistent=False)
        init_weights(self, c.init)

    def forward(self, images):
        patches = self.patch_embed(images).flatten(2).transpose(1, 2) + self.patch_positions     # (B, g*g, C)
        latents = (self.latent_tokens + self.latent_positions).expand(len(images), -1, -1)         # (B, N, C)
        x = self.ln_pre(torch.cat([patches, latents], dim=1))
        for block in self.blocks:
            x = block(x, mask=self.mask)
        return self.to_latent(self.ln_post(x[:, patches.shape[1]:]))

# ---- Quantizer: latents <-> token ids. Nothing outside this class knows what a code is. -------------

class Quantizer(nn.Module):
    """Nearest codebook entry, straight-through gradient, and online clustering (CVQ) against dead codes."""
    COMMITMENT = 0.25
    DECAY = 0.99

    def __init__(self, config):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.codebook_dim))
        self.register_buffer("usage", torch.zeros(config.codebook_size))    # running share of tokens per code
        self.observed = None                                               # what `observe` gathered this step
        nn.init.trunc_normal_(self.codebook, std=0.02 if config.init == "paper" else 0.5)

    def forward(self, z, blend=1.0):
        """Latents (B, N, D) -> quantized latents (B, N, D), tokens (B, N) int64, quantizer loss (scalar).
        blend: 0 passes the latents unquantized, 1 quantizes them; in between, a mixture of the two."""
        with torch.autocast(z.device.type, enabled=False):    # bfloat16 is too coarse for distances
            z = z.float()
            distances = self.distances(z)
            tokens = distances.argmin(-1)
            codes = self.codes(tokens)
            # Codes always follow the latents; latents are held to codes as far as the decoder sees codes.
            loss = F.mse_loss(codes, z.detach()) + blend * self.COMMITMENT * F.mse_loss(z, codes.detach())
            if self.training and self.codebook.requires_grad:                # stage 1, the GAN phase included
                self.observe(z.flatten(0, 1), tokens.flatten(), distances.flatten(0, 1))
            return z + blend * (codes - z).detach(), tokens, loss

    def tokens(self, z):
        """Latents (B, N, D) -> tokens (B, N) int64."""
        return self.distances(z).argmin(-1)

    def codes(self, tokens):
        """Tokens (B, N) -> quantized latents (B, N, D)."""
        return F.embedding(tokens, self.codebook)

    def fingerprint(self):
        """The tensors that decide which token a latent gets, by name."""
        return {"codebook": self.codebook}

    @torch.no_grad()
    def distances(self, z):
        """Squared distances of latents (B, N, D) to the codes, but for a constant per latent: (B, N, K)."""
        return self.codebook.pow(2).sum(1) - 2 * z @ self.codebook.T

    @torch.no_grad()
    def observe(self, z, tokens, distances):
        """Note the number of tokens and the closest latent of each code. z (M, D), distances (M, K)."""
        counts = torch.bincount(tokens, minlength=len(self.codebook)).float()
        distance, index = (distances + z.pow(2).sum(1, keepdim=True)).min(0)
        candidate = z[index]
        if self.observed is not None:                         # a further micro-batch of the same step
            counts_before, distance_before, candidate_before = self.observed
            closer = distance < distance_before
            counts = counts + counts_before
            distance = torch.where(closer, distance, distance_before)
            candidate = torch.where(closer[:, None], candidate, candidate_before)
        self.observed = counts, distance, candidate

    @torch.no_grad()
    def after_step(self, stepped):
        """After every optimizer step, pull codes that are hardly used onto latents of the batch (CVQ). A code
        of average use does not move; one never used becomes the latent nearest to it, over all ranks.
        stepped: False when the step was skipped; then nothing moves."""
        (counts, distance, candidate), self.observed = self.observed, None
        if not stepped:
            return
        if dist.is_initialized():                             # ranks exchange counts and one candidate a code
            dist.all_reduce(counts)
            nearest = distance.clone()
            dist.all_reduce(nearest, dist.ReduceOp.MIN)
            mine = (distance == nearest).float()[:, None]     # several ranks may be equally near
            candidate = candidate * mine
            dist.all_reduce(candidate)
            dist.all_reduce(mine)
            candidate = candidate / mine
        self.usage.lerp_(counts / counts.sum(), 1 - self.DECAY)
        # CVQ's constants: 10 makes the step from used to unused sharp, 1e-3 keeps alpha below 1
        alpha = torch.exp(-self.usage * len(self.codebook) * 10 / (1 - self.DECAY) - 1e-3)
        self.codebook.lerp_(candidate, alpha[:, None])

# ---- Decoder: latents -> picture --------------------------------------------------------------------

class PixelHead(nn.Module):
    """Each token paints one patch: (B, rows*cols, C) -> (B, 3, rows*p, cols*p) in [0, 1]."""
    def __init__(self, width, patch_size):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(width, patch_size ** 2 * 3)
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x, rows):
        p = self.patch_size
        x = self.proj(x).view(len(x), rows, -1, p, p, 3).permute(0, 5, 1, 3, 2, 4)        # (B, 3, r, p, c, p)
        x = self.conv(x.flatten(4).flatten(2, 3))
        return x.float().sigmoid()                            # bfloat16 is coarser than 8 bits

class Decoder(nn.Module):
    """Transformer: quantized latents (B, N, D) -> picture (B, 3, H, W) and strip, both in [0, 1]. Causal
    (stage 1): one learned token in front, every token sees only earlier ones, and the prefix paints the
    strip (B, 3, p, P*p). Bidirectional (stage 2): `buffer_tokens` learned tokens in front, no strip."""
    def __init__(self, config):
        super().__init__()
        c, width = config, config.decoder_width
        self.grid, self.prefix_tokens = c.grid, c.prefix_tokens
        self.causal = c.decoder == "causal"
        self.from_latent = nn.Linear(c.codebook_dim, width)
        self.buffer_tokens = learned(1 if self.causal else c.buffer_tokens, width)
        self.positions = learned(len(self.buffer_tokens) + c.num_tokens, width)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, c.head_dim) for _ in range(c.decoder_depth))
        self.ln_post = nn.LayerNorm(width)
        self.image_head = PixelHead(width, c.patch_size)
        self.strip_head = PixelHead(width, c.patch_size) if self.causal and c.prefix_tokens else None
        with torch.device("cpu"):
            place = c.prefix_tokens + generation_order(c.grid).argsort()
        self.register_buffer("place", place, persistent=False)              # the token that paints each patch
        init_weights(self, c.init)

    def forward(self, z):
        x = self.from_latent(z)
        x = torch.cat([self.buffer_tokens.expand(len(x), -1, -1), x], dim=1) + self.positions
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x, self.causal)                         # the no-peeking-forward rule is this argument
        x = self.ln_post(x[:, len(self.buffer_tokens):])                                           # (B, N, C)
        strip = self.strip_head(x[:, :self.prefix_tokens], 1) if self.strip_head else None
        return self.image_head(x[:, self.place], self.grid), strip

def strip_target(images, model):
    """What the P prefix tokens paint, (B, 3, p, P*p), see `own_patches`."""
    p = model.config.patch_size
    patches = images.unfold(2, p, p).unfold(3, p, p).flatten(2, 3)                         # (B, 3, g*g, p, p)
    strip = patches[:, :, model.encoder.own_patches[:model.config.prefix_tokens]]
    return strip.transpose(2, 3).flatten(3)

# ---- The whole --------------------------------------------------------------------------------------

class Tokenizer(nn.Module):
    """Images are (B, 3, H, W) floats in [0, 1], tokens (B, N) int64, prefix first."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = Quantizer(config)
        self.decoder = Decoder(config)
        self.causal_decoder = None   # in stage 2: stage 1's decoder, kept for painting token by token

    def forward(self, images, blend=1.0):
        """-> picture, strip (or None, see `Decoder`), quantizer loss. blend: see `Quantizer.forward`."""
        z, _, quantizer_loss = self.quantizer(self.encoder(images), blend)
        image, strip = self.decoder(z)
        return image, strip, quantizer_loss

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) float in [0, 1] -> tokens (B, N) int64: prefix, then in order of generation."""
        with torch.autocast(images.device.type, enabled=False):
            return self.quantizer.tokens(self.encoder(images))

    @torch.no_grad()
    def decode(self, tokens):
        """Tokens (B, N) int64 -> images (B, 3, H, W) float in [0, 1]."""
        return self.decoder(self.quantizer.codes(tokens))[0]

    @torch.no_grad()
    def decode_causal(self, tokens):
        """By stage 1's decoder: tokens (B, N) -> images (B, 3, H, W) and strip, see `Decoder`."""
        return self.stage1_decoder()(self.quantizer.codes(tokens))

    def stage1_decoder(self):
        """InputError when there is none, as in the released file."""
        decoder = self.decoder if self.decoder.causal else self.causal_decoder
        if decoder is None:
            raise InputError("this tokenizer keeps no causal decoder; only ours with a causal stage 1 do")
        return decoder

    def swap_decoder(self, cold=False):
        """Stage 2: a bidirectional decoder; all else is frozen, so token ids stay. As in the released code it
        starts from the old one's tensors that fit, all but buffer tokens and positions; or, if cold, anew."""
        self.requires_grad_(False)
        old, self.config = self.decoder, replace(self.config, decoder="bidirectional")
        if old.causal:
            self.causal_decoder = old
        self.decoder = Decoder(self.config).to(self.encoder.latent_tokens.device)
        if not cold:
            load_fitting(self.decoder, old.state_dict())
        return self

    def fingerprint(self):
        """Sixteen hex digits that name what decides a token id: encoder, codebook, order of generation."""
        digest = hashlib.sha256(self.config.encoder.encode())
        tensors = {**self.encoder.state_dict(), **self.quantizer.fingerprint()}
        for name, value in sorted(tensors.items()):
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
        order = generation_order(self.config.grid)
        if not order.equal(torch.arange(len(order))):         # raster order adds nothing
            digest.update(order.numpy().tobytes())
        return digest.hexdigest()[:16]

def init_weights(model, scheme):
    """paper: truncated normal 0.02 for linear and conv weights, biases zero. narrow (ours, for small models
    in few steps): a narrow layer gets larger weights, so that its outputs are as large as those of a layer
    768 wide. The last convolution starts as the identity; from 0.02 a small model paints in grey for long."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            scale = 1 if scheme == "paper" else (768 / module.weight[0].numel()) ** 0.5
            nn.init.trunc_normal_(module.weight, std=0.02 * scale)
            nn.init.zeros_(module.bias)
    if scheme == "paper":
        return
    for module in model.modules():
        if isinstance(module, PixelHead):
            nn.init.dirac_(module.conv.weight)

# ---- Checkpoints ------------------------------------------------------------------------------------

# What the released AliTok.pth calls its parts, and what they are called here.
RELEASED_NAMES = dict(line.split() for line in """
    latent_tokens                                   encoder.latent_tokens
    encoder.positional_embedding                    encoder.patch_positions
    encoder.latent_token_positional_embedding       encoder.latent_positions
    encoder.conv_out.                               encoder.to_latent.
    encoder.transformer.                            encoder.blocks.
    quantize.embedding.weight                       quantizer.codebook
    quantize.embed_prob                             quantizer.usage
    decoder.decoder_embed.                          decoder.from_latent.
    decoder.class_embedding                         decoder.buffer_tokens
    decoder.latent_token_positional_embedding       decoder.positions
    decoder.ffn.0.                                  decoder.image_head.proj.
    decoder.conv_out.                               decoder.image_head.conv.
    decoder.ffn_aux.0.                              decoder.strip_head.proj.
    decoder.conv_out_aux.                           decoder.strip_head.conv.
    decoder.transformer.                            decoder.blocks.
""".strip().splitlines())

def from_released(released):
    """A released state dict -> a checkpoint of ours, by the shapes of the tensors. KeyError if it is none."""
    state = {}
    for name, value in released.items():
        for theirs, ours in RELEASED_NAMES.items():
            name = name.replace(theirs, ours)
        if name.endswith(("to_latent.weight", "head.proj.weight")):
            value = value.flatten(1)                          # a 1 x 1 convolution there, a linear layer here
        state[name] = value
    codes, dim = state["quantizer.codebook"].shape
    encoder_width, _, patch, _ = state["encoder.patch_embed.weight"].shape
    buffer_tokens, decoder_width = state["decoder.buffer_tokens"].shape
    grid = math.isqrt(len(state["encoder.patch_positions"]))
    prefix_tokens = len(state["encoder.latent_tokens"]) - grid ** 2
    encoder_depth, decoder_depth = (
        sum(name.startswith(part) and name.endswith("ln_1.bias") for name in state)
        for part in ("encoder.blocks", "decoder.blocks"))
    causal = buffer_tokens == 1
    config = dict(image_size=grid * patch, patch_size=patch, decoder="causal" if causal else "bidirectional",
                  prefix_tokens=prefix_tokens, encoder_width=encoder_width, encoder_depth=encoder_depth,
                  decoder_width=decoder_width, decoder_depth=decoder_depth, codebook_size=codes,
                  codebook_dim=dim, buffer_tokens=32 if causal else buffer_tokens)
    return {"config": config, "model": {"quantizer.usage": torch.zeros(codes), **state}}

def load_tokenizer(path, device="cpu"):
    """The tokenizer of a file of train_tokenizer.py, or of a released one, in eval mode."""
    saved = load_checkpoint(path, "tokenizer", from_released)
    config, state = TokenizerConfig(**saved["config"]), saved["model"]
    causal = replace(config, decoder="causal")
    with torch.device("meta"):                                # without random weights
        model = Tokenizer(config)
        if "causal_decoder.positions" in state:
            model.causal_decoder = Decoder(causal)
    order = generation_order(config.grid).tolist()
    if saved.get("order", sorted(order)) != order:            # files without one have raster order
        raise InputError(f"the tokens of {path} have another order than generation_order says")
    load_weights(model, state, path)
    model.data = saved.get("data", ("shapes", None))          # --data and --val-data of its training
    return model.float().to(device).eval()                    # files may hold float16
