"""Paint pictures of the classes you name.

    python sample.py --class 207                    # with out/tokenizer.pt and out/ar.pt, else with the demo in weights/
    python sample.py --class tench 12 --n 8 --seed 3 --cfg-scale 4
    torchrun --nproc_per_node=8 sample.py --npz samples.npz --num-images 50000

Picture k of a command is a function of (seed, k) alone: neither the batch size nor the number of ranks changes it.
"""
import argparse
import json
import os
import shutil
import sys

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
    demo = os.path.join(HERE, "weights")
    for folder in (args.out, demo):
        pair = [os.path.join(folder, name) for name in ("tokenizer.pt", "ar.pt")]
        if all(map(os.path.exists, pair)):
            break
    if folder == demo and not (args.tokenizer and args.ar) and data.rank_and_count()[0] == 0:
        print(f"no tokenizer.pt and ar.pt together in {args.out}: taking the demo model in weights/", file=sys.stderr)
    return args.tokenizer or pair[0], args.ar or pair[1]


def class_id(word, model):
    """A class as the user names it, a number or a name -> its id. InputError when there is no such class."""
    names = model.classes or []
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < model.config.num_classes:
        return int(word)
    close = [name for name in names if word.lower() in name.lower()][:5]
    raise InputError(f"no class {word!r}: classes are 0 to {model.config.num_classes - 1}" + (
        f", or names such as {', '.join(map(repr, close or names[:3]))}" if names else ""))


def paint(model, tokenizer, pictures, args, device):
    """Paint this rank's share of `pictures`, a list of (number k, class id), batch by batch.

    Yields numbers (list), tokens (B, N) int64 and images (B, 3, H, W) uint8 on the CPU.
    """
    rank, ranks = data.rank_and_count()
    mine = pictures[rank::ranks]
    progress = tqdm(total=len(pictures), desc="painting", unit="img", disable=rank > 0)
    for at in range(0, len(mine), args.batch_size):
        numbers, classes = zip(*mine[at:at + args.batch_size])
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            tokens = model.generate(torch.tensor(classes), image_uniforms(args.seed, numbers, model.config.num_tokens),
                                    args.cfg_scale, args.cfg_power, args.temperature, args.top_k, args.top_p)
            images = (tokenizer.decode(tokens) * 255).round().byte()
        yield list(numbers), tokens.cpu(), images.cpu()
        progress.update(min(len(numbers) * ranks, len(pictures) - progress.n))
    progress.close()


def paint_grid(model, tokenizer, ids, args, device):
    """--n pictures of each class in `ids`: one PNG grid. -> its path."""
    size = tokenizer.config.image_size
    pictures = [(k, label) for k, label in enumerate(label for label in ids for _ in range(args.n))]
    images = torch.zeros(len(pictures), 3, size, size, dtype=torch.uint8)
    for numbers, _, painted in paint(model, tokenizer, pictures, args, device):
        images[numbers] = painted
    if dist.is_initialized():                 # every picture was painted by one rank and is zero on the others
        shared = images.to(device)
        dist.all_reduce(shared)
        images = shared.cpu()
    path = args.png or os.path.join(args.out, f"class_{'_'.join(map(str, ids[:8]))}.png")
    if data.rank_and_count()[0] == 0:
        data.save_grid(path, images / 255, args.n if len(ids) > 1 else max(1, round(args.n ** 0.5)))
    return path


def paint_npz(model, tokenizer, args, device, settings):
    """--num-images pictures, classes in turn (0, 1, ... and again), into an .npz that ADM's evaluator reads (`arr_0`).

    In turn, because that evaluator averages the Inception Score over runs of 5000 in file order, each of which needs all classes.

    They gather in a memory-mapped file in the folder <npz>.part, from where an interrupted run goes on. `settings` is what
    the pictures depend on; a folder that was painted with others is refused.
    """
    rank, n, size, classes = data.rank_and_count()[0], args.num_images, tokenizer.config.image_size, model.config.num_classes
    if os.path.exists(args.npz):
        raise InputError(f"{args.npz} is there already; name another file or remove it")
    if n % classes:
        raise InputError(f"--num-images {n} is not a multiple of the {classes} classes; choose {max(1, n // classes) * classes}")
    part = args.npz + ".part"
    note, paths = os.path.join(part, "settings.json"), [os.path.join(part, name) for name in ("images.npy", "done.npy")]
    if rank == 0 and not os.path.exists(note):
        os.makedirs(part, exist_ok=True)
        data.create_array(paths[0], np.uint8, (n, size, size, 3), 0)
        data.create_array(paths[1], np.uint8, (n,), 0)
        data.write_text(note, json.dumps(settings))
    data.barrier()
    found = data.read_json(note)
    changed = [f"{key} {found.get(key)}, now {value}" for key, value in settings.items() if found.get(key) != value]
    if changed:
        raise InputError(f"{part} holds pictures painted with other settings ({'; '.join(changed)}); "
                         "go on with the old ones, or remove it")
    images, done = (np.lib.format.open_memmap(path, "r+") for path in paths)
    pictures = [(int(k), int(k) % classes) for k in np.flatnonzero(done == 0)]
    data.barrier()                            # every rank has the same list before one of them shortens it
    for numbers, _, painted in paint(model, tokenizer, pictures, args, device):
        images[numbers] = painted.permute(0, 2, 3, 1).numpy()
        images.flush()                        # a picture is on disk before it counts as done
        done[numbers] = 1
    done.flush()
    data.barrier()
    if rank == 0:
        data.replace_file(args.npz, lambda file: np.savez(file, arr_0=images))
        shutil.rmtree(part)
    return args.npz


LEAST = {"n": 1, "num_images": 1, "batch_size": 1, "top_k": 1,
         "seed": 0, "cfg_scale": 0, "cfg_power": 0, "temperature": 0, "top_p": 0}


def check(args):
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value < np.inf:
            raise InputError(f"--{name.replace('_', '-')} is at least {least}, found {value}")
    if args.top_p is not None and args.top_p > 1:
        raise InputError(f"--top-p is at most 1, found {args.top_p}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--class", dest="classes", nargs="+", metavar="CLASS", help="paint a grid of these, numbers or names")
    what.add_argument("--npz", help="paint equally many pictures of every class into this file, for fid.py and ADM's evaluator")
    parser.add_argument("--num-images", type=int, default=50_000, help="pictures in the .npz, over all classes")
    parser.add_argument("-n", "--n", type=int, default=16, help="pictures of each class; torchrun lets only -n through")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg-scale", type=float, help="guidance at the last token; 1 is none (default: the model's)")
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
    tokenizer = load_tokenizer(paths[0], device)
    model = load_ar(paths[1], device, tokenizer.config.grid)
    if (model.config.codebook_size, model.config.grid) != (tokenizer.config.codebook_size, tokenizer.config.grid) or (
            model.tokenizer and model.tokenizer != tokenizer.fingerprint()):
        raise InputError(f"{paths[1]} was trained on the tokens of another tokenizer than {paths[0]}")
    if args.npz:
        settings = {name: getattr(args, name) for name in ("num_images", "seed", "cfg_scale", "cfg_power", "temperature",
                                                           "top_k", "top_p", "dtype")}
        settings |= {"tokenizer": data.file_digest(paths[0]), "ar": data.file_digest(paths[1])}
        path, what = paint_npz(model, tokenizer, args, device, settings), f"{args.num_images} pictures"
    else:
        ids = [class_id(word, model) for word in args.classes]
        path = paint_grid(model, tokenizer, ids, args, device)
        what = ", ".join(f"{k} ({model.classes[k]})" if model.classes else str(k) for k in ids[:8])
    if rank == 0:
        print(f"painted {what} with {paths[1]}: {path}")


if __name__ == "__main__":
    data.run(main)
