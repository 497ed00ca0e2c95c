"""Train the AliTok tokenizer: stage 1 (causal decoder), the swap, stage 2 (bidirectional decoder), in one command.

    python train_tokenizer.py                                     # built-in pictures, tiny preset, a CPU is enough
    torchrun --nproc_per_node=8 train_tokenizer.py --preset imagenet256 --data imagenet/train --val-data imagenet/val

Writes to --out: tokenizer_stage1.pt and tokenizer_stage2.pt (training states, --resume goes on from them), tokenizer.pt
(the finished model: after stage 1 with the causal decoder, after stage 2 with the crisp one), log.jsonl, pictures/.
"""
import argparse
import contextlib
import itertools
import math
import os
import sys
import time
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import fid
from data import InputError
from fid import psnr
from tokenizer import PRESETS, Tokenizer, TokenizerConfig, load_tokenizer

# steps: of stages 1 and 2. batch_size: over all ranks. lr -> final_lr: after warmup steps, along a cosine.
# blend: quantization is blended in between these shares of stage 1; before, the decoder sees the latents as they are.
RECIPES = {
    # Ours. Without a perceptual loss the commitment term would outweigh the picture, and quantizing from the first step
    # keeps so small a model from finding out where in the picture a token belongs.
    "tiny": dict(steps=(10_000, 6000), batch_size=16, lr=5e-4, final_lr=1e-5, warmup=100, betas=(0.9, 0.95),
                 quantizer_weight=0.1, blend=(0.2, 0.35)),
    # As published, for 8 GPUs of 48 images each.
    "imagenet256": dict(steps=(350_000, 300_000), batch_size=384, lr=1e-4, final_lr=2e-6, warmup=10_000, betas=(0.9, 0.95),
                        quantizer_weight=1.0, blend=(0.0, 0.0)),
}

CHANGES = ("encoder", "image_size", "patch_size", "codebook_size")      # flags that replace a preset's value


# -----------------------------------------------------------------------------
# Helpers that train_ar.py shares

def add_run_arguments(parser):
    parser.add_argument("--data", default="shapes", help="'shapes', the built-in pictures, or a folder of class folders")
    parser.add_argument("--val-data", help="validation folder; without it every 20th image of --data is held out")
    parser.add_argument("--out", default="out", help="folder for checkpoints, log and pictures")
    parser.add_argument("--resume", action="store_true", help="go on from the training state in --out")
    parser.add_argument("--batch-size", type=int, help="images a step, over all ranks")
    parser.add_argument("--accum", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--final-lr", type=float, help="learning rate that a cosine ends at")
    parser.add_argument("--warmup", type=int, help="steps of linear warmup")
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-pictures", type=int, default=50_000, help="size of the built-in training set")
    parser.add_argument("--workers", type=int, help="reading processes a rank (default: 8 with a GPU, else 0)")
    parser.add_argument("--eval-every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--eval-images", type=int, default=256, help="validation pictures an evaluation looks at")
    parser.add_argument("--eval-fid", action="store_true", help="also log fid.py's metrics over --eval-images pictures")
    parser.add_argument("--inception", metavar="PATH", help="for --eval-fid: weights (default: downloaded once) or 'random'")
    parser.add_argument("--save-every", type=int, default=500, help="steps between saves, and the most that a kill can cost")
    parser.add_argument("--skip-bad-images", action="store_true", help="put the next readable image in an unreadable one's place")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="of the matrix work in training; auto is bfloat16 on a GPU")
    parser.add_argument("--save-dtype", choices=["float32", "float16"], default="float32", help="of the finished model's file")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile on a GPU")


def check_run_arguments(args, recipe):
    """Fill what the recipe decides and refuse what can't work. Joins the ranks; -> rank, number of ranks, device."""
    for name, value in recipe.items():
        if name != "steps" and getattr(args, name, None) is None:
            setattr(args, name, value)
    for name in ("batch_size", "accum", "lr", "clip", "num_pictures", "eval_every", "eval_images", "save_every"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} is above zero, found {getattr(args, name)}")
    for name in ("seed", "warmup", "workers", "final_lr"):
        if (getattr(args, name) or 0) < 0:
            raise InputError(f"--{name.replace('_', '-')} is at least 0, found {getattr(args, name)}")
    rank, ranks, device = data.start_ranks(args.device)
    if args.batch_size % (ranks * args.accum):
        raise InputError(f"a batch of {args.batch_size} can't be shared evenly by {ranks} ranks in {args.accum} micro-batches; "
                         f"choose --batch-size as a multiple of {ranks * args.accum}")
    if args.workers is None:
        args.workers = 8 if device.type == "cuda" else 0
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    return rank, ranks, device


FIXED = ["data", "val_data", "batch_size", "lr", "warmup", "clip", "seed", "num_pictures", "dtype",
         "steps", "final_lr"]                 # a resumed run keeps these


def check_resumed(path, saved, args, names):
    changed = [f"--{name.replace('_', '-')} {saved[name]}, now {getattr(args, name)}" for name in names
               if saved[name] != getattr(args, name)]
    if changed:
        raise InputError(f"{path} was trained with other settings ({'; '.join(changed)}); resume with the old ones, "
                         "or start anew in another --out")


def state_to_resume(path, resume):
    """Whether there is a training state to go on from; says so when --resume was given and there is none."""
    if resume and not os.path.exists(path) and data.rank_and_count()[0] == 0:
        tqdm.write(f"nothing to resume at {path}: starting anew", file=sys.stderr)
    return resume and os.path.exists(path)


def refuse_overwrite(path):
    if os.path.exists(path):
        raise InputError(f"{path} is there already: --resume goes on from it, another --out starts anew and keeps it")


def learning_rate(step, steps, warmup, peak, final):
    """Linear warmup to `peak`, then a cosine to `final`, which the step after the last would reach."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def wrap(model, ranks, device):
    if ranks == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False)


def no_sync(model, wanted):
    """Gradients are exchanged with the last micro-batch of a step only."""
    return model.no_sync() if wanted and isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


# -----------------------------------------------------------------------------
# Losses

def blend_at(progress, start, end):
    """Share of quantization at this share of stage 1: 0 until `start`, 1 from `end` on."""
    return min(1.0, max(0.0, (progress - start) / (end - start))) if end > start else 1.0


def tokenizer_losses(output, images, config, quantizer_weight):
    """The terms of the loss and their weights. Perceptual and adversarial terms join here and in `weights`.

    output: what Tokenizer.forward returned for images (B, 3, H, W) in [0, 1]. -> {name: scalar}, {name: weight}
    """
    image, strip, quantizer_loss, _ = output
    losses, weights = {"mse": F.mse_loss(image, images)}, {"mse": 1.0}
    if strip is not None:
        losses["strip"] = F.mse_loss(strip, strip_target(images, config.patch_size))
        weights["strip"] = 10 * (config.grid + 1) / config.grid ** 2
    if quantizer_loss.requires_grad:
        losses["quantizer"], weights["quantizer"] = quantizer_loss, quantizer_weight
    return losses, weights


def strip_target(images, patch):
    """What the prefix tokens paint, (B, 3, p, (g+1)*p): the first patch, then the first row."""
    return torch.cat([images[:, :, :patch, :patch], images[:, :, :patch]], dim=3)


@torch.no_grad()
def evaluate(model, val, args, device, rank, ranks, picture):
    """Mean PSNR in dB over --eval-images validation images; draws eight originals over their reconstructions."""
    model.eval()
    keys = [(0, index) for index in data.spread(len(val), args.eval_images)]
    total = 0.0
    for images, _ in data.batches(val, [keys[at:at + 32] for at in range(rank * 32, len(keys), ranks * 32)]):
        images = data.to_float(images, device)
        total += psnr(model.decode(model.encode(images)), images).sum().item()
    if rank == 0:
        # index + k, since pictures at even distances have digits of their class in common
        shown = [min(index + k, len(val) - 1) for k, index in enumerate(data.spread(len(val), 8))]
        images = data.to_float(torch.stack([val.read(0, index)[0] for index in shown]), device)
        data.save_grid(picture, torch.cat([images, model.decode(model.encode(images))]), len(images))
    model.train()
    return ranks * data.mean_over_ranks({"psnr": total})["psnr"] / len(keys)


# -----------------------------------------------------------------------------
# One stage

def train_stage(stage, model, train, val, args, device, rank, ranks):
    """Train in place from wherever --resume finds the stage's state, to its last step."""
    path, run = f"{args.out}/tokenizer_stage{stage}.pt", f"tokenizer stage {stage}"
    config, steps, start = model.config, args.steps[stage - 1], 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1]},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, args.betas, weight_decay=1e-4, fused=device.type != "mps")  # decay: ours
    if state_to_resume(path, args.resume):
        state = data.load_checkpoint(path, "tokenizer")
        check_resumed(path, {**state["args"], **state["config"]}, argparse.Namespace(**{**vars(args), **asdict(config)}),
                      FIXED + list(asdict(config)))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    if start >= steps:
        return
    if device.type == "cuda" and not args.no_compile:
        model.encoder.compile()
        model.decoder.compile()
    wrapped = wrap(model, ranks, device)
    inception = fid.load_inception(args.inception, device) if args.eval_fid else None
    log = data.Log(f"{args.out}/log.jsonl", run, start)
    keys = data.BatchKeys(len(train), args.seed + stage, args.batch_size, args.accum, start, rank, ranks)
    stream = data.batches(train, keys, args.workers)

    def save(step):
        if rank == 0:
            data.save_checkpoint(path, "tokenizer", asdict(config), model.state_dict(), optimizer=optimizer.state_dict(),
                                 step=step, args=vars(args), classes=train.classes)
        data.barrier()

    model.train()
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=run, disable=rank > 0)
    began, seen = time.perf_counter(), 0
    for step in progress:
        lr = learning_rate(step, steps, args.warmup, args.lr, args.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if stage == 1:
            model.quantizer.blend = blend_at(step / steps, *args.blend)
        sums = {}
        for part, (images, _) in enumerate(itertools.islice(stream, args.accum), 1):
            images = data.to_float(images, device)
            with no_sync(wrapped, part < args.accum):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                    output = wrapped(images)
                losses, weights = tokenizer_losses(output, images, config, args.quantizer_weight)
                (sum(weights[name] * loss for name, loss in losses.items()) / args.accum).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach() / args.accum
        torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        optimizer.step()
        optimizer.zero_grad()
        if stage == 1:
            model.quantizer.revive()
        seen += args.batch_size

        done = step + 1
        if done % 20 == 0 or done == steps:
            means = data.mean_over_ranks({name: loss.item() for name, loss in sums.items()})
            values = {"loss": sum(weights[name] * loss for name, loss in means.items()), **means,
                      "psnr": -10 * math.log10(max(means["mse"], 1e-10)), "codebook_use": model.quantizer.use().item()}
            progress.set_postfix(loss=f"{values['loss']:.4f}", psnr=f"{values['psnr']:.2f}", use=f"{values['codebook_use']:.0%}",
                                 img_s=f"{seen / (time.perf_counter() - began):.0f}")
            log.write(done, **values, lr=lr)
            began, seen = time.perf_counter(), 0
        if done % args.eval_every == 0 or done == steps:
            value = evaluate(model, val, args, device, rank, ranks, f"{args.out}/pictures/tokenizer_stage{stage}_{done:06d}.png")
            log.write(done, val_psnr=value)
            if inception:
                found = fid.tokenizer_metrics(model, val, inception, device, args.eval_images)
                log.write(done, inception=inception.origin, **{f"val_{name}": number for name, number in found.items()})
            if rank == 0:
                progress.write(f"{run}, step {done}: validation PSNR {value:.2f} dB")
            began, seen = time.perf_counter(), 0
        if done % args.save_every == 0 or done == steps:
            save(done)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--stage", choices=["1", "2", "both"], default="both")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("STAGE1", "STAGE2"), help="such as 20000 12000")
    for name in CHANGES:
        kind = str if name == "encoder" else int
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=f"in place of the preset's {name.replace('_', ' ')}"
                            + (": bidirectional or causal" if kind is str else ""))
    add_run_arguments(parser)
    args = parser.parse_args()

    args.steps = args.steps or RECIPES[args.preset]["steps"]
    if min(args.steps) < 1:
        raise InputError(f"--steps takes two numbers above zero, found {args.steps[0]} {args.steps[1]}")
    args.steps = list(args.steps)
    changes = {name: getattr(args, name) for name in CHANGES if getattr(args, name) is not None}
    config = TokenizerConfig(**{**PRESETS[args.preset], **changes})
    rank, ranks, device = check_run_arguments(args, RECIPES[args.preset])
    train, val = data.open_data(args.data, args.val_data, config.image_size, args.seed, args.skip_bad_images, args.num_pictures)
    stages = [1, 2] if args.stage == "both" else [int(args.stage)]
    if not args.resume:
        for name in [f"tokenizer_stage{stage}.pt" for stage in stages] + ["tokenizer.pt"] * (1 in stages):
            refuse_overwrite(f"{args.out}/{name}")

    def finish(model):
        if rank == 0:
            weights = {name: value.to(getattr(torch, args.save_dtype)) for name, value in model.state_dict().items()}
            data.save_checkpoint(f"{args.out}/tokenizer.pt", "tokenizer", asdict(model.config), weights, classes=train.classes)
        data.barrier()

    if 1 in stages:
        torch.manual_seed(args.seed)
        model = Tokenizer(config).to(device)
        train_stage(1, model, train, val, args, device, rank, ranks)
        if not os.path.exists(f"{args.out}/tokenizer_stage2.pt"):
            finish(model)
    if 2 in stages:
        path = f"{args.out}/tokenizer_stage1.pt"
        model = load_tokenizer(path, device)
        if model.config != config:
            raise InputError(f"{path} has another shape than these flags ask for: {model.config}; give the flags of stage 1")
        torch.manual_seed(args.seed + 1)
        model.swap_decoder()
        train_stage(2, model, train, val, args, device, rank, ranks)
        finish(model)
    if rank == 0:
        print(f"wrote {args.out}/tokenizer.pt; next: python train_ar.py" + (f" --out {args.out}" if args.out != "out" else ""))


if __name__ == "__main__":
    data.run(main)
