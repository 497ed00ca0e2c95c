"""Paint pictures of the classes you name.

    python sample.py --class 207         # with out/tokenizer.pt and out/ar.pt, else with the demo in weights/
    python sample.py --class 207 --n 1 --paint painting.gif      # token by token
    python sample.py --image photo.png --keep 0.5 --n 8  # keeps the first half of its tokens, paints the rest
    python sample.py --reconstruct photos/ --png grid.png        # what the tokenizer makes of pictures
    torchrun --nproc_per_node=8 sample.py --npz samples.npz --num-images 50000

On a CPU in float32, picture k of a command follows from (seed, k) alone, whatever the batches and ranks.
"""
import argparse
import hashlib
import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
from ar_model import image_uniforms, load_ar
from data import InputError
from fid import Folder, psnr
from tokenizer import load_tokenizer

DEMO = Path(__file__).resolve().parent / "weights"
UNPAINTED = 0.85                 # grey
SAMPLING = ("cfg_scale", "cfg_power", "temperature", "top_k")      # arguments of ARModel.generate

def find_models(args):
    """Paths of tokenizer and AR model: as given, or in --out, or the demo's if nothing is given or there."""
    folder, given = args.out, args.tokenizer or args.ar
    if folder == "out" and not given and not os.path.exists("out/tokenizer.pt"):
        data.say("no model in out/ yet: taking the demo model in weights/")
        folder = DEMO
    return args.tokenizer or f"{folder}/tokenizer.pt", args.ar or f"{folder}/ar.pt"

def class_id(word, model):
    """A class as the user names it, a number or a name -> its id. InputError when there is no such class."""
    names, word = model.classes or [], unicodedata.normalize("NFC", word)
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < model.config.num_classes:
        return int(word)
    raise InputError(f"no class {word!r}: ids go to {model.config.num_classes - 1}; --classes lists all")

# ---- Painting ------------------------------------------------------------------------------------

def paint(model, tokenizer, pictures, args, device, kept=None):
    """Paint this rank's share of `pictures`, a list of (number k, class id). kept: first tokens of each, or
    None. Yields, batch by batch, numbers (array), tokens (B, N) int64, images (B, 3, H, W) uint8."""
    spans = data.rank_spans(len(pictures), args.batch_size)
    compiled = args.compile and device.type == "cuda" and len(spans) >= 8    # ours
    for span in data.progress_bar(spans, "painting", args.batch_size):
        numbers, classes = np.transpose(pictures[span])
        uniforms = image_uniforms(args.seed, numbers, model.config.num_tokens)
        tokens = model.generate(torch.tensor(classes), uniforms, **args.sampling,
                                kept=None if kept is None else kept[numbers],
                                compiled=compiled and len(numbers) == args.batch_size)
        images = (tokenizer.decode(tokens) * 255).round().byte()
        yield numbers, tokens.cpu(), images.cpu()

def paint_all(model, tokenizer, ids, args, device, kept=None):
    """--n pictures of each of `ids` -> tokens (n, N) int64, images (n, 3, H, W) in [0, 1], on every rank."""
    size, pictures = tokenizer.config.image_size, list(enumerate(np.repeat(ids, args.n)))
    tokens = torch.zeros(len(pictures), tokenizer.config.num_tokens, dtype=torch.long)
    images = torch.zeros(len(pictures), 3, size, size, dtype=torch.uint8)
    for numbers, *painted in paint(model, tokenizer, pictures, args, device, kept):
        tokens[numbers], images[numbers] = painted
    if dist.is_initialized():                # every picture was painted by one rank and is zero on the others
        dist.all_reduce(tokens)
        dist.all_reduce(images)
    return tokens.to(device), images.to(device) / 255

def save_grid(images, columns, name, args):
    """Save pictures, `columns` a row, as --png or as `name` in --out; a picture a file if --png is a folder.
    Other seeds and sampling options than the defaults are part of the name. -> path"""
    name += "".join(f"_{option}{value}" for option, value in args.chosen.items())
    path = args.png or f"{args.out}/{name}.png"
    if path.endswith("/") or os.path.isdir(path):
        for k, image in enumerate(images):
            data.save_picture(f"{path}/{name}_{k:05d}.png", data.to_image(image))
    else:
        data.save_picture(path, data.grid_image(images, columns))
    return path

def paint_grid(model, tokenizer, ids, args, device):
    """A grid of --n pictures of each class of `ids`. -> path"""
    _, images = paint_all(model, tokenizer, ids, args, device)
    columns = args.n if len(ids) > 1 else round(args.n ** 0.5)
    return save_grid(images, columns, f"class_{'_'.join(map(str, ids[:8]))}", args)

def paint_npz(model, tokenizer, args, device, weights):
    """--num-images pictures in an .npz that ADM's evaluator reads (`arr_0`), classes in turn. They gather in
    a folder beside it, from where an interrupted run with the same settings goes on."""
    n, size, classes = args.num_images, tokenizer.config.image_size, model.config.num_classes
    if os.path.exists(args.npz):
        raise InputError(f"{args.npz} is there already; name another file or remove it")
    if n % classes:
        raise InputError(f"--num-images must be a multiple of {classes}, the number of classes; found {n}")
    settings = [n, args.seed, args.dtype, args.sampling, *map(data.file_digest, weights)]
    part = f"{args.npz}.{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"
    paths = [f"{part}/images.npy", f"{part}/done.npy"]
    lock = data.take_lock(part)
    if data.rank() == 0 and not os.path.exists(paths[1]):
        data.create_array(paths[0], np.uint8, (n, size, size, 3), 0)
        data.create_array(paths[1], np.uint8, (n,), 0)
    data.barrier()
    images, done = map(data.open_array, paths)
    pictures = [(int(k), int(k) % classes) for k in np.flatnonzero(done == 0)]
    data.barrier()                            # every rank has the same list before one of them shortens it
    for numbers, _, painted in paint(model, tokenizer, pictures, args, device):
        data.write_rows(images, numbers, painted.permute(0, 2, 3, 1).numpy())
        data.write_rows(done, numbers, np.ones(len(numbers)))                # its picture is on the disk
    data.barrier()
    if data.rank() == 0:
        images, done = map(data.open_array, paths)            # with what other hosts wrote
        if not done.all():
            raise InputError(f"{(done == 0).sum()} pictures are not on the disk in {paths[0]}; run again")
        data.replace_file(args.npz, lambda file: np.savez(file, arr_0=images))
        lock.close()
        shutil.rmtree(part, ignore_errors=True)
    return args.npz

# ---- Looking inside ------------------------------------------------------------------------------

def so_far(image, strip, tokenizer, known):
    """A picture of which the first `known` tokens are there, the rest is grey. image (B, 3, H, W), strip (B,
    3, p, P*p) of the causal decoder -> (B, 3, H + 2p, P*p), or without a strip (None) the image alone."""
    config = tokenizer.config
    g, p, P = config.grid, config.patch_size, config.prefix_tokens
    places = tokenizer.decoder.place.view(g, g)              # of the token that paints each patch, then pixel
    places = places.repeat_interleave(p, 0).repeat_interleave(p, 1)
    image = image.where(places < known, UNPAINTED)
    if not P:
        return image
    strip_places = torch.arange(P, device=image.device).repeat_interleave(p)
    strip = strip.where(strip_places < known, UNPAINTED)
    image = F.pad(image, (0, P * p - g * p, p, 0), value=UNPAINTED)          # a band between, and as wide
    return torch.cat([strip, image], 2)

def paint_gif(model, tokenizer, ids, args, device):
    """--paint: a grid appears token by token, as far as the causal decoder is sure. -> path"""
    config, columns = tokenizer.config, args.n if args.n > 1 else len(ids)
    tokens, finished = paint_all(model, tokenizer, ids, args, device)
    image, strip = tokenizer.decode_causal(tokens)
    frames = [data.grid_image(so_far(shown, strip, tokenizer, known), columns)
              for known, shown in enumerate([image] * (config.num_tokens + 1) + [finished])]
    durations = [60] * config.num_tokens + [600, 3000]                       # in ms
    film = dict(save_all=True, append_images=frames[1:], loop=0, duration=durations)
    data.replace_file(args.paint, lambda file: frames[0].save(file, "GIF", **film))
    return args.paint

def read_pictures(path, size, count):
    """An image file, or `count` of a folder or of the built-in validation pictures ("shapes"), evenly spread;
    centre-cropped: (B, 3, size, size) in [0, 1]. InputError when there are none."""
    pictures = data.Shapes("val", size) if path == "shapes" else Folder(path, size)
    if not len(pictures):
        raise InputError(f"no image or folder of images: {path}")
    images = [pictures.read(0, index)[0] for index in data.spread(len(pictures), count)]
    return torch.stack(images).float() / 255

def complete(model, tokenizer, ids, args, device):
    """--image: the AR model goes on from the first --keep of the tokens of --num-images pictures. -> path of
    a grid. A row is the original, what is kept of it (by the causal decoder), and --n completions."""
    config = tokenizer.config
    originals = read_pictures(args.image, config.image_size, args.num_images).to(device)
    tokens = tokenizer.encode(originals)
    kept = round(args.keep * config.num_tokens)
    if not ids:
        ids, args.sampling["cfg_scale"] = [model.config.num_classes], 1.0    # no class, nothing to guide to
    _, completed = paint_all(model, tokenizer, ids * len(originals), args, device,
                             tokens[:, :kept].repeat_interleave(args.n, 0))
    seen = so_far(*tokenizer.decode_causal(tokens), tokenizer, kept)
    seen = seen[..., -config.image_size:, :config.image_size]                # without the band of the prefix
    rows = torch.cat([originals[:, None], seen[:, None], completed.unflatten(0, (-1, args.n))], 1)
    return save_grid(rows.flatten(0, 1), args.n + 2, "completed", args)

def reconstruct(tokenizer, args, device):
    """--reconstruct: rows of original, stage 1 (if it is kept), stage 2; PSNR in dB. -> path of a grid"""
    originals = read_pictures(args.reconstruct, tokenizer.config.image_size, args.n).to(device)
    tokens = tokenizer.encode(originals)
    painted = {"final decoder": tokenizer.decode(tokens)}
    if tokenizer.decoder.causal or tokenizer.causal_decoder:
        painted = {"causal decoder": tokenizer.decode_causal(tokens)[0], **painted}
    for name, images in painted.items():
        scores = [f"{score:.1f} dB" for score in psnr(images, originals)]
        data.say(f"{name}: {', '.join(scores)}")
    rows = torch.stack([originals, *painted.values()], 1)
    return save_grid(rows.flatten(0, 1), 1 + len(painted), "reconstructed", args)

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--paint", metavar="GIF", help="with --class: show the grid appear token by token")
    task.add_argument("--image", metavar="PATH", help="go on from the first tokens of pictures (or 'shapes')")
    task.add_argument("--reconstruct", metavar="PATH", help="pictures, and what the decoders make of them")
    task.add_argument("--npz", help="paint equally many pictures of every class into this file, for fid.py")
    task.add_argument("--classes", dest="list_classes", action="store_true", help="list what the model knows")
    add = parser.add_argument
    add("--class", dest="classes", nargs="+", metavar="CLASS", default=[], help="ids or names; a name wins")
    add("--keep", type=data.from_0_to_1, default=0.5, help="with --image: share of its tokens to keep (0.5)")
    add("--num-images", type=data.positive, help="pictures in the .npz (50,000); rows of --image (8)")
    add("-n", "--n", type=data.positive, default=16,
        help="pictures of a class or to reconstruct, or completions of a picture (%(default)s)")
    add("--seed", **data.SEED)
    add("--cfg-scale", type=data.at_least_zero, help="guidance at the last token; 1 is none (the model's)")
    add("--cfg-power", type=data.at_least_zero, help="above 1 guidance comes late (the model's)")
    add("--temperature", type=data.at_least_zero, help="0 takes the likeliest token (the model's)")
    add("--top-k", type=data.positive, help="draw from the k likeliest tokens")
    add("--batch-size", type=data.positive, default=16, help="(%(default)s)")
    add("--out", default="out", help="folder with tokenizer.pt and ar.pt (%(default)s)")
    add("--tokenizer", help="tokenizer checkpoint (in --out; the demo's, if none is given or there)")
    add("--ar", help="AR checkpoint (likewise)")
    add("--png", help="file of a grid (default: in --out, after what it shows), or folder of single pictures")
    data.add_device_arguments(parser)
    parser.set_defaults(dtype="float32")      # guidance magnifies the rounding of bfloat16
    args = parser.parse_args()
    args.sampling = {name: vars(args)[name] for name in SAMPLING if vars(args)[name] is not None}
    args.chosen = args.sampling | ({"seed": args.seed} if args.seed else {})
    source = args.image or args.reconstruct
    if args.png and source and os.path.realpath(args.png) == os.path.realpath(source):
        parser.error("--png names the input; name another file")
    needs_class = not (args.npz or args.reconstruct or args.list_classes)
    if needs_class != bool(args.classes) and not args.image:
        parser.error("say what to paint: --class (alone, with --paint or with --image), or without a --class "
                     "one of --image, --reconstruct, --npz and --classes")
    if args.image and len(args.classes) > 1:
        parser.error("--image takes one --class at most")
    args.num_images = args.num_images or (50_000 if args.npz else 8)
    return args

def main():
    args = parse_args()
    device = data.start(args)
    torch.backends.cuda.matmul.allow_tf32 = True              # as the authors sample
    weights = find_models(args)
    tokenizer = data.pack_linears(load_tokenizer(weights[0], device))
    if args.paint or args.image:
        tokenizer.stage1_decoder()            # refuses before the work
    if args.reconstruct:
        path = reconstruct(tokenizer, args, device)
        return data.say(f"painted {args.reconstruct} with {weights[0]}: {path}")
    model = load_ar(weights[1], device, tokenizer.config.grid, tokenizer.config.prefix_tokens)
    if (model.config.codebook_size != tokenizer.config.codebook_size
            or model.tokenizer not in (None, tokenizer.fingerprint())):
        raise InputError(f"{weights[1]} was trained on the tokens of another tokenizer than {weights[0]}")
    model.blocks.to(getattr(torch, args.dtype))
    data.pack_linears(model)
    if args.list_classes:
        names = model.classes or [""] * model.config.num_classes
        return data.say("\n".join(f"{label} {name}" for label, name in enumerate(names)))
    ids = [class_id(word, model) for word in args.classes]
    subject = ", ".join(f"{k} ({model.classes[k]})" if model.classes else str(k) for k in ids[:8])
    if args.npz:
        path, subject = paint_npz(model, tokenizer, args, device, weights), f"{args.num_images} pictures"
    elif args.image:
        path, subject = complete(model, tokenizer, ids, args, device), args.image
    elif args.paint:
        path = paint_gif(model, tokenizer, ids, args, device)
    else:
        path = paint_grid(model, tokenizer, ids, args, device)
    data.say(f"painted {subject} with {weights[1]}: {path}")

if __name__ == "__main__":
    data.run(main)
