"""Paint pictures of the classes you name.

    python sample.py --class 207                    # with out/tokenizer.pt and out/ar.pt, else with the demo in weights/
    python sample.py --class tench 12 --n 8 --seed 3 --cfg-scale 4
    python sample.py --class 207 --n 1 --paint painting.gif      # token by token
    python sample.py --image photo.png --keep 0.5 --n 8          # the first half of its tokens is kept, the rest painted anew
    python sample.py --reconstruct photos/ --out grid.png        # what the tokenizer makes of pictures
    torchrun --nproc_per_node=8 sample.py --npz samples.npz --num-images 50000

Picture k of a command is a function of (seed, k) alone: neither the batch size nor the number of ranks changes it.
"""
import argparse
import copy
import json
import os
import shutil
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import fid
from ar_model import PRESETS, ARConfig, ARModel, image_uniforms, load_ar, rotate
from data import InputError
from tokenizer import load_causal_decoder, load_tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))


def find_weights(args):
    """Paths of tokenizer and AR model: as given, else the trained pair in --out, else the demo pair that comes along."""
    wanted = {"tokenizer.pt": args.tokenizer, **({} if args.reconstruct else {"ar.pt": args.ar})}
    missing = [name for name, given in wanted.items() if not given and not os.path.exists(os.path.join(args.out, name))]
    if missing and (args.out != "out" or len(missing) < len(wanted)):
        raise InputError(f"no {' and no '.join(missing)} in {args.out}: train_tokenizer.py and train_ar.py write them; or name files "
                         "with --tokenizer and --ar")
    if missing and data.rank_and_count()[0] == 0:
        print(f"no {' and no '.join(missing)} in {args.out}: taking the demo model in weights/", file=sys.stderr)
    folder = os.path.join(HERE, "weights") if missing else args.out
    return args.tokenizer or os.path.join(folder, "tokenizer.pt"), args.ar or os.path.join(folder, "ar.pt")


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


def paint(model, tokenizer, pictures, args, device, kept=None):
    """Paint this rank's share of `pictures`, a list of (number k, class id), batch by batch. kept: (B, K) first tokens of each.

    Yields numbers (list), tokens (B, N) int64 and images (B, 3, H, W) uint8 on the CPU, a GPU being at the next batch already.
    """
    rank, ranks = data.rank_and_count()
    share = -(-len(pictures) // ranks)
    mine = pictures[rank * share:(rank + 1) * share]          # in one piece, so that ranks write to different pages of a file
    progress = tqdm(total=len(pictures), desc="painting", unit="img", disable=rank > 0)
    on_gpu, in_flight = device.type == "cuda", []
    for at in range(0, len(mine), args.batch_size):
        numbers, classes = zip(*mine[at:at + args.batch_size])
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            tokens = model.generate(torch.tensor(classes), image_uniforms(args.seed, numbers, model.config.num_tokens),
                                    args.cfg_scale, args.cfg_power, args.temperature, args.top_k, args.top_p,
                                    None if kept is None else kept[list(numbers)],
                                    on_gpu and len(numbers) == args.batch_size and not args.no_compile)
            images = (tokenizer.decode(tokens) * 255).round().byte()
        copies = (list(numbers), *(x.to("cpu", non_blocking=on_gpu) for x in (tokens, images)))
        launched = (torch.cuda.current_stream().record_event() if on_gpu else None, copies)
        yield from map(wait_for_copies, in_flight if on_gpu else [launched])
        in_flight = [launched] if on_gpu else []
        progress.update(min(len(numbers) * ranks, len(pictures) - progress.n))
    yield from map(wait_for_copies, in_flight)
    progress.close()


def wait_for_copies(batch):
    """batch: the event that follows the copies to the CPU, or None, and the copies -> these, once they are whole."""
    event, copies = batch
    if event:
        event.synchronize()
    return copies


def paint_grid(model, tokenizer, ids, args, device):
    """--n pictures of each class in `ids`: one PNG grid. -> its path."""
    size = tokenizer.config.image_size
    pictures = [(k, label) for k, label in enumerate(label for label in ids for _ in range(args.n))]
    images = torch.zeros(len(pictures), 3, size, size, dtype=torch.uint8)
    for numbers, _, painted in paint(model, tokenizer, pictures, args, device):
        images[numbers] = painted
    if dist.is_initialized():                 # every picture was painted by one rank and is zero on the others
        dist.all_reduce(images)
    path = args.png or os.path.join(args.out, f"class_{'_'.join(map(str, ids[:8]))}.png")
    if data.rank_and_count()[0] == 0:
        data.save_grid(path, images / 255, args.n if len(ids) > 1 else max(1, round(args.n ** 0.5)))
    return path


# -----------------------------------------------------------------------------
# Looking inside

UNPAINTED = 0.85                 # grey


def patch_order(config, device):
    """The token that paints each pixel: (H, W)."""
    order = torch.arange(config.prefix_tokens, config.num_tokens, device=device).view(config.grid, config.grid)
    return order.repeat_interleave(config.patch_size, 0).repeat_interleave(config.patch_size, 1)


def so_far(image, strip, config, painted):
    """A picture of which the first `painted` tokens are known: the prefix strip in a band of its own over the image.

    image (B, 3, H, W) and strip (B, 3, p, (g+1)*p), of the causal decoder -> (B, 3, H + 2p, W + p); the rest is grey.
    Without prefix tokens strip is None and there is no such band: (B, 3, H, W).
    """
    g, p, P = config.grid, config.patch_size, config.prefix_tokens
    image = image.where(patch_order(config, image.device) < painted, UNPAINTED)
    if not P:
        return image
    canvas = torch.full((len(image), 3, g * p + 2 * p, P * p), UNPAINTED, device=image.device)
    strip_order = torch.arange(P, device=image.device).repeat_interleave(p).expand(p, -1)
    canvas[..., :p, :] = strip.where(strip_order < painted, UNPAINTED)
    canvas[..., 2 * p:, :g * p] = image
    return canvas


def paint_gif(model, tokenizer, causal, ids, args, device):
    """--paint: the pictures of a grid appearing token by token, as far as the causal decoder is sure; last, the finished ones."""
    pictures = [(k, label) for k, label in enumerate(label for label in ids for _ in range(args.n))]
    parts = list(paint(model, tokenizer, pictures, args, device))
    tokens, finished = torch.cat([part[1] for part in parts]).to(device), torch.cat([part[2] for part in parts])
    with torch.no_grad():
        image, strip = causal.decoder(F.embedding(tokens, causal.quantizer.codebook))
    frames = [so_far(image, strip, causal.config, k) for k in range(causal.config.num_tokens + 1)]
    frames.append(so_far(finished.to(device) / 255, strip, causal.config, causal.config.num_tokens))
    columns = args.n if args.n > 1 else len(ids)
    zoom = max(1, 256 // causal.config.image_size // columns)
    sheets = [data.grid_image(frame.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), columns) for frame in frames]
    data.replace_file(args.paint, lambda file: sheets[0].save(file, "GIF", save_all=True, append_images=sheets[1:], loop=0,
                                                             duration=[60] * (len(sheets) - 2) + [600, 3000]))
    return args.paint


def read_pictures(path, size, count):
    """An image file, the first `count` of a folder, or of the built-in validation pictures ("shapes"), centre-cropped:
    (B, 3, size, size) in [0, 1]. InputError when there are none."""
    if path == "shapes":
        shapes = data.Shapes("val", size, 0, 1000)
        images = [shapes.read(0, index)[0] for index in data.spread(1000, count)]
    else:
        paths = fid.Folder(path).paths[:count] if os.path.isdir(path) else [path] * os.path.isfile(path)
        images = [data.to_tensor(data.centre_crop(data.read_image(name), size)) for name in paths]
    if not images:
        raise InputError(f"no images in {path}" if os.path.isdir(path) else f"no such image or folder: {path}")
    return torch.stack(images).float() / 255


def complete(model, tokenizer, causal, ids, args, device):
    """--image: the AR model goes on from the first --keep of the tokens of a picture, or of --num-images pictures. A grid, a row
    a picture: the original, what is kept of it (as the causal decoder paints it), and --n completions."""
    config = tokenizer.config
    originals = read_pictures(args.image, config.image_size, args.num_images).to(device)
    tokens = tokenizer.encode(originals)
    kept = round(args.keep * config.num_tokens)
    label = ids[0] if ids else model.config.num_classes
    if not ids:
        args.cfg_scale = 1.0                  # without a class there is nothing to guide to
    pictures = [(k, label) for k in range(len(originals) * args.n)]
    parts = [part[2] for part in paint(model, tokenizer, pictures, args, device, tokens[:, :kept].repeat_interleave(args.n, 0))]
    completed = torch.cat(parts).to(device).view(len(originals), args.n, 3, config.image_size, config.image_size) / 255
    with torch.no_grad():
        image, strip = causal.decoder(F.embedding(tokens, causal.quantizer.codebook))
    if kept < config.num_tokens:
        hidden = patch_order(config, device) >= kept
        pairs = ((completed, originals[:, None]), (tokenizer.decode(tokens), originals))
        mse = ((a - b)[..., hidden].square().flatten(1).mean(1).clamp_min(1e-10) for a, b in pairs)          # of each picture
        found, best = (-10 * values.log10().mean().item() for values in mse)
        print(f"hidden part, against the original: completions {found:.2f} dB PSNR, reconstruction from all tokens {best:.2f} dB")
    seen = so_far(image, strip, config, kept)[..., -config.image_size:, :config.image_size]
    path = args.png or os.path.join(args.out, "completed.png")
    data.save_grid(path, torch.cat([originals[:, None], seen[:, None], completed], 1).flatten(0, 1), args.n + 2)
    return path


def reconstruct(tokenizer, causal, args, device):
    """--reconstruct: original, stage-1 and stage-2 reconstruction of -n pictures, see `read_pictures`, with PSNR in dB below."""
    size = tokenizer.config.image_size
    originals = read_pictures(args.reconstruct, size, args.n).to(device)
    tokens = tokenizer.encode(originals)
    columns = [originals, causal.decode(tokens), tokenizer.decode(tokens)]
    cell, line = max(size, 64), 16
    sheet = Image.new("RGB", (3 * (cell + 4), len(originals) * (size + line + 2) + line), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, (name, images) in enumerate(zip(("original", "stage 1", "stage 2"), columns)):
        left = column * (cell + 4) + 2
        pen.text((left, 1), name, "black", font)
        for row, (image, value) in enumerate(zip(images, fid.psnr(images, originals).tolist())):
            top = row * (size + line + 2) + line
            sheet.paste(data.to_picture(image), (left, top))
            pen.text((left, top + size + 1), f"{value:.1f} dB" if column else "", "black", font)
    path = args.png or os.path.join(args.out, "reconstructed.png")
    data.replace_file(path, lambda file: sheet.save(file, "PNG"))
    return path


# -----------------------------------------------------------------------------

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
        data.make_folder(part)
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
        if not done.all():
            raise InputError(f"{(done == 0).sum()} pictures did not arrive in {part}; run this again")
        data.replace_file(args.npz, lambda file: np.savez(file, arr_0=images))
        shutil.rmtree(part)
    return args.npz


# -----------------------------------------------------------------------------
# Benchmark

def grown_by_concatenation(model, ids, t, caches):
    """`ARModel.step` as it is usually written, for comparison: the cache of a block is a list [keys, values] that grows."""
    x, table = model.embeddings(ids)[:, None], model.table[:, t:t + 1]
    for block, cache in zip(model.blocks, caches):
        a, h = block.attn, block.norm1(x)
        q, k, v = a.qkv(h).view(len(ids), 1, 3, a.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(a.q_norm(q), table), rotate(a.k_norm(k), table)
        cache[:] = [torch.cat([old, new], 2) for old, new in zip(cache, (k, v))]
        h = F.scaled_dot_product_attention(q, *cache).transpose(1, 2).reshape(x.shape)
        x = x + a.proj(h)
        x = x + block.mlp(block.norm2(x))
    return model.output(model.norm(x))[:, 0]


@torch.no_grad()
def benchmark(model, batches, args, device):
    """Milliseconds a token, guidance included, of three ways to paint, beside the floor: what reading the weights and the cache at
    the measured bandwidth, or the operations at the measured matrix rate, takes at least. A table, and the same as JSON.

    Timed at the start, the middle and the end of a picture; the full forward, whose time grows with it, in the middle.
    """
    config, N, low = model.config, model.config.num_tokens, getattr(torch, args.dtype)
    plain = copy.deepcopy(model)
    if args.dtype == "bfloat16":
        model.halve()

    def seconds(call, *items):
        call(items[0])
        data.wait_for(device)
        began = time.perf_counter()
        for item in items:
            call(item)
        data.wait_for(device)
        return (time.perf_counter() - began) / len(items)

    large = torch.ones(4096, 32768, device=device)
    bandwidth = large.nbytes / seconds(lambda _: large @ large[0], *range(4))
    rate, rows = data.matrix_rate(device, args.dtype), []
    for B in batches:
        ids = torch.zeros(2 * B, dtype=torch.long, device=device)
        places = [t for part in (0, N // 2 - 2, N - 4) for t in range(part, part + 4)]
        cache = torch.zeros(config.depth, 2, 2 * B, config.heads, 1 + N, config.width // config.heads, device=device, dtype=low)
        uniforms, strength = torch.zeros(B, device=device, dtype=torch.float64), torch.tensor(2.0, device=device)
        on_gpu = device.type == "cuda" and not args.no_compile
        step, at = (model.compiled_next_tokens if on_gpu else model.next_tokens), torch.arange(N, device=device)

        def default(t):
            with torch.autocast(device.type, low, enabled=low != torch.float32):
                step(ids, at[t:t + 1] if on_gpu else t, cache, uniforms, strength, 1.0, None, None)

        def growing(t):
            grown = [[part[:, :, :t].float() for part in block] for block in cache]
            data.wait_for(device)
            began = time.perf_counter()
            grown_by_concatenation(plain, ids, t, grown)
            data.wait_for(device)
            return time.perf_counter() - began

        tokens = torch.zeros(2 * B, N // 2, dtype=torch.long, device=device)
        naive = seconds(lambda _: plain(tokens, ids), 0)
        growing(0)
        cached = sum(map(growing, places)) / len(places)
        fast = seconds(default, *places)
        peak = data.peak_memory(device)
        matrices = sum(p.numel() for block in model.blocks for p in block.parameters())
        bytes_read = matrices * low.itemsize + model.output.weight.nbytes + cache.nbytes / 2
        floor = max(bytes_read / bandwidth, 4 * B * (matrices + model.output.weight.numel()) / rate)
        rows.append({"batch": B, "full_forward_ms": naive * 1e3, "concatenated_cache_ms": cached * 1e3, "default_ms": fast * 1e3,
                     "speedup_over_concatenated": cached / fast, "images_per_s": B / (fast * N), "floor_ms": floor * 1e3,
                     "times_floor": fast / floor, "peak_memory_gb": peak / 1e9})
    print("  ".join(rows[0]))
    for row in rows:
        print("  ".join(f"{value:>{len(name)}.{0 if name == 'batch' else 2}f}" for name, value in row.items()))
    print(json.dumps({"dtype": args.dtype, "bandwidth_gb_per_s": bandwidth / 1e9, "matrix_tflops_per_s": rate / 1e12, "rows": rows}))


# -----------------------------------------------------------------------------

SMALL = 30_000_000               # parameters: below, a CPU is not bound by reading them, and bfloat16 gains nothing
LEAST = {"n": 1, "num_images": 1, "batch_size": 1, "top_k": 1,
         "seed": 0, "cfg_scale": 0, "cfg_power": 0, "temperature": 0, "top_p": 0}


def check(args):
    """InputError for what can't be painted, before anything is loaded."""
    if args.out.endswith(".png"):             # where the grid goes, too
        args.png, args.out = args.out, "out"
    if args.benchmark:
        return
    given = [name for name in ("npz", "reconstruct", "image", "classes") if getattr(args, name)]
    if not given or len(given) > 1 and given != ["image", "classes"] or args.paint and given != ["classes"]:
        raise InputError("say what to paint: --class (and --paint, to see it appear), --image (with or without one --class), "
                         f"--reconstruct or --npz; found {' and '.join(given).replace('classes', 'class') or 'none of them'}")
    for flag, path, suffix in (("png", args.png, ".png"), ("paint", args.paint, ".gif"), ("npz", args.npz, ".npz")):
        if path and not path.lower().endswith(suffix):
            raise InputError(f"--{flag} names a {suffix} file, found {path}")
    if args.keep is not None and not args.image:
        raise InputError("--keep goes with --image")
    args.keep = 0.5 if args.keep is None else args.keep
    if args.image and len(args.classes) > 1 or not 0 <= args.keep <= 1:
        raise InputError(f"--image takes one --class at most and --keep from 0 to 1, found {len(args.classes)} and {args.keep}")
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value < np.inf:
            raise InputError(f"--{name.replace('_', '-')} is at least {least}, found {value}")
    args.num_images = args.num_images or (50_000 if args.npz else 8)
    if args.top_p is not None and args.top_p > 1:
        raise InputError(f"--top-p is at most 1, found {args.top_p}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--class", dest="classes", nargs="+", metavar="CLASS", default=[], help="paint a grid of these, numbers "
                        "or names")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--paint", metavar="GIF", help="with --class: show the grid appear token by token")
    what.add_argument("--image", help="go on from the first tokens of this picture, of a folder's, or of the built-in ones "
                      "('shapes'); with or without a --class")
    what.add_argument("--reconstruct", metavar="PATH", help="original, stage-1 and stage-2 reconstructions of its images, or of "
                      "one image, or of 'shapes'")
    what.add_argument("--benchmark", metavar="MODEL", help="time the AR model of a file, or a preset with random weights: "
                      f"{', '.join(PRESETS)}")
    what.add_argument("--npz", help="paint equally many pictures of every class into this file, for fid.py and ADM's evaluator")
    parser.add_argument("--keep", type=float, help="with --image: share of its tokens to keep (0.5)")
    parser.add_argument("--num-images", type=int, help="pictures in the .npz, over all classes (default: 50,000); rows of --image (8)")
    parser.add_argument("-n", "--n", type=int, default=16, help="pictures of each class, completions of --image, pictures to --reconstruct; "
                        "torchrun lets only -n through")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg-scale", type=float, help="guidance at the last token; 1 is none (default: the model's)")
    parser.add_argument("--cfg-power", type=float, help="above 1 guidance comes late, below early (default: the model's)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the fewest tokens whose probabilities reach p")
    parser.add_argument("--batch-size", type=int, help="default: 16; --benchmark measures 1, 16 and 64")
    parser.add_argument("--out", default="out", help="folder with tokenizer.pt and ar.pt")
    parser.add_argument("--tokenizer", help="tokenizer checkpoint (default: the one in --out, else in weights/)")
    parser.add_argument("--ar", help="AR checkpoint (default: likewise)")
    parser.add_argument("--png", help="the grid's file name (default: in --out, class_<class>.png, completed.png or reconstructed.png)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="of the matrix work; auto is bfloat16 where the hardware has it and the model is large; float32 is the reference")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile on a GPU")
    args = parser.parse_args()
    check(args)
    rank, ranks, device = data.start_ranks(args.device)
    if ranks > 1 and (args.paint or args.image or args.reconstruct):
        raise InputError("--paint, --image and --reconstruct are for a single process: run them without torchrun")
    if args.benchmark:
        model = (ARModel(ARConfig(**PRESETS[args.benchmark])) if args.benchmark in PRESETS else load_ar(args.benchmark)).eval()
        args.dtype = data.pick_dtype(args.dtype, device)
        return benchmark(model.to(device), [args.batch_size] if args.batch_size else [1, 16, 64], args, device)
    args.batch_size = args.batch_size or 16
    paths = find_weights(args)
    tokenizer = load_tokenizer(paths[0], device)
    causal = load_causal_decoder(paths[0], device) if args.paint or args.image or args.reconstruct else None
    if args.reconstruct:
        print(f"reconstructed {args.reconstruct} with {paths[0]}: {reconstruct(tokenizer, causal, args, device)}")
        return
    model = load_ar(paths[1], device, tokenizer.config.grid)
    if args.dtype == "auto" and device.type == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL:
        args.dtype = "float32"
    args.dtype = data.pick_dtype(args.dtype, device)
    if args.dtype == "bfloat16":
        model.halve()
    if any(getattr(model.config, name) != getattr(tokenizer.config, name) for name in ("codebook_size", "grid", "prefix")) or (
            model.tokenizer and model.tokenizer != tokenizer.fingerprint()):
        raise InputError(f"{paths[1]} was trained on the tokens of another tokenizer than {paths[0]}")
    ids = [class_id(word, model) for word in args.classes]
    what = ", ".join(f"{k} ({model.classes[k]})" if model.classes else str(k) for k in ids[:8])
    if args.npz:
        settings = {name: getattr(args, name) for name in ("num_images", "seed", "cfg_scale", "cfg_power", "temperature",
                                                           "top_k", "top_p", "dtype")}
        settings |= {"tokenizer": data.file_digest(paths[0]), "ar": data.file_digest(paths[1])}
        path, what = paint_npz(model, tokenizer, args, device, settings), f"{args.num_images} pictures"
    elif args.image:
        path, what = complete(model, tokenizer, causal, ids, args, device), f"{args.n} ways to go on from {args.image}"
    elif args.paint:
        path = paint_gif(model, tokenizer, causal, ids, args, device)
    else:
        path = paint_grid(model, tokenizer, ids, args, device)
    if rank == 0:
        print(f"painted {what} with {paths[1]}: {path}")


if __name__ == "__main__":
    data.run(main)
