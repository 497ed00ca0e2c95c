"""What goes in and out of a run: pictures, crops, the token cache, the ranks that share them, checkpoints on disk.

Notable:
- A built-in data set, `shapes`, needs no download: 1000 classes of drawn pictures, each a function of (seed, split, index).
- Every random choice follows from (seed, epoch, index), so workers, ranks and a resumed run all see the same pictures.
- The token cache is one memory-mapped array; a row that is not written yet is filled with 65535, so that a build can be
  killed at any moment and goes on where it was.
- Checkpoints are written aside, synced and renamed, and loading them runs no code.

`python data.py` writes a labelled contact sheet of the built-in pictures.
"""
import argparse
import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import socket
import sys
import time
import traceback
import zipfile
import zlib

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


class InputError(ValueError):
    """Something the user gave is wrong. The message says what was found and what to do."""


class Stopped(Exception):
    """A run that was asked to stop has saved its state and does so. `signal` is what asked."""

    def __init__(self, number, where):
        super().__init__(f"stopped by {signal.Signals(number).name} at {where}")
        self.signal = number


def run(main):
    """Call main() as a command. Exit codes: 2 for an InputError, one line on stderr; 1 for what the system refuses (a full
    disk), likewise; 128 + the signal's number for a run that was stopped, 130 for Ctrl-C; 1 with a traceback for a mistake of ours.
    """
    code, said = 0, None
    try:
        main()
    except InputError as error:
        code, said = 2, f"error: {error}"
    except Stopped as stop:
        code, said = 128 + stop.signal, str(stop)
    except OSError as error:
        code, said = 1, f"error: {error}"
    except KeyboardInterrupt:
        code = 130
    except Exception:
        if not dist.is_initialized():
            raise
        code, said = 1, traceback.format_exc()
    rank, ranks = rank_and_count()
    if said and (rank == 0 or code < 128):
        print((f"rank {rank}: " if ranks > 1 else "") + said, file=sys.stderr, flush=True)
    if dist.is_initialized():
        if not code:
            barrier()
            time.sleep(0.5)                   # a rank that leaves at once can cut off what another has yet to read of this
        sys.stdout.flush()
        os._exit(code)                        # others may wait for a rank that failed; and gloo's threads may abort a usual end
    if code:
        sys.exit(code)


def generator(stream, *ids):
    """A numpy Generator that follows from the name of its use and some non-negative integers alone."""
    return np.random.default_rng([zlib.crc32(stream.encode()), *ids])


def key_uniforms(stream, seed, keys):
    """One number in [0, 1) a key, for many at once: keys (B, 2) of (epoch, index) -> (B,) float64, by splitmix64."""
    words = np.asarray(keys, np.uint64).T
    state = np.full(words.shape[1], (zlib.crc32(stream.encode()) << 32) ^ seed, np.uint64)
    with np.errstate(over="ignore"):          # 64-bit arithmetic that wraps
        for word in words:
            state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)) * 2.0 ** -53


# -----------------------------------------------------------------------------
# Built-in pictures: class = 100 * shape + 10 * colour + background

SHAPES = ["circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "bar", "hourglass"]
COLOURS = {"red": (214, 40, 40), "orange": (245, 135, 20), "yellow": (250, 215, 50), "green": (40, 150, 60),
           "cyan": (40, 205, 215), "blue": (40, 80, 215), "purple": (130, 50, 185), "pink": (250, 110, 180),
           "brown": (125, 75, 35), "white": (250, 250, 250)}
BACKGROUNDS = {"night": (18, 20, 40), "slate": (95, 105, 120), "fog": (190, 194, 198), "sand": (224, 202, 155),
               "mint": (170, 226, 192), "sky": (160, 204, 242), "lavender": (202, 182, 236), "rose": (242, 200, 200),
               "forest": (24, 66, 46), "wine": (88, 22, 48)}
SHAPE_CLASSES = [f"{colour} {shape} on {ground}" for shape in SHAPES for colour in COLOURS for ground in BACKGROUNDS]
PALETTE, GROUNDS = (np.array(list(c.values()), np.float32) / 255 for c in (COLOURS, BACKGROUNDS))


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
    return np.maximum(abs(y) - 0.85, (abs(x) - 0.12 - 0.7 * abs(y)) / 1.22)            # hourglass


@functools.lru_cache
def pixel_centres(size):
    return tuple((np.mgrid[0:size, 0:size][::-1] + 0.5).astype(np.float32) / size - 0.5)


def draw_shape(seed, split, index, size):
    """Picture `index` of a split of the built-in set: (size, size, 3) uint8 and its class, index % 1000.

    Position, size, rotation, tint and shading are random; edges are antialiased by their distance in pixels.
    """
    label = index % 1000
    rng = generator("shapes " + split, seed, index)
    x, y = pixel_centres(size)
    angle, radius = rng.uniform(-0.3, 0.3), rng.uniform(0.3, 0.4)
    cx, cy = rng.uniform(-0.08, 0.08, 2)
    tints = rng.uniform(-0.03, 0.03, (2, 3)).astype(np.float32)
    lights = rng.uniform(-0.15, 0.15, (2, 2))
    cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
    u, v = (x - cx) * cos + (y - cy) * sin, (y - cy) * cos - (x - cx) * sin
    cover = np.clip(0.5 - signed_distance(SHAPES[label // 100], u, v) * (radius * size), 0, 1)[..., None]
    def shaded(colour, tint, light):
        return (colour + tint).clip(0, 1) * (1 + light[0] * x + light[1] * y)[..., None]

    ground, paint = shaded(GROUNDS[label % 10], tints[0], lights[0]), shaded(PALETTE[label // 10 % 10], tints[1], lights[1])
    return ((ground + (paint - ground) * cover).clip(0, 1) * 255 + 0.5).astype(np.uint8), label


def shape_digits(labels):
    """Classes (B,) -> (B, 3): shape, colour, background."""
    return torch.stack([labels // 100, labels // 10 % 10, labels % 10], 1)


class Shapes:
    """The built-in pictures as a data set. Every epoch draws new ones; a picture has one crop, itself."""
    crops = ["whole"]
    classes = SHAPE_CLASSES
    name = "shapes"

    def __init__(self, split, size, seed, length):
        self.split, self.size, self.seed, self.length = split, size, seed, length
        self.labels = np.arange(length) % 1000
        self.files = f"shapes {seed} {split} {length}"       # what a token cache of this set depends on

    def __len__(self):
        return self.length

    def read(self, epoch, index):
        """-> (3, H, W) uint8 tensor, class."""
        image, label = draw_shape(self.seed, self.split, epoch * self.length + index, self.size)
        return torch.from_numpy(image).permute(2, 0, 1), label

    def read_crops(self, index):
        """-> (crops, 3, H, W) uint8: what the token cache keeps of a picture."""
        return self.read(0, index)[0][None]


# -----------------------------------------------------------------------------
# Image folders

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_image(path):
    """Any image file as an upright RGB PIL image; 16-bit greys are scaled to 8, transparency goes onto white."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).astype(np.float32) / 257 + 0.5).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if max(image.size) > 100 * min(image.size):
                raise ValueError(f"{image.width}x{image.height} is too long and thin to crop")
            return image.convert("RGB")
    except Exception as error:                # Pillow's decoders raise a dozen kinds for a damaged file
        raise InputError(f"{path} is not a readable image ({error}); remove or repair it") from None


def shrink(image, size):
    """ADM's resize: halve with a box filter while twice too large, then bicubic until the shorter side is `size`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    return image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.BICUBIC)


def centre_crop(image, size):
    """PIL image -> (size, size, 3) uint8, as ADM prepares ImageNet."""
    pixels = np.asarray(shrink(image, size))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top:top + size, left:left + size]


def random_crop(image, size, rng):
    """PIL image -> (size, size, 3) uint8: shorter side to `size`, a random place along the longer one, a random flip."""
    pixels = np.asarray(shrink(image, size))
    top, left = rng.integers(pixels.shape[0] - size + 1), rng.integers(pixels.shape[1] - size + 1)
    pixels = pixels[top:top + size, left:left + size]
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


CENTRE_CROPS = ["centre", "centre mirrored"]
TEN_CROPS = [place + mirrored for mirrored in ("", " mirrored")
             for place in ("top left", "top right", "bottom left", "bottom right", "centre")]


def five_crops(image, size):
    """PIL image -> list of (size, size, 3) uint8: corners and centre of a centre crop 1.1 times as large (the paper's, mirrored
    ones aside)."""
    wide = int(1.1 * size)
    pixels, far, middle = centre_crop(image, wide), wide - size, (wide - size) // 2
    return [pixels[top:top + size, left:left + size]
            for top, left in ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))]


class ImageFolder:
    """Images in one sub-folder a class, as in ImageNet (`n01440764/x.JPEG`); sorted folder names give the class ids.

    files: list of (path, class id). Training draws a random crop and flip from (seed, epoch, index), validation the centre.
    `crops` names what the token cache keeps of a picture: CENTRE_CROPS, or TEN_CROPS if so set.
    """
    crops = CENTRE_CROPS

    def __init__(self, name, files, classes, size, seed, training, skip_bad):
        self.name, self.classes, self.size, self.seed = name, classes, size, seed
        self.paths = [path for path, _ in files]
        self.labels = np.array([label for _, label in files])
        self.training, self.skip_bad, self.told = training, skip_bad, set()
        listing = "\n".join(f"{os.path.relpath(path, name)} {label}" for path, label in files)
        self.files = hashlib.sha256(listing.encode()).hexdigest()[:16]

    def __len__(self):
        return len(self.paths)

    def open(self, index):
        """The picture at `index`; with skip_bad, the next readable one of its class stands in for an unreadable one."""
        try:
            return read_image(self.paths[index])
        except InputError as error:
            if not self.skip_bad:
                raise InputError(f"{error}, or train with --skip-bad-images") from None
            if index not in self.told:
                tqdm.write(f"skipped: {error}", file=sys.stderr)
            self.told.add(index)
        same = np.flatnonzero(self.labels == self.labels[index])
        for other in np.roll(same, -np.searchsorted(same, index))[1:]:
            with contextlib.suppress(InputError):
                return read_image(self.paths[other])
        raise InputError(f"no readable image of class {self.classes[self.labels[index]]} in {self.name}")

    def read(self, epoch, index):
        image = self.open(index)
        pixels = (random_crop(image, self.size, generator("crop", self.seed, epoch, index)) if self.training
                  else centre_crop(image, self.size))
        return to_tensor(pixels), int(self.labels[index])

    def read_crops(self, index):
        image, size = self.open(index), self.size
        crops = torch.stack([to_tensor(pixels) for pixels in (five_crops(image, size) if self.crops is TEN_CROPS
                                                              else [centre_crop(image, size)])])
        return torch.cat([crops, crops.flip(-1)])


def to_tensor(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def list_folder(folder):
    """-> sorted class names, list of (path, class id) in a fixed order. InputError if there is nothing to train on."""
    if not os.path.isdir(folder):
        raise InputError(f"no such folder: {folder} (--data takes 'shapes' or a folder with one sub-folder a class)")
    try:
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"can't read {folder} ({error}); repair it, or name another folder") from None
    files = []
    for label, name in enumerate(classes):
        found = [os.path.join(where, file) for where, _, names in os.walk(os.path.join(folder, name)) for file in names
                 if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")]
        if not found:
            raise InputError(f"no images in {os.path.join(folder, name)}: every sub-folder is a class and holds "
                             f"{', '.join(IMAGE_SUFFIXES)} files")
        files += [(path, label) for path in sorted(found)]
    if not classes:
        raise InputError(f"no images in {folder}: it needs one sub-folder a class, such as {folder}/cats/1.jpg")
    return classes, files


def open_data(data, val_data, size, seed, skip_bad=False, num_pictures=50_000, ten_crop=False):
    """--data and --val-data -> training and validation sets.

    `shapes`, or a folder of one sub-folder a class. Without a validation folder every 20th image, at least one, is held out.
    """
    if data == "shapes":
        if val_data:
            raise InputError("--val-data goes with an image folder; the built-in pictures have a validation set of their own")
        if ten_crop:
            raise InputError("--ten-crop goes with an image folder; the built-in pictures have no borders to crop")
        return Shapes("train", size, seed, num_pictures), Shapes("val", size, seed, 1000)
    classes, train = list_folder(data)
    if val_data:
        names, val = list_folder(val_data)
        if names != classes:
            raise InputError(f"{val_data} has other classes than {data}: "
                             f"{', '.join(sorted(set(names) ^ set(classes))[:5])} in one of them only")
    else:
        if len(train) < 2:
            raise InputError(f"{data} holds a single image; training and validation need one each at least")
        val = train[19::20] or train[-1:]
        held_out = set(val)
        train = [file for file in train if file not in held_out]
    train = ImageFolder(data, train, classes, size, seed, True, skip_bad)
    if ten_crop:
        train.crops = TEN_CROPS
    return train, ImageFolder(val_data or data, val, classes, size, seed, False, skip_bad)


# -----------------------------------------------------------------------------
# Batches: an endless, shuffled stream that any step can be entered at

def stream_keys(n, seed, first, count):
    """Places first .. first + count - 1 of the endless shuffled stream over n items -> (count, 2) int64 of (epoch, index).

    Every epoch has its own order.
    """
    epochs, places = np.divmod(np.arange(first, first + count), n)
    keys = np.stack([epochs, places], 1)
    for epoch in range(epochs[0], epochs[-1] + 1):
        keys[epochs == epoch, 1] = epoch_order(n, seed, epoch)[places[epochs == epoch]]
    return keys


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return generator("order", seed, epoch).permutation(n)


def batch_keys(n, seed, batch_size, accum, start, rank, ranks):
    """For each step from `start` on, this rank's share of the global batch in `accum` micro-batches, without end."""
    micro = batch_size // ranks // accum
    for step in itertools.count(start):
        for part in range(accum):
            yield stream_keys(n, seed, step * batch_size + (rank * accum + part) * micro, micro)


def spread(n, count):
    """`count` indices, or all if there are fewer, evenly over 0 .. n-1: a subset that sees every class of a sorted set."""
    count = min(n, count)
    return [k * n // count for k in range(count)]


class Reader(torch.utils.data.Dataset):
    """Reads batches of keys; an unreadable image travels as its error, so that workers can't bury it."""

    def __init__(self, read):
        self.read = read

    def __getitem__(self, keys):
        try:
            return default_collate([self.read(*key) for key in keys])
        except InputError as error:
            return error


def outlive_signals(worker):
    """A reading process ignores Ctrl-C and goes on for ten seconds after SIGTERM: when the whole group is told to stop, the trainer
    finishes its step and saves, which it could not were a reader to die under it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


def batches(dataset, keys, workers=0, read=None):
    """Iterate over batches of `read(*key)`, by default (images (B, 3, H, W) uint8, classes (B,)), for each batch in `keys`."""
    loader = DataLoader(Reader(read or dataset.read), sampler=keys, batch_size=None, num_workers=workers,
                        worker_init_fn=outlive_signals, pin_memory=torch.cuda.is_available(),
                        prefetch_factor=4 if workers else None)
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def to_float(images, device):
    """(B, 3, H, W) uint8 -> float in [0, 1] on `device`."""
    return images.to(device, non_blocking=True).float() / 255


# -----------------------------------------------------------------------------
# Token cache

UNWRITTEN = 65535


class TokenCache:
    """Tokens of a whole data set: `tokens.npy` (images, crops, N) uint16 and `labels.npy` (images,), memory-mapped.

    `cache.json` beside them names what they came from; `open_cache` refuses a cache that came from anything else.
    """

    def __init__(self, folder, shape, labels, codebook_size):
        self.folder, self.codebook_size = folder, codebook_size
        try:
            self.tokens, self.labels = (np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r", allow_pickle=False)
                                        for name in ("tokens", "labels"))
            whole = self.tokens.shape == shape and self.tokens.dtype == np.uint16 and np.array_equal(self.labels, labels)
        except (OSError, ValueError, EOFError):
            whole = False
        if not whole:
            self.refuse()

    def refuse(self):
        raise InputError(f"the token cache in {self.folder} is damaged; delete the folder to build it anew")

    def __len__(self):
        return len(self.tokens)

    def batch(self, keys, seed):
        """Keys (epoch, index) -> tokens (B, N) int64 and classes (B,) int64; each epoch draws one of an image's crops."""
        indices = np.array(keys)[:, 1]
        chosen = (key_uniforms("crop choice", seed, keys) * self.tokens.shape[1]).astype(np.int64)
        tokens = self.tokens[indices, chosen]
        if tokens.max() >= self.codebook_size:
            self.refuse()
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(self.labels[indices].astype(np.int64))


def open_cache(folder, dataset, tokenizer, device, workers=0, batch_size=64):
    """The token cache of `dataset` in `folder`, built by all ranks when it is missing or unfinished.

    Raises InputError when the folder holds a cache of another tokenizer, data set or crop.
    """
    config = tokenizer.config
    if config.codebook_size > UNWRITTEN:
        raise InputError(f"the token cache holds codebooks of up to {UNWRITTEN} entries, this one has {config.codebook_size}")
    want = {"tokenizer": tokenizer.fingerprint(), "files": dataset.files, "images": len(dataset), "crops": dataset.crops,
            "image_size": config.image_size, "tokens": config.num_tokens, "codebook": config.codebook_size}
    note = os.path.join(folder, "cache.json")
    rank, ranks = rank_and_count()
    shape = (len(dataset), len(dataset.crops), config.num_tokens)
    if not os.path.exists(note) and rank == 0:
        make_folder(folder)
        create_array(os.path.join(folder, "tokens.npy"), np.uint16, shape, UNWRITTEN)
        replace_file(os.path.join(folder, "labels.npy"), lambda file: np.save(file, dataset.labels.astype(np.int32)))
        write_text(note, json.dumps({**want, "finished": False}, indent=1))
    barrier()
    found = read_json(note)
    wrong = [f"{key} {found.get(key)!r}, now {value!r}" for key, value in want.items() if found.get(key) != value]
    if wrong:
        raise InputError(f"the token cache in {folder} was made for something else ({'; '.join(wrong)}); "
                         "delete the folder to build it anew, or name another with --cache")
    TokenCache(folder, shape, dataset.labels, config.codebook_size)            # whole, so far as it goes
    if not found.get("finished"):
        build_cache(folder, dataset, tokenizer, device, workers, batch_size)
        if rank == 0:
            if len(left := unwritten(np.load(os.path.join(folder, "tokens.npy"), mmap_mode="r", allow_pickle=False))):
                raise InputError(f"{len(left)} rows of the token cache in {folder} did not arrive on the disk; run this again")
            write_text(note, json.dumps({**want, "finished": True}, indent=1))
    barrier()
    return TokenCache(folder, shape, dataset.labels, config.codebook_size)


def unwritten(tokens):
    """Indices of the images of which not all tokens are there."""
    return np.concatenate([np.flatnonzero((tokens[at:at + 4096] == UNWRITTEN).any(axis=(1, 2))) + at
                           for at in range(0, len(tokens), 4096)])


def build_cache(folder, dataset, tokenizer, device, workers, batch_size):
    """Encode the rows of tokens.npy that are not written yet, every rank its share."""
    rank, ranks = rank_and_count()
    tokens = np.lib.format.open_memmap(os.path.join(folder, "tokens.npy"), "r+")
    missing = unwritten(tokens)
    barrier()                                 # every rank has the same list before one of them shortens it
    mine = np.array_split(missing, ranks)[rank]                                # in one piece: other ranks' pages stay theirs
    crops = tokens.shape[1]
    rows = [mine[at:at + max(1, batch_size // crops)] for at in range(0, len(mine), max(1, batch_size // crops))]
    keys = [part[:, None] for part in rows]
    progress = tqdm(total=len(missing), desc="tokens", unit="img", disable=rank > 0)
    for part, images in zip(rows, batches(dataset, keys, workers, dataset.read_crops)):
        ids = tokenizer.encode(to_float(images.flatten(0, 1), device))
        tokens[part] = ids.view(len(part), crops, -1).cpu().numpy()
        progress.update(min(len(part) * ranks, len(missing) - progress.n))
    tokens.flush()
    progress.close()
    barrier()                                 # "finished" is said of every rank's share


# -----------------------------------------------------------------------------
# Ranks

PATIENCE = datetime.timedelta(hours=2)        # a rank may wait for another's download or evaluation; torchrun sees to dead ones


def start_ranks(device="auto"):
    """Join the other ranks when torchrun started this one. -> rank, number of ranks, device."""
    device = pick_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "mps":
            raise InputError("several processes can't share an Apple GPU; run without torchrun, or with --device cpu")
        if device.type == "cuda":
            local = int(os.environ["LOCAL_RANK"])
            if local >= torch.cuda.device_count():
                raise InputError(f"rank {local} has no GPU, there are {torch.cuda.device_count()}: lower --nproc_per_node")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)    # gloo for what need not wait for the GPU
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
    return *rank_and_count(), device


def pick_device(name):
    """--device: auto, cpu, cuda or mps -> torch.device. InputError when it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there.get(name):
        raise InputError(f"device {name} is not available here; there is {', '.join(k for k in there if there[k])}")
    return torch.device(name)


def pick_dtype(name, device):
    """--dtype of the matrix work in training: bfloat16 where the hardware has it, unless named."""
    if name != "auto":
        return name
    fast = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "cpu": lambda: getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")}.get(device.type, bool)()
    return "bfloat16" if fast else "float32"


class Interruptions:
    """When a training run has to save: every so many steps or minutes, and before it obeys SIGTERM or Ctrl-C.

    Inside `with`, the first signal is noted, for `due` to tell; a second one, more than a second later (torchrun and the terminal
    may both deliver the first), ends the process at once. All ranks get the same answers.
    """

    def __init__(self, steps, minutes):
        self.steps, self.minutes, self.signal, self.saved = steps, minutes, 0, time.monotonic()

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.signal and time.monotonic() > self.noted + 1:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.noted = number, time.monotonic()

    def due(self, step):
        """-> whether to save after so many steps, and the signal to obey after that, or 0."""
        late = self.minutes and time.monotonic() > self.saved + 60 * self.minutes
        late, number = over_ranks([late, self.signal], dist.ReduceOp.MAX)
        save = bool(late or number or step % self.steps == 0)
        if save:
            self.saved = time.monotonic()
        return save, int(number)


def rank_and_count():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_ranks(values, operation=dist.ReduceOp.SUM):
    """A list of numbers, summed (or whatever) over ranks. Waits for the other processes, not for GPUs."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor.tolist()


def barrier():
    over_ranks([0])


def mean_over_ranks(values):
    """{name: number} -> the same, averaged over ranks."""
    return {name: total / rank_and_count()[1] for name, total in zip(values, over_ranks(list(values.values())))}


def wait_for(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def matrix_rate(device, dtype, size=None):
    """Operations a second of a large matrix product."""
    size = size or (8192 if device.type == "cuda" else 2048)
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, getattr(torch, dtype))
    for k in range(8):
        if k == 3:                            # after warming up
            wait_for(device)
            began = time.perf_counter()
        matrix @ matrix
    wait_for(device)
    return 5 * 2 * size ** 3 / (time.perf_counter() - began)


class Speed:
    """Images a second since the last `restart`, and MFU: the share of the ranks' matrix rate that they make.

    operations: of a training step, for one image; what is left out of them, is left out of MFU.
    """

    def __init__(self, operations, device, dtype):
        self.limit = matrix_rate(device, dtype, None if device.type == "cuda" else 1024) * rank_and_count()[1] / operations
        self.restart()

    def restart(self):
        self.began, self.seen = time.perf_counter(), 0

    def show(self):
        """-> what a progress bar shows: {"img_s", "mfu"}."""
        rate = self.seen / (time.perf_counter() - self.began)
        self.restart()
        return {"img_s": f"{rate:.0f}", "mfu": f"{rate / self.limit:.0%}"}


def peak_memory(device):
    """Bytes, at most so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource                           # not there on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def benchmark(name, step, images, device, dtype, steps=4):
    """Time step(k), which trains on `images` images, and print one JSON object.

    milliseconds a step, images_per_s, peak_memory_gb, teraflops_per_s, and mfu: those as a share of what a large matrix product
    reaches in the same run. Attention on a CPU is not counted among the operations.
    """
    if rank_and_count()[1] > 1:
        raise InputError("--benchmark measures one process: run it without torchrun")
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step(0), step(1)                      # in a GAN phase, a turn of either network
    for k in (2, 3):                          # compiles, and fills the optimizers' states
        step(k)
    wait_for(device)
    began = time.perf_counter()
    for k in range(steps):
        step(k)
    wait_for(device)
    took = (time.perf_counter() - began) / steps
    done = counter.get_total_flops() / 2 / took
    print(json.dumps({"step": name, "dtype": dtype, "batch": images, "ms": round(took * 1000, 1),
                      "images_per_s": round(images / took, 2), "peak_memory_gb": round(peak_memory(device) / 1e9, 2),
                      "teraflops_per_s": round(done / 1e12, 3), "mfu": round(done / matrix_rate(device, dtype), 3)}))


# -----------------------------------------------------------------------------
# Checkpoints, logs and pictures on disk

def replace_file(path, write, keep=False):
    """write(file) aside, sync, then rename: whoever reads `path` finds the old content or the new, never half of one.

    keep: the old content stays as <path>.previous. InputError when it can't be written; the old content is then untouched.
    """
    folder, aside = os.path.dirname(os.path.abspath(path)), f"{path}.tmp"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and os.path.exists(path):
            os.replace(path, f"{path}.previous")
        os.replace(aside, path)
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    except (OSError, RuntimeError) as error:  # torch.save has a kind of its own for a full disk
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise InputError(f"can't write {path} ({error}); " + ("what it held before is untouched" if os.path.exists(path) else
                                                             "make room, or name another place")) from None


def make_folder(folder):
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't make the folder {folder} ({error}); name another place") from None


def write_text(path, text):
    replace_file(path, lambda file: file.write(text.encode()))


def read_json(path):
    """The dict in a file that `write_text` wrote. InputError when it holds none."""
    try:
        with open(path) as file:
            return dict(json.load(file))
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged; delete the folder it is in to start anew") from None


def create_array(path, dtype, shape, fill):
    """A new memory-mapped .npy of one value. Its room on the disk is taken now: a full disk says so here, not by a crash later."""
    try:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with open(path, "r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path)
        raise InputError(f"can't make {path} of {math.prod(shape) * np.dtype(dtype).itemsize:,} bytes ({error}); make room, or "
                         "name another place") from None
    array[:] = fill
    array.flush()


def save_checkpoint(path, kind, config, model, keep=False, **more):
    """Write a checkpoint: its kind ("tokenizer" or "ar"), config dict, state dict, and whatever else belongs to it.

    keep: the checkpoint that was there stays as <path>.previous, for `load_state`.
    """
    replace_file(path, lambda file: torch.save({"kind": kind, "config": config, "model": model, **more}, file), keep)


def load_state(path, kind):
    """The training state that a run goes on from: that in `path`, or the one before where it is damaged. None: start anew.

    Rank 0 chooses and says so. InputError when there are files and none of them can be used.
    """
    chosen = [None]
    if rank_and_count()[0] == 0:
        there, trouble = [name for name in (path, f"{path}.previous") if os.path.exists(name)], None
        for at, name in enumerate(there):
            try:
                load_checkpoint(name, kind)
                if bad := zipfile.ZipFile(name).testzip():
                    raise InputError(f"{name} is damaged (in {bad})")
                chosen = [name]
                break
            except InputError as error:
                trouble = error
        if trouble and not chosen[0]:
            raise trouble
        if not there:
            tqdm.write(f"no training state at {path} yet: starting at the first step", file=sys.stderr)
        elif chosen[0] != path:
            tqdm.write(f"warning: {trouble or f'{path} is missing'}; going on from the save before it, {chosen[0]}", file=sys.stderr)
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    if not chosen[0]:
        return None
    state = load_checkpoint(chosen[0], kind)
    if over_ranks([state["step"]], dist.ReduceOp.MAX)[0] != -over_ranks([-state["step"]], dist.ReduceOp.MAX)[0]:
        raise InputError(f"the ranks see different contents in {chosen[0]}; --out must be one folder for all of them")
    return state


def load_checkpoint(path, kind, convert=lambda state: None):
    """-> the dict that `save_checkpoint` wrote, on the CPU. InputError for anything but a checkpoint of this kind.

    convert: turns the content of a file this project did not write into such a dict, or returns None.
    """
    if not os.path.isfile(path):
        raise InputError(f"no such checkpoint: {path}" + (" (train_tokenizer.py writes it)" if kind == "tokenizer"
                                                         else " (train_ar.py writes it)"))
    whole = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        if not whole and file.read(4) == b"PK\x03\x04":
            raise InputError(f"{path} is incomplete ({os.path.getsize(path):,} bytes); download or copy it again")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except Exception as error:                # pickle, zip and torch each have their own kinds
        code = re.search(r"unsupported (?:global|class|operand|instruction).*?([\w.]+\.\w+)", str(error), re.I)
        reason = f"loading it would run code: {code[1]}" if code else (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"{path} is not a checkpoint that can be loaded safely, or it is damaged ({reason})") from None
    found = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
    if found is None and isinstance(checkpoint, dict):
        converted = convert(checkpoint)
        if converted:
            return converted
    if found != kind:
        raise InputError(f"{path} is not a checkpoint of kind '{kind}', it holds " +
                         (f"kind '{found}'" if found else "something this project does not know"))
    return checkpoint


def fill(model, state, path):
    """load_state_dict, but a missing, unexpected or misshapen tensor is an InputError that lists them."""
    own = model.state_dict()
    wrong = ([f"{name} is missing" for name in own if name not in state] +
             [f"{name} is unexpected" for name in state if name not in own] +
             [f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}" for name in own
              if name in state and state[name].shape != own[name].shape])
    if wrong:
        raise InputError(f"{path} does not fit the model: {'; '.join(wrong[:20])}" +
                         (f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""))
    model.load_state_dict(state)


def file_digest(path, algorithm="sha256"):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()[:16]


def fetch(address, digest, instead):
    """Path in torch.hub's folder of a file that others publish; one rank of each machine downloads it when it is missing.

    digest: (algorithm, how the file's digest begins), checked before use. instead: what a user without network can do.
    """
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(address))
    (algorithm, begins), part = digest, f"{path}.{os.getpid()}"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        if not os.path.exists(path):
            before = socket.getdefaulttimeout()
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                socket.setdefaulttimeout(30)  # torch.hub sets none, and a firewall may keep it waiting for minutes
                torch.hub.download_url_to_file(address, part)
                if not file_digest(part, algorithm).startswith(begins):
                    raise OSError(f"invalid hash value: its {algorithm} does not begin with {begins}")
                os.replace(part, path)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.remove(part)
                raise InputError(f"can't download {os.path.basename(path)} ({error}); fetch {address} elsewhere and put it at "
                                 f"{path}, or {instead}") from None
            finally:
                socket.setdefaulttimeout(before)
        elif not file_digest(path, algorithm).startswith(begins):
            raise InputError(f"{path} is damaged: its {algorithm} does not begin with {begins}; remove it")
    barrier()
    return path


def load_weights(path):
    """The state dict in a weights file of others, on the CPU. InputError when it can't be loaded without running code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                # pickle, zip and torch each have their own kinds
        raise InputError(f"{path} can't be loaded as weights ({str(error).strip().splitlines()[0]}); get it anew") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} can't be loaded as weights, it holds a {type(state).__name__}: is it another file?")
    return state


class Log:
    """`log.jsonl`: one JSON object a line, {"run": ..., "step": ..., ...}. Rank 0 writes; a resumed run drops its lines
    from beyond the step it goes on from, so the log reads as if nothing had happened."""

    def __init__(self, path, name, step):
        self.path, self.name = path, name
        make_folder(os.path.dirname(path))
        if rank_and_count()[0] == 0 and os.path.exists(path):
            with open(path) as file:
                lines = [line for line in file if line.endswith("\n")]
            entries = [json.loads(line) for line in lines]
            write_text(path, "".join(line for line, entry in zip(lines, entries)
                                     if entry["run"] != name or entry["step"] <= step))

    def write(self, step, **values):
        if rank_and_count()[0] == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"run": self.name, "step": step, **values}) + "\n")
                file.flush()
                os.fsync(file.fileno())


def to_picture(image):
    """(3, H, W) in [0, 1] -> PIL image."""
    return Image.fromarray((image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def grid_image(images, columns):
    """Images (n, 3, H, W) in [0, 1] -> a PIL image of them all, `columns` a row, with white lines between."""
    n, _, height, width = images.shape
    sheet = Image.new("RGB", (columns * (width + 2) + 2, -(-n // columns) * (height + 2) + 2), "white")
    for k, image in enumerate(images):
        sheet.paste(to_picture(image), (2 + k % columns * (width + 2), 2 + k // columns * (height + 2)))
    return sheet


def save_grid(path, images, columns):
    picture = grid_image(images, columns)
    replace_file(path, lambda file: picture.save(file, "PNG"))


# -----------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description="Write a labelled contact sheet of the built-in pictures: a row a shape, "
                                                 "a column a colour, backgrounds along the diagonals.")
    parser.add_argument("--size", type=int, default=96, help="pixels a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=["train", "val"], default="train")
    parser.add_argument("--out", default="shapes.png")
    args = parser.parse_args()
    if not 8 <= args.size <= 1024 or args.seed < 0:
        raise InputError(f"--size is from 8 to 1024 and --seed at least 0, found {args.size} and {args.seed}")
    cell, font = max(args.size, 84), ImageFont.load_default(11)
    sheet = Image.new("RGB", (10 * (cell + 6), 10 * (args.size + 50)), "white")
    pen = ImageDraw.Draw(sheet)
    for shape in range(10):
        for colour in range(10):
            label = 100 * shape + 10 * colour + (shape + colour) % 10
            left, top = colour * (cell + 6) + 3, shape * (args.size + 50) + 3
            sheet.paste(Image.fromarray(draw_shape(args.seed, args.split, label, args.size)[0]), (left, top))
            words = f"{label:03d} {SHAPE_CLASSES[label]}".replace(" on", "\non").replace(SHAPES[shape], f"\n{SHAPES[shape]}")
            pen.multiline_text((left, top + args.size + 1), words, "black", font, spacing=1)
    replace_file(args.out, lambda file: sheet.save(file, "PNG"))
    print(f"wrote {args.out}: classes read as shape, colour, background ({args.split} pictures, seed {args.seed})")


if __name__ == "__main__":
    run(main)
