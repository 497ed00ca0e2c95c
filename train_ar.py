"""Train the AliTok AR model on the tokens of a trained tokenizer.

    python train_ar.py                                            # finds out/tokenizer.pt, a CPU is enough
    torchrun --nproc_per_node=8 train_ar.py --preset B --data imagenet/train --val-data imagenet/val

Builds the token cache in --cache when it is missing. Writes to --out: ar_state.pt (training state, --resume goes on from
it), ar.pt (the finished model), log.jsonl and pictures/.
"""
import argparse
import itertools
import math
from dataclasses import asdict

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import fid
from ar_model import PRESETS, ARConfig, ARModel, image_uniforms
from data import InputError
from tokenizer import load_tokenizer
from train_tokenizer import (FIXED, CarefulAdamW, add_run_arguments, check_resumed, check_run_arguments, learning_rate, no_sync,
                             refuse_overwrite, wrap)

PAPER = dict(steps=500_000, batch_size=2048, lr=4e-4, final_lr=1e-5, warmup=62_500)
RECIPES = {
    "tiny": dict(steps=9000, batch_size=32, lr=2e-3, final_lr=1e-5, warmup=200),       # ours
    "B": PAPER, "L": PAPER, "XL": {**PAPER, "steps": 250_000},
}


def seed_step(seed, step, rank):
    """Dropout masks follow from (seed, step, rank): a resumed run draws the same ones, other ranks or micro-batches others."""
    torch.manual_seed(int(data.generator("step", seed, step, rank).integers(2 ** 62)))


def drop_classes(classes, keys, probability, seed, null):
    """Each (epoch, index) of `keys` loses its class with the given probability: classes (B,) -> (B,), `null` where lost."""
    lost = torch.from_numpy(data.key_uniforms("class dropout", seed, keys) < probability)
    return torch.where(lost, null, classes)


@torch.no_grad()
def evaluate(model, cache, keys, args, device, rank, ranks):
    """Judge the model on the images at `keys`, (epoch, index), of a cache. -> {"loss": nats a token, "accuracy": share of tokens that
    are the likeliest, both also with _prefix, _first_row and _rest for those parts alone, "bits_per_image"}"""
    model.eval()
    N, P, g = model.config.num_tokens, model.config.prefix_tokens, model.config.grid
    sums = torch.zeros(2, N, dtype=torch.double)
    for at in range(rank * 32, len(keys), ranks * 32):
        tokens, classes = (t.to(device) for t in cache.batch(keys[at:at + 32], args.seed))
        logits = model(tokens[:, :-1], classes).float()
        sums[0] += F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").double().sum(0).cpu()
        sums[1] += (logits.argmax(-1) == tokens).double().sum(0).cpu()
    model.train()
    means = torch.tensor(data.over_ranks(sums.flatten().tolist())).view(2, N) / len(keys)
    if not means.isfinite().all():
        raise InputError("the loss on whole images is not finite any more: training has diverged; start anew with a lower --lr")
    parts = {"": slice(N), "_prefix": slice(P), "_first_row": slice(P, P + g), "_rest": slice(P + g, N)}
    return {"bits_per_image": means[0].sum().item() / math.log(2),
            **{f"{name}{part}": values[where].mean().item() for name, values in zip(("loss", "accuracy"), means)
               for part, where in parts.items() if len(values[where])}}


def judge_samples(model, tokenizer, reference, inception, args, device, rank, ranks):
    """fid.py's metrics of --eval-images samples, of classes evenly spread, against validation images; {} on ranks above 0."""
    model.eval()
    features, classes = fid.Features(args.eval_images, inception, device), data.spread(model.config.num_classes, args.eval_images)
    for at in range(rank * 32, args.eval_images, ranks * 32):
        numbers = range(at, min(at + 32, args.eval_images))
        tokens = model.generate(torch.tensor([classes[k % len(classes)] for k in numbers]),
                                image_uniforms(args.seed, numbers, model.config.num_tokens))
        features.add(numbers, (tokenizer.decode(tokens) * 255).round().byte())
    model.train()
    samples = features.finish()
    return fid.compare(reference, samples, inception) if samples else {}


def paint_samples(model, tokenizer, path, seed, n=32):
    """A grid of samples of classes spread over all there are; the same classes and random numbers each time."""
    model.eval()
    classes = torch.tensor([k * model.config.num_classes // n for k in range(n)])
    tokens = model.generate(classes, image_uniforms(seed, range(n), model.config.num_tokens))
    model.train()
    data.save_grid(path, tokenizer.decode(tokens), 8)


class Update:
    """The AR model in training: its optimizer, and what one step does to them."""

    def __init__(self, model, args, device, rank, ranks):
        self.model, self.args, self.device, self.rank = model, args, device, rank
        decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith("embeddings")]
        others = [p for name, p in model.named_parameters() if p.ndim < 2 or name.startswith("embeddings")]
        self.optimizer = CarefulAdamW(decayed, others, args, betas=(0.9, 0.96), weight_decay=0.03)
        model.recompute = args.grad_checkpoint
        if device.type == "cuda" and not args.no_compile:
            model.compile()
        self.wrapped = wrap(model, ranks, device)

    def step(self, step, parts):
        """One optimizer step on micro-batches of tokens (B, N), classes (B,), keys (B, 2). -> losses, learning rate."""
        args, null = self.args, self.model.config.num_classes
        lr = learning_rate(step, args.steps, args.warmup, args.lr, args.final_lr)
        seed_step(args.seed, step, self.rank)
        sums = {"loss": 0, "accuracy": 0}
        for part, (tokens, labels, keys) in enumerate(parts, 1):
            labels = drop_classes(labels, keys, args.class_dropout, args.seed, null).to(self.device, non_blocking=True)
            tokens = tokens.to(self.device, non_blocking=True)
            with no_sync(self.wrapped, part < args.accum):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                    logits = self.wrapped(tokens[:, :-1], labels)
                loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
                (loss / args.accum).backward()
            sums["loss"] += loss.detach() / args.accum
            sums["accuracy"] += (logits.argmax(-1) == tokens).float().mean() / args.accum
        self.optimizer.step(lr)
        return sums, lr


def train(model, tokenizer, train_cache, val_cache, val_set, args, interruptions, rank, ranks, device, classes):
    path, run, start, saved = f"{args.out}/ar_state.pt", "ar", 0, 0
    config, fingerprint = model.config, tokenizer.fingerprint()
    update = Update(model, args, device, rank, ranks)
    state = data.load_state(path, "ar") if args.resume else None
    if state:
        check_resumed(path, {**state["args"], **asdict(ARConfig(**state["config"])), "tokenizer": state["tokenizer"]},
                      argparse.Namespace(**{**vars(args), **asdict(config), "tokenizer": fingerprint}),
                      FIXED + ["class_dropout", "tokenizer"] + list(asdict(config)))
        model.load_state_dict(state["model"])
        update.optimizer.load_state_dict(state["optimizer"])
        start = saved = state["step"]
    if args.eval_fid:
        inception = fid.load_inception(args.inception, device)
        reference = fid.extract(val_set, inception, device, args.eval_images, "validation images")
    log = data.Log(f"{args.out}/log.jsonl", run, start)
    evaluated = {"train": data.stream_keys(len(train_cache), args.seed, 0, min(len(train_cache), args.eval_images)),
                 "val": [(0, index) for index in data.spread(len(val_cache), args.eval_images)]}
    keys = data.batch_keys(len(train_cache), args.seed, args.batch_size, args.accum, start, rank, ranks)

    def save(path, step, weights, **more):
        if rank == 0:
            data.save_checkpoint(path, "ar", asdict(config), weights, classes=classes, tokenizer=fingerprint, step=step, **more)
        data.barrier()

    matrices = sum(p.numel() for p in [*model.blocks.parameters(), model.output.weight])
    speed = data.Speed(6 * matrices * config.num_tokens, device, args.dtype)              # attention left out
    model.train()
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=run, disable=rank > 0)
    for step in progress:
        parts = list(itertools.islice(keys, args.accum))
        losses, lr = update.step(step, [(*train_cache.batch(part, args.seed), part) for part in parts])
        speed.seen += args.batch_size

        done = step + 1
        if done % 20 == 0 or done == args.steps:
            values = data.mean_over_ranks({name: value.item() for name, value in losses.items()})
            update.optimizer.check(done, path, saved)
            progress.set_postfix(loss=f"{values['loss']:.3f}", acc=f"{values['accuracy']:.1%}", **speed.show())
            log.write(done, **values, lr=lr, skipped=int(update.optimizer.skipped))
        if done % args.eval_every == 0 or done == args.steps:
            values = {f"{split}_{name}": value for split, cache in (("train", train_cache), ("val", val_cache))
                      for name, value in evaluate(model, cache, evaluated[split], args, device, rank, ranks).items()}
            if args.eval_fid:
                found = judge_samples(model, tokenizer, reference, inception, args, device, rank, ranks)
                values |= {"inception": inception.origin, **{f"val_{name}": number for name, number in found.items()}}
            log.write(done, **values)
            if rank == 0:
                paint_samples(model, tokenizer, f"{args.out}/pictures/ar_{done:06d}.png", args.seed)
                progress.write(f"{run}, step {done}: validation loss {values['val_loss']:.3f} nats a token, "
                               f"accuracy {values['val_accuracy']:.1%}")
            data.barrier()
            speed.restart()
        save_now, asked = interruptions.due(done)
        if save_now or done == args.steps:
            save(path, done, model.state_dict(), optimizer=update.optimizer.state_dict(), args=vars(args), keep=True)
            saved = done
        if asked:
            raise data.Stopped(asked, f"step {done}; --resume goes on from there")
    dtype = getattr(torch, args.save_dtype)
    save(f"{args.out}/ar.pt", args.steps, {name: value.to(dtype) for name, value in model.state_dict().items()})


def benchmark(config, args, device):
    """Time a training step on random tokens, as many as an image of ImageNet has."""
    size = args.batch_size // args.accum
    torch.manual_seed(args.seed)
    part = (torch.randint(config.codebook_size, (size, config.num_tokens)), torch.randint(config.num_classes, (size,)),
            data.stream_keys(size, args.seed, 0, size))
    update = Update(ARModel(config).to(device).train(), args, device, 0, 1)
    data.benchmark(f"AR {args.preset}", lambda k: update.step(k, [part] * args.accum), args.batch_size, device, args.dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--tokenizer", help="a trained tokenizer (default: tokenizer.pt in --out)")
    parser.add_argument("--cache", help="folder of the token cache (default: tokens in --out)")
    parser.add_argument("--steps", type=int, help="steps to train (default: the preset's)")
    parser.add_argument("--width", type=int, help="in place of the preset's, with heads of the same size")
    for name, kind in (("depth", int), ("dropout", float)):
        parser.add_argument("--" + name, type=kind, help="in place of the preset's")
    parser.add_argument("--ten-crop", action="store_true", help="cache ten crops of an image, as the paper does, not two")
    parser.add_argument("--class-dropout", type=float, default=0.1, help="share of pictures that train the null class")
    add_run_arguments(parser)
    args = parser.parse_args()

    args.steps = RECIPES[args.preset]["steps"] if args.steps is None else args.steps
    if args.steps < 1 or not 0 <= args.class_dropout <= 1:
        raise InputError("--steps is above zero and --class-dropout between 0 and 1, "
                         f"found {args.steps} and {args.class_dropout}")
    rank, ranks, device = check_run_arguments(args, RECIPES[args.preset])
    if not args.resume and not args.benchmark:
        for name in ("ar_state.pt", "ar.pt"):
            refuse_overwrite(f"{args.out}/{name}")
    preset = PRESETS[args.preset]
    settings = {**preset, **{name: getattr(args, name) for name in ("width", "depth", "dropout") if getattr(args, name) is not None}}
    head_dim = preset["width"] // preset["heads"]
    if settings["width"] < 1 or settings["width"] % head_dim or settings["depth"] < 1:
        raise InputError(f"--width is a multiple of {head_dim}, the size of a head, and --depth at least 1, "
                         f"found {settings['width']} and {settings['depth']}")
    settings["heads"] = settings["width"] // head_dim
    if args.benchmark:
        return benchmark(ARConfig(**settings), args, device)
    tokenizer = load_tokenizer(args.tokenizer or f"{args.out}/tokenizer.pt", device)
    train_set, val_set = data.open_data(args.data, args.val_data, tokenizer.config.image_size, args.seed, args.skip_bad_images,
                                        args.num_pictures, args.ten_crop)
    config = ARConfig(num_classes=len(train_set.classes), **settings,
                      **{name: getattr(tokenizer.config, name) for name in ("codebook_size", "grid", "prefix")})
    cache = args.cache or f"{args.out}/tokens"
    train_cache = data.open_cache(f"{cache}/train", train_set, tokenizer, device, args.workers)
    val_cache = data.open_cache(f"{cache}/val", val_set, tokenizer, device, args.workers)
    torch.manual_seed(args.seed)
    model = ARModel(config).to(device)
    with data.Interruptions(args.save_every, args.save_minutes) as interruptions:
        train(model, tokenizer, train_cache, val_cache, val_set, args, interruptions, rank, ranks, device, train_set.classes)
    if rank == 0:
        print(f"wrote {args.out}/ar.pt; next: python sample.py --class 0" + (f" --out {args.out}" if args.out != "out" else ""))


if __name__ == "__main__":
    data.run(main)
