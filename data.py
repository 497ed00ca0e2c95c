"""First half: pictures, batches, the token cache. Then what both models need, and what every run needs.

Notable:
- A built-in data set, `shapes`, needs no download: drawn pictures, each a function of (seed, split, index).
- Every random choice follows from (seed, epoch, index): workers, ranks, resumed runs see the same pictures.
- The token cache is one memory-mapped array. Rows not written yet hold what is no token.
"""
import argparse
import collections
import contextlib
import ctypes
import datetime
import fcntl
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageOps, PngImagePlugin
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

class InputError(ValueError):
    """Something the user gave is wrong. The message says what was found and what to do."""

def generator(stream, *ids):
    """A numpy Generator that follows from the name of its use and some non-negative integers alone."""
    return np.random.default_rng([zlib.crc32(stream.encode()), *ids])

def generation_order(grid):
    """Row * grid + column of the patch of each image token: (grid * grid,). All code follows this order."""
    return torch.arange(grid ** 2)

# ---- Built-in pictures. The digits of a class are shape, colour, background. ---------------------

SHAPES = "circle square triangle star cross ring crescent heart bar hourglass".split()
COLOURS = dict(pair.split("=") for pair in (
    "red=#d62828 orange=#f58714 yellow=#fad732 green=#28963c cyan=#28cdd7 "
    "blue=#2850d7 purple=#8232b9 pink=#fa6eb4 brown=#7d4b23 white=#fafafa").split())
BACKGROUNDS = dict(pair.split("=") for pair in (
    "night=#121428 slate=#5f6978 fog=#bec2c6 sand=#e0ca9b mint=#aae2c0 "
    "sky=#a0ccf2 lavender=#cab6ec rose=#f2c8c8 forest=#18422e wine=#581630").split())
COMBINATIONS = list(itertools.product(SHAPES, COLOURS, BACKGROUNDS))
SHAPE_CLASSES = [f"{colour} {shape} on {background}" for shape, colour, background in COMBINATIONS]

def signed_distance(shape, x, y):
    """Distance to the outline of a shape about one unit in radius, negative inside. x, y: arrays, y down."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.85
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.75
    if shape == "triangle":
        return np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.5
    if shape == "star":                       # fold the plane into half a point, then one straight edge
        angle = np.arctan2(x, -y) % (2 * math.pi / 5)
        angle = np.minimum(angle, 2 * math.pi / 5 - angle)
        px, py = r * np.cos(angle) - 1.0, r * np.sin(angle)
        ex, ey = 0.42 * math.cos(math.pi / 5) - 1.0, 0.42 * math.sin(math.pi / 5)
        return (px * ey - py * ex) / math.hypot(ex, ey)
    if shape == "cross":
        return np.minimum(np.maximum(abs(x) - 0.9, abs(y) - 0.28), np.maximum(abs(x) - 0.28, abs(y) - 0.9))
    if shape == "ring":
        return abs(r - 0.68) - 0.2
    if shape == "crescent":
        return np.maximum(r - 0.9, 0.75 - np.hypot(x - 0.45, y))
    if shape == "heart":                      # a square on its corner, and a disc on each upper side
        u, v = (x + y) * 0.7071, (x - y) * 0.7071
        discs = np.minimum(np.hypot(u + 0.05, v - 0.58), np.hypot(u + 0.58, v - 0.05)) - 0.53
        return np.minimum(np.maximum(abs(u + 0.05), abs(v - 0.05)) - 0.53, discs)
    if shape == "bar":
        return np.maximum(abs(x) - 0.98, abs(y) - 0.3)
    if shape == "hourglass":
        return np.maximum(abs(y) - 0.85, (abs(x) - 0.12 - 0.7 * abs(y)) / 1.22)
    raise ValueError(f"signed_distance does not know the shape {shape!r}")

def draw_shape(seed, split, index, size):
    """Picture `index` of a split of the built-in set, (size, size, 3) uint8, and its class; classes
    alternate. Position, size, rotation, tint and shading are random. Edges are antialiased."""
    label = index % len(SHAPE_CLASSES)
    shape, colour, background = COMBINATIONS[label]
    rng = generator("shapes " + split, seed, index)
    y, x = (np.mgrid[0:size, 0:size] + 0.5).astype(np.float32) / size - 0.5
    angle, radius = rng.uniform(-0.3, 0.3), rng.uniform(0.3, 0.4)
    cx, cy = rng.uniform(-0.08, 0.08, 2)
    tints = rng.uniform(-0.03, 0.03, (2, 3)).astype(np.float32)
    lights = rng.uniform(-0.15, 0.15, (2, 2))
    cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
    u, v = (x - cx) * cos + (y - cy) * sin, (y - cy) * cos - (x - cx) * sin
    cover = np.clip(0.5 - signed_distance(shape, u, v) * (radius * size), 0, 1)[..., None]

    def shaded(hue, tint, light):
        rgb = (np.array(ImageColor.getrgb(hue), np.float32) / 255 + tint).clip(0, 1)
        return rgb * (1 + light[0] * x + light[1] * y)[..., None]

    ground = shaded(BACKGROUNDS[background], tints[0], lights[0])
    paint = shaded(COLOURS[colour], tints[1], lights[1])
    return ((ground + (paint - ground) * cover).clip(0, 1) * 255 + 0.5).astype(np.uint8), label

class Shapes:
    """The built-in pictures as a data set. Every epoch draws new ones; a picture has one crop, itself."""
    classes, crops = SHAPE_CLASSES, 1

    def __init__(self, split, size, seed=0, length=None):
        self.split, self.size, self.seed, self.length = split, size, seed, length or len(SHAPE_CLASSES)
        self.labels = np.arange(self.length) % len(SHAPE_CLASSES)
        self.files = {f"{split} pictures": f"shapes of seed {seed}, {self.length}"}

    def __len__(self):
        return self.length

    def read(self, epoch, index):
        """-> (3, H, W) uint8 tensor, class."""
        image, label = draw_shape(self.seed, self.split, epoch * self.length + index, self.size)
        return to_tensor(image), label

    def read_crops(self, index):
        """-> (crops, 3, H, W) uint8: what the token cache keeps of a picture, and the picture's index."""
        return self.read(0, index)[0][None], index

# ---- Image folders -------------------------------------------------------------------------------

IMAGE_SUFFIXES = ".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .avif".split()
hidden = re.compile(r"[.@$]|__MACOSX").match  # names that are hidden, or a system's own
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28     # long comments harm no picture

def image_files(folder):
    """-> paths of all images below a folder, relative to it and sorted. Says how many there are, and what it
    left out. Links are followed, unless to a folder that they lie in. OSError where the system refuses."""
    def refuse(error):
        raise error

    root, paths, others = os.path.join(folder, ""), [], collections.Counter()
    for where, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders
                      if not hidden(name) and not is_inside(where, os.path.join(where, name))]
        for name in itertools.filterfalse(hidden, names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                paths.append(os.path.join(where, name)[len(root):])
            else:
                others[suffix or name] += 1
    groups = sorted({path.split(os.sep)[0] for path in paths if os.sep in path})
    left_out = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
    say(f"{folder}: {len(paths):,} pictures in {len(groups)} folders ({', '.join(groups[:3]) or 'one class'}"
        f"{', ...' * (len(groups) > 3)}); left out: {left_out or 'nothing'}", sys.stderr)
    return sorted(paths)

def is_inside(path, folder):
    """Whether a path is the folder or lies below it, links resolved."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())

def read_image(path, least=None):
    """Any image file as an upright RGB PIL image. 16-bit greys become 8-bit, transparency becomes white. A
    JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that leaves `least` pixels a side: it takes less time.
    InputError for what is no good image, OSError where the system refuses the file."""
    try:
        with Image.open(str(path)) as image:
            image.draft(None, least and (least, least))
            image.load()                                                     # its errors come only once
            with contextlib.suppress(Exception):                             # damaged notes, good pixels
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) / 257 + 0.5).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if max(image.size) > 100 * min(image.size):
                raise ValueError(f"{image.width}x{image.height} is too long and thin to crop")
            return image.convert("RGB")
    except Exception as error:                # Pillow's decoders raise a dozen kinds for a damaged file
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise                             # from the system: the image may be good
        raise InputError(f"{path} is not a readable image ({error}); remove or repair it") from None

def to_tensor(pixels):
    """(H, W, 3) array or PIL image -> (3, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1)))

def centre_crop(image, size):
    """PIL image -> (3, size, size) uint8, as ADM prepares ImageNet: box halvings, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    pixels = to_tensor(image.resize((width, height), Image.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[:, top:top + size, left:left + size]

def random_crop(image, size, rng):
    """PIL image -> (3, size, size) uint8: antialiased bilinear resize, random crop and flip."""
    width, height = (side * size // min(image.size) for side in image.size)
    pixels = to_tensor(image.resize((width, height), Image.BILINEAR))
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    cropped = pixels[:, top:top + size, left:left + size]
    return cropped.flip(-1) if rng.random() < 0.5 else cropped

def five_crops(image, size):
    """The paper's (5, 3, size, size) uint8 of a PIL image: corners and middle of a 1.1 times larger crop."""
    wide = int(1.1 * size)
    pixels, far, middle = centre_crop(image, wide), wide - size, (wide - size) // 2
    places = [*itertools.product((0, far), repeat=2), (middle, middle)]
    return torch.stack([pixels[:, top:top + size, left:left + size] for top, left in places])

class ImageFolder:
    """Pictures of one split. Training takes a random crop and flip, validation the centre. The token cache
    keeps the centre and its mirror image, or ten crops. paths: below `folder`; labels: class ids; arrays."""
    def __init__(self, split, folder, paths, labels, classes, size, args, ten_crop=False):
        self.training, self.folder, self.classes, self.size = split == "train", folder, classes, size
        self.skip_bad, self.seed, self.crops = args.skip_bad_images, args.seed, 10 if ten_crop else 2
        self.paths, self.labels, self.files = paths, labels, {}              # arrays, which workers share
        stamps = [[] for _ in classes]
        for path, label in zip(paths, labels):
            status = os.stat(f"{folder}/{path}")
            stamps[label].append(f"{path} {status.st_size} {status.st_mtime_ns}\n")
        for name, lines in zip(classes, stamps):
            digest = hashlib.sha256(os.fsencode("".join(lines))).hexdigest()
            self.files[f"{split} pictures of class {name}"] = f"{len(lines)}, names and times {digest[:8]}"

    def __len__(self):
        return len(self.paths)

    def open(self, index, least=None):
        """-> the picture at `index`, or with skip_bad the next readable one of its class, and its index."""
        same = np.flatnonzero(self.labels == self.labels[index]) if self.skip_bad else [index]
        for other in np.roll(same, -np.searchsorted(same, index)):
            try:
                return read_image(f"{self.folder}/{self.paths[other]}", least), other
            except InputError as error:
                if not self.skip_bad:
                    raise InputError(f"{error} and start anew, or add --skip-bad-images") from None
                warnings.warn(f"skipped: {error}")                           # once per picture
        raise InputError(f"no readable image of class {self.classes[self.labels[index]]} in {self.folder}")

    def read(self, epoch, index):
        least = 4 * self.size if self.training else None      # ours: after the resize it hardly shows
        (image, _), label = self.open(index, least), self.labels[index]
        if self.training:
            return random_crop(image, self.size, generator("crop", self.seed, epoch, index)), label
        return centre_crop(image, self.size), label

    def read_crops(self, index):
        """-> (crops, 3, H, W) uint8, and the index of the picture that they are of."""
        image, source = self.open(index)
        crops = five_crops(image, self.size) if self.crops == 10 else centre_crop(image, self.size)[None]
        return torch.cat([crops, crops.flip(-1)]), source

def list_folder(folder, args):
    """-> class names (sorted), paths below the folder, class ids. Without sub-folders it is one class."""
    for flag in ("out", "cache"):
        place = getattr(args, flag, None)
        if place and is_inside(place, folder):
            raise InputError(f"--{flag} {place} lies in {folder}, among the pictures; name a place outside")
    paths, folders = image_files(folder), [name for name in next(os.walk(folder))[1] if not hidden(name)]
    if folders:                               # what lies beside them has no class
        paths = [path for path in paths if os.sep in path]
    if not paths:
        raise InputError(f"no images in {folder}: it needs a sub-folder a class, such as {folder}/cats/1.jpg")
    names = [path.split(os.sep)[0] if folders else "pictures" for path in paths]
    for empty in {*folders} - {*names}:
        raise InputError(f"no images in {folder}/{empty}: each sub-folder is a class; convert or remove it")
    names = [unicodedata.normalize("NFC", name) for name in names]
    classes, labels = np.unique(names, return_inverse=True)
    if all(path.count(os.sep) > 1 for path in paths):
        say(f"note: every class in {folder} is a folder of folders. Is --data meant to name one of them?")
    return classes.tolist(), np.array(paths), labels

def open_data(args, size, ten_crop=False, labelled=True):
    """-> training and validation set of --data and --val-data, of pictures of size x size. Without a folder
    for validation every 20th image is held out, but never a class's only one. labelled: classes matter."""
    if args.data == "shapes":
        if args.val_data or ten_crop:
            raise InputError("--val-data and --ten-crop go with image folders, not with built-in pictures")
        return Shapes("train", size, args.seed, args.num_pictures), Shapes("val", size, args.seed)
    classes, *train = list_folder(args.data, args)
    if args.val_data:
        val_classes, *val = list_folder(args.val_data, args)
        odd = set(val_classes) ^ set(classes)
        if odd and (labelled or "pictures" not in odd):
            raise InputError(f"{args.val_data} has other classes than --data: only one has {sorted(odd)[:5]}")
    else:
        val_classes, (paths, labels) = classes, train
        not_alone = np.flatnonzero(np.bincount(labels)[labels] > 1)
        held_out = not_alone[not_alone % 20 == 19]
        if not len(held_out):
            held_out = not_alone[-1:]
        if not len(held_out):
            raise InputError(f"no class of {args.data} has two pictures, to hold one out; give --val-data")
        val = paths[held_out], labels[held_out]
        train = np.delete(paths, held_out), np.delete(labels, held_out)
    return (ImageFolder("train", args.data, *train, classes, size, args, ten_crop),
            ImageFolder("val", args.val_data or args.data, *val, val_classes, size, args))

# ---- Batches: an endless, shuffled stream that any step can be entered at. A key is (epoch, index).

@functools.lru_cache(maxsize=8)
def epoch_random(method, stream, seed, epoch, n):
    """n random values of a method of numpy's Generator, that follow from the other arguments."""
    return getattr(generator(stream, seed, epoch), method)(n)

def key_uniforms(stream, seed, keys, n):
    """A number in [0, 1) for each key, index < n, that follows from the key and the seed alone: (keys,)."""
    return np.array([epoch_random("random", stream, seed, epoch, n)[index] for epoch, index in keys])

def batch_keys(stream, n, args, start=0):
    """The keys of this rank's micro-batches, --accum a step, from step `start` on, without end."""
    micro = args.batch_size // (world_size() * args.accum)
    for step in itertools.count(start):
        for k in range(args.accum):
            first = step * args.batch_size + (rank() * args.accum + k) * micro
            places = (divmod(place, n) for place in range(first, first + micro))
            yield [(epoch, int(epoch_random("permutation", stream, args.seed, epoch, n)[place]))
                   for epoch, place in places]

def spread(n, count):
    """`count` indices, or all, spread over 0 ... n-1 at varying distances: equal ones would miss classes."""
    count = min(n, count)
    return [k * n // count + int(k * 0.618034 % 1 * (n // count)) for k in range(count)]

def rank_spans(count, size):
    """This rank's share of `count` places: slices of at most `size`, which the ranks take in turn."""
    return [slice(k, k + size) for k in range(rank() * size, count, world_size() * size)]

class Reader:
    """Reads batches of keys; an unreadable image travels as its error, so that workers can't bury it."""
    def __init__(self, read):
        self.read = read

    def __getitem__(self, keys):
        try:
            return default_collate([self.read(*key) for key in keys])
        except (InputError, OSError) as error:
            return error

def outlive_signals(worker):
    """A reading process goes on after a signal, ten minutes after SIGTERM: the trainer is to save first."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))

def batches(read, keys, workers=0):
    """Iterate over batches of read(*key), one for each list in `keys`, read by so many other processes."""
    loader = DataLoader(Reader(read), sampler=keys, batch_size=None, num_workers=workers,
                        worker_init_fn=outlive_signals, pin_memory=torch.cuda.is_available())
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch

def to_float(images, device):
    """(B, 3, H, W) uint8 -> float in [0, 1] on `device`."""
    return images.to(device, non_blocking=True).float() / 255

# ---- Token cache ---------------------------------------------------------------------------------

class TokenCache:
    """Tokens of a data set, (images, crops, N) in the memory-mapped `folder`/tokens.npy, and its labels. All
    ranks build what is missing; another run waits meanwhile. InputError for a cache of other things."""
    def __init__(self, folder, dataset, tokenizer, device, workers=0, batch_size=64):
        self.folder, self.path, note = folder, f"{folder}/tokens.npy", f"{folder}/cache.json"
        config, self.labels, self.files = tokenizer.config, dataset.labels, dataset.files
        self.codebook_size, shape = config.codebook_size, (len(dataset), dataset.crops, config.num_tokens)
        advice = f"delete {folder} to build it anew"
        settings = {"tokenizer": tokenizer.fingerprint(), "shape": list(shape), **dataset.files}
        lock = take_lock(folder, wait=True)
        if rank() == 0 and not os.path.exists(note):
            for other in set(os.listdir(folder)) - {"tokens.npy", ".lock"}:
                raise InputError(f"{folder} holds {other}; name an empty or new folder with --cache")
            dtype = np.uint16 if self.codebook_size < 2 ** 16 else np.uint32
            create_array(self.path, dtype, shape, self.codebook_size)        # which is no token
            replace_file(note, lambda file: file.write(json.dumps(settings, indent=1).encode()))
        barrier()
        try:
            with open(note) as file:
                saved = dict(json.load(file))
            self.tokens = open_array(self.path)
        except (ValueError, TypeError, EOFError, FileNotFoundError):
            raise InputError(f"the token cache is damaged; {advice}") from None
        refuse_changes(f"the token cache in {folder} was made for something else", saved, settings,
                       f"name the same --data and --val-data, or {advice}, or name another with --cache")
        if len(self.missing()):
            self.build(dataset, tokenizer, device, workers, batch_size)
        lock.close()

    def __len__(self):
        return len(self.tokens)

    def batch(self, keys, seed):
        """Keys -> tokens (B, N) int64, classes (B,) int64; each epoch draws one of an image's crops."""
        indices = [index for _, index in keys]
        crops = (key_uniforms("crop choice", seed, keys, len(self)) * self.tokens.shape[1]).astype(np.int64)
        tokens = self.tokens[indices, crops].astype(np.int64)
        batch = torch.from_numpy(tokens), torch.from_numpy(self.labels[indices])
        return [tensor.pin_memory() for tensor in batch] if torch.cuda.is_available() else batch

    def missing(self):
        """Indices of the images of which not all tokens are written, or some are damaged."""
        return np.flatnonzero(self.tokens.max((1, 2)) >= self.codebook_size)

    def build(self, dataset, tokenizer, device, workers, batch_size):
        """Encode the images whose tokens are missing, every rank its share."""
        missing, micro = self.missing(), max(1, batch_size // dataset.crops)
        barrier()                             # every rank has the same list before one of them shortens it
        rows = [missing[span] for span in rank_spans(len(missing), micro)]
        stream = batches(dataset.read_crops, [indices[:, None] for indices in rows], workers)
        for indices, (images, sources) in zip(progress_bar(rows, "tokens", micro), stream):
            with open(f"{self.folder}/stand_ins.txt", "a", errors="surrogateescape") as file:
                for index, source in zip(indices, sources.tolist()):
                    if index != source:
                        print(dataset.paths[source], "for", dataset.paths[index], file=file)
            ids = tokenizer.encode(to_float(images.flatten(0, 1), device))
            write_rows(self.tokens, indices, ids.unflatten(0, images.shape[:2]).cpu().numpy())
        barrier()
        self.tokens = open_array(self.path)   # with what other hosts wrote
        if len(self.missing()):
            raise InputError(f"not all rows of {self.path} are on the disk; run this again")

# ==== What both models need =======================================================================

def attention(q, k, v, mask=None, causal=False, dropout=0.0):
    """softmax(q k^T / sqrt(D)) v for q, k, v (B, H, T, D). On a CPU by definition, in float32, where that is
    faster than PyTorch's fused kernel: in training, and for one query on cached keys."""
    with torch.autocast(v.device.type, enabled=False):
        if v.device.type != "cpu" or not v.requires_grad and q.shape[2] > 1:
            return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, mask, dropout, causal)
        scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5              # (B, H, queries, keys)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
        return F.dropout(scores.softmax(-1), dropout) @ v.float()

class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU. Its weight lies as oneDNN reads it; `F.linear` would reorder it
    in every call. `state_dict` gives what the linear layer's would; such a model can't load or be copied."""
    def __init__(self, linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.to_dense()

def pack_linears(model):
    """For inference on a CPU: linear layers become `PackedLinear`, where oneDNN can do that. -> model"""
    if not torch.backends.mkldnn.is_available() or next(model.parameters()).device.type != "cpu":
        return model
    dtypes = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer.weight.dtype in dtypes:
            model.set_submodule(name, PackedLinear(layer))
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data = tensor.clone()          # now nothing holds the mapped file in memory any more
    return model

# ==== What every run needs ========================================================================

def outlive_reader(stream):
    """When whoever reads stdout or stderr has gone, as after Ctrl-C in `| tee log`, the run goes on."""
    write = stream.write
    with contextlib.suppress(AttributeError):
        stream.reconfigure(errors="backslashreplace")         # a class name may have letters it can't show

    def write_or_drop(text):
        try:
            write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    stream.write = write_or_drop

HINTS = {"out of memory": "give a smaller --batch-size; when training, a larger --accum or --grad-checkpoint",
         "shared memory": "give --workers 0, or more shared memory (docker run --shm-size=8g)",
         "Too many open files": "raise the limit with `ulimit -n 65536`, or give fewer --workers"}

def run(main):
    """Call main() as a command. Exit codes: 2 with a line on stderr for an InputError or what the system
    refuses, 128 + the signal for a run that stopped and has saved, 1 with a traceback for our mistakes."""
    outlive_reader(sys.stdout)
    outlive_reader(sys.stderr)
    code = 0
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code
    except KeyboardInterrupt:
        code = 130
    except Exception as error:                # reported here, before Python waits for the reading processes
        expected = isinstance(error, (InputError, OSError))
        code, message = (2, f"error: {error}") if expected else (1, traceback.format_exc())
        message += "".join(f"\nhint: {hint}" for sign, hint in HINTS.items() if sign in str(error))
        tqdm.write(f"rank {rank()}: {message}" if world_size() > 1 else message, sys.stderr)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in multiprocessing.active_children():
            process.kill()
    if dist.is_initialized():
        if not code:
            barrier()
            time.sleep(0.5)                   # leaving at once can cut off what another rank has yet to read
        os._exit(code)                        # others may wait for a failed rank, and gloo may abort an exit
    sys.exit(code)

# ---- Command line --------------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, found {text}")
        return value

    parse.__name__ = kind.__name__            # argparse names it where kind(text) fails
    return parse

HelpFormatter = argparse.RawDescriptionHelpFormatter
positive, natural = number(int, 1), number(int, 0)
DEVICES = ["cuda"] * torch.cuda.is_available() + ["cpu"]
DEVICE = dict(choices=DEVICES, default=DEVICES[0], help="(%(default)s)")
SEED = dict(type=number(int, 0, 2 ** 63), default=0, help="of all random choices (%(default)s)")
WORKERS = dict(type=natural, default=8 if "cuda" in DEVICES else 0,
               help="reading processes per rank (%(default)s)")
above_zero, at_least_zero, from_0_to_1 = number(float, 1e-12), number(float, 0), number(float, 0, 1)

def preset_parser(doc, presets):
    """A parser of --preset, --init and --out, which are read first: they decide the other flags' defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, add_help=False)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--preset", choices=presets, default="tiny", help="shape of the model, and its recipe")
    shape.add_argument("--init", dest="init_from", metavar="FILE", help="fine-tune this checkpoint")
    parser.add_argument("--out", default="out", help="folder for checkpoints, log, pictures (%(default)s)")
    return parser

def add_run_arguments(parser):
    """The flags of both trainers. --batch-size, --lr, --warmup and --clip get defaults from the recipe."""
    add = parser.add_argument
    add("-h", "--help", action="help", help="show this and exit")
    add("--data", help="folder of pictures or of class folders, or 'shapes' (train_ar.py: the tokenizer's)")
    add("--val-data", help="validation folder; without it every 20th image of --data is held out")
    add("--resume", action="store_true", help="go on from the training state in --out")
    add("--batch-size", type=positive, help="images a step, over all ranks (%(default)s)")
    add("--accum", type=positive, default=1, help="micro-batches a step (%(default)s)")
    add("--lr", type=above_zero, help="its peak, in stage 1; stage 2's scales with it (%(default)s)")
    add("--warmup", type=natural, help="steps of linear warmup; fewer in short runs (%(default)s)")
    add("--clip", type=at_least_zero, help="largest gradient norm; 0 is no limit (%(default)s)")
    add("--seed", **SEED)
    add("--num-pictures", type=positive, default=50_000, help="of the built-in set (%(default)s)")
    add("--eval-every", type=positive, default=500, help="steps between evaluations (%(default)s)")
    add("--eval-images", type=positive, default=256, help="pictures an evaluation looks at (%(default)s)")
    add("--save-every", type=positive, default=500, help="steps between saves (%(default)s)")
    add("--workers", **WORKERS)
    add("--skip-bad-images", action="store_true", help="the next readable image replaces an unreadable one")
    add("--grad-checkpoint", action="store_true", help="save memory: compute activations twice")
    add_device_arguments(parser)

def add_device_arguments(parser):
    parser.add_argument("--device", **DEVICE)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="of the matrix work; auto: bfloat16 where hardware is fast at it (%(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="no torch.compile")

# What decides the result, so that a resumed run must not change it. The number of steps may change.
FIXED = "batch_size lr final_lr warmup clip seed dtype judged_by blend_between class_dropout ten_crop".split()
LOG_EVERY = 20                                # steps

def refuse_changes(message, saved, now, advice):
    """InputError that names the first values that differ between two dicts."""
    changed = [f"{name} {str(saved.get(name))[:60]}, now {str(now.get(name))[:60]}"
               for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
    if changed:
        raise InputError(f"{message} ({'; '.join(changed[:3])}); {advice}")

def refuse_overwrite(resume, state, *others):
    """InputError when a training would replace files of another: it must resume the state, or find none."""
    if not (resume and os.path.exists(state)):
        for path in filter(os.path.exists, (state, *others)):
            raise InputError(f"{path} is there already: --resume goes on from {state}, where there is one; "
                             "a new --out starts anew")

# ---- Ranks, devices, signals ---------------------------------------------------------------------

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def keep_memory():
    """Have glibc keep freed memory: to get it back from the system page by page slows down every step."""
    with contextlib.suppress(OSError, AttributeError):                       # there is no glibc elsewhere
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((-1, 2 ** 31 - 1), (-2, 2 ** 26), (-4, 0)):
            mallopt(parameter, value)         # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX

def start(args):
    """Join the ranks, if torchrun started them, and fill in --dtype. -> device"""
    keep_memory()
    device, on_gpu = torch.device(args.device), args.device == "cuda"
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        if on_gpu:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",  # gloo does not wait for the GPU
                                timeout=datetime.timedelta(days=1))          # for a rank's download, a lock
    parts = world_size() * args.accum if "accum" in args else 1
    if args.batch_size % parts:
        raise InputError(f"a batch of {args.batch_size} can't be shared evenly by {world_size()} ranks in "
                         f"{args.accum} micro-batches; choose --batch-size as a multiple of {parts}")
    if args.dtype == "auto":
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else
                torch.cpu.get_capabilities().get("avx512_bf16"))
        args.dtype = "bfloat16" if fast else "float32"
    return device

def over_ranks(values, operation=dist.ReduceOp.SUM):
    """A list of numbers, summed (or otherwise reduced) over ranks. Waits for the processes, not for GPUs."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor.tolist()

def barrier():
    over_ranks([0])

def mean_over_ranks(losses):
    """{name: number or tensor of one} -> the same as numbers, averaged over ranks."""
    totals = over_ranks([float(loss) for loss in losses.values()])
    return {name: total / world_size() for name, total in zip(losses, totals)}

def progress_bar(batches, name, batch_size, **options):
    """Rank 0's progress through its batches, in images."""
    return tqdm(batches, name, unit="img", unit_scale=batch_size, disable=rank() > 0, **options)

def say(text, file=None):
    """Print a line above the progress bar, once for all ranks."""
    if rank() == 0:
        tqdm.write(text, file)

STOP_SIGNALS = [signal.Signals[f"SIG{name}"] for name in "TERM INT HUP USR1 USR2 XCPU".split()]

class StopFlag:
    """Notes the first signal to stop (scheduler, Ctrl-C, a closed terminal), for the loop to save. A second
    one ends the process, unless it comes within a second: torchrun and the terminal may both deliver one."""
    def __init__(self):
        self.signal = self.noted = 0
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self.note)

    def note(self, number, frame):
        if not self.signal:
            self.signal, self.noted = number, time.monotonic()
            with contextlib.suppress(OSError):                # the screen may be gone
                os.write(2, b"\nstopping after this step; a second signal ends at once, without saving\n")
        elif time.monotonic() > self.noted + 1:
            os._exit(128 + number)

    def read(self, step):
        """The signal that any rank got, or 0. Several ranks tell each other when they log, not every step."""
        if world_size() > 1 and step % LOG_EVERY:
            return 0
        return int(over_ranks([self.signal], dist.ReduceOp.MAX)[0])

def leave(signal_number, step):
    """End a run that a signal has stopped, after it has saved."""
    say(f"stopped by signal {signal_number} at step {step}; --resume goes on from there")
    raise SystemExit(128 + signal_number)

# ---- Training ------------------------------------------------------------------------------------

def learning_rate(step, steps, warmup, peak, final):
    """Linear warmup to `peak`, then a cosine to `final`, which the step after the last would reach."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))

def distribute(model):
    """The model for training on several ranks, as it is on one."""
    ddp = nn.parallel.DistributedDataParallel
    return ddp(model, forward_sync_buffers=False) if world_size() > 1 else model

def compile_and_checkpoint(modules, steps, args, device):
    """--grad-checkpoint: keep nothing of what happens inside a block; the backward pass computes it again.
    torch.compile on a GPU, and on a CPU in runs long enough (ours) to win back the half minute it takes."""
    torch._dynamo.config.suppress_errors = device.type != "cuda"             # a CPU may have no compiler
    for module in modules:
        for block in module.blocks:
            vars(block).pop("forward", None)  # stage 1's: in stage 2 the encoder has no backward pass
            if args.grad_checkpoint and next(block.parameters()).requires_grad:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if args.compile and (device.type == "cuda" or steps >= 4000):
            module.compile()

def check_bad_steps(in_row):
    """InputError when ten steps in a row (ours) were skipped, because their gradient was not finite."""
    if in_row == 10:
        raise InputError("10 gradients in a row were not finite: --resume the last save, or lower --lr")

# ---- Files ---------------------------------------------------------------------------------------

def replace_file(path, write):
    """write(file) aside, sync, then rename: `path` holds the old content or the new, never half of one. Rank
    0 does it. InputError when it can't be written; the old content is then untouched."""
    if rank() > 0:
        return
    folder, aside = os.path.dirname(os.path.abspath(path)), f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        with contextlib.suppress(OSError):    # some file systems can't sync a folder
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    except (OSError, RuntimeError) as error:  # torch.save has a kind of its own for a full disk
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise InputError(f"can't write {path} ({error}); make room, or name another place") from None

def take_lock(folder, wait=False):
    """Make a folder and have it for this run, until the returned file is closed or the process ends. wait: if
    another run has it, wait for that; else InputError that names the other. Rests of killed runs go."""
    os.makedirs(folder, exist_ok=True)
    file = open(f"{folder}/.lock", "a+")
    if rank() == 0:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = f"{folder} is in use by {file.read()}"
            if not wait:
                raise InputError(f"{holder}; wait for it, or choose another folder") from None
            say(f"{holder}: waiting for it")
            fcntl.lockf(file, fcntl.LOCK_EX)
        file.truncate(0)
        print(f"process {os.getpid()} on {os.uname().nodename}", end="", file=file, flush=True)
        for path in Path(folder).glob("*.[0-9]*.tmp"):
            path.unlink()
    return file

def create_array(path, dtype, shape, fill):
    """A new .npy of one value. It takes its room on the disk now: a full disk says so here."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    write_rows(array, range(shape[0]), itertools.repeat(np.full(shape[1:], fill)))

open_array = functools.partial(np.load, mmap_mode="r", allow_pickle=False)

def write_rows(array, indices, rows):
    """Write rows of a memory-mapped .npy to its file. Through the map the system would write whole pages: on
    a page that two hosts share, one would bring old rows back over the other's new ones."""
    with open(array.filename, "r+b") as file:
        for index, row in zip(indices, rows):
            file.seek(array.offset + index * array.nbytes // len(array))
            file.write(row.astype(array.dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())

def file_digest(path):
    """The sha256 of a file in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def save_checkpoint(path, **content):
    """Write {"kind": "tokenizer" or "ar", "config": dict, "model": state dict, ...}. Other ranks wait."""
    replace_file(path, lambda file: torch.save(content, file))
    barrier()

def read_torch(path):
    """The dict in a file of torch's, on the CPU; no code in it runs. InputError for anything else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except Exception as error:                # pickle, zip and torch each have their own kinds
        raise InputError(f"{path} is damaged or incomplete, or loading it would run code; get it again "
                         f"({' '.join(str(error).split())[:300]})") from None
    return content

def load_checkpoint(path, kind, from_released=None):
    """-> the dict that `save_checkpoint` wrote. InputError for anything but a checkpoint of this kind.
    from_released: turns the weights in a file of the authors into such a dict. KeyError for others."""
    if not os.path.isfile(path):
        raise InputError(f"no such checkpoint: {path} (train_{kind}.py writes it)")
    content = read_torch(path)
    try:
        if from_released and "kind" not in content:
            for name in ("model_state", "model", "ema"):          # where training code keeps the weights
                content = content.get(name, content)
            weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): content[name] for name in content}
            return from_released(weights)
        if content["kind"] != kind:
            raise ValueError(f"kind '{content['kind']}'")
    except Exception as error:                # whatever a foreign file makes of it
        raise InputError(f"{path} does not fit: it is no checkpoint of kind '{kind}', nor a released one "
                         f"({error!r})") from None
    return content

def load_weights(model, state, path):
    """load_state_dict; InputError that lists the tensors that are missing, unexpected or of another shape."""
    try:                                      # on the device "meta" a model has none and takes these
        model.load_state_dict(state, assign=next(model.parameters()).is_meta)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit the model: {' '.join(str(error).split())[:1500]}") from None

def load_fitting(model, state):
    """Take over the tensors of a state dict that fit a model by name and shape; the others stay."""
    own = model.state_dict()
    fits = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    model.load_state_dict(fits, strict=False)

def load_training_state(path, kind, fixed, steps):
    """The state that --resume goes on from, or None. InputError if `fixed` differs, and beyond `steps`."""
    state = load_checkpoint(path, kind) if os.path.exists(path) else None
    step = state["step"] if state else 0
    if over_ranks([step])[0] != step * world_size():
        raise InputError(f"ranks see different contents in {path}; --out must be one folder for all of them")
    if state:
        refuse_changes(f"{path} was trained with other settings", state["fixed"], fixed,
                       "resume with the old ones, or start anew in another --out")
        if step > steps:
            raise InputError(f"{path} has done {step} steps, more than --steps {steps}; give {step} or more")
    else:
        say(f"no training state at {path} yet: starting at the first step")
    return state

class Log:
    """`log.jsonl`, a JSON object a line. Rank 0 writes. A resumed run drops its lines of later steps."""
    def __init__(self, path, run, step):
        self.path, self.run, kept = path, run, []
        if os.path.exists(path):
            with open(path, "rb") as file:
                lines = [line for line in file if line.strip() and line.endswith(b"\n")]
            kept = [line for line, entry in zip(lines, map(json.loads, lines))
                    if entry["run"] != run or entry["step"] <= step]
        replace_file(path, lambda file: file.writelines(kept))

    def write(self, step, **values):
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"run": self.run, "step": step, **values}) + "\n")

def grid_image(images, columns):
    """Images (n, 3, H, W) in [0, 1] -> a PIL image, `columns` a row, each enlarged to 128 pixels or more."""
    zoom = -(-128 // min(128, images.shape[-1]))
    height, width = (side * zoom + 2 for side in images.shape[2:])           # with the line
    sheet = Image.new("RGB", (columns * width + 2, -(-len(images) // columns) * height + 2), "white")
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        tile = ImageOps.scale(to_image(image), zoom, Image.NEAREST)
        sheet.paste(tile, (column * width + 2, row * height + 2))
    return sheet

def to_image(pixels):
    """(3, H, W) in [0, 1] -> a PIL image."""
    return Image.fromarray((pixels.permute(1, 2, 0).cpu() * 255).round().byte().numpy())

def save_picture(path, picture):
    """A PIL image -> a PNG file, on rank 0."""
    replace_file(path, lambda file: picture.save(file, "PNG"))
