"""Networks of others that judge pictures, and the numbers that generated pictures are judged by.

    python fid.py reference.npz samples.npz      # each an .npz of images or statistics, or a folder of images
    python fid.py imagenet/val --crop 256 --save-stats val.npz
    python fid.py --tokenizer out/tokenizer.pt --data shapes            # rFID, PSNR and codebook use
    torchrun --nproc_per_node=8 fid.py reference.npz samples.npz

Notable:
- The numbers are those of ADM's evaluator. Its network is the Inception of 2015-12-05, not torchvision's:
  average pools leave padding out, the last block pools with max, pictures are resized as by TensorFlow 1.
- The Inception Score is averaged over runs of 5000 images in file order, so classes must be well mixed.
"""
import argparse
import json
import math
import os
import sys
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
from data import InputError
from tokenizer import load_tokenizer

PUBLISHED = "6726825d"           # how the sha256 of the published Inception begins
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}

# Where the weights are published, and how the sha256 of the files begins.
WEIGHTS = {
    "inception": ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                  "pt_inception-2015-12-05-6726825d.pth", PUBLISHED),
    "convnext": ("https://download.pytorch.org/models/convnext_small-0c510722.pth", "0c510722"),
    "vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "lpips": ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth", ""),
}

def find_weights(name, place=None):
    """The path of a network's weights: `place`, the file in the folder `place`, or downloaded once (None).
    One rank of each machine downloads, to torch.hub's folder. InputError when the file can't be had."""
    address, digest = WEIGHTS[name]
    file_name = os.path.basename(address)
    path = place or os.path.join(torch.hub.get_dir(), "checkpoints", file_name)
    if os.path.isdir(path):
        path = f"{path}/{file_name}"
    if place and not os.path.isfile(path):
        raise InputError(f"no such file: {path}; it is published at {address}")
    if os.environ.get("LOCAL_RANK", "0") == "0" and not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(address, path, digest)
        except (OSError, RuntimeError) as error:
            raise InputError(f"can't download {file_name} ({error}); fetch {address} and put it at "
                             f"{path}, or name its place by --inception or --vision-weights") from None
    data.barrier()
    return path

# ---- Inception of 2015-12-05. Modules bear the names that the weights file gives them. -----------

# A line a block: pool | branches, side by side. A branch: name, steps of channels:kernel (or channels for
# 1x1). The last step has stride 2 if the pool ends in /2. Two kernels in a step convolve the same input.
MIXED = {
    "5b": "avg   | 1x1 64  | 5x5 48 64:5x5 | 3x3dbl 64 96:3x3 96:3x3 | _pool 32",
    "5c": "avg   | 1x1 64  | 5x5 48 64:5x5 | 3x3dbl 64 96:3x3 96:3x3 | _pool 64",
    "5d": "avg   | 1x1 64  | 5x5 48 64:5x5 | 3x3dbl 64 96:3x3 96:3x3 | _pool 64",
    "6a": "max/2 | 3x3 384:3x3 | 3x3dbl 64 96:3x3 96:3x3 | _pool",
    "6b": "avg | 1x1 192 | 7x7 128 128:1x7 192:7x1 | 7x7dbl 128 128:7x1 128:1x7 128:7x1 192:1x7 | _pool 192",
    "6c": "avg | 1x1 192 | 7x7 160 160:1x7 192:7x1 | 7x7dbl 160 160:7x1 160:1x7 160:7x1 192:1x7 | _pool 192",
    "6d": "avg | 1x1 192 | 7x7 160 160:1x7 192:7x1 | 7x7dbl 160 160:7x1 160:1x7 160:7x1 192:1x7 | _pool 192",
    "6e": "avg | 1x1 192 | 7x7 192 192:1x7 192:7x1 | 7x7dbl 192 192:7x1 192:1x7 192:7x1 192:1x7 | _pool 192",
    "7a": "max/2 | 3x3 192 320:3x3 | 7x7x3 192 192:1x7 192:7x1 192:3x3 | _pool",
    "7b": "avg   | 1x1 320 | 3x3 384 384:1x3:3x1 | 3x3dbl 448 384:3x3 384:1x3:3x1 | _pool 192",
    "7c": "max   | 1x1 320 | 3x3 384 384:1x3:3x1 | 3x3dbl 448 384:3x3 384:1x3:3x1 | _pool 192",
}

class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU. Keeps the size unless it has a stride or is not padded."""
    def __init__(self, inputs, outputs, kernel, stride=1, padded=True):
        super().__init__()
        kernel = [int(size) for size in kernel.split("x")]
        padding = "same" if padded and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

class Mixed(nn.Module):
    """A block of MIXED: (B, inputs, h, w) -> (B, self.outputs, h, w), or half the size."""
    def __init__(self, inputs, line):
        super().__init__()
        pool, *branches = line.split("|")
        pool_stride = 2 if "/2" in pool else 1
        self.pool = nn.MaxPool2d(3, pool_stride, 2 - pool_stride)
        if "avg" in pool:
            self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.branches, self.outputs = {}, 0
        for branch in branches:
            name, *steps = branch.split()
            width, self.branches[name] = inputs, []
            for k, step in enumerate(steps, 1):
                channels, *kernels = step.split(":")
                stride = pool_stride if k == len(steps) else 1
                convs = [ConvNorm(width, int(channels), kernel, stride) for kernel in kernels or ["1x1"]]
                number = f"_{k}" if len(steps) > 1 else ""          # as the weights file counts: _1, _2a, _2b
                for letter, conv in zip("ab" if len(convs) > 1 else [""], convs):
                    self.add_module(f"branch{name}{number}{letter}", conv)
                self.branches[name].append(convs)
                width = int(channels) * len(convs)
            self.outputs += width

    def forward(self, x):
        outputs = []
        for branch, steps in self.branches.items():
            y = self.pool(x) if branch == "_pool" else x
            for convs in steps:
                y = torch.cat([conv(y) for conv in convs], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)

class Inception(nn.Module):
    """(B, 3, 299, 299) floats from `prepare` -> (B, 4071): 2048 pool features, 2023 spatial ones."""
    def __init__(self):
        super().__init__()                                              # `forward` calls these in this order
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, "3x3", stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, "3x3", padded=False)           # (B, 32, 147, 147)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, "3x3")
        self.pool_2 = nn.MaxPool2d(3, 2)                                     # (B, 64, 73, 73)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, "1x1")
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, "3x3", padded=False)
        self.pool_4 = nn.MaxPool2d(3, 2)                                     # (B, 192, 35, 35)
        channels = 192
        for name, line in MIXED.items():                                # 5: 35 x 35, 6: 17 x 17, 7: 8 x 8
            block = Mixed(channels, line)
            self.add_module(f"Mixed_{name}", block)
            channels = block.outputs
        self.fc = nn.Linear(2048, 1008)                                # its weight serves the Inception Score

    def forward(self, x):
        for name, layer in self.named_children():
            if name != "fc":
                x = layer(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)            # (B, 2023): of the 1x1 branch
        return torch.cat([x.mean((2, 3)), spatial], 1)

def prepare(images):
    """(B, 3, H, W) uint8 -> (B, 3, 299, 299) floats in [-1, 1), resized by TensorFlow 1's bilinear rule. That
    rule has no half-pixel centres: output pixel k reads the input at k * size / 299. `align_corners` reads at
    k * (size - 1) / (299 - 1), which becomes the same with one pixel more of input and of output."""
    x = F.pad(images.float(), (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, (300, 300), mode="bilinear", align_corners=True)[..., :299, :299]
    return (x - 128) / 128

def load_inception(place, device):
    """The network, frozen. `origin` says whose figures these are: how the file's sha256 begins, or "random".
    place: a weights file, "random" (seeded, to try things offline), or None for the published weights."""
    torch.manual_seed(0)
    net = Inception().requires_grad_(False)
    net.origin = "random"
    if place != "random":
        path = find_weights("inception", place)
        data.load_weights(net, data.read_torch(path), path)
        net.origin = data.file_digest(path)[:8]
    if device.type == "cpu":
        net.to(memory_format=torch.channels_last)                            # 1.7 times as fast there
    return net.to(device).eval()

# ---- ConvNeXt-S and LPIPS. Modules bear the names that torchvision's weight files give them.

def normalize(images):
    """Images (B, 3, H, W) in [0, 1] -> of mean 0 and deviation 1 in each channel, over ImageNet."""
    mean, std = images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return (images - mean) / std

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

class ConvNeXtBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block = nn.ModuleDict({
            "0": nn.Conv2d(width, width, 7, padding=3, groups=width), "2": nn.LayerNorm(width, eps=1e-6),
            "3": nn.Linear(width, 4 * width), "5": nn.Linear(4 * width, width)})
        self.layer_scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x):
        conv, norm, widen, narrow = self.block.values()
        y = norm(conv(x).permute(0, 2, 3, 1))                                # (B, h, w, C)
        y = narrow(F.gelu(widen(y))).permute(0, 3, 1, 2)
        return x + self.layer_scale * y

class ConvNeXt(nn.Module):
    """ConvNeXt-S (arXiv 2201.03545): images (B, 3, H, W) in [0, 1] -> ImageNet logits (B, 1000)."""
    def __init__(self):
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(3, 96, 4, stride=4), ChannelNorm(96, eps=1e-6))]
        for width, depth in ((96, 3), (192, 3), (384, 27), (768, 3)):
            if width > 96:
                halving = nn.Conv2d(width // 2, width, 2, stride=2)
                layers.append(nn.Sequential(ChannelNorm(width // 2, eps=1e-6), halving))
            layers.append(nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth))))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(ChannelNorm(768, eps=1e-6), nn.Flatten(), nn.Linear(768, 1000))

    def forward(self, images):
        images = F.interpolate(images, (224, 224), mode="bilinear", antialias=True)
        return self.classifier(self.features(normalize(images)).mean((2, 3), keepdim=True))

class LPIPS(nn.Module):
    """LPIPS with VGG16 (arXiv 1801.03924): two batches of images (B, 3, H, W) in [0, 1] -> distances (B,)."""
    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.lin = nn.ParameterList(torch.rand(1, width, 1, 1) for width in (64, 128, 256, 512, 512))

    def forward(self, a, b):
        x, distance, weights = normalize(torch.cat([a, b])), 0, iter(self.lin)
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):           # the end of one of VGG16's five stages
                one, other = F.normalize(x.float(), dim=1).chunk(2)
                distance = distance + ((one - other).pow(2) * next(weights)).sum(1).mean((1, 2))
            x = layer(x)
        return distance

def load_judges(place, device):
    """{"convnext": ConvNeXt, "lpips": LPIPS}, frozen, with public weights from the folder `place` or
    downloaded. "random" gives seeded stand-ins. InputError when a file is missing or unfit."""
    torch.manual_seed(0)
    judges = {"convnext": ConvNeXt(), "lpips": LPIPS()}
    if place != "random":
        paths = [find_weights(name, place) for name in ("convnext", "vgg", "lpips")]
        convnext, vgg, lins = map(data.read_torch, paths)
        lpips = {name: value for name, value in vgg.items() if name.startswith("features.")}
        for k in range(5):
            lpips[f"lin.{k}"] = lins.get(f"lin{k}.model.1.weight")
        data.load_weights(judges["convnext"], convnext, paths[0])
        data.load_weights(judges["lpips"], lpips, f"{paths[1]} with {paths[2]}")
    return {name: net.to(device).eval().requires_grad_(False) for name, net in judges.items()}

# ---- Images and their statistics ----------------------------------------------------------------------

class NpzImages:
    """`arr_0` of an .npz, uint8 (n, H, W, 3), read one by one. ValueError for another array."""
    def __init__(self, path):
        self.path, self.file = path, None
        with zipfile.ZipFile(path).open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            self.shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
            self.start = file.tell()
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or by_column:
            raise ValueError("arr_0 must be images of one size, uint8 (n, H, W, 3) in C order; it is "
                             f"{dtype} {self.shape}")

    def __len__(self):
        return self.shape[0]

    def read(self, epoch, index):
        size = math.prod(self.shape[1:])
        try:
            if self.file is None:             # here, so that every reading process has a handle of its own
                self.file = zipfile.ZipFile(self.path).open("arr_0.npy")
            self.file.seek(self.start + index * size)
            pixels = np.frombuffer(self.file.read(size), np.uint8).reshape(self.shape[1:])
        except Exception as error:            # zipfile, zlib and numpy each have their own kinds
            raise InputError(f"{self.path} is damaged or incomplete around image {index} ({error})") from None
        return data.to_tensor(pixels), index

class Folder:
    """All images in a folder, at any depth, by path, or a single file; cropped to crop x crop if given."""
    def __init__(self, path, crop=None):
        self.crop, self.paths = crop, [path]
        if os.path.isdir(path):
            self.paths = [f"{path}/{name}" for name in data.image_files(path)]
        self.size = None if crop or not self.paths else data.read_image(self.paths[0]).size

    def __len__(self):
        return len(self.paths)

    def read(self, epoch, index):
        image = data.read_image(self.paths[index])
        if self.crop:
            return data.centre_crop(image, self.crop), index
        if image.size != self.size:
            raise InputError(f"images must be of one size: {self.paths[index]} is {image.size}, others are "
                             f"{self.size}; --crop N makes them N x N, as ADM prepares ImageNet")
        return data.to_tensor(image), index

def image_batches(images, name, args):
    """--num-images of a set, by default all -> how many, and this rank's batches of them: place (a slice) and
    [images (B, 3, H, W) uint8, labels]. InputError for fewer than two."""
    chosen = data.spread(len(images), args.num_images or len(images))
    if len(chosen) < 2:
        raise InputError(f"statistics need two images at least, found {len(chosen)} in {name}")
    spans = data.rank_spans(len(chosen), args.batch_size)
    keys = [[(0, index) for index in chosen[span]] for span in spans]
    stream = data.batches(images.read, keys, args.workers)
    return len(chosen), zip(data.progress_bar(spans, name, args.batch_size), stream)

def moments(rows):
    """(n, D) -> (D + 1, D + 1) float64: sums of products of two columns, the last being ones. They add up."""
    rows = F.pad(rows.double(), (0, 1), value=1)
    return rows.T @ rows

def gaussian(sums):
    """`moments` -> mean (D,), covariance (D, D), on the CPU."""
    sums = sums.cpu()
    count, totals = sums[-1, -1], sums[-1, :-1]
    mean = totals / count
    return mean, (sums[:-1, :-1] - totals[:, None] * mean) / (count - 1)

def add_on_rank_0(*tensors):
    for tensor in tensors:
        if dist.is_initialized():
            dist.reduce(tensor, 0)

def extract(images, net, device, name, args):
    """Features of --num-images images of a set, by default of all -> on rank 0 "mu", "sigma" of the pool
    features, "mu_s", "sigma_s" of the spatial ones, and "pool" (n, 2048); on the others {}."""
    count, batches = image_batches(images, name, args)
    pool, spatial_sums = torch.zeros(count, 2048, device=device), moments(torch.zeros(0, 2023, device=device))
    for places, (pixels, _) in batches:
        features = net(prepare(pixels.to(device, non_blocking=True)))
        pool[places] = features[:, :2048]
        spatial_sums += moments(features[:, 2048:])
    add_on_rank_0(pool, spatial_sums)
    if data.rank() > 0:
        return {}
    pool_sums = sum(map(moments, pool.split(4096)))
    return dict(zip([*STATISTICS, "pool"], [*gaussian(pool_sums), *gaussian(spatial_sums), pool]))

def load_statistics(path, net, device, args):
    """Like `extract`, of an .npz of images or statistics or both, or of a folder; without what is not
    there. InputError for anything else, and for statistics of another network."""
    if os.path.isdir(path):
        return extract(Folder(path, args.crop), net, device, path, args)
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            stored = {name: file[name] for name in STATISTICS if name in names}
            origin = str(file["inception"]) if "inception" in names else PUBLISHED
        images = NpzImages(path) if "arr_0" in names else None
    except Exception as error:                # zipfile, zlib and numpy each have their own kinds
        raise InputError(f"{path} is damaged, or no .npz of images or statistics ({error})") from None
    for name, value in stored.items():
        if value.shape != STATISTICS[name] or not np.isfinite(value).all():
            raise InputError(f"{name} in {path} must be finite, {STATISTICS[name]}, found {value.shape}")
    if images is None and not {"mu", "sigma"} <= stored.keys():
        raise InputError(f"{path} has neither images (arr_0) nor statistics (mu, sigma), only {names}")
    if stored and origin != net.origin:
        raise InputError(f"the statistics in {path} are of Inception {origin}, this run's is {net.origin}")
    of_images = {} if images is None else extract(images, net, device, path, args)
    return of_images | {name: torch.from_numpy(value).double() for name, value in stored.items()}

# ---- The metrics ---------------------------------------------------------------------------------

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: means (D,), covariances (D, D) of any rank. With S = F F^T
    the trace of sqrt(S1 S2) is the sum of the singular values of F1^T F2. They keep rounding at 1e-16, where
    a square root of an eigenvalue that should be 0 would make 1e-8 of it."""
    def factor(sigma):
        values, vectors = torch.linalg.eigh(sigma.double())
        kept = values > values.abs().max() * len(values) * torch.finfo(torch.float64).eps
        return vectors[:, kept] * values[kept].sqrt()                        # (D, rank)

    overlap = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    distance = (mu1 - mu2).double().square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap
    return max(0.0, distance.item())

def inception_score(pool, weight, split=5000):
    """exp of the mean KL divergence from each image's classes to their average; the mean over runs of
    `split`. pool (n, 2048); weight (1008, 2048) of the last layer, whose bias ADM's evaluator leaves out."""
    weight, scores = weight.cpu().double(), []
    for part in pool.split(split):
        log_p = (part.cpu().double() @ weight.T).log_softmax(1)
        scores.append((log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp())
    return torch.stack(scores).mean().item()

def precision_recall(reference, samples, k=3, block=25_000_000):
    """Share of samples (m, D) in the manifold of the reference (n, D), and of the reference in theirs. It is
    the union of balls around features, as wide as the distance to the k-th nearest other feature
    (Kynkaanniemi et al.). `block` distances are held at a time. None twice for k images or fewer."""
    if min(len(reference), len(samples)) <= k:
        return None, None
    centre = reference.mean(0)                # distances are exact between small numbers
    reference, samples = reference - centre, samples - centre

    def distances(a, b):                      # from blocks of a to all of b: (rows, len(b)) each
        return (torch.cdist(rows, b) for rows in a.split(max(1, block // len(b))))

    def covered(points, centres):             # the nearest centre of all to a centre is the centre itself
        radii = torch.cat([d.topk(k + 1, largest=False).values[:, k] for d in distances(centres, centres)])
        return torch.cat([(d <= radii).any(1) for d in distances(points, centres)]).float().mean().item()

    return covered(samples, reference), covered(reference, samples)

def compare(reference, samples, net):
    """Two results of `load_statistics` -> {name: number, or None where it can't be known}."""
    scores = dict.fromkeys(["FID", "sFID", "IS", "precision", "recall"])
    for name, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        if mu in reference and mu in samples:
            scores[name] = frechet_distance(reference[mu], reference[sigma], samples[mu], samples[sigma])
    if "pool" in samples:
        scores["IS"] = inception_score(samples["pool"], net.fc.weight)
        if "pool" in reference:
            scores["precision"], scores["recall"] = precision_recall(reference["pool"], samples["pool"])
    return scores

def psnr(a, b):
    """Peak signal-to-noise ratio of each pair of images in [0, 1], in dB: (B, 3, H, W) twice -> (B,)."""
    return -10 * (a - b).float().pow(2).mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()

def tokenizer_metrics(tokenizer, images, net, device, args):
    """How well a tokenizer reconstructs --num-images pictures, in 8 bits: {"rFID", "PSNR" in dB,
    "codebook_use": share of codes that occur, "images"}, on rank 0."""
    count, batches = image_batches(images, args.data, args)
    real_sums, painted_sums = (moments(torch.zeros(0, 2048, device=device)) for _ in range(2))
    psnr_sum = torch.zeros(1, dtype=torch.float64)
    uses = torch.zeros(tokenizer.config.codebook_size)                       # of each code
    for _, (pixels, _) in batches:
        before = data.to_float(pixels, device)
        tokens = tokenizer.encode(before)
        after = (tokenizer.decode(tokens) * 255).round().byte()
        real_sums += moments(net(prepare(pixels.to(device)))[:, :2048])
        painted_sums += moments(net(prepare(after))[:, :2048])
        psnr_sum += psnr(data.to_float(after, device), before).sum().cpu()
        uses += tokens.flatten().bincount(minlength=len(uses)).cpu()
    add_on_rank_0(real_sums, painted_sums, psnr_sum, uses)
    if data.rank() > 0:
        return {}
    return {"rFID": frechet_distance(*gaussian(real_sums), *gaussian(painted_sums)),
            "PSNR": psnr_sum.item() / count,
            "codebook_use": (uses > 0).float().mean().item(), "images": [count]}

# ---- Command line -----------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter)
    add = parser.add_argument
    add("reference", nargs="?", help=".npz of images or statistics, or folder; alone, an Inception Score")
    add("samples", nargs="?", help="likewise; judged against the reference")
    add("--tokenizer", help="judge this tokenizer's reconstructions of --data")
    add("--data", help="'shapes', the built-in validation pictures, or a folder of images, centre-cropped")
    add("--num-images", type=data.number(int, 2), help="so many images of each set, evenly spread (all)")
    add("--crop", type=data.positive, help="make a folder's images this size: resized, centre-cropped")
    add("--save-stats", metavar="NPZ", help="write mu, sigma, mu_s and sigma_s of the last argument")
    add("--inception", metavar="PATH", help="weights file (downloaded once), or 'random', for trials")
    add("--batch-size", type=data.positive, default=64, help="(%(default)s)")
    add("--workers", **data.WORKERS)
    add("--device", **data.DEVICE)
    parser.set_defaults(dtype="float32")      # published figures are of float32
    args = parser.parse_args()
    if bool(args.tokenizer) != bool(args.data) or bool(args.tokenizer) == bool(args.reference):
        parser.error("name one or two sets of images, or --tokenizer and --data")
    if args.tokenizer and (args.crop or args.save_stats):
        parser.error("--crop and --save-stats go with sets of images, not with --tokenizer")
    return args

def main():
    args = parse_args()
    paths = [path for path in (args.reference, args.samples) if path]
    for path in paths or [args.data]:         # before anything is downloaded
        if path != "shapes" and not os.path.exists(path):
            raise InputError(f"no such file or folder: {path}")
    if args.save_stats and os.path.exists(args.save_stats):
        raise InputError(f"{args.save_stats} is there already; name another file or remove it")
    device = data.start(args)
    torch.backends.cudnn.allow_tf32 = False
    torch.set_grad_enabled(False)
    net = load_inception(args.inception, device)
    if args.tokenizer:
        tokenizer = data.pack_linears(load_tokenizer(args.tokenizer, device))
        size = tokenizer.config.image_size
        images = (data.Shapes("val", size, length=args.num_images) if args.data == "shapes"
                  else Folder(args.data, size))
        scores = tokenizer_metrics(tokenizer, images, net, device, args)
    else:
        sets = [load_statistics(path, net, device, args) for path in paths]
        scores = compare(*sets, net) if args.samples else {"IS": compare({}, *sets, net)["IS"]}
        scores["images"] = [len(each["pool"]) if "pool" in each else None for each in sets]
    if net.origin != PUBLISHED:
        data.say(f"warning: Inception is not the published one but {net.origin}: figures are not comparable",
                 sys.stderr)
    data.say(json.dumps({**scores, "inception": net.origin}, indent=1))
    if args.save_stats:
        sets[-1].pop("pool", None)
        data.replace_file(args.save_stats, lambda file: np.savez(file, **sets[-1], inception=net.origin))

if __name__ == "__main__":
    data.run(main)
