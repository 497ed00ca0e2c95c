"""First half: pictures, batches, the token cache. Then what both models need, and what every run needs.

Notable:
- A built-in data set, `shapes`, needs no download: drawn pictures, each a function of (seed, split, index).
- Every random choice follows from (seed, epoch, index): workers, ranks, resumed runs see the same pictures.
- The token cache is one memory-mapped array. Rows not written yet hold 65535, so a killed build can go on.
"""
import argparse
import contextlib
import ctypes
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import time
import traceback
import warnings
import zipfile
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

class InputError(ValueError):
    """Something the user gave is wrong. The message says what was found and what to do."""

def generator(stream, *ids):
    """A numpy Generator that follows from the name of its use and some non-negative integers alone."""
    return np.random.default_rng([zlib.crc32(stream.encode()), *ids])

def generation_order(grid):
    """The patch of each image token, in the order of generation: (grid * grid,) of row * grid + column.
    Tokenizer, rotary table and film follow this one function."""
    return torch.arange(grid ** 2)

# ---- Built-in pictures. The digits of a class are shape, colour, background. ---------------------

SHAPES = "circle square triangle star cross ring crescent heart bar hourglass".split()
COLOURS = dict(pair.split("=") for pair in (
    "red=#d62828 orange=#f58714 yellow=#fad732 green=#28963c cyan=#28cdd7 "
    "blue=#2850d7 purple=#8232b9 pink=#fa6eb4 brown=#7d4b23 white=#fafafa").split())
BACKGROUNDS = dict(pair.split("=") for pair in (
    "night=#121428 slate=#5f6978 fog=#bec2c6 sand=#e0ca9b mint=#aae2c0 "
    "sky=#a0ccf2 lavender=#cab6ec rose=#f2c8c8 forest=#18422e wine=#581630").split())
SHAPE_CLASSES = [f"{colour} {shape} on {background}"
                 for shape in SHAPES for colour in COLOURS for background in BACKGROUNDS]

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
    shape, colour, background = np.unravel_index(label, (len(SHAPES), len(COLOURS), len(BACKGROUNDS)))
    rng = generator("shapes " + split, seed, index)
    y, x = (np.mgrid[0:size, 0:size] + 0.5).astype(np.float32) / size - 0.5
    angle, radius = rng.uniform(-0.3, 0.3), rng.uniform(0.3, 0.4)
    cx, cy = rng.uniform(-0.08, 0.08, 2)
    tints = rng.uniform(-0.03, 0.03, (2, 3)).astype(np.float32)
    lights = rng.uniform(-0.15, 0.15, (2, 2))
    cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
    u, v = (x - cx) * cos + (y - cy) * sin, (y - cy) * cos - (x - cx) * sin
    cover = np.clip(0.5 - signed_distance(SHAPES[shape], u, v) * (radius * size), 0, 1)[..., None]

    def shaded(hue, tint, light):
        rgb = (np.array(ImageColor.getrgb(hue), np.float32) / 255 + tint).clip(0, 1)
        return rgb * (1 + light[0] * x + light[1] * y)[..., None]

    ground = shaded(list(BACKGROUNDS.values())[background], tints[0], lights[0])
    paint = shaded(list(COLOURS.values())[colour], tints[1], lights[1])
    return ((ground + (paint - ground) * cover).clip(0, 1) * 255 + 0.5).astype(np.uint8), label

class Shapes:
    """The built-in pictures as a data set. Every epoch draws new ones; a picture has one crop, itself."""
    classes, crops = SHAPE_CLASSES, 1

    def __init__(self, split, size, seed=0, length=None):
        self.split, self.size, self.seed, self.length = split, size, seed, length or len(SHAPE_CLASSES)
        self.labels = np.arange(self.length) % len(SHAPE_CLASSES)
        self.files = f"shapes {seed} {split} {self.length}"                  # what a token cache depends on

    def __len__(self):
        return self.length

    def read(self, epoch, index):
        """-> (3, H, W) uint8 tensor, class."""
        image, label = draw_shape(self.seed, self.split, epoch * self.length + index, self.size)
        return to_tensor(image), label

    def read_crops(self, index):
        """-> (crops, 3, H, W) uint8: what the token cache keeps of a picture."""
        return self.read(0, index)[0][None]

# ---- Image folders -------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

def image_files(folder):
    """Paths of all images in a folder, at any depth, sorted."""
    return sorted(os.path.join(where, name) for where, _, names in os.walk(folder) for name in names
                  if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))

def read_image(path):
    """Any image file as an upright RGB PIL image. 16-bit greys become 8-bit, transparency becomes white."""
    try:
        with Image.open(str(path)) as image:
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
        raise InputError(f"{path} is not a readable image ({error}); remove or repair it") from None

def to_tensor(pixels):
    """(H, W, 3) array -> (3, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

def shrink(image, size):
    """ADM's resize of a PIL image's shorter side -> (3, H, W) uint8: box halvings, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    return to_tensor(np.asarray(image.resize((width, height), Image.BICUBIC)))

def centre_crop(image, size):
    """PIL image -> (3, size, size) uint8, as ADM prepares ImageNet."""
    pixels = shrink(image, size)
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return pixels[:, top:top + size, left:left + size]

def random_crop(image, size, rng):
    """PIL image -> (3, size, size) uint8: antialiased bilinear resize, random crop and flip."""
    width, height = (side * size // min(image.size) for side in image.size)
    pixels = to_tensor(np.asarray(image.resize((width, height), Image.BILINEAR)))
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    cropped = pixels[:, top:top + size, left:left + size]
    return cropped.flip(-1) if rng.random() < 0.5 else cropped

def five_crops(image, size):
    """The paper's (5, 3, size, size) uint8 of a PIL image: corners and middle of a 1.1 times larger crop."""
    wide = int(1.1 * size)
    pixels, far, middle = centre_crop(image, wide), wide - size, (wide - size) // 2
    corners = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
    return torch.stack([pixels[:, top:top + size, left:left + size] for top, left in corners])

class ImageFolder:
    """Images in one sub-folder a class. files: list of (path, class id). Training takes a random crop and
    flip, validation the centre. The token cache keeps the centre and its mirror image, or ten crops."""
    def __init__(self, folder, files, classes, size, args, training=False, ten_crop=False):
        self.folder, self.classes, self.size, self.seed = folder, classes, size, args.seed
        self.training, self.skip_bad, self.ten_crop = training, args.skip_bad_images, ten_crop
        self.paths, self.labels = map(np.array, zip(*files))                 # arrays, which workers share
        self.crops = 10 if ten_crop else 2
        listing = "\n".join(f"{path[len(folder):].lstrip('/')} {label}" for path, label in files)
        self.files = hashlib.sha256(listing.encode()).hexdigest()[:16]       # what a token cache depends on

    def __len__(self):
        return len(self.paths)

    def open(self, index):
        """The picture at `index`; if it is unreadable and skip_bad, the next readable one of its class."""
        try:
            return read_image(self.paths[index])
        except InputError as error:
            if not self.skip_bad:
                raise InputError(f"{error}, or train with --skip-bad-images") from None
            warnings.warn(f"skipped: {error}", stacklevel=2)                 # once per picture
        same = np.flatnonzero(self.labels == self.labels[index])
        for other in np.roll(same, -np.searchsorted(same, index))[1:]:
            with contextlib.suppress(InputError):
                return read_image(self.paths[other])
        raise InputError(f"no readable image of class {self.classes[self.labels[index]]} in {self.folder}")

    def read(self, epoch, index):
        image, label = self.open(index), int(self.labels[index])
        if self.training:
            return random_crop(image, self.size, generator("crop", self.seed, epoch, index)), label
        return centre_crop(image, self.size), label

    def read_crops(self, index):
        image = self.open(index)
        crops = five_crops(image, self.size) if self.ten_crop else centre_crop(image, self.size)[None]
        return torch.cat([crops, crops.flip(-1)])

def list_folder(folder):
    """-> sorted class names, list of (path, class id) in a fixed order. InputError for an empty class."""
    if not os.path.isdir(folder):
        raise InputError(f"no such folder: {folder} (it must be 'shapes' or a folder of class folders)")
    classes = sorted(entry.name for entry in os.scandir(folder)
                     if entry.is_dir() and not entry.name.startswith("."))
    files = []
    for label, name in enumerate(classes):
        paths = image_files(os.path.join(folder, name))
        files += [(path, label) for path in paths]
        if not paths:
            raise InputError(f"no images in {folder}/{name}: a sub-folder is a class of {IMAGE_SUFFIXES}")
    if not files:
        raise InputError(f"no images in {folder}: it needs a sub-folder a class, such as {folder}/cats/1.jpg")
    return classes, files

def open_data(args, size, ten_crop=False):
    """The training and the validation set of --data and --val-data, of pictures of size x size. `shapes`, or
    folders of one sub-folder a class. Without a validation folder every 20th image is held out."""
    if args.data == "shapes":
        if args.val_data or ten_crop:
            raise InputError("--val-data and --ten-crop go with image folders, not with built-in pictures")
        return Shapes("train", size, args.seed, args.num_pictures), Shapes("val", size, args.seed)
    classes, train = list_folder(args.data)
    if args.val_data:
        val_classes, val = list_folder(args.val_data)
        odd = sorted(set(val_classes) ^ set(classes))[:5]
        if odd:
            raise InputError(f"{args.val_data} has other classes than {args.data}: only one has {odd}")
    elif len(train) < 2:
        raise InputError(f"{args.data} holds a single image; training and validation need one each at least")
    else:
        val = train[19::20] or train[-1:]
        held_out = set(val)
        train = [file for file in train if file not in held_out]
    return (ImageFolder(args.data, train, classes, size, args, True, ten_crop),
            ImageFolder(args.val_data or args.data, val, classes, size, args))

# ---- Batches: an endless, shuffled stream that any step can be entered at. A key is (epoch, index).

@functools.lru_cache(maxsize=8)
def epoch_random(method, stream, seed, epoch, n):
    """n random values of a method of numpy's Generator, that follow from the other arguments."""
    return getattr(generator(stream, seed, epoch), method)(n)

def key_uniforms(stream, seed, keys, n):
    """A number in [0, 1) for each key, index < n, that follows from the key and the seed alone: (keys,)."""
    return np.array([epoch_random("random", stream, seed, epoch, n)[index] for epoch, index in keys])

def stream_keys(stream, seed, n, first, count):
    """Places first ... first + count - 1 of the endless shuffled stream over n items: a list of keys."""
    places = (divmod(place, n) for place in range(first, first + count))
    return [(epoch, int(epoch_random("permutation", stream, seed, epoch, n)[k])) for epoch, k in places]

def batch_keys(stream, n, args, start=0):
    """The keys of this rank's micro-batches, --accum a step, from step `start` on, without end."""
    micro = args.batch_size // (world_size() * args.accum)
    for step in itertools.count(start):
        for k in range(args.accum):
            first = step * args.batch_size + (rank() * args.accum + k) * micro
            yield stream_keys(stream, args.seed, n, first, micro)

def spread(n, count):
    """`count` indices, or all if there are fewer, evenly over 0 ... n-1: a subset that sees every class."""
    count = min(n, count)
    return [k * n // count for k in range(count)]

def rank_spans(count, size):
    """This rank's share of `count` places: slices of at most `size`, which the ranks take in turn."""
    starts = range(rank() * size, count, world_size() * size)
    return [slice(start, min(start + size, count)) for start in starts]

class Reader(Dataset):
    """Reads batches of keys; an unreadable image travels as its error, so that workers can't bury it."""
    def __init__(self, read):
        self.read = read

    def __getitem__(self, keys):
        try:
            return default_collate([self.read(*key) for key in keys])
        except InputError as error:
            return error

def outlive_signals(worker):
    """A reading process goes on after Ctrl-C, and ten seconds after SIGTERM: the trainer is to save first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))

def batches(read, keys, workers=0):
    """Iterate over batches of read(*key), one for each list in `keys`, read by so many other processes."""
    loader = DataLoader(Reader(read), sampler=keys, batch_size=None, num_workers=workers,
                        worker_init_fn=outlive_signals, pin_memory=torch.cuda.is_available(),
                        prefetch_factor=4 if workers else None)
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch

def to_float(images, device):
    """(B, 3, H, W) uint8 -> float in [0, 1] on `device`."""
    return images.to(device, non_blocking=True).float() / 255

# ---- Token cache ---------------------------------------------------------------------------------

UNWRITTEN = 65535

class TokenCache:
    """Tokens of a data set, (images, crops, N) uint16 in the memory-mapped `folder`/tokens.npy, and its
    labels. All ranks build it where it is missing or unfinished. InputError for a cache of other things."""
    def __init__(self, folder, dataset, tokenizer, device, workers=0, batch_size=64):
        config = tokenizer.config
        self.path, self.note = f"{folder}/tokens.npy", f"{folder}/cache.json"
        self.labels, self.codebook_size = dataset.labels, config.codebook_size
        shape = (len(dataset), dataset.crops, config.num_tokens)
        settings = {"tokenizer": tokenizer.fingerprint(), "files": dataset.files, "shape": list(shape)}
        if rank() == 0 and not os.path.exists(self.note):
            create_array(self.path, np.uint16, shape, UNWRITTEN)
            self.write_note(settings, finished=False)
        barrier()
        try:
            with open(self.note) as file:
                saved = dict(json.load(file))
            self.tokens = open_array(self.path)
        except (ValueError, TypeError, EOFError, FileNotFoundError):
            self.refuse()
        refuse_changes(f"the token cache in {folder} was made for something else", saved, settings,
                       "delete the folder to build it anew, or name another with --cache")
        if self.tokens.shape != shape:
            self.refuse()
        if not saved["finished"]:
            self.build(dataset, tokenizer, device, workers, batch_size)
            self.write_note(settings, finished=True)

    def write_note(self, settings, finished):
        if rank() == 0:
            text = json.dumps({**settings, "finished": finished}, indent=1)
            replace_file(self.note, lambda file: file.write(text.encode()))

    def refuse(self):
        raise InputError(f"the token cache {self.path} is damaged; delete its folder to build it anew")

    def __len__(self):
        return len(self.tokens)

    def batch(self, keys, seed):
        """Keys -> tokens (B, N) int64, classes (B,) int64; each epoch draws one of an image's crops."""
        indices = [index for _, index in keys]
        crops = (key_uniforms("crop choice", seed, keys, len(self)) * self.tokens.shape[1]).astype(np.int64)
        tokens = self.tokens[indices, crops].astype(np.int64)
        if tokens.max() >= self.codebook_size:
            self.refuse()
        batch = torch.from_numpy(tokens), torch.from_numpy(self.labels[indices])
        return [part.pin_memory() for part in batch] if torch.cuda.is_available() else batch

    def missing(self):
        """Indices of the images of which not all tokens are written."""
        return np.concatenate([np.flatnonzero((self.tokens[at:at + 4096] == UNWRITTEN).any(axis=(1, 2))) + at
                               for at in range(0, len(self), 4096)])

    def build(self, dataset, tokenizer, device, workers, batch_size):
        """Encode the images whose tokens are missing, every rank its share."""
        missing = self.missing()
        barrier()                             # every rank has the same list before one of them shortens it
        share = np.array_split(missing, world_size())[rank()]
        micro = max(1, batch_size // dataset.crops)
        rows = [share[at:at + micro] for at in range(0, len(share), micro)]
        stream = batches(dataset.read_crops, [indices[:, None] for indices in rows], workers)
        for indices, images in zip(progress_bar(rows, "tokens", micro), stream):       # (B, crops, 3, H, W)
            ids = tokenizer.encode(to_float(images.flatten(0, 1), device))
            write_rows(self.tokens, indices, ids.unflatten(0, images.shape[:2]).cpu().numpy())
        barrier()
        self.tokens = open_array(self.path)   # with what other hosts wrote
        if len(self.missing()):
            raise InputError(f"{len(self.missing())} rows of {self.path} are not on the disk; run this again")

# ==== What both models need =======================================================================

def attention(q, k, v, mask=None, causal=False, dropout=0.0):
    """softmax(q k^T / sqrt(D)) v for q, k, v (B, H, T, D). On a CPU by definition, in float32, where that is
    faster than PyTorch's fused kernel: in training, and for one query on cached keys."""
    with torch.autocast(v.device.type, enabled=False):
        if v.device.type != "cpu" or not v.requires_grad and q.shape[2] > 1:
            return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, mask, dropout, causal)
        scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5              # (B, H, queries, keys)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
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
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear) and layer.weight.dtype in dtypes:
                setattr(module, name, PackedLinear(layer))
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data = tensor.clone()          # now nothing holds the mapped file in memory any more
    return model

# ==== What every run needs ========================================================================

def run(main):
    """Call main() as a command. Exit codes: 2 with a line on stderr for an InputError or what the system
    refuses, 128 + the signal for a run that stopped and has saved, 1 with a traceback for our mistakes."""
    code, message = 0, None
    try:
        main()
    except (InputError, OSError) as error:
        code, message = 2, f"error: {error}"
    except SystemExit as leaving:
        code = leaving.code
    except KeyboardInterrupt:
        code = 130
    except Exception:
        code, message = 1, traceback.format_exc()
    if message:
        print(f"rank {rank()}: {message}" if world_size() > 1 else message, file=sys.stderr)
    if dist.is_initialized():
        if not code:
            barrier()
            time.sleep(0.5)                   # leaving at once can cut off what another rank has yet to read
        sys.stdout.flush()
        os._exit(code)                        # others may wait for a failed rank, and gloo may abort an exit
    if code:
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
DEVICE = dict(choices=["auto", "cpu", "cuda", "mps"], default="auto")
WORKERS = dict(type=natural, help="reading processes per rank (8 with a GPU, else 0)")
above_zero, at_least_zero, from_0_to_1 = number(float, 1e-12), number(float, 0), number(float, 0, 1)

def preset_parser(doc, presets):
    """A parser of --preset, --init and --out, which are read first: they decide the other flags' defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, add_help=False)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--preset", choices=presets, default="tiny", help="shape of the model, and its recipe")
    shape.add_argument("--init", dest="init_from", metavar="CHECKPOINT",
                       help="fine-tune this model, of ours or a released one")
    parser.add_argument("--out", default="out", help="folder for checkpoints, log, pictures (%(default)s)")
    return parser

def add_run_arguments(parser):
    """The flags of both trainers. --batch-size, --lr, --warmup and --clip get defaults from the recipe."""
    add = parser.add_argument
    add("-h", "--help", action="help", help="show this and exit")
    add("--data", default="shapes", help="'shapes', the built-in pictures, or a folder of class folders")
    add("--val-data", help="validation folder; without it every 20th image of --data is held out")
    add("--resume", action="store_true", help="go on from the training state in --out")
    add("--batch-size", type=positive, help="images a step, over all ranks (%(default)s)")
    add("--accum", type=positive, default=1, help="micro-batches a step (%(default)s)")
    add("--lr", type=above_zero, help="of the first phase, at its peak; all scale with it (%(default)s)")
    add("--warmup", type=natural, help="steps of linear warmup; fewer in short runs (%(default)s)")
    add("--clip", type=at_least_zero, help="largest gradient norm; 0 is no limit (%(default)s)")
    add("--seed", type=natural, default=0)
    add("--num-pictures", type=positive, default=50_000, help="of the built-in set (%(default)s)")
    add("--eval-every", type=positive, default=500, help="steps between evaluations (%(default)s)")
    add("--eval-images", type=positive, default=256, help="pictures an evaluation looks at (%(default)s)")
    add("--save-every", type=positive, default=500, help="steps between saves (%(default)s)")
    add("--workers", **WORKERS)
    add("--skip-bad-images", action="store_true", help="the next readable image replaces an unreadable one")
    add("--save-dtype", choices=["float32", "float16"], default="float32", help="of the finished model")
    add("--grad-checkpoint", action="store_true", help="save memory: compute activations twice")
    add_device_arguments(parser)

def add_device_arguments(parser):
    add = parser.add_argument
    add("--device", **DEVICE)
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the matrix work; auto is bfloat16 where the hardware is fast at it")
    add("--no-compile", dest="compile", action="store_false", help="do without torch.compile")

# What decides the result, so that a resumed run must not change it. The number of steps may change.
FIXED = "data val_data batch_size lr warmup clip seed num_pictures dtype".split()

def refuse_changes(message, saved, now, advice):
    """InputError that names each value of `now` that is another one in `saved`, two dicts."""
    changed = [f"{name} {saved.get(name)}, now {now[name]}" for name in now if saved.get(name) != now[name]]
    if changed:
        raise InputError(f"{message} ({'; '.join(changed)}); {advice}")

def refuse_overwrite(paths):
    for path in filter(os.path.exists, paths):
        raise InputError(f"{path} is there already: --resume goes on from it, another --out starts anew")

# ---- Ranks, devices, signals ---------------------------------------------------------------------

PATIENCE = datetime.timedelta(hours=2)        # with another rank's download; torchrun sees to dead ranks
LOG_EVERY = 20                                # steps

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def keep_memory():
    """glibc returns freed memory to the system, and gets it back page by page at the next step. Have it keep
    the memory (M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX). Other systems have no such settings."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((-1, 2 ** 31 - 1), (-2, 2 ** 26), (-4, 0)):
            mallopt(parameter, value)

def start(args):
    """Join the ranks, if torchrun started them, and fill in --dtype and --workers. -> device"""
    keep_memory()
    accelerator = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = accelerator if args.device == "auto" else torch.device(args.device)
    if device.type not in ("cpu", accelerator.type):
        raise InputError(f"device {device} is not available here; there is {accelerator}")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "mps":
            raise InputError("several processes can't share an Apple GPU; give --device cpu, or no torchrun")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # gloo for what need not wait for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    parts = world_size() * args.accum if "accum" in args else 1
    if args.batch_size % parts:
        raise InputError(f"a batch of {args.batch_size} can't be shared evenly by {world_size()} ranks in "
                         f"{args.accum} micro-batches; choose --batch-size as a multiple of {parts}")
    on_gpu = device.type == "cuda"
    if "workers" in args and args.workers is None:
        args.workers = 8 if on_gpu else 0
    if args.dtype == "auto":
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else
                device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"))
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

def say(text):
    """Print a line above the progress bar, once for all ranks."""
    if rank() == 0:
        tqdm.write(text)

class StopFlag:
    """Notes the first SIGTERM or SIGINT, for the loop to save and stop. A second one ends the process, unless
    it comes within a second: torchrun and the terminal may both deliver the first."""
    def __init__(self):
        self.signal = self.noted = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        if self.signal and time.monotonic() > self.noted + 1:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.noted = number, time.monotonic()

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
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))

def distribute(model, device):
    """The model for training on several ranks, as it is on one."""
    if world_size() == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

def compile_in_place(modules, steps, args, device):
    """torch.compile on a GPU, and on a CPU in runs long enough (ours) to win back the half minute it takes.
    Where a CPU has no compiler, PyTorch says so and goes on without."""
    torch._dynamo.config.suppress_errors = device.type != "cuda"
    if args.compile and (device.type == "cuda" or steps >= 4000):
        for module in modules:
            module.compile()

def checkpoint_blocks(blocks):
    """--grad-checkpoint: keep nothing of what happens inside a block; the backward pass computes it again."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

def check_finite(name, value):
    if not math.isfinite(value):
        raise InputError(f"{name} is not finite: training has diverged; start anew with a lower --lr")

def check_bad_steps(in_row, path, limit=10):
    """InputError when so many steps in a row (ours) were skipped, because their gradient was not finite."""
    if in_row == limit:
        saved = f"--resume goes on from {path}" if os.path.exists(path) else "nothing is saved yet"
        raise InputError(f"{in_row} steps in a row had gradients that are not finite; {saved}; if it happens "
                         "again, start anew with a lower --lr")

# ---- Files ---------------------------------------------------------------------------------------

def replace_file(path, write):
    """write(file) aside, sync, then rename: `path` holds the old content or the new, never half of one.
    InputError when it can't be written; the old content is then untouched."""
    folder, aside = os.path.dirname(os.path.abspath(path)), f"{path}.tmp"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    except (OSError, RuntimeError) as error:  # torch.save has a kind of its own for a full disk
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise InputError(f"can't write {path} ({error}); make room, or name another place") from None

def create_array(path, dtype, shape, fill):
    """A new .npy of one value. It takes its room on the disk now: a full disk says so here."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    write_rows(array, range(shape[0]), itertools.repeat(np.full(shape[1:], fill)))

def open_array(path):
    return np.load(path, mmap_mode="r", allow_pickle=False)

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

# A checkpoint is a dict: {"kind": "tokenizer" or "ar", "config": dict, "model": state dict, and more}.

def save_checkpoint(path, **content):
    """Write a checkpoint. Rank 0 does it, the others wait."""
    if rank() == 0:
        replace_file(path, lambda file: torch.save(content, file))
    barrier()

def in_dtype(state, dtype):
    """A state dict in the dtype of --save-dtype."""
    return {name: value.to(getattr(torch, dtype)) for name, value in state.items()}

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

def load_checkpoint(path, kind, from_released=lambda state: None):
    """-> the dict that `save_checkpoint` wrote. InputError for anything but a checkpoint of this kind.
    from_released: turns the content of a file of the authors into such a dict, or returns None."""
    if not os.path.isfile(path):
        raise InputError(f"no such checkpoint: {path} (train_{kind}.py writes it)")
    content = read_torch(path)
    if "kind" not in content:
        content = from_released(content)
    elif content["kind"] != kind:
        content = None
    if content is None:
        raise InputError(f"{path} is not a checkpoint of kind '{kind}', nor a released one")
    return content

def load_weights(model, state, path):
    """load_state_dict; InputError that lists the tensors that are missing, unexpected or of another shape. A
    model on the device "meta" has no weights of its own: it takes those of `state` as they are."""
    try:
        model.load_state_dict(state, assign=next(model.parameters()).is_meta)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit the model: {' '.join(str(error).split())[:1500]}") from None

def load_fitting(model, state):
    """Take over the tensors of a state dict that fit a model by name and shape; the others stay."""
    own = model.state_dict()
    own.update((name, value) for name, value in state.items()
               if name in own and value.shape == own[name].shape)
    model.load_state_dict(own)

def load_training_state(path, kind, fixed, steps):
    """The state that --resume goes on from; None, with a word, when there is none yet. InputError when ranks
    see different files, when `fixed` is not what it was, and beyond `steps`."""
    state = load_checkpoint(path, kind) if os.path.exists(path) else None
    step = state["step"] if state else 0
    if over_ranks([step])[0] != step * world_size():
        raise InputError(f"ranks see different contents in {path}; --out must be one folder for all of them")
    if state:
        refuse_changes(f"{path} was trained with other settings", state.get("fixed", {}), fixed,
                       "resume with the old ones, or start anew in another --out")
        if step > steps:
            raise InputError(f"{path} has done {step} steps, more than --steps {steps}; give {step} or more")
    else:
        say(f"no training state at {path} yet: starting at the first step")
    return state

class Log:
    """`log.jsonl`, a JSON object a line: {"run": ..., "step": ..., ...}. Rank 0 writes. A resumed run drops
    its lines of later steps, so the log reads as if nothing had happened."""
    def __init__(self, path, run, step):
        self.path, self.run, kept = path, run, []
        if rank() == 0:
            if os.path.exists(path):
                with open(path, "rb") as file:
                    entries = [(line, json.loads(line)) for line in file if line.endswith(b"\n")]
                kept = [line for line, entry in entries if entry["run"] != run or entry["step"] <= step]
            replace_file(path, lambda file: file.writelines(kept))

    def write(self, step, **values):
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"run": self.run, "step": step, **values}) + "\n")

def grid_image(images, columns):
    """Images (n, 3, H, W) in [0, 1] -> a PIL image of them all, `columns` a row, with white lines between."""
    images = F.pad(images.float().cpu().clamp(0, 1), (0, 2, 0, 2), value=1)
    blank = images.new_ones(-len(images) % columns, *images.shape[1:])
    rows = torch.cat([images, blank]).unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)     # (r, H, c, W, 3)
    sheet = F.pad(rows.flatten(0, 1).flatten(1, 2), (0, 0, 2, 0, 2, 0), value=1)
    return Image.fromarray((sheet * 255).round().byte().numpy())

def save_picture(path, picture):
    """A PIL image -> a PNG file. Rank 0 writes."""
    if rank() == 0:
        replace_file(path, lambda file: picture.save(file, "PNG"))
