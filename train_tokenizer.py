"""Train the AliTok tokenizer: stage 1 (causal decoder), the swap, stage 2 (bidirectional decoder).

    python train_tokenizer.py                       # built-in pictures, tiny preset, a CPU is enough
    torchrun --nproc_per_node=8 train_tokenizer.py --preset imagenet256 --data train --val-data val

A stage is a list of phases, see RECIPES. Writes to --out: tokenizer_stage1.pt and tokenizer_stage2.pt (states
that --resume goes on from), tokenizer.pt (the finished model), log.jsonl, pictures/.
"""
import itertools
import math
import os
from dataclasses import asdict, fields, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from data import InputError
from fid import load_judges, psnr
from tokenizer import PRESETS, Tokenizer, TokenizerConfig, load_tokenizer, strip_target

class Phase(NamedTuple):
    """Steps, learning rate from -> to (a cosine), and the weight of each loss, the paper's by default."""
    name: str
    steps: int
    lr: float
    final_lr: float
    mse: float = 1.0
    strip: float = 10.0          # times the strip's share of the picture's patches
    quantizer: float = 0.0
    perceptual: float = 0.0
    lpips: float = 0.0
    gan: float = 0.0
    discriminator: float = 0.1

PAPER = [
    Phase("lpips", 50_000, 1e-4, 1e-4, quantizer=1.0, perceptual=0.1, lpips=1.0),
    Phase("perceptual", 200_000, 1e-4, 2e-5, quantizer=1.0, perceptual=1.0),
    Phase("gan", 100_000, 2e-5, 2e-6, quantizer=1.0, perceptual=1.0, gan=0.1 * 0.05)]

# warmup: in stage 2 only after a cold swap. blend_between: shares of stage 1 between which quantization is
# blended in; before, the decoder sees the latents themselves. discriminator: channels of its first layer.
RECIPES = {
    # Ours. Without a perceptual loss the commitment term would outweigh the picture, and quantizing from the
    # first step keeps so small a model from finding out where in the picture a token belongs. On a grid of 8
    # a strip of weight 4.7 counts 0.66 times as much as the picture, as on the paper's grid of 16.
    "tiny": dict(
        batch_size=16, warmup=100, betas=(0.9, 0.95), weight_decay=1e-4, clip=1.0,
        blend_between=(0.2, 0.35), discriminator=32,
        stages=[[Phase("pixels", 6000, 1e-3, 1e-5, strip=4.7, quantizer=0.1)],
                [Phase("pixels", 3500, 2e-3, 2e-5)]]),
    # The released code's: PyTorch's AdamW as it is, 48 images a GPU. Here for 8 GPUs; see README.
    "paper": dict(
        batch_size=384, warmup=10_000, betas=(0.9, 0.999), weight_decay=0.01, clip=0.0,
        blend_between=(0.0, 0.0), discriminator=128,
        stages=[PAPER, [PAPER[0], PAPER[1]._replace(steps=150_000), PAPER[2]]]),
}

def plan(phases, steps, lr_scale, perceptual, strip_share):
    """The phases of a stage, stretched to `steps`, rates scaled, with perceptual losses or without."""
    totals = list(itertools.accumulate(phase.steps for phase in phases))
    ends = [round(total * steps / totals[-1]) for total in totals]
    planned = []
    for phase, start, end in zip(phases, [0, *ends], ends):
        if start == end:
            raise InputError(f"{steps} steps are too few for {len(phases)} phases; give more --steps")
        planned.append(phase._replace(
            steps=end - start, lr=phase.lr * lr_scale, final_lr=phase.final_lr * lr_scale,
            perceptual=phase.perceptual * perceptual, lpips=phase.lpips * perceptual,
            strip=phase.strip * strip_share))
    return planned

def blend_at(progress, start, end):
    """Share of quantization at this share of stage 1: 0 until `start`, 1 from `end` on."""
    return min(1.0, max(0.0, (progress - start) / (end - start))) if end > start else 1.0

# ---- Losses --------------------------------------------------------------------------------------

class Discriminator(nn.Module):
    """The released code's PatchGAN: images (B, 3, H, W) in [0, 1] -> logits (B, 1, 16, 16), high for real."""
    def __init__(self, channels):
        super().__init__()
        widths = [channels, channels, 2 * channels, 4 * channels]
        self.stem = nn.Conv2d(3, channels, 5, padding=2)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(32, width) for width in widths[1:])
        self.mix = nn.Conv2d(widths[-1], widths[-1], 1)
        self.to_logits = nn.Conv2d(widths[-1], 1, 5, padding=2)
        binomial = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("blur", binomial[:, None] * binomial, persistent=False)

    def downsample(self, x):
        """(B, C, H, W) -> (B, C, H/2, W/2), rounded up: every second pixel, after the binomial filter."""
        B, C, H, W = x.shape
        x = F.pad(x, (1, 1 + W % 2, 1, 1 + H % 2))
        return F.conv2d(x, self.blur.expand(C, 1, 4, 4), stride=2, groups=C)

    def forward(self, images):
        x = F.leaky_relu(self.stem(images), 0.1)
        for conv, norm in zip(self.convs, self.norms):
            x = F.leaky_relu(norm(self.downsample(conv(x))), 0.1)
        x = F.adaptive_max_pool2d(x, 16)
        return self.to_logits(F.leaky_relu(self.mix(x), 0.1))

def perceptual_loss(convnext, painted, images):
    """Mean squared difference of the ImageNet logits of images (B, 3, H, W); true ones need no gradient."""
    with torch.no_grad():
        target = convnext(images)
    return F.mse_loss(convnext(painted), target)

@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def evaluate(model, val, args, device, picture_path):
    """Judge --eval-images reconstructions, draw eight. -> {"val_psnr": in dB, "val_codes": how many occur}"""
    model.eval()
    indices, total = data.spread(len(val), args.eval_images), 0.0
    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64)
    keys = [[(0, index) for index in indices[span]] for span in data.rank_spans(len(indices), 32)]
    for images, _ in data.batches(val.read, keys):
        images = data.to_float(images, device)
        tokens = model.encode(images)
        counts += tokens.flatten().cpu().bincount(minlength=len(counts))
        total += psnr(model.decode(tokens), images).sum().item()
    total, *counts = data.over_ranks([total, *counts.tolist()])
    shown = [val.read(0, index)[0] for index in data.spread(len(val), 8)]
    images = data.to_float(torch.stack(shown), device)
    painted = model.decode(model.encode(images))
    data.save_picture(picture_path, data.grid_image(torch.cat([images, painted]), len(images)))
    model.train()
    return {"val_psnr": total / len(indices), "val_codes": sum(count > 0 for count in counts)}

# ---- One stage -----------------------------------------------------------------------------------

def train_stage(stage, model, train, val, args, judges, stop_flag, device):
    """Train a stage of model in place, from wherever --resume finds its state, to its last step."""
    config = model.config
    paths = [f"{args.out}/tokenizer_stage{k}.pt" for k in (1, 2)]
    run, path = f"tokenizer stage {stage}", paths[stage - 1]
    phases, steps = args.phases[stage], args.steps[stage - 1]
    schedule = [(phase, phase_step) for phase in phases for phase_step in range(phase.steps)]
    fixed = {name: getattr(args, name, None) for name in data.FIXED}
    order = data.generation_order(config.grid).tolist()
    warm = stage == 2 and not args.cold_swap
    fixed |= {phase.name: str(phase[2:]) for phase in phases}                # all but name and steps
    fixed |= {"order": order, "warm": warm, **asdict(config), **train.files, **val.files}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    discriminator = Discriminator(args.discriminator).to(device)
    optimizer, disc_optimizer = (
        torch.optim.AdamW(net.parameters(), args.lr, args.betas, weight_decay=args.weight_decay, fused=True)
        for net in (model, discriminator))
    parts = dict(model=model, optimizer=optimizer, discriminator=discriminator, disc_optimizer=disc_optimizer)

    start, skipped, losses = 0, 0, {}
    state = data.load_training_state(path, "tokenizer", fixed, steps) if args.resume else None
    if state:
        start, skipped, losses = state["step"], state["skipped"], state["losses"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    elif warm and (args.stage == "both" or not args.init_from):
        before = data.load_checkpoint(paths[0], "tokenizer")
        data.load_fitting(discriminator, before["discriminator"])
    if start == steps:
        return
    if stage == 1 and start and os.path.exists(paths[1]):
        raise InputError(f"stage 2 in {args.out} has begun on stage 1 as it was after {start} steps; "
                         f"give --steps {start} {args.steps[1]}, or start anew in another --out")
    data.compile_and_checkpoint([model.encoder, model.decoder], steps, args, device)
    ddp_model, ddp_discriminator = data.distribute(model), data.distribute(discriminator)
    log = data.Log(f"{args.out}/log.jsonl", run, start)
    batches = data.batches(train.read, data.batch_keys(run, len(train), args, start), args.workers)
    progress = data.progress_bar(range(start, steps), run, args.batch_size, initial=start, total=steps)
    bad_in_row = {model: 0, discriminator: 0}
    model.train()
    for step in progress:
        phase, phase_step = schedule[step]
        warmup = 0 if warm or phase is not phases[0] else min(args.warmup, steps // 10)
        lr = data.learning_rate(phase_step, phase.steps, warmup, phase.lr, phase.final_lr)
        blend = blend_at(step / steps, *args.blend_between)

        # In a GAN phase, discriminator and tokenizer learn from alternate batches.
        if phase.gan and phase_step % 2 == 0:
            net, ddp_net, active = discriminator, ddp_discriminator, disc_optimizer
        else:
            net, ddp_net, active = model, ddp_model, optimizer
        discriminator.requires_grad_(net is discriminator)
        sums = {}
        for micro in range(args.accum):
            images = data.to_float(next(batches)[0], device)
            ddp_net.require_backward_grad_sync = micro + 1 == args.accum      # exchange gradients once a step
            # The tokenizer may compute in bfloat16, all losses and their networks in float32 (GPUs in TF32).
            if net is discriminator:
                with torch.no_grad(), autocast:
                    painted = model(images, blend)[0]
                real, fake = ddp_net(torch.cat([images, painted])).chunk(2)           # logits; hinge loss
                terms = {"discriminator": (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2}
            else:
                with autocast:
                    painted, strip, quantizer_loss = ddp_net(images, blend)
                terms = {"mse": F.mse_loss(painted, images)}
                if strip is not None:
                    terms["strip"] = F.mse_loss(strip, strip_target(images, model))
                if stage == 1:
                    terms["quantizer"] = quantizer_loss
                if phase.perceptual:
                    terms["perceptual"] = perceptual_loss(judges["convnext"], painted, images)
                if phase.lpips:
                    terms["lpips"] = judges["lpips"](painted, images).mean()
                if phase.gan:
                    terms["gan"] = -discriminator(painted).mean()
            loss = sum(getattr(phase, name) * term for name, term in terms.items())
            if net is model:
                terms["loss"] = loss
            (loss / args.accum).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() / args.accum
        losses = {**losses, **sums} if phase_step > 0 else sums              # also the other network's last

        norm = nn.utils.clip_grad_norm_(net.parameters(), args.clip or math.inf)
        if norm.isfinite():
            gradient = model.encoder.latent_tokens.grad
            if stage == 1 and net is model and (gradient is None or not gradient.any()):
                raise RuntimeError("no gradient reaches the encoder: does Quantizer.forward pass it on?")
            for group in active.param_groups:
                group["lr"] = lr
            active.step()
            bad_in_row[net] = 0
        else:
            skipped, bad_in_row[net] = skipped + 1, bad_in_row[net] + 1
            data.check_bad_steps(bad_in_row[net])
        if stage == 1:
            model.quantizer.after_step(stepped=bad_in_row[net] == 0)
        active.zero_grad()

        done = step + 1
        if done % data.LOG_EVERY == 0 or done == steps:
            means = data.mean_over_ranks(losses)
            log.write(done, phase=phase.name, **means, lr=lr, skipped=skipped)
            progress.set_postfix(means, phase=phase.name, skipped=skipped)
        stop = stop_flag.read(done)
        if stop or done % args.save_every == 0 or done == steps:
            data.save_checkpoint(
                path, kind="tokenizer", config=asdict(config), order=order, fixed=fixed, step=done,
                skipped=skipped, losses=data.mean_over_ranks(losses), data=(args.data, args.val_data),
                **{name: part.state_dict() for name, part in parts.items()})
        if done % args.eval_every == 0 or done == steps:
            scores = evaluate(model, val, args, device,
                              f"{args.out}/pictures/tokenizer_stage{stage}_{done:06d}.png")
            log.write(done, **scores)
            data.say(f"{run}, step {done}: validation PSNR {scores['val_psnr']:.2f} dB, "
                     f"{scores['val_codes']} of {config.codebook_size} codes")
        if stop:
            data.leave(stop, done)

def parse_args():
    parser = data.preset_parser(__doc__, PRESETS)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, help="phases and losses (the preset's)")
    add("--stage", choices=["1", "2", "both"], default="both", help="2 goes on from 1 in --out, or --init")
    known, _ = parser.parse_known_args()
    if known.stage == "2" and not known.init_from:
        known.init_from = f"{known.out}/tokenizer_stage1.pt"
    start = load_tokenizer(known.init_from) if known.init_from else None
    shape = start.config if start else PRESETS[known.preset]
    recipe = dict(RECIPES[known.recipe or ("tiny" if shape.init == "narrow" else "paper")])
    shape = asdict(shape) | {"decoder": "causal"}
    if start:
        recipe["blend_between"] = (0.0, 0.0)                  # its decoder knows codes already
    else:
        shape["prefix_tokens"] = None                         # follows --image-size and --patch-size
    lr = recipe["stages"][0][0].lr
    add("--steps", type=data.positive, nargs=2, metavar=("STAGE1", "STAGE2"), help="of both (%(default)s)")
    add("--encoder", choices=["bidirectional", "causal"], help="(%(default)s)")
    add("--decoder", choices=["causal", "bidirectional"], help="of stage 1 (%(default)s)")
    add("--image-size", type=data.positive, help="(%(default)s)")
    add("--patch-size", type=data.positive, help="(%(default)s)")
    add("--codebook-size", type=data.number(int, 2), help="(%(default)s)")
    add("--prefix-tokens", type=data.natural, help="0, g or g + 1 for g patches a side (g + 1)")
    add("--cold-swap", action="store_true", help="stage 2 starts anew, discriminator and warmup too")
    add("--vision-weights", metavar="FOLDER", help="of loss networks (downloaded), or 'random', for trials")
    add("--no-perceptual", dest="perceptual", action="store_false", help="no ConvNeXt and LPIPS losses")
    data.add_run_arguments(parser)
    parser.set_defaults(steps=[sum(phase.steps for phase in phases) for phases in recipe["stages"]],
                        **recipe, **shape, lr=lr, base_lr=lr, start=start, data="shapes")
    return parser.parse_args()

def main():
    args = parse_args()
    config = TokenizerConfig(**{field.name: getattr(args, field.name) for field in fields(TokenizerConfig)})
    device, share = data.start(args), config.prefix_tokens / config.grid ** 2
    torch.backends.cuda.matmul.allow_tf32 = True              # ConvNeXt's layers would take half of a step
    stages = [1, 2] if args.stage == "both" else [int(args.stage)]
    if stages == [2] and config != replace(args.start.config, decoder=config.decoder):
        raise InputError(f"stage 2 takes its shape from a file ({args.start.config}); leave out other flags")
    args.phases = {stage: plan(args.stages[stage - 1], args.steps[stage - 1], args.lr / args.base_lr,
                               args.perceptual, share) for stage in stages}
    train, val = data.open_data(args, config.image_size, labelled=False)
    args.lock = data.take_lock(args.out)      # held as long as the run has `args`
    states = [f"{args.out}/tokenizer_stage{stage}.pt" for stage in stages]
    if 1 in stages or args.init_from:
        states.append(f"{args.out}/tokenizer.pt")
    data.refuse_overwrite(args.resume, *states)
    judges, args.judged_by = {}, "none"
    if any(phase.perceptual or phase.lpips for phase in itertools.chain(*args.phases.values())):
        judges = load_judges(args.vision_weights, device)
        args.judged_by = "random" if args.vision_weights == "random" else "ConvNeXt and LPIPS"
    stop_flag = data.StopFlag()
    torch.manual_seed(args.seed)
    if 1 in stages:
        model = Tokenizer(config)
        if args.start:
            known = args.start.state_dict()                   # of two decoders, the causal one wins
            known = {name.replace("causal_decoder", "decoder"): value for name, value in known.items()}
            data.load_fitting(model, known)
    else:
        model = args.start
    model.to(device)
    for stage in stages:
        if stage == 2:
            torch.manual_seed(args.seed + 1)
            args.blend_between = 0.0, 0.0     # its decoder sees codes alone
            model.swap_decoder(args.cold_swap)
        train_stage(stage, model, train, val, args, judges, stop_flag, device)
        if stage == 1 and os.path.exists(f"{args.out}/tokenizer_stage2.pt"):
            continue                          # tokenizer.pt is stage 2's already
        data.save_checkpoint(f"{args.out}/tokenizer.pt", kind="tokenizer", config=asdict(model.config),
                             model=model.state_dict(), data=(args.data, args.val_data),
                             order=data.generation_order(config.grid).tolist())
    data.say(f"{args.out}/tokenizer.pt is ready; next: train_ar.py with the same --out")

if __name__ == "__main__":
    data.run(main)
