"""Train the AliTok tokenizer: stage 1 (causal decoder), the swap, stage 2 (bidirectional decoder), in one command.

    python train_tokenizer.py                                     # built-in pictures, tiny preset, a CPU is enough
    torchrun --nproc_per_node=8 train_tokenizer.py --preset imagenet256 --data imagenet/train --val-data imagenet/val

A stage is a list of phases, each with its learning rate and its losses (RECIPES); one run goes through them all.
Writes to --out: tokenizer_stage1.pt and tokenizer_stage2.pt (training states, --resume goes on from them), tokenizer.pt
(the finished model: after stage 1 with the causal decoder, after stage 2 with the crisp one), log.jsonl, pictures/.
"""
import argparse
import contextlib
import itertools
import math
import os
from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import fid
from data import InputError
from fid import psnr
from tokenizer import PRESETS, Tokenizer, TokenizerConfig, from_released, load_tokenizer


class Phase(NamedTuple):
    """A stretch of a stage: steps, learning rate from -> to along a cosine, weights of the losses beside MSE and strip."""
    name: str
    steps: int
    lr: float
    final_lr: float
    quantizer: float = 0.0
    perceptual: float = 0.0
    lpips: float = 0.0
    gan: float = 0.0


# batch_size: over all ranks. warmup: steps, at the start of either stage. discriminator: channels of its first stage.
# blend: quantization is blended in between these shares of stage 1; before, the decoder sees the latents as they are.
RECIPES = {
    # Ours. Without a perceptual loss the commitment term would outweigh the picture, and quantizing from the first step
    # keeps so small a model from finding out where in the picture a token belongs.
    "tiny": dict(batch_size=16, warmup=100, betas=(0.9, 0.95), blend=(0.2, 0.35), discriminator=32, stages=(
        [Phase("pixels", 6000, 1e-3, 1e-5, quantizer=0.1)],
        [Phase("pixels", 4000, 2e-3, 2e-5)])),
    # As published, for 8 GPUs of 48 images each; betas are ours, and so is clipping.
    "paper": dict(batch_size=384, warmup=10_000, betas=(0.9, 0.95), blend=(0.0, 0.0), discriminator=128, stages=(
        [Phase("lpips", 50_000, 1e-4, 1e-4, quantizer=1.0, perceptual=0.1, lpips=1.0),
         Phase("perceptual", 200_000, 1e-4, 2e-5, quantizer=1.0, perceptual=1.0),
         Phase("gan", 100_000, 2e-5, 2e-6, quantizer=1.0, perceptual=1.0, gan=0.1 * 0.05)],
        [Phase("lpips", 50_000, 1e-4, 1e-4, perceptual=0.1, lpips=1.0),
         Phase("perceptual", 150_000, 1e-4, 2e-5, perceptual=1.0),
         Phase("gan", 100_000, 2e-5, 2e-6, perceptual=1.0, gan=0.1 * 0.05)])),
}
DISCRIMINATOR_WEIGHT = 0.1
BAD_STEPS = 10                   # ours: so many steps in a row with a loss that is not finite end the run

CHANGES = ("encoder", "decoder", "prefix", "image_size", "patch_size", "codebook_size")      # flags that replace a preset's value


def scale_phases(phases, steps):
    """The phases stretched or shrunk so that they make `steps` together. InputError when one would have no step."""
    total, done, scaled = sum(phase.steps for phase in phases), 0, []
    for phase in phases:
        done += phase.steps
        scaled.append(phase._replace(steps=round(done * steps / total) - sum(p.steps for p in scaled)))
    if not all(phase.steps for phase in scaled):
        raise InputError(f"{steps} steps are too few for the {len(phases)} phases of a stage; give --steps more")
    return scaled


def phase_at(phases, step):
    """-> the phase that `step` belongs to and the step's place in it."""
    for phase in phases:
        if step < phase.steps:
            return phase, step
        step -= phase.steps


def set_phases(args, recipe):
    """Put the phases of both stages into `args`, with --steps, --lr and --no-perceptual applied. -> the rest of the recipe."""
    stages = recipe["stages"]
    lr = stages[0][0].lr if args.lr is None else args.lr
    factor, without = lr / stages[0][0].lr, dict(perceptual=0.0, lpips=0.0) if args.no_perceptual else {}
    args.phases = [[phase._replace(lr=phase.lr * factor, final_lr=phase.final_lr * factor, **without)
                    for phase in scale_phases(phases, steps)] for phases, steps in zip(stages, args.steps)]
    whole = sum(phase.steps for phase in stages[0])
    return {**{name: value for name, value in recipe.items() if name != "stages"}, "lr": lr,
            "warmup": min(recipe["warmup"], round(recipe["warmup"] * args.steps[0] / whole))}


# -----------------------------------------------------------------------------
# Helpers that train_ar.py shares

def add_run_arguments(parser):
    parser.add_argument("--data", default="shapes", help="'shapes', the built-in pictures, or a folder of class folders")
    parser.add_argument("--val-data", help="validation folder; without it every 20th image of --data is held out")
    parser.add_argument("--out", default="out", help="folder for checkpoints, log and pictures")
    parser.add_argument("--resume", action="store_true", help="go on from the training state in --out")
    parser.add_argument("--batch-size", type=int, help="images a step, over all ranks")
    parser.add_argument("--accum", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--lr", type=float, help="peak learning rate (of the tokenizer's first phase; the others scale with it)")
    parser.add_argument("--warmup", type=int, help="steps of linear warmup")
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-pictures", type=int, default=50_000, help="size of the built-in training set")
    parser.add_argument("--workers", type=int, help="reading processes a rank (default: 8 with a GPU, else 0)")
    parser.add_argument("--eval-every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--eval-images", type=int, default=256, help="validation pictures an evaluation looks at (of the AR "
                        "model: as many training pictures, too)")
    parser.add_argument("--eval-fid", action="store_true", help="also log fid.py's metrics over --eval-images pictures")
    parser.add_argument("--inception", metavar="PATH", help="for --eval-fid: weights (default: downloaded once) or 'random'")
    parser.add_argument("--save-every", type=int, default=500, help="steps between saves, and the most that a kill can cost")
    parser.add_argument("--save-minutes", type=float, default=15, help="minutes between saves, should they be sooner; 0: never")
    parser.add_argument("--skip-bad-images", action="store_true", help="put the next readable image in an unreadable one's place")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="of the matrix work in training; auto is bfloat16 where the hardware has it")
    parser.add_argument("--save-dtype", choices=["float32", "float16"], default="float32", help="of the finished model's file")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile on a GPU")
    parser.add_argument("--grad-checkpoint", action="store_true", help="save memory: compute activations twice")
    parser.add_argument("--benchmark", action="store_true", help="measure a training step on random input, and end")


def check_run_arguments(args, recipe):
    """Fill what the recipe decides and refuse what can't work. Joins the ranks; -> rank, number of ranks, device."""
    for name, value in recipe.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    for name in ("batch_size", "accum", "lr", "clip", "num_pictures", "eval_every", "eval_images", "save_every"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} is above zero, found {getattr(args, name)}")
    for name in ("seed", "warmup", "workers", "save_minutes"):
        if (getattr(args, name) or 0) < 0:
            raise InputError(f"--{name.replace('_', '-')} is at least 0, found {getattr(args, name)}")
    rank, ranks, device = data.start_ranks(args.device)
    if args.batch_size % (ranks * args.accum):
        raise InputError(f"a batch of {args.batch_size} can't be shared evenly by {ranks} ranks in {args.accum} micro-batches; "
                         f"choose --batch-size as a multiple of {ranks * args.accum}")
    if args.workers is None:
        args.workers = 8 if device.type == "cuda" else 0
    args.dtype = data.pick_dtype(args.dtype, device)
    return rank, ranks, device


FIXED = ["data", "val_data", "batch_size", "lr", "warmup", "clip", "seed", "num_pictures", "dtype", "steps"]   # a resumed run's


def check_resumed(path, saved, args, names):
    changed = [f"--{name.replace('_', '-')} {saved.get(name)}, now {getattr(args, name)}" for name in names
               if saved.get(name) != getattr(args, name)]
    if changed:
        raise InputError(f"{path} was trained with other settings ({'; '.join(changed)}); resume with the old ones, "
                         "or start anew in another --out")


def refuse_overwrite(path):
    if os.path.exists(path) or os.path.exists(f"{path}.previous"):
        raise InputError(f"{path} is there already: --resume goes on from it, another --out starts anew and keeps it")


def learning_rate(step, steps, warmup, peak, final):
    """Linear warmup to `peak`, then a cosine to `final`, which the step after the last would reach."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


class CarefulAdamW:
    """AdamW on clipped gradients, which leaves everything as it is in a step whose gradient is not finite, and counts those.

    Nothing here waits for the device: the count is read when it is logged. parameters: all, and which of them decay.
    """

    def __init__(self, decayed, others, args, betas, weight_decay):
        self.parameters, self.clip = [*decayed, *others], args.clip
        self.adamw = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], args.lr, betas,
                                       weight_decay=weight_decay, fused=True)
        self.skipped = self.in_row = torch.zeros((), device=self.parameters[0].device)

    def step(self, lr):
        """-> whether the step was skipped, a boolean on the device."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        bad = ~nn.utils.clip_grad_norm_(self.parameters, self.clip).isfinite()
        self.adamw.found_inf = bad.float()                   # where this is 1, the fused kernel does nothing
        self.adamw.step()
        self.adamw.zero_grad()
        self.skipped = self.skipped + bad
        self.in_row = torch.where(self.in_row < BAD_STEPS, (self.in_row + 1) * bad, self.in_row)
        return bad

    def check(self, step, path, saved):
        """InputError when BAD_STEPS steps in a row were skipped; `path` holds step `saved`, if any."""
        if self.in_row >= BAD_STEPS:
            raise InputError(f"{BAD_STEPS} steps in a row, before step {step}, had gradients that are not finite; " + (
                f"{path} holds step {saved}, from where --resume goes on" if saved else "nothing is saved yet") +
                "; if it happens again, start anew with a lower --lr")

    def state_dict(self):
        return {**self.adamw.state_dict(), "skipped": [int(self.skipped), int(self.in_row)]}

    def load_state_dict(self, state):
        self.adamw.load_state_dict({name: value for name, value in state.items() if name != "skipped"})
        self.skipped, self.in_row = (torch.tensor(float(count), device=self.skipped.device) for count in state["skipped"])


def wrap(model, ranks, device):
    if ranks == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False)


def no_sync(model, wanted):
    """Gradients are exchanged with the last micro-batch of a step only."""
    return model.no_sync() if wanted and isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


# -----------------------------------------------------------------------------
# Networks that judge pictures. Modules of the first two bear the names that torchvision's weight files give them.

VISION_FILES = {                 # where they are published, and how their digests begin
    "convnext": ("https://download.pytorch.org/models/convnext_small-0c510722.pth", ("sha256", "0c510722")),
    "vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth", ("sha256", "397923af")),
    "lpips": ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
              ("md5", "d507d7349b931f06")),
}


def fixed(net, **values):
    """Constants that move with the network but are none of its weights."""
    for name, value in values.items():
        net.register_buffer(name, torch.tensor(value), persistent=False)


class Permute(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width), Permute(0, 2, 3, 1), nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), Permute(0, 3, 1, 2))
        self.layer_scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x):
        return x + self.layer_scale * self.block(x)


class ConvNeXt(nn.Module):
    """ConvNeXt-S (arXiv 2201.03545): images (B, 3, H, W) in [0, 1] of any size, seen at 224 x 224 -> ImageNet logits (B, 1000)."""

    def __init__(self, widths=(96, 192, 384, 768), depths=(3, 3, 27, 3)):
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0], eps=1e-6))]
        for before, width, depth in zip((None, *widths), widths, depths):
            if before:
                layers.append(nn.Sequential(ChannelNorm(before, eps=1e-6), nn.Conv2d(before, width, 2, stride=2)))
            layers.append(nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth))))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(ChannelNorm(widths[-1], eps=1e-6), nn.Flatten(), nn.Linear(widths[-1], 1000))
        fixed(self, mean=[[[0.485]], [[0.456]], [[0.406]]], std=[[[0.229]], [[0.224]], [[0.225]]])     # ImageNet's

    def forward(self, images):
        x = (F.interpolate(images, (224, 224), mode="bilinear", antialias=True) - self.mean) / self.std
        return self.classifier(self.features(x).mean((2, 3), keepdim=True))


class LPIPS(nn.Module):
    """LPIPS with VGG16 (arXiv 1801.03924): two batches of images (B, 3, H, W) in [0, 1] -> distances (B,)."""
    ENDS = (3, 8, 15, 22, 29)                # the ReLU that ends each block of VGG16

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        self.lin = nn.ParameterList(nn.Parameter(torch.rand(1, width, 1, 1)) for width in (64, 128, 256, 512, 512))
        fixed(self, shift=[[[-0.030]], [[-0.088]], [[-0.188]]], scale=[[[0.458]], [[0.448]], [[0.450]]])

    def forward(self, a, b):
        x, distance = (2 * torch.cat([a, b]) - 1 - self.shift) / self.scale, 0
        lins = iter(self.lin)
        for k, layer in enumerate(self.features):
            x = layer(x)
            if k in self.ENDS:
                one, other = (x.float() / (x.float().pow(2).sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
                distance = distance + ((one - other).pow(2) * next(lins)).sum(1).mean((1, 2))
        return distance


def load_vision(folder, device):
    """{"perceptual": ConvNeXt, "lpips": LPIPS}, frozen, with public weights: from `folder`, or downloaded once (None).

    "random" gives seeded stand-ins, to try things offline. InputError when a file is missing, damaged or of another network.
    """
    with torch.random.fork_rng(devices=[]):                                  # a training run's random numbers stay its own
        torch.manual_seed(0)
        nets = {"perceptual": ConvNeXt(), "lpips": LPIPS()}
    if folder != "random":
        state, names = {}, ", ".join(os.path.basename(address) for address, _ in VISION_FILES.values())
        for name, (address, digest) in VISION_FILES.items():
            path = (os.path.join(folder, os.path.basename(address)) if folder else
                    data.fetch(address, digest, "name its folder with --vision-weights; --no-perceptual trains without"))
            if not os.path.isfile(path):
                raise InputError(f"no {path}; --vision-weights names a folder with {names}")
            state[name] = data.load_weights(path)
        data.fill(nets["perceptual"], state["convnext"], "the ConvNeXt-S weights")
        data.fill(nets["lpips"], {**{name: value for name, value in state["vgg"].items() if name.startswith("features.")},
                                  **{name.replace(".model.1.weight", "").replace("lin", "lin."): value
                                     for name, value in state["lpips"].items()}}, "the VGG16 or LPIPS weights")
    return {name: net.to(device).eval().requires_grad_(False) for name, net in nets.items()}


class Discriminator(nn.Module):
    """PatchGAN with blur-pooled downsampling: images (B, 3, H, W) in [0, 1] -> logits (B, 1, h, w), high for real patches."""

    def __init__(self, channels):
        super().__init__()
        widths = [channels, channels, 2 * channels, 4 * channels]            # doubling after the first stage: ours
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(32, width) for width in widths[1:])
        self.to_logits = nn.Conv2d(widths[-1], 1, 5, padding=2)
        fixed(self, blur=[[a * b / 64 for b in (1, 3, 3, 1)] for a in (1, 3, 3, 1)])

    def half(self, x):
        """(B, C, H, W) -> (B, C, H/2, W/2), low-passed by the binomial filter before every second pixel is dropped."""
        kernel = self.blur.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=2, groups=x.shape[1])

    def forward(self, images):
        x = F.leaky_relu(self.stem(2 * images - 1), 0.1)
        for conv, norm in zip(self.convs, self.norms):
            x = F.leaky_relu(norm(self.half(conv(x))), 0.1)
        return self.to_logits(F.adaptive_max_pool2d(x, (min(16, x.shape[2]), min(16, x.shape[3]))))


# -----------------------------------------------------------------------------
# Losses

def blend_at(progress, start, end):
    """Share of quantization at this share of stage 1: 0 until `start`, 1 from `end` on."""
    return min(1.0, max(0.0, (progress - start) / (end - start))) if end > start else 1.0


def tokenizer_losses(output, images, config, phase, vision, discriminator):
    """The terms of the loss and their weights in this phase; a term without weight is not computed.

    output: what Tokenizer.forward returned for images (B, 3, H, W) in [0, 1]. -> {name: scalar}, {name: weight}
    """
    image, strip, quantizer_loss, _ = output
    weights = {"mse": 1.0, "strip": 10 * (config.grid + 1) / config.grid ** 2 if strip is not None else 0.0,
               "quantizer": phase.quantizer, "perceptual": phase.perceptual, "lpips": phase.lpips, "gan": phase.gan}
    terms = {"mse": lambda: F.mse_loss(image, images),
             "strip": lambda: F.mse_loss(strip, strip_target(images, config.patch_size)),
             "quantizer": lambda: quantizer_loss,
             "perceptual": lambda: perceptual_loss(vision["perceptual"], image, images),
             "lpips": lambda: vision["lpips"](image, images).mean(),
             "gan": lambda: -discriminator(image).float().mean()}
    weights = {name: weight for name, weight in weights.items() if weight}
    return {name: terms[name]() for name in weights}, weights


def strip_target(images, patch):
    """What the prefix tokens paint, (B, 3, p, (g+1)*p): the first patch, then the first row."""
    return torch.cat([images[:, :, :patch, :patch], images[:, :, :patch]], dim=3)


def perceptual_loss(convnext, image, target):
    """Mean squared difference of ImageNet logits; the target's need no gradient."""
    with torch.no_grad():
        wanted = convnext(target)
    return F.mse_loss(convnext(image).float(), wanted.float())


def hinge_loss(logits):
    """The discriminator's loss on logits (2B, 1, h, w) of real images, then of painted ones; averaging the two is ours."""
    real, painted = logits.float().chunk(2)
    return (F.relu(1 - real).mean() + F.relu(1 + painted).mean()) / 2


@torch.no_grad()
def evaluate(model, val, args, device, rank, ranks, picture):
    """-> over --eval-images validation images {"val_psnr": mean PSNR in dB, "val_psnr_first_row": of their first row of patches,
    "val_codes": how many codes occur in them, "val_looks_ahead": the share of the upper half's tokens, prefix included, that change
    when another picture's lower half takes the place of theirs}. Draws eight over their reconstructions. InputError when training
    has diverged."""
    model.eval()
    keys = [(0, index) for index in data.spread(len(val), args.eval_images)]
    config, totals = model.config, [0.0, 0.0, 0.0]
    used, rows = torch.zeros(config.codebook_size), (config.grid + 1) // 2
    upper_tokens, upper_pixels = config.prefix_tokens + rows * config.grid, rows * config.patch_size
    for images, _ in data.batches(val, [keys[at:at + 32] for at in range(rank * 32, len(keys), ranks * 32)]):
        images = data.to_float(images, device)
        tokens = model.encode(images)
        used[tokens.unique().cpu()] = 1
        painted = model.decode(tokens)
        for k, part in enumerate((slice(None), slice(config.patch_size))):
            totals[k] += psnr(painted[:, :, part], images[:, :, part]).sum().item()
        # a picture alone in its batch has no other and counts as unchanged
        others = torch.cat([images[:, :, :upper_pixels], images.roll(len(images) // 2, 0)[:, :, upper_pixels:]], 2)
        totals[2] += (model.encode(others) != tokens)[:, :upper_tokens].float().mean(1).sum().item()
    whole, first_row, ahead = (total / len(keys) for total in data.over_ranks(totals))
    if not math.isfinite(whole):
        raise InputError("validation PSNR is not finite any more: training has diverged; start anew with a lower --lr")
    if rank == 0:
        # index + k, since pictures at even distances have digits of their class in common
        shown = [min(index + k, len(val) - 1) for k, index in enumerate(data.spread(len(val), 8))]
        images = data.to_float(torch.stack([val.read(0, index)[0] for index in shown]), device)
        data.save_grid(picture, torch.cat([images, model.decode(model.encode(images))]), len(images))
    model.train()
    return {"val_psnr": whole, "val_psnr_first_row": first_row, "val_looks_ahead": ahead,
            "val_codes": int(sum(count > 0 for count in data.over_ranks(used.tolist())))}


# -----------------------------------------------------------------------------
# One stage

class Stage:
    """A stage in training: tokenizer, discriminator, their optimizers, and what one step does to them."""

    def __init__(self, number, model, args, vision, device, ranks):
        self.number, self.model, self.args, self.vision, self.device = number, model, args, vision, device
        self.phases = args.phases[number - 1]
        self.discriminator, self.last = None, {}             # the latest value of every loss of this phase
        model.encoder.recompute = model.decoder.recompute = args.grad_checkpoint
        nets = {"tokenizer": model}                          # whose turns there are
        if any(phase.gan for phase in self.phases):
            nets["discriminator"] = self.discriminator = Discriminator(args.discriminator).to(device)
        self.optimizers = {}
        for name, net in nets.items():
            trained = [p for p in net.parameters() if p.requires_grad]
            self.optimizers[name] = CarefulAdamW([p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2], args,
                                                 args.betas, weight_decay=1e-4)                        # decay: ours
        if device.type == "cuda" and not args.no_compile:
            model.encoder.compile()
            model.decoder.compile()
        self.wrapped = {name: wrap(net, ranks, device) for name, net in nets.items()}

    def operations(self):
        """Of the tokenizer's training step, for one image: those of its blocks; attention and the networks that judge left out."""
        model, N = self.model, self.model.config.num_tokens
        encoder, decoder = (sum(p.numel() for p in net.blocks.parameters()) for net in (model.encoder, model.decoder))
        return ((6 if self.number == 1 else 2) * encoder * (N + len(model.encoder.patch_positions)) +
                6 * decoder * (N + len(model.decoder.buffer_tokens)))

    def step(self, step, batches):
        """One optimizer step on the micro-batches, (B, 3, H, W) uint8. In a GAN phase the discriminator and the tokenizer
        take turns. -> phase, learning rate; the losses gather in `last`.

        A step whose gradient is not finite changes no weight and is counted, all without waiting for the device.
        """
        args, (phase, place) = self.args, phase_at(self.phases, step)
        turn = "discriminator" if phase.gan and place % 2 == 0 else "tokenizer"
        lr = learning_rate(place, phase.steps, args.warmup if step == place else 0, phase.lr, phase.final_lr)
        if self.number == 1:
            self.model.quantizer.blend = blend_at(step / args.steps[0], *args.blend)
        if self.discriminator:
            self.discriminator.requires_grad_(turn == "discriminator")
        sums, weights = {}, {}
        for part, images in enumerate(batches, 1):
            images = data.to_float(images, self.device)
            with (no_sync(self.wrapped[turn], part < args.accum),
                  torch.autocast(self.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")):
                if turn == "tokenizer":
                    output = self.wrapped["tokenizer"](images)
                    losses, weights = tokenizer_losses(output, images, self.model.config, phase, self.vision, self.discriminator)
                else:
                    with torch.no_grad():
                        painted = self.model(images)[0]
                    losses = {"discriminator": hinge_loss(self.wrapped["discriminator"](torch.cat([images, painted])))}
                    weights = {"discriminator": DISCRIMINATOR_WEIGHT}
                total = sum(weights[name] * loss for name, loss in losses.items()) / args.accum
            total.backward()
            if turn == "tokenizer":
                losses["loss"] = total * args.accum
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach() / args.accum
        skipped = self.optimizers[turn].step(lr)
        if self.number == 1 and turn == "tokenizer":
            self.model.quantizer.revive(skipped)
        self.last = {**(self.last if place else {}), **sums}
        return phase, lr

    def state(self):
        """What a checkpoint keeps beside the tokenizer; to be called on all ranks."""
        return {"optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "discriminator": self.discriminator and self.discriminator.state_dict(), "losses": self.losses()}

    def losses(self):
        return data.mean_over_ranks({name: float(loss) for name, loss in self.last.items()})

    def load(self, state):
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.discriminator:
            self.discriminator.load_state_dict(state["discriminator"])
        self.last = state["losses"]

    def skipped(self):
        return sum(int(optimizer.skipped) for optimizer in self.optimizers.values())


def train_stage(number, model, train, val, args, vision, interruptions, device, rank, ranks):
    """Train in place from wherever --resume finds the stage's state, to its last step."""
    path, run = f"{args.out}/tokenizer_stage{number}.pt", f"tokenizer stage {number}"
    config, steps, start = model.config, args.steps[number - 1], 0
    stage = Stage(number, model, args, vision, device, ranks)
    state = data.load_state(path, "tokenizer") if args.resume else None
    if state:
        check_resumed(path, {**state["args"], **asdict(TokenizerConfig(**state["config"]))},
                      argparse.Namespace(**{**vars(args), **asdict(config)}), FIXED + ["recipe", "perceptual"] + list(asdict(config)))
        model.load_state_dict(state["model"])
        stage.load(state)
        start = state["step"]
    if start >= steps:
        return
    inception = fid.load_inception(args.inception, device) if args.eval_fid else None
    log = data.Log(f"{args.out}/log.jsonl", run, start)
    keys = data.batch_keys(len(train), args.seed + number, args.batch_size, args.accum, start, rank, ranks)
    stream = data.batches(train, keys, args.workers)
    saved, speed = start, data.Speed(stage.operations(), device, args.dtype)

    model.train()
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=run, disable=rank > 0)
    for step in progress:
        phase, lr = stage.step(step, (images for images, _ in itertools.islice(stream, args.accum)))
        speed.seen += args.batch_size

        done = step + 1
        if done % 20 == 0 or done == steps:
            losses, skipped = stage.losses(), stage.skipped()
            for optimizer in stage.optimizers.values():
                optimizer.check(done, path, saved)
            values = {**losses, "codebook_use": model.quantizer.use().item()}
            if "mse" in losses:
                values["psnr"] = -10 * math.log10(max(losses["mse"], 1e-10))
            shown = {name: f"{values[key]:.4g}" for name, key in (("loss", "loss"), ("psnr", "psnr")) if key in values}
            progress.set_postfix(**shown, use=f"{values['codebook_use']:.0%}", **({"skipped": skipped} if skipped else {}),
                                 **{name: value for name, value in speed.show().items() if name != "mfu" or not phase.gan})
            progress.set_description(f"{run}, {phase.name}")
            log.write(done, phase=phase.name, **values, lr=lr, skipped=skipped)
        if done % args.eval_every == 0 or done == steps:
            found = evaluate(model, val, args, device, rank, ranks, f"{args.out}/pictures/tokenizer_stage{number}_{done:06d}.png")
            log.write(done, **found)
            if rank == 0:
                progress.write(f"{run}, step {done}: validation PSNR {found['val_psnr']:.2f} dB, {found['val_codes']} of "
                               f"{config.codebook_size} codes")
            if inception:
                found = fid.tokenizer_metrics(model, val, inception, device, args.eval_images)
                log.write(done, inception=inception.origin, **{f"val_{name}": metric for name, metric in found.items()})
            speed.restart()
        save, asked = interruptions.due(done)
        if save or done == steps:
            state, saved = stage.state(), done
            if rank == 0:
                data.save_checkpoint(path, "tokenizer", asdict(config), model.state_dict(), keep=True, **state,
                                     step=done, args={name: value for name, value in vars(args).items() if name != "phases"},
                                     classes=train.classes)
            data.barrier()
        if asked:
            raise data.Stopped(asked, f"step {done} of stage {number}; --resume goes on from there")


def benchmark(config, args, vision, device):
    """Time a training step in each phase of stage 1, on random images."""
    images = torch.randint(0, 256, (args.batch_size // args.accum, 3, config.image_size, config.image_size), dtype=torch.uint8)
    stage, first = Stage(1, Tokenizer(config).to(device).train(), args, vision, device, 1), 0
    for phase in stage.phases:
        data.benchmark(f"{args.preset} stage 1, {phase.name}", lambda k: stage.step(first + k % 2, [images] * args.accum),
                       args.batch_size, device, args.dtype)
        first += phase.steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--recipe", choices=RECIPES, help="phases and their losses (default: the preset's)")
    parser.add_argument("--stage", choices=["1", "2", "both"], default="both")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("STAGE1", "STAGE2"), help="stretches the phases of the recipe")
    parser.add_argument("--vision-weights", metavar="FOLDER", help="with the weights of the networks behind the perceptual losses "
                        "(default: downloaded once), or 'random' for trials")
    parser.add_argument("--no-perceptual", action="store_true", help="do without ConvNeXt and LPIPS losses")
    for name, note in (("encoder", ""), ("decoder", "; of stage 1: bidirectional makes an ordinary tokenizer, for comparison")):
        parser.add_argument("--" + name, help=f"bidirectional or causal, in place of the preset's {name}{note}")
    for name in ("image_size", "patch_size", "codebook_size"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, help=f"in place of the preset's {name.replace('_', ' ')}")
    parser.add_argument("--no-prefix", dest="prefix", action="store_false", default=None,
                        help="do without prefix tokens and strip, for comparison")
    add_run_arguments(parser)
    args = parser.parse_args()

    args.recipe = args.recipe or ("tiny" if args.preset == "tiny" else "paper")
    recipe = RECIPES[args.recipe]
    if args.benchmark:
        args.steps = None                     # a phase is measured from its first step on
    args.steps = args.steps or [sum(phase.steps for phase in phases) for phases in recipe["stages"]]
    if min(args.steps) < 1:
        raise InputError(f"--steps takes two numbers above zero, found {args.steps[0]} {args.steps[1]}")
    changes = {name: getattr(args, name) for name in CHANGES if getattr(args, name) is not None}
    config = TokenizerConfig(**{**PRESETS[args.preset], **changes})
    rank, ranks, device = check_run_arguments(args, set_phases(args, recipe))
    if config.image_size < 16 and any(phase.gan for phases in args.phases for phase in phases):
        raise InputError(f"the discriminator needs images of 16 pixels at least, found {config.image_size}")
    train, val = data.open_data(args.data, args.val_data, config.image_size, args.seed, args.skip_bad_images, args.num_pictures)
    stages = [1, 2] if args.stage == "both" else [int(args.stage)]
    if not args.resume and not args.benchmark:
        for name in [f"tokenizer_stage{stage}.pt" for stage in stages] + ["tokenizer.pt"] * (1 in stages):
            refuse_overwrite(f"{args.out}/{name}")
    vision = {}
    if any(phase.perceptual or phase.lpips for phases in args.phases for phase in phases):
        vision = load_vision(args.vision_weights, device)
    args.perceptual = "none" if not vision else "random" if args.vision_weights == "random" else "ConvNeXt and LPIPS"
    if args.benchmark:
        return benchmark(config, args, vision, device)

    def finish(model, causal_decoder=None):
        if rank == 0:
            weights, causal = ({name: value.to(getattr(torch, args.save_dtype)) for name, value in net.state_dict().items()}
                               if net else None for net in (model, causal_decoder))
            data.save_checkpoint(f"{args.out}/tokenizer.pt", "tokenizer", asdict(model.config), weights, classes=train.classes,
                                 perceptual=args.perceptual, causal_decoder=causal)
        data.barrier()

    with data.Interruptions(args.save_every, args.save_minutes) as interruptions:
        if 1 in stages:
            torch.manual_seed(args.seed)
            model = Tokenizer(config).to(device)
            train_stage(1, model, train, val, args, vision, interruptions, device, rank, ranks)
            if not os.path.exists(f"{args.out}/tokenizer_stage2.pt"):
                finish(model)
        if 2 in stages:
            path = f"{args.out}/tokenizer_stage1.pt"
            model = load_tokenizer(path, device)
            if model.config != config:
                raise InputError(f"{path} has another shape than these flags ask for: {model.config}; give the flags of stage 1")
            before = data.load_checkpoint(path, "tokenizer", from_released)
            if before.get("step", 0) < before.get("args", {"steps": [0]})["steps"][0]:
                raise InputError(f"{path} holds step {before['step']} of {before['args']['steps'][0]} of stage 1: finish that first, "
                                 "with --resume and without --stage")
            torch.manual_seed(args.seed + 1)
            causal_decoder = model.decoder if model.decoder.causal else None
            model.swap_decoder()
            train_stage(2, model, train, val, args, vision, interruptions, device, rank, ranks)
            finish(model, causal_decoder)
    if rank == 0:
        flags = {"data": (args.data, "shapes"), "val-data": (args.val_data, None), "out": (args.out, "out")}
        print(f"wrote {args.out}/tokenizer.pt; next: python train_ar.py" +
              "".join(f" --{name} {value}" for name, (value, default) in flags.items() if value != default))


if __name__ == "__main__":
    data.run(main)
