"""Paint pictures of the classes you name.

    python sample.py --class 207                    # with out/tokenizer.pt and out/ar.pt, else with the demo in weights/
    python sample.py --class tench 12 --n 8 --seed 3 --cfg-scale 4

Picture k of a command is a function of (seed, k) alone: neither the batch size nor the number of ranks changes it.
"""
import argparse
import os

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from ar_model import image_uniforms, load_ar
from data import InputError
from tokenizer import load_tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))


def find_weights(args):
    """Paths of tokenizer and AR model: as given, else the trained pair in --out, else the demo pair that comes along."""
    for folder in (args.out, os.path.join(HERE, "weights")):
        pair = [os.path.join(folder, name) for name in ("tokenizer.pt", "ar.pt")]
        if all(map(os.path.exists, pair)):
            break
    return args.tokenizer or pair[0], args.ar or pair[1]


def class_id(word, model):
    """A class as the user names it, a number or a name -> its id. InputError when there is no such class."""
    names = model.classes or []
    if word in names:
        return names.index(word)
    if word.isdigit() and int(word) < model.config.num_classes:
        return int(word)
    close = [name for name in names if word.lower() in name.lower()][:5]
    raise InputError(f"no class {word!r}: classes are 0 to {model.config.num_classes - 1}" + (
        f", or names such as {', '.join(map(repr, close or names[:3]))}" if names else ""))


def paint(model, tokenizer, classes, args, device):
    """Classes of pictures 0 .. n-1 -> tokens (n, N) int64 and images (n, 3, H, W) uint8 on the CPU, the same on every rank."""
    rank, ranks = data.rank_and_count()
    mine = list(range(rank, len(classes), ranks))
    N, size = model.config.num_tokens, tokenizer.config.image_size
    tokens = torch.zeros(len(classes), N, dtype=torch.long)
    images = torch.zeros(len(classes), 3, size, size, dtype=torch.uint8)
    progress = tqdm(total=len(classes), desc="painting", unit="img", disable=rank > 0)
    for at in range(0, len(mine), args.batch_size):
        part = mine[at:at + args.batch_size]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            found = model.generate(torch.tensor([classes[k] for k in part]), image_uniforms(args.seed, part, N), args.cfg_scale,
                                   args.cfg_power, args.temperature, args.top_k, args.top_p)
            tokens[part] = found.cpu()
            images[part] = (tokenizer.decode(found) * 255).round().byte().cpu()
        progress.update(min(len(part) * ranks, len(classes) - progress.n))
    progress.close()
    if dist.is_initialized():                 # every picture was painted by one rank and is zero on the others
        for tensor in (tokens, images):
            shared = tensor.to(device)
            dist.all_reduce(shared)
            tensor.copy_(shared)
    return tokens, images


def check(args):
    for name, low, high in (("n", 1, None), ("seed", 0, None), ("batch_size", 1, None), ("cfg_scale", 0, None),
                            ("cfg_power", 0, None), ("temperature", 0, None), ("top_k", 1, None), ("top_p", 0, 1)):
        value = getattr(args, name)
        if value is not None and not (low <= value <= (np.inf if high is None else high)):
            raise InputError(f"--{name.replace('_', '-')} is at least {low}" + (f" and at most {high}" if high else "")
                             + f", found {value}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--class", dest="classes", nargs="+", required=True, metavar="CLASS", help="numbers or names")
    parser.add_argument("--n", type=int, default=16, help="pictures of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg-scale", type=float, help="strength of guidance at the last token; 1 is none (default: the model's)")
    parser.add_argument("--cfg-power", type=float, help="above 1 guidance comes late, below early (default: the model's)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the fewest tokens whose probabilities reach p")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", default="out", help="folder with tokenizer.pt and ar.pt")
    parser.add_argument("--tokenizer", help="tokenizer checkpoint (default: the one in --out, else in weights/)")
    parser.add_argument("--ar", help="AR checkpoint (default: likewise)")
    parser.add_argument("--png", help="the grid's file name (default: class_<class>.png in --out)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto is bfloat16 on a GPU")
    args = parser.parse_args()
    check(args)
    rank, ranks, device = data.start_ranks(args.device)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    paths = find_weights(args)
    tokenizer, model = load_tokenizer(paths[0], device), load_ar(paths[1], device)
    if model.tokenizer != tokenizer.fingerprint():
        raise InputError(f"{paths[1]} was trained on the tokens of another tokenizer than {paths[0]}")
    ids = [class_id(word, model) for word in args.classes]
    _, images = paint(model, tokenizer, [k for k in ids for _ in range(args.n)], args, device)
    if rank == 0:
        names = [model.classes[k] if model.classes else str(k) for k in ids]
        path = args.png or os.path.join(args.out, f"class_{'_'.join(map(str, ids[:8]))}.png")
        columns = args.n if len(ids) > 1 else max(1, round(args.n ** 0.5))
        data.save_grid(path, images / 255, columns)
        print(f"painted {', '.join(f'{k} ({name})' for k, name in zip(ids[:8], names))} with {paths[1]}: {path}")


if __name__ == "__main__":
    data.run(main)
