"""The numbers generated pictures are judged by: FID, sFID, Inception Score, precision and recall, as ADM's evaluator has them.

    python fid.py reference.npz samples.npz                   # each an .npz of images or statistics, or a folder of images
    python fid.py imagenet/val --crop 256 --save-stats val.npz
    python fid.py --tokenizer out/tokenizer.pt --data shapes  # rFID, PSNR, SSIM and codebook use; --data also takes a folder
    python fid.py --shapes samples.npz                        # built-in pictures: do they show shape, colour and background?
    python fid.py --shapes runs/a-0 runs/a-1 runs/b-0         # and whole runs beside each other, seeds averaged
    torchrun --nproc_per_node=8 fid.py reference.npz samples.npz

Notable:
- The network is the Inception of 2015-12-05 behind all published figures, not torchvision's: its average pools leave padding
  out, its last block pools with max, and pictures are resized as TensorFlow 1 did it. Its weights are downloaded once.
- Where a file holds mu, sigma, mu_s, sigma_s, they stand for FID and sFID, and its arr_0 serves precision and recall.
- Images pass by in batches; what stays in memory is 16 kB of features an image. Gaussians are float64.
- The trace of sqrt(S1 S2) is a sum of singular values, which rank-deficient covariances (few images) don't disturb.
- The Inception Score is averaged over runs of 5000 images in file order, so classes must be well mixed.
"""
import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import InputError
from tokenizer import load_tokenizer

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
ADDRESS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS
PUBLISHED = "6726825d"           # how the sha256 of the published weights begins
FEW_IMAGES = 5000                # ours: below, a warning that FID is biased
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}


# -----------------------------------------------------------------------------
# Inception of 2015-12-05. Modules bear the names that the weights file gives them.

class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU. Keeps the size unless it has a stride or is not padded."""

    def __init__(self, inputs, outputs, kernel, stride=1, padded=True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, joined along channels: (B, inputs, h, w) -> (B, sum, h, w), halved with stride 2.

    branches: {name: [step, ...]}; a step is (channels, kernel), or a list of two that read the same input. branch_pool
    starts with the pool; the stride is the last step's. Names count the steps of a branch, _1, _2a, _2b, if it has several.
    """

    def __init__(self, inputs, pool, stride=1, **branches):
        super().__init__()
        self.pool, self.stride, self.branches = pool, stride, {}
        for branch, steps in branches.items():
            width, self.branches[branch] = inputs, []
            for k, step in enumerate(steps, 1):
                number = f"_{k}" if len(steps) > 1 else ""
                parts = {number + letter: part for letter, part in zip("ab", step)} if isinstance(step, list) else {number: step}
                for suffix, (channels, kernel) in parts.items():
                    self.add_module(branch + suffix, ConvNorm(width, channels, kernel, stride if k == len(steps) else 1))
                self.branches[branch].append([branch + suffix for suffix in parts])
                width = sum(channels for channels, _ in parts.values())

    def forward(self, x):
        outputs, padding = [], 2 - self.stride
        for branch, steps in self.branches.items():
            y = x
            if branch == "branch_pool":
                y = (F.max_pool2d(x, 3, self.stride, padding) if self.pool == "max" else
                     F.avg_pool2d(x, 3, self.stride, padding, count_include_pad=False))
            for names in steps:
                y = torch.cat([getattr(self, name)(y) for name in names], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def mixed_a(inputs, pooled):             # -> 224 + pooled channels
    return Mixed(inputs, "avg", branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
                 branch_pool=[(pooled, 1)])


def mixed_c(c):                          # 768 -> 768 channels
    row, column = (1, 7), (7, 1)
    return Mixed(768, "avg", branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, row), (192, column)],
                 branch7x7dbl=[(c, 1), (c, column), (c, row), (c, column), (192, row)], branch_pool=[(192, 1)])


def mixed_e(inputs, pool):               # -> 2048 channels
    both = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(inputs, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), both], branch3x3dbl=[(448, 1), (384, 3), both],
                 branch_pool=[(192, 1)])


class Inception(nn.Module):
    """(B, 3, 299, 299) floats from `prepare` -> (B, 4071): 2048 pool features, 2023 spatial ones."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_a(192, 32), mixed_a(256, 64), mixed_a(288, 64)
        self.Mixed_6a = Mixed(288, "max", 2, branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (mixed_c(c) for c in (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, "max", 2, branch3x3=[(192, 1), (320, 3)],
                              branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)], branch_pool=[])
        self.Mixed_7b, self.Mixed_7c = mixed_e(1280, "avg"), mixed_e(2048, "max")
        self.fc = nn.Linear(2048, 1008)                                      # its weight serves the Inception Score

    def forward(self, x):
        x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))                        # (B, 32, 147, 147)
        x = F.max_pool2d(self.Conv2d_2b_3x3(x), 3, 2)                        # (B, 64, 73, 73)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)    # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                   # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))    # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                    # (B, 2023): of the 1x1 branch, which comes first
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))    # (B, 2048, 8, 8)
        return torch.cat([x.mean((2, 3)), spatial], 1)


def prepare(images):
    """(B, 3, H, W) uint8 -> (B, 3, 299, 299) floats in [-1, 1), by TensorFlow 1's bilinear rule without half-pixel centres."""
    x = images.float()
    for dim in (2, 3):
        size = x.shape[dim]
        source = torch.arange(299, device=x.device) * (size / 299)
        low = source.long().clamp_max(size - 1)
        share = (source - low).view(-1, *[1] * (3 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(size - 1)), share)
    return x.sub_(128).div_(128)


def load_inception(choice=None, device=torch.device("cpu")):
    """The network in eval mode; `origin` says whose figures these are: how the file's sha256 begins, or "random".

    choice: a weights file, "random" (seeded, to try things offline), or None for the published weights, downloaded on first
    use to torch.hub's folder. InputError when there is no such file, no internet, or another network in the file.
    """
    with torch.random.fork_rng(devices=[]):                                  # a training run's random numbers stay its own
        torch.manual_seed(0)
        net = Inception()
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    net.origin = "random"
    if choice != "random":
        path = choice or data.fetch(ADDRESS, ("sha256", PUBLISHED), "name it with --inception PATH; --inception random does "
                                    "without, for trials only")
        state = data.load_weights(path)
        net.origin = data.file_digest(path)[:len(PUBLISHED)]
        wanted = {name: value.shape for name, value in net.state_dict().items()}
        if {name: getattr(value, "shape", None) for name, value in state.items()} != wanted:
            raise InputError(f"{path} holds another network than the Inception of 2015-12-05, whose file is {WEIGHTS}")
        net.load_state_dict(state)
    if device.type == "cpu":
        net.to(memory_format=torch.channels_last)                            # 1.7 times as fast there
    return net.to(device).eval().requires_grad_(False)


# -----------------------------------------------------------------------------
# Where images come from

class NpzImages:
    """`arr_0` of an .npz, uint8 (n, H, W, 3), read from start to end and never in memory as a whole."""

    def __init__(self, path):
        self.path = path
        if not os.path.isfile(path):
            raise InputError(f"no such file: {path}")
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                self.shape, by_column, kind = headers[np.lib.format.read_magic(file)](file)
                self.start = file.tell()
        except Exception as error:            # zipfile, zlib and numpy each have their own kinds
            raise InputError(f"{path} is not an .npz file of images (arr_0), or it is damaged ({error})") from None
        if kind != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or by_column:
            found = ("objects, as of images of different sizes" if kind == object else
                     f"{kind} {self.shape}" + " in Fortran order" * by_column)
            raise InputError(f"arr_0 in {path} must be images of one size, uint8 (n, H, W, 3) from 0 to 255; it is {found}")

    def __len__(self):
        return self.shape[0]

    def batches(self, parts):
        """The images at each list of indices in `parts`, all in rising order: (B, 3, H, W) uint8, and None for their classes."""
        image = math.prod(self.shape[1:])
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            for part in parts:
                pixels = bytearray()
                try:
                    for index in part:
                        file.seek(self.start + index * image)
                        pixels += file.read(image)
                    pixels = np.frombuffer(pixels, np.uint8).reshape(len(part), *self.shape[1:])
                except Exception as error:    # zipfile, zlib and numpy each have their own kinds
                    raise InputError(f"{self.path} is damaged or incomplete around image {part[0]} ({error})") from None
                yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), None


class Folder:
    """All images in a folder, at any depth, in the order of their paths; centre-cropped to crop x crop if that is given."""

    def __init__(self, folder, crop=None):
        self.crop, self.size = crop, None
        self.paths = sorted(os.path.join(where, name) for where, _, names in os.walk(folder) for name in names
                            if name.lower().endswith(data.IMAGE_SUFFIXES) and not name.startswith("."))

    def __len__(self):
        return len(self.paths)

    def read(self, epoch, index):
        image = data.read_image(self.paths[index])
        if self.crop:
            return data.to_tensor(data.centre_crop(image, self.crop)), index
        self.size = self.size or data.read_image(self.paths[0]).size
        if image.size != self.size:
            raise InputError(f"images must be of one size: {self.paths[index]} is {image.width}x{image.height}, {self.paths[0]} "
                             f"{self.size[0]}x{self.size[1]}; --crop N makes them N x N as ADM prepares ImageNet")
        return data.to_tensor(np.asarray(image)), index


def ahead(batches):
    """The same batches, each read by a thread while the one before is worked on; unpacking does not hold Python's lock."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def image_batches(images, count, name, batch_size=64, workers=0):
    """This rank's share of `count` images, evenly spread, of a NpzImages, a Folder or a data set of data.py, with a progress bar.

    Yields their places among the `count`, as a range, and the images (B, 3, H, W) uint8.
    """
    rank, ranks = data.rank_and_count()
    chosen = data.spread(len(images), count)
    spans = [range(at, min(at + batch_size, count)) for at in range(rank * batch_size, count, ranks * batch_size)]
    if isinstance(images, NpzImages):
        stream = ahead(images.batches([[chosen[k] for k in span] for span in spans]))
    else:
        stream = data.batches(images, [[(0, chosen[k]) for k in span] for span in spans], workers)
    with tqdm(total=count, desc=name, unit="img", disable=rank > 0) as progress:
        for span, (pixels, _) in zip(spans, stream):
            yield span, pixels
            progress.update(min(len(span) * ranks, count - progress.n))


# -----------------------------------------------------------------------------
# Statistics of many images

@contextlib.contextmanager
def full_precision():
    """float32 means float32 in here, where cuDNN's defaults and training allow TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def gaussian(rows):
    """(n, D) -> mean (D,), covariance (D, D), in float64 on the CPU."""
    rows = rows.cpu() if rows.device.type == "mps" else rows                 # Apple's GPUs have no float64
    mean = rows.mean(0, dtype=torch.float64)
    scatter = sum((part - mean).T @ (part - mean) for part in rows.split(4096))
    return mean.cpu(), scatter.cpu() / (len(rows) - 1)


class Features:
    """Collects the features of `count` images, of which each rank adds its share. InputError for fewer than two."""

    def __init__(self, count, net, device, where=""):
        if count < 2:
            raise InputError(f"statistics need two images at least, found {count}{where}")
        self.net, self.device, self.seconds = net, device, 0.0               # seconds: in the network
        self.rows = torch.zeros(count, 4071, device=device)

    @torch.no_grad()
    def add(self, indices, images):
        """indices: a range of places in the whole set. images: (B, 3, H, W) uint8 on any device."""
        with full_precision():
            x = prepare(images.to(self.device, non_blocking=True))
            began = self.clock()
            rows = self.net(x)
            self.seconds += self.clock() - began
        self.rows[indices.start:indices.stop] = rows

    def clock(self):
        data.wait_for(self.device)
        return time.perf_counter()

    def finish(self):
        """On rank 0 {"mu", "sigma": of the pool features, "mu_s", "sigma_s": of the spatial ones, "pool": (count, 2048),
        "count"}, on the others {}. Every rank calls it."""
        if dist.is_initialized():
            dist.reduce(self.rows, 0)         # every image was read by one rank and is zero on the others
        if data.rank_and_count()[0] > 0:
            return {}
        pool, spatial = self.rows.split([2048, 2023], 1)
        return dict(zip([*STATISTICS, "pool", "count"], [*gaussian(pool), *gaussian(spatial), pool, len(pool)]))


def extract(images, net, device, count=None, name="features", benchmark=False, **options):
    """What Features.finish says of `count` images, by default all; InputError for fewer than two. options: of `image_batches`.

    benchmark: also print the share of time outside the network, from the second batch on, since the first warms up.
    """
    count = min(len(images), count or len(images))
    features, began = Features(count, net, device, f" in {name}"), None
    for batch in image_batches(images, count, name, **options):
        features.add(*batch)
        if began is None:
            began, features.seconds = time.perf_counter(), 0.0
    if benchmark and features.seconds and data.rank_and_count()[0] == 0:
        share = 1 - features.seconds / (time.perf_counter() - began)
        print(f"{name}: {share:.1%} of the time was spent outside the network", file=sys.stderr)
    return features.finish()


def load_statistics(path, net, device, crop=None, **options):
    """Like Features.finish, of an .npz of images or statistics or both, or of a folder; without what can't be known.

    crop: for a folder; options: for `extract`. InputError for anything else, and for statistics of another network.
    """
    if os.path.isdir(path):
        return extract(Folder(path, crop), net, device, name=path, **options)
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not an .npz file, or it is damaged")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in [*STATISTICS, "count", "inception"] if name in file.files}
            names = file.files
        images = NpzImages(path) if "arr_0" in names else None
    except InputError:
        raise
    except Exception as error:                # zipfile, zlib and numpy each have their own kinds
        raise InputError(f"{path} is not an .npz file, or it is damaged ({error})") from None
    for name, shape in STATISTICS.items():
        if name in found and (found[name].shape != shape or found[name].dtype.kind != "f" or not np.isfinite(found[name]).all()):
            raise InputError(f"{name} in {path} must be finite floats {shape}, it is {found[name].dtype} {found[name].shape}")
    if "arr_0" not in names and not {"mu", "sigma"} <= set(found):
        raise InputError(f"{path} has neither images (arr_0) nor statistics (mu, sigma), only {', '.join(names) or 'nothing'}")
    origin = str(found.get("inception", PUBLISHED))
    if "mu" in found and origin != net.origin:
        raise InputError(f"the statistics in {path} come from the Inception {origin}, this run's is {net.origin}")
    statistics = extract(images, net, device, name=path, **options) if "arr_0" in names else {}
    if "mu" in found:
        statistics.pop("count", None)         # of a subset of the images that the statistics are of
    return {**statistics, **{name: torch.from_numpy(found[name]).double() for name in STATISTICS if name in found},
            **{name: int(found[name]) for name in ["count"] if name in found}}


# -----------------------------------------------------------------------------
# The metrics

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: means (D,), covariances (D, D) of any rank.

    With S = F F^T the trace of sqrt(S1 S2) is the sum of the singular values of F1^T F2. An eigenvalue that should be 0 and
    is 1e-16 by rounding has the square root 1e-8; a singular value stays at 1e-16.
    """
    def factor(sigma):
        values, vectors = torch.linalg.eigh(sigma.double())
        kept = values > values.abs().max() * len(values) * torch.finfo(torch.float64).eps
        return vectors[:, kept] * values[kept].sqrt()                        # (D, rank)

    overlap = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    return max(0.0, ((mu1 - mu2).double().square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap).item())


def inception_score(pool, weight, split=5000):
    """exp of the mean KL divergence from each image's classes to their average, over runs of `split` images, averaged.

    pool (n, 2048); weight (1008, 2048), of the last layer, whose bias ADM's evaluator leaves out.
    """
    weight, scores = weight.cpu().double(), []
    for part in pool.split(split):
        log_p = (part.cpu().double() @ weight.T).log_softmax(1)
        scores.append((log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(reference, samples, k=3, block=25_000_000):
    """Share of samples within the reference's manifold, and of the reference within theirs (Kynkaanniemi et al.).

    A manifold is the union of balls around features, each as wide as the distance to the k-th nearest other feature.
    reference (n, D), samples (m, D), on one device; `block` distances are held at a time. None twice for k images or fewer.
    """
    if min(len(reference), len(samples)) <= k:
        return None, None
    sets = [x - reference.mean(0) for x in (reference, samples)]             # |a|^2 + |b|^2 - 2ab is exact for small a, b only

    def distances(a, b):                      # squared, from blocks of a to all of b: (rows, len(b)) each
        squares = b.square().sum(1)
        for rows in a.split(max(1, block // len(b))):
            yield torch.addmm(squares, rows, b.T, alpha=-2).add_(rows.square().sum(1, keepdim=True))

    with full_precision():                    # the nearest feature of all is the feature itself
        radii = [torch.cat([d.topk(k + 1, largest=False).values[:, k] for d in distances(x, x)]) for x in sets]
        return tuple(torch.cat([(d <= radii[at]).any(1) for d in distances(sets[1 - at], sets[at])]).float().mean().item()
                     for at in (0, 1))


def compare(reference, samples, net):
    """Two results of `load_statistics` -> {"FID", "sFID", "IS", "precision", "recall"}: numbers, None where unknown."""
    def distance(*names):
        known = set(names) <= set(reference) & set(samples)
        return frechet_distance(*(x[name] for x in (reference, samples) for name in names)) if known else None

    pools = [x.get("pool") for x in (reference, samples)]
    precision, recall = (None, None) if any(pool is None for pool in pools) else precision_recall(*pools)
    return {"FID": distance("mu", "sigma"), "sFID": distance("mu_s", "sigma_s"),
            "IS": None if pools[1] is None else inception_score(pools[1], net.fc.weight),
            "precision": precision, "recall": recall}


def psnr(a, b):
    """Peak signal-to-noise ratio of each pair of images in [0, 1], in dB: (B, 3, H, W) twice -> (B,)."""
    return -10 * (a - b).float().pow(2).mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()


def ssim(a, b):
    """Structural similarity of each pair of images in [0, 1]: (B, 3, H, W) twice -> (B,). InputError below 11 pixels.

    Wang et al.'s: Gaussian window 11 x 11 of sigma 1.5, wholly inside the image, K 0.01 and 0.03, data range 1, RGB averaged.
    """
    if min(a.shape[2:]) < 11:
        raise InputError(f"SSIM needs images of 11 pixels a side at least, these are {a.shape[3]}x{a.shape[2]}")
    window = torch.exp(-torch.arange(-5.0, 6.0, device=a.device).square() / (2 * 1.5 ** 2))
    window = window / window.sum()
    planes = torch.cat([a, b, a * a, b * b, a * b]).flatten(0, 1)[:, None]                                # (15 B, 1, H, W)
    planes = F.conv2d(F.conv2d(planes, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
    mean_a, mean_b, aa, bb, ab = planes.view(5, len(a), -1)
    c1, c2, product, squares = 0.01 ** 2, 0.03 ** 2, mean_a * mean_b, mean_a ** 2 + mean_b ** 2
    return ((2 * product + c1) * (2 * (ab - product) + c2) / ((squares + c1) * (aa + bb - squares + c2))).mean(1)


@torch.no_grad()
def tokenizer_metrics(tokenizer, images, net, device, count=None, **options):
    """How well a tokenizer reconstructs `count` pictures of a data set of its image size; options: of `image_batches`.

    -> {"rFID", "PSNR" in dB, "SSIM", "codebook_use": share of codes that occur, "codebook_entropy" in bits}; {} on ranks
    above 0. Reconstructions are rounded to 8 bits, as saved pictures are. InputError for fewer than two pictures.
    """
    count = min(len(images), count or len(images))
    real, painted = Features(count, net, device), Features(count, net, device)
    used, sums = torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64, device=device), {"PSNR": 0.0, "SSIM": 0.0}
    for indices, pixels in image_batches(images, count, "reconstructing", **options):
        before = data.to_float(pixels, device)
        tokens = tokenizer.encode(before)
        after = (tokenizer.decode(tokens) * 255).round().byte()
        real.add(indices, pixels)
        painted.add(indices, after)
        used += torch.bincount(tokens.flatten(), minlength=len(used))
        with full_precision():
            for name, measure in (("PSNR", psnr), ("SSIM", ssim)):
                sums[name] += measure(data.to_float(after, device), before).sum().item()
    if dist.is_initialized():
        dist.all_reduce(used)
    means = {name: total / count for name, total in zip(sums, data.over_ranks(list(sums.values())))}
    real, painted, share = real.finish(), painted.finish(), used.cpu().double() / used.sum().item()
    if not real:
        return {}
    rfid = frechet_distance(real["mu"], real["sigma"], painted["mu"], painted["sigma"])
    return {"rFID": rfid, **means, "codebook_use": (share > 0).double().mean().item(),
            "codebook_entropy": torch.special.entr(share).sum().item() / math.log(2)}


# -----------------------------------------------------------------------------
# Are samples of the built-in pictures what was asked for?

def shape_classifier(size, steps=800):
    """A small network, trained on the true pictures for about a minute: images (B, 3, size, size) in [0, 1] -> logits (B, 30), ten
    each for shape, colour and background. Half of its training is on blurred pictures, so that softness is no clue."""
    def stage(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU()]

    torch.manual_seed(0)
    net = nn.Sequential(*stage(3, 32), *stage(32, 64), *stage(64, 128), *stage(128, 128), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                        nn.Linear(128 * 16, 30))
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    stream = data.batches(data.Shapes("train", size, 0, 50_000), data.batch_keys(50_000, 0, 64, 1, 0, 0, 1))
    for step, (images, labels) in zip(tqdm(range(steps), desc="classifier"), stream):
        images = images.float() / 255 + 0.02 * torch.randn(len(images), 3, 1, 1)
        if step % 2:
            images = F.interpolate(F.avg_pool2d(images, 2), (size, size), mode="bilinear")
        logits = net(images.clamp(0, 1)).view(-1, 3, 10)
        F.cross_entropy(logits.flatten(0, 1), data.shape_digits(labels).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval()


@torch.no_grad()
def shape_accuracy(classifier, images, labels):
    """Images (n, 3, H, W) in [0, 1] of classes (n,) -> shares right: {"shape", "colour", "background", "all"}."""
    found = torch.cat([classifier(part).view(-1, 3, 10).argmax(2) for part in images.split(100)])
    right = found == data.shape_digits(labels)
    return {**dict(zip(("shape", "colour", "background"), right.double().mean(0).tolist())),
            "all": right.all(1).double().mean().item()}


def last_evaluations(folder):
    """What a run's log.jsonl says last of each stage: {"stage 1 val_psnr": number, "ar val_loss": number, ...}. {} without one."""
    values, path = {}, os.path.join(folder, "log.jsonl")
    if os.path.exists(path):
        with open(path) as file:
            for line in (json.loads(line) for line in file if line.endswith("\n")):           # a last line may be half written
                values |= {f"{line['run'].removeprefix('tokenizer ')} {name}": value for name, value in line.items()
                           if name.startswith(("val_", "train_")) and value is not None}
    return values


def judge_shapes(paths, png=None, steps=800):
    """Print a table of what samples of the built-in pictures show: shares right, and the Frechet distance to true pictures in the
    classifier's features; the same of validation pictures, as a ceiling.

    paths: .npz files of samples, classes in turn, or folders of runs with samples.npz and log.jsonl, whose last evaluations are
        shown, too. Folders that differ only in a final -number share a column: mean and standard deviation over them.
    png: where a grid goes, a row for each column of the table, of its first folder or file.
    steps: of the classifier's training.
    """
    def true_pictures(split, count):
        pictures = data.Shapes(split, size, 0, count)
        return torch.stack([pictures.read(0, k)[0] for k in range(count)])

    def judge(images):
        images = images.float() / 255
        with torch.no_grad():
            features = torch.cat([classifier[:-3](part).mean((2, 3)) for part in images.split(100)])
        return {f"samples {name}": share for name, share in
                shape_accuracy(classifier, images, torch.arange(len(images)) % 1000).items()}, gaussian(features)

    files = [NpzImages(os.path.join(path, "samples.npz") if os.path.isdir(path) else path) for path in paths]
    size = files[0].shape[1]
    if any(file.shape[1:3] != (size, size) for file in files):
        raise InputError(f"--shapes takes square pictures of one size, found {', '.join(str(file.shape[1:3]) for file in files)}")
    classifier = shape_classifier(size, steps)
    _, reference = judge(true_pictures("train", 5000))
    columns, shown = {}, {}
    for path, images in (*((path, next(file.batches([range(len(file))]))[0]) for path, file in zip(paths, files)),
                         ("true pictures", true_pictures("val", 1000))):
        shares, found = judge(images)
        values = {**(last_evaluations(path) if os.path.isdir(path) else {}), **shares,
                  "samples Frechet distance": frechet_distance(*reference, *found)}
        name = re.sub(r"-\d+$", "", os.path.normpath(path)) if os.path.isdir(path) else path
        shown.setdefault(name, images[[k * len(images) // 16 for k in range(16)]])           # 16, to fill its row, also of fewer
        for what, value in values.items():
            columns.setdefault(name, {}).setdefault(what, []).append(value)
    if png:
        data.save_grid(png, torch.cat(list(shown.values())) / 255, 16)
    rows = dict.fromkeys(what for values in columns.values() for what in values)
    counts = [len(next(iter(values.values()))) for values in columns.values()]
    print("| | " + " | ".join(name + (f" ({count} runs)" if count > 1 else "") for name, count in zip(columns, counts)) + " |\n" +
          "|---" * (1 + len(columns)) + "|")
    for what in rows:
        cells = [values.get(what, []) for values in columns.values()]
        print(f"| {what} | " + " | ".join((f"{np.mean(cell):.4g}" + (f" ± {np.std(cell, ddof=1):.2g}" if len(cell) > 1 else ""))
                                          if cell else "" for cell in cells) + " |")


# -----------------------------------------------------------------------------

def report(values, net, counts, as_json):
    """Print {name: number or None} for people or, as JSON, for machines; warnings go to stderr."""
    notes, published = [], net.origin == PUBLISHED
    if not published:
        notes.append("Inception is " + ("a random network" if net.origin == "random" else f"of other weights, {net.origin}") +
                     ": its figures are not comparable with published ones")
    few = [count for count in counts if count is not None and count < FEW_IMAGES]
    if few and not {"FID", "rFID"}.isdisjoint(values):
        notes.append(f"FID of {min(few)} images is biased upwards; compare it only with figures of as many images")
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps({**values, "images": counts, "inception": net.origin, "comparable": published, "warnings": notes}))
        return
    units = {"PSNR": "dB", "SSIM": "", "codebook_use": "of the codes", "codebook_entropy": "bits"}     # no Inception in these
    for name, value in values.items():
        unit = units.get(name, "" if published else "(not comparable with published figures)")
        print(f"{name:<17}" + ("unknown (it takes images, 4 at least)" if value is None else f"{value:.6g} {unit}".rstrip()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", nargs="?", help=".npz of images or statistics, or folder; alone, it gets an Inception Score")
    parser.add_argument("samples", nargs="?", help="likewise; judged against the reference")
    parser.add_argument("--tokenizer", help="judge this tokenizer's reconstructions of --data")
    parser.add_argument("--shapes", nargs="+", metavar="PATH", help="how many samples of the built-in pictures show the class asked "
                        "for: .npz files, or folders of runs, averaged where they differ only in a final -number")
    parser.add_argument("--png", help="with --shapes: also a grid of samples, a row for each column of the table")
    parser.add_argument("--data", help="'shapes', the built-in validation pictures, or a folder of images, to be centre-cropped")
    parser.add_argument("--num-images", type=int, help="so many images of each set, evenly spread (default: all; 1000 of shapes)")
    parser.add_argument("--crop", type=int, help="make a folder's images this size: shorter side resized, centre cropped")
    parser.add_argument("--save-stats", metavar="NPZ", help="write mu, sigma, mu_s and sigma_s of the last argument")
    parser.add_argument("--inception", metavar="PATH", help="weights file (default: downloaded once), or 'random', for trials")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, help="processes a rank that read a folder (default: 8 with a GPU, else 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--benchmark", action="store_true", help="also print the share of time spent outside the network")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    for flag, value, low in (("num-images", args.num_images, 2), ("crop", args.crop, 1), ("batch-size", args.batch_size, 1),
                             ("workers", args.workers, 0)):
        if value is not None and value < low:
            raise InputError(f"--{flag} is at least {low}, found {value}")
    if args.shapes and not (args.tokenizer or args.data or args.reference):
        return judge_shapes(args.shapes, args.png)
    if args.png:
        raise InputError("--png goes with --shapes alone")
    if args.shapes or bool(args.tokenizer) != bool(args.data) or bool(args.tokenizer) == bool(args.reference):
        raise InputError("name one or two sets of images, or --tokenizer and --data, or --shapes")
    if args.tokenizer and (args.crop or args.save_stats or args.benchmark):
        raise InputError("--crop, --save-stats and --benchmark go with sets of images, not with --tokenizer")
    paths = [path for path in (args.reference, args.samples, args.data) if path and path != "shapes"]
    for path in paths:                        # before anything is downloaded
        if not os.path.exists(path):
            raise InputError(f"no such file or folder: {path}")
    rank, _, device = data.start_ranks(args.device)
    options = dict(count=args.num_images, batch_size=args.batch_size,
                   workers=(0 if device.type == "cpu" else 8) if args.workers is None else args.workers)
    if args.tokenizer:
        tokenizer, net = load_tokenizer(args.tokenizer, device), load_inception(args.inception, device)
        size = tokenizer.config.image_size
        images = data.Shapes("val", size, 0, args.num_images or 1000) if args.data == "shapes" else Folder(args.data, size)
        values = tokenizer_metrics(tokenizer, images, net, device, **options)
        counts = [min(len(images), args.num_images or len(images))]
    else:
        net = load_inception(args.inception, device)
        sets = [load_statistics(path, net, device, args.crop, benchmark=args.benchmark, **options) for path in paths]
        if rank == 0:
            values, counts = compare(sets[0], sets[-1], net), [x.get("count") for x in sets]
            values = values if args.samples else {"IS": values["IS"]}
            if args.save_stats:
                arrays = {name: value for name, value in sets[-1].items() if name != "pool"}
                data.replace_file(args.save_stats, lambda file: np.savez(file, **arrays, inception=net.origin))
    if rank == 0:
        report(values, net, counts, args.json)


if __name__ == "__main__":
    data.run(main)
