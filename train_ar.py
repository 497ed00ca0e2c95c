"""Train the AliTok AR model on the tokens of a trained tokenizer.

    python train_ar.py                                            # finds out/tokenizer.pt, a CPU is enough
    torchrun --nproc_per_node=8 train_ar.py --preset B --ten-crop --data train --val-data val
    python train_ar.py --init alitok_b.bin --tokenizer AliTok.pth --data photos/train      # fine-tuning

Builds the token cache in --cache when it is missing. Writes to --out: ar_state.pt (training state, --resume
goes on from it), ar.pt (the finished model), log.jsonl and pictures/.
"""
import math
from dataclasses import asdict

import torch
import torch.nn.functional as F

import data
from ar_model import PRESETS, ARConfig, ARModel, image_uniforms, load_ar, start_from
from tokenizer import load_tokenizer

PAPER = dict(steps=500_000, batch_size=2048, lr=4e-4, final_lr=1e-5, warmup=62_500)
RECIPES = {
    "tiny": dict(steps=9000, batch_size=32, lr=2e-3, final_lr=1e-5, warmup=200),       # ours
    "B": PAPER, "L": PAPER, "XL": {**PAPER, "steps": 250_000},
    "init": dict(steps=1000, batch_size=32, lr=2e-4, final_lr=1e-5, warmup=100, eval_every=200),   # ours
}
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.96), 0.03, 1.0

def drop_classes(classes, keys, probability, seed, n, null):
    """Classes (B,) -> (B,): each key (epoch, index) loses its class to `null` with this probability."""
    lost = torch.from_numpy(data.key_uniforms("class dropout", seed, keys, n) < probability)
    return torch.where(lost, null, classes)

@torch.compiler.set_stance("force_eager")     # of the loop's step alone is there a compiled version
@torch.no_grad()
def evaluate(model, cache, args, device):
    """-> of --eval-images of a cache: {"loss": nats per token, "accuracy": share of likeliest tokens}."""
    model.eval()
    loss = accuracy = 0.0
    keys = [(0, index) for index in data.spread(len(cache), args.eval_images)]
    for span in data.rank_spans(len(keys), 32):
        tokens, classes = (t.to(device) for t in cache.batch(keys[span], args.seed))
        logits = model(tokens[:, :-1], classes).float()
        loss += F.cross_entropy(logits.transpose(1, 2), tokens, reduction="sum").item()
        accuracy += (logits.argmax(-1) == tokens).sum().item()
    model.train()
    count = len(keys) * model.config.num_tokens
    loss, accuracy = (total / count for total in data.over_ranks([loss, accuracy]))
    return {"loss": loss, "accuracy": accuracy}

def paint_samples(model, tokenizer, path, seed, n=32):
    """A grid of samples of classes spread over all there are, each time with the same random numbers."""
    model.eval()
    classes = torch.arange(n) * model.config.num_classes // n
    tokens = model.generate(classes, image_uniforms(seed, range(n), model.config.num_tokens))
    model.caches.clear()                                      # training needs the memory
    model.train()
    data.save_picture(path, data.grid_image(tokenizer.decode(tokens), 8))

def train(model, tokenizer, caches, classes, args, device):
    """Train in place, from where --resume finds the state, to the last step. caches: {"train", "val"}."""
    run, path, config = "ar", f"{args.out}/ar_state.pt", model.config
    n, fingerprint = len(caches["train"]), tokenizer.fingerprint()
    fixed = {name: getattr(args, name, None) for name in data.FIXED} | asdict(config)
    fixed |= {"tokenizer": fingerprint, **caches["train"].files, **caches["val"].files}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and not name.startswith("embeddings")
        (matrices if decays else others).append(parameter)
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    def save(name, state, **more):
        data.save_checkpoint(f"{args.out}/{name}", kind="ar", config=asdict(config), model=state,
                             classes=classes, tokenizer=fingerprint, **more)

    start, skipped, bad_in_row = 0, 0, 0
    state = data.load_training_state(path, "ar", fixed, args.steps) if args.resume else None
    if state:
        start, skipped = state["step"], state["skipped"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    data.compile_and_checkpoint([model], args.steps, args, device)
    ddp_model, stop_flag = data.distribute(model), data.StopFlag()
    log = data.Log(f"{args.out}/log.jsonl", run, start)
    micro_batches = data.batch_keys(run, n, args, start)
    steps = range(start, args.steps)
    progress = data.progress_bar(steps, run, args.batch_size, initial=start, total=args.steps)
    model.train()
    for step in progress:
        warmup = min(args.warmup, args.steps // 4)                           # for short runs, ours
        lr = data.learning_rate(step, args.steps, warmup, args.lr, min(args.lr, args.final_lr))
        # Dropout follows from (seed, step, rank), so that a resumed run repeats it.
        torch.manual_seed(data.generator("dropout", args.seed, step, data.rank()).integers(2 ** 62).item())
        sums = {"loss": 0, "accuracy": 0}
        for micro in range(args.accum):
            keys = next(micro_batches)
            tokens, labels = caches["train"].batch(keys, args.seed)
            labels = drop_classes(labels, keys, args.class_dropout, args.seed, n, config.num_classes)
            tokens, labels = (t.to(device, non_blocking=True) for t in (tokens, labels))
            ddp_model.require_backward_grad_sync = micro + 1 == args.accum    # exchange gradients once a step
            with autocast:
                logits = ddp_model(tokens[:, :-1], labels)
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
            (loss / args.accum).backward()
            sums["loss"] += loss.detach() / args.accum
            sums["accuracy"] += (logits.argmax(-1) == tokens).float().mean() / args.accum

        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        if norm.isfinite():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            bad_in_row = 0
        else:
            skipped, bad_in_row = skipped + 1, bad_in_row + 1
            data.check_bad_steps(bad_in_row)
        optimizer.zero_grad()

        done = step + 1
        if done % data.LOG_EVERY == 0 or done == args.steps:
            means = data.mean_over_ranks(sums)
            log.write(done, **means, lr=lr, skipped=skipped)
            progress.set_postfix(means, skipped=skipped)
        stop = stop_flag.read(done)
        if stop or done % args.save_every == 0 or done == args.steps:
            save("ar_state.pt", model.state_dict(), optimizer=optimizer.state_dict(), step=done,
                 skipped=skipped, fixed=fixed)
        if done % args.eval_every == 0 or done == args.steps:
            scores = {f"{split}_{name}": value for split, cache in caches.items()
                      for name, value in evaluate(model, cache, args, device).items()}
            log.write(done, **scores)
            paint_samples(model, tokenizer, f"{args.out}/pictures/ar_{done:06d}.png", args.seed)
            data.say(f"{run}, step {done}: validation loss {scores['val_loss']:.3f} nats a token, accuracy "
                     f"{scores['val_accuracy']:.1%}")
        if stop:
            data.leave(stop, done)
    save("ar.pt", model.state_dict())
    data.say(f"wrote ar.pt; next: sample.py --class 0 --out {args.out} --tokenizer {args.tokenizer}")

def parse_args():
    parser = data.preset_parser(__doc__, PRESETS)
    known, _ = parser.parse_known_args()
    add = parser.add_argument
    add("--tokenizer", help="a trained tokenizer (default: tokenizer.pt in --out)")
    add("--cache", help="folder of the token cache (default: tokens in --out)")
    add("--steps", type=data.positive, help="steps to train (%(default)s)")
    add("--width", type=data.positive, help="of the model; the number of heads follows (%(default)s)")
    add("--depth", type=data.positive, help="blocks (%(default)s)")
    add("--dropout", type=data.number(float, 0, 0.99), help="(%(default)s)")
    add("--ten-crop", action="store_true", help="cache ten crops of an image, as the paper does, not two")
    add("--class-dropout", type=data.from_0_to_1, default=0.1, help="share that trains the null class (0.1)")
    data.add_run_arguments(parser)
    start = load_ar(known.init_from) if known.init_from else None
    shape = asdict(start.config) if start else PRESETS[known.preset]
    parser.set_defaults(**RECIPES["init" if start else known.preset], **shape, clip=CLIP, start=start)
    args = parser.parse_args()
    args.heads = max(1, args.width * shape["heads"] // shape["width"])
    return args

def main():
    args = parse_args()
    device = data.start(args)
    data.refuse_overwrite(args.resume, f"{args.out}/ar_state.pt", f"{args.out}/ar.pt")
    args.tokenizer = args.tokenizer or f"{args.out}/tokenizer.pt"
    tokenizer = data.pack_linears(load_tokenizer(args.tokenizer, device))
    if not args.data:
        args.data, args.val_data = tokenizer.data[0], args.val_data or tokenizer.data[1]
        data.say(f"no --data given: taking --data {args.data}")
    train_set, val_set = data.open_data(args, tokenizer.config.image_size, args.ten_crop)
    args.lock = data.take_lock(args.out)      # held as long as the run has `args`
    like, shape = tokenizer.config, {name: getattr(args, name) for name in PRESETS["tiny"]}
    config = ARConfig(like.codebook_size, like.grid, like.prefix_tokens, len(train_set.classes), **shape)
    caches = {split: data.TokenCache(f"{args.cache or args.out + '/tokens'}/{split}", dataset, tokenizer,
                                     device, args.workers)
              for split, dataset in (("train", train_set), ("val", val_set))}
    torch.manual_seed(args.seed)
    model = ARModel(config)
    if args.start:
        if args.start.tokenizer not in (None, tokenizer.fingerprint()):
            data.say("note: the model of --init was trained on the tokens of another tokenizer")
        start_from(model, args.start, train_set.classes)
    model.to(device)
    train(model, tokenizer, caches, train_set.classes, args, device)

if __name__ == "__main__":
    data.run(main)
