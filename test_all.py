"""Tests of everything that could break, on the CPU, and the evidence that is no part of the product.

    python -m pytest test_all.py                     # all of it, about six minutes on two cores
    python -m pytest -m "not slow" test_all.py       # about a minute: no kills, ranks, pipelines, compiler
    python test_all.py benchmark                     # milliseconds a token in sampling, each way
    python test_all.py claims study                  # trains for hours, prints the tables of docs/claims.md
    python test_all.py costs                         # of the published recipe, calculated
    python test_all.py judge out run-0 run-1         # a table of runs: are their samples what was asked for?
    python test_all.py sheet --png shapes.png        # labelled contact sheet of the built-in pictures
"""
import argparse, contextlib, functools, io, itertools, json, math, multiprocessing, os, re, shutil, signal
import subprocess, sys, time, timeit, unicodedata, warnings, zlib
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ar_model, data, fid, sample, train_ar, train_tokenizer
from ar_model import ARConfig, ARModel, guidance, image_uniforms, load_ar, sample_tokens
from tokenizer import RELEASED_NAMES, Decoder, Tokenizer, TokenizerConfig, load_tokenizer, strip_target

HERE, CPU = Path(__file__).resolve().parent, torch.device("cpu")
BITS = 1.6 / 255                              # two roundings to 8 bits apart
if __name__ != "__main__":                    # one thread: small models, and equal sums in other processes
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)             # no other file registers it
slow = pytest.mark.slow                       # of all tests after FAST, below
load = functools.partial(torch.load, weights_only=True)
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")

# ---- Tools ---------------------------------------------------------------------------------------

SMALL = dict(image_size=32, patch_size=8, encoder_width=32, encoder_depth=2, decoder_width=32, head_dim=16,
             decoder_depth=2, codebook_size=64, codebook_dim=8, buffer_tokens=4, init="narrow")
SHAPE = "--image-size 32 --patch-size 8 --codebook-size 64"
TOKENIZER = SHAPE + " --batch-size 8 --eval-images 64"
AR = "--steps 40 --batch-size 8 --num-pictures 200 --eval-images 64 --width 64 --depth 2"

def small_tokenizer(**changes):
    torch.manual_seed(0)
    return Tokenizer(TokenizerConfig(**{**SMALL, **changes})).eval()

def small_ar(**changes):
    torch.manual_seed(0)
    small = dict(codebook_size=64, grid=4, num_classes=10, width=48, depth=2, heads=2, dropout=0.0)
    model = ARModel(ARConfig(**{**small, **changes}))
    nn.init.normal_(model.output.weight, std=0.3)             # zero, as it starts, would hide all differences
    return model.eval()

def split(words):
    """Words of a command line, a string of several or a path each, as a list."""
    return [str(part) for word in words for part in (word.split() if isinstance(word, str) else [word])]

def command(module, *words):
    """Run a script's main() as its command line does, in this process. -> exit code, stdout, stderr"""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in data.STOP_SIGNALS}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), torch.enable_grad(), (
            mock.patch("sys.argv", [module.__name__ + ".py", *split(words)])):
        try:
            data.run(module.main)
        except SystemExit as error:
            code = error.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()

def must(module, *words):                     # `command`, which has to succeed
    code, out, err = command(module, *words)
    assert code == 0, err
    return out

def python(*words, cwd=HERE, fails=False):
    """Run Python, which has to succeed, or to fail. -> its stdout, or its stderr"""
    call = [sys.executable, *map(str, words)]
    result = subprocess.run(call, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stderr if fails else result.stdout

def torchrun(script, *words, **options):
    ranks = "-m torch.distributed.run --nproc_per_node=2 --standalone"
    return python(*split([ranks, HERE / script, *words]), **options)

def log_of(out, run, key):
    with open(f"{out}/log.jsonl") as file:
        return [entry[key] for entry in map(json.loads, file) if entry["run"] == run and key in entry]

def differing(a, b, place=()):
    """The places at which two nested dicts and lists differ, tensors to the bit."""
    a, b = (dict(enumerate(tree)) if isinstance(tree, (list, tuple)) else tree for tree in (a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return {where for key in a.keys() | b.keys()
                for where in differing(a.get(key, "missing"), b.get(key, "missing"), (*place, key))}
    tensors = torch.is_tensor(a) and torch.is_tensor(b)
    return set() if (torch.equal(a, b) if tensors else type(a) is type(b) and a == b) else {place}

def write_images(folder, classes=("cat", "dog"), each=6):
    """A folder of pictures in mixed formats and sizes: class k is mostly colour k."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for n, suffix in enumerate(["jpg", "png", "webp", "bmp", "JPEG", "png"][:each]):
            pixels = rng.integers(0, 60, (50 + 17 * n, 140 - 13 * n, 3)).astype(np.uint8)
            pixels[..., k % 3] += 190
            Image.fromarray(pixels).save(folder / name / f"{n}.{suffix}")
    return folder

def pictures(places, size=32, split="val"):   # built-in ones, (n, 3, size, size) uint8
    return torch.stack([data.to_tensor(data.draw_shape(0, split, k, size)[0]) for k in places])

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which both trainers have run, small."""
    out = tmp_path_factory.mktemp("trained")
    must(train_tokenizer, f"--out {out} --steps 150 100", TOKENIZER)
    must(train_ar, f"--out {out}", AR)
    return out

def on_tokens(trained):                       # words for train_ar, with the tokens that are there
    return f"{AR} --tokenizer {trained}/tokenizer.pt --cache {trained}/tokens --dtype float32"

# ---- data.py -------------------------------------------------------------------------------------

def test_shapes_show_their_class_and_are_a_function_of_seed_split_index():
    grounds = np.array([ImageColor.getrgb(hue) for hue in data.BACKGROUNDS.values()])
    for label in range(0, len(data.SHAPE_CLASSES), 37):
        image, drawn = data.draw_shape(0, "train", label, 64)
        ground = np.abs(grounds - image[::63, ::63].mean((0, 1))).sum(1).argmin()     # of the corners
        assert drawn == label and ground == np.unravel_index(label, tuple(DIGITS.values()))[2]
    for other in [(1, "train", 207), (0, "val", 207), (0, "train", 207 + len(data.SHAPE_CLASSES))]:
        assert (data.draw_shape(0, "train", 207, 64)[0] != data.draw_shape(*other, 64)[0]).mean() > 0.3

def test_images_are_turned_upright_and_put_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                          # turned by a right angle
    Image.new("RGBA", (40, 30)).save(tmp_path / "clear.png", exif=exif)
    pixels = np.asarray(data.read_image(tmp_path / "clear.png"))
    assert pixels.shape == (40, 30, 3) and (pixels == 255).all()
    Image.new("RGB", (2100, 1600)).save(tmp_path / "large.jpg")
    assert data.read_image(tmp_path / "large.jpg", 400).size == (525, 400)

def test_crops():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    crop = data.centre_crop(ramp, 50).float()
    assert crop.shape == (3, 50, 50) and abs(crop[0].mean() - 99.5) < 1 and abs(crop[0, 25, 0] - 51) <= 1
    rows = [data.random_crop(ramp, 50, data.generator("crop", 0, 0, k))[0, 25].int() for k in range(40)]
    assert {(row[-1] > row[0]).item() for row in rows} == {True, False}      # flipped or not
    assert np.ptp([row.min() for row in rows]) > 50                          # from all along the longer side
    pixels = np.random.default_rng(0).integers(0, 256, (44, 60, 3), np.uint8)          # 44 is 1.1 * 40
    places = [(0, 8), (0, 12), (4, 8), (4, 12), (2, 10)]
    for crop, (top, left) in zip(data.five_crops(Image.fromarray(pixels), 40), places, strict=True):
        assert np.array_equal(crop.permute(1, 2, 0), pixels[top:top + 40, left:left + 40])

def test_an_epoch_sees_every_image_once():
    args = argparse.Namespace(batch_size=10, accum=1, seed=7)
    keys = list(itertools.chain(*itertools.islice(data.batch_keys("run", 23, args), 9)))
    assert len(set(keys[:69])) == 69 and keys[50:60] == next(data.batch_keys("run", 23, args, 5))
    assert [index for _, index in keys[:23]] != [index for _, index in keys[23:46]]

def test_token_cache_resumes(tmp_path):
    model, shapes = small_tokenizer(codebook_size=70_000), data.Shapes("train", 32, 0, 40)   # beyond 16 bits
    whole = np.array(data.TokenCache(tmp_path, shapes, model, CPU).tokens)
    assert np.array_equal(whole[:, 0], model.encode(pictures(range(40), 32, "train") / 255))
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r+", allow_pickle=False)
    tokens[10:25] = tokens[35, 0, 5:] = 70_000                # as a kill leaves it
    tokens[30, 0, 3] = 2 ** 32 - 1            # no token: damaged
    assert (np.array(data.TokenCache(tmp_path, shapes, model, CPU, batch_size=7).tokens) == whole).all()

# ---- tokenizer.py. First the idea: nobody looks ahead. -------------------------------------------

@pytest.mark.parametrize("first", [0, 1, 4, 5, 6, 12, 20])
def test_causal_decoder_never_looks_ahead(first):
    model, order, tokens = small_tokenizer(), data.generation_order(4), torch.randint(64, (3, 21))
    cut = nn.Unfold(8, stride=8)              # (B, 3, H, W) -> patches (B, 192, n)
    changed = tokens.where(torch.arange(21) < first, (tokens + 1 + torch.randint(62, (3, 21))) % 64)
    before, after = (torch.cat([cut(strip), cut(image)[..., order]], 2).mT   # in the order of the tokens
                     for image, strip in map(model.decode_causal, (tokens, changed)))
    assert torch.equal(before[:, :first], after[:, :first])
    assert (before[:, first:] != after[:, first:]).any(2).all()              # and all later ones do change

@pytest.mark.parametrize("place", [0, 1, 3, 4, 9, 15])
def test_causal_encoder_never_looks_ahead(place):
    model, images = small_tokenizer(encoder="causal"), torch.rand(3, 3, 32, 32)
    patches, later = F.unfold(images, 8, stride=8), data.generation_order(4)[place:]
    changed = F.fold(patches.index_copy(2, later, torch.rand(3, 192, len(later))), 32, 8, stride=8)
    first = 0 if place == 0 else 1 + place if place < 4 else 5 + place       # token that may see the patch
    with torch.no_grad():
        a, b = model.encoder(images), model.encoder(changed)
    assert torch.equal(a[:, :first], b[:, :first]) and (a[:, first:] != b[:, first:]).any(2).all()
    assert torch.allclose(model.encoder(images), a, atol=1e-5)               # as training computes it
    x, block, mask = torch.rand(1, 37, 32), model.encoder.blocks[0], model.encoder.mask
    assert torch.allclose(block(x, True, mask), block(x, False, mask.tril()), atol=1e-5)
    assert torch.equal(model.encode(images)[:, :first], model.encode(changed)[:, :first])

def test_quantizer_takes_the_nearest_code_and_passes_gradients():
    quantizer, z = small_tokenizer().quantizer, (torch.randn(2, 21, 8) * 0.3).requires_grad_()
    codes, tokens, loss = quantizer(z)
    distance, nearest = scipy.spatial.cKDTree(quantizer.codebook.detach()).query(z.detach())
    assert np.array_equal(tokens, nearest) and torch.allclose(codes, quantizer.codebook[tokens], atol=1e-6)
    assert loss.item() == pytest.approx(1.25 * (distance ** 2).mean() / 8, rel=1e-4)
    (codes * torch.arange(8.0)).sum().backward()
    assert torch.allclose(z.grad, torch.arange(8.0).expand_as(z))
    assert torch.allclose(quantizer(z, blend=0.5)[0], (z + quantizer.codebook[tokens]) / 2, atol=1e-6)

def test_dead_codes_come_back():
    quantizer = small_tokenizer().quantizer.train()
    optimizer = torch.optim.Adam([quantizer.codebook], 1e-2)
    def used_after(steps):
        for _ in range(steps):
            quantizer(torch.randn(8, 32, 8))[2].backward()
            optimizer.step()
            optimizer.zero_grad()
            quantizer.after_step(True)
        return len(quantizer.tokens(torch.randn(1, 4096, 8)).unique())
    assert used_after(200) > 60
    quantizer.codebook.data[8:] += 100        # where no latent is; their running usage has to fade first
    assert used_after(100) <= 8 and used_after(900) > 60

def test_swap_starts_warm_unless_told_otherwise():
    model = small_tokenizer().swap_decoder()
    new, old = (decoder.state_dict() for decoder in (model.decoder, model.causal_decoder))
    assert {key for key, in differing(new, {key: old[key] for key in new})} == {"buffer_tokens", "positions"}
    cold = small_tokenizer().swap_decoder(cold=True).decoder
    assert (cold.blocks[0].mlp.c_fc.weight != old["blocks.0.mlp.c_fc.weight"]).all()

def rebuild(name, shape, seed=0):
    """A weight of a released checkpoint that anyone can rebuild: it follows from its name and shape alone."""
    w = np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode())).standard_normal(shape)
    if len(shape) in (2, 4) and "embedding" not in name and "latent_tokens" not in name:
        w = w * np.sqrt((2 if len(shape) == 4 else 1) / np.prod(shape[1:]))
    elif "embedding" not in name and "latent_tokens" not in name:
        w = 1 + 0.1 * w if name.endswith("weight") else 1 + 0.1 * abs(w) if "running_var" in name else 0.1 * w
    return torch.from_numpy(np.asarray(w, np.float32))

def released_tokenizer(stage):
    """A state dict with the authors' names and shapes. A name that is not theirs would give other weights."""
    decoder, released = "causal" if stage == 1 else "bidirectional", {}
    model = small_tokenizer(image_size=64, patch_size=16, encoder_width=64, decoder_width=128, head_dim=64,
                            codebook_dim=16, buffer_tokens=32, decoder=decoder)
    for name, value in model.state_dict().items():
        shape = tuple(value.shape)
        if name.endswith(("to_latent.weight", "head.proj.weight")):
            shape += (1, 1)                   # a 1 x 1 convolution there
        for theirs, ours in RELEASED_NAMES.items():
            name = name.replace(ours, theirs)
        released[name] = rebuild("tok/" + name, shape)
    if stage == 2:
        del released["quantize.embed_prob"]
    return released

@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder, state = tmp_path_factory.mktemp("released"), small_ar(width=96).state_dict()
    wrapped = {f"module._orig_mod.{name}": value for name, value in released_tokenizer(1).items()}
    torch.save({"model_state": wrapped, "start_step": 5}, folder / "stage1.pth")
    torch.save(released_tokenizer(2), folder / "AliTok.pth")
    torch.save({name: rebuild("ar/" + name, value.shape) for name, value in state.items()}, folder / "ar.bin")
    return folder

def near(values, expected):
    assert np.allclose(values, expected, atol=3e-5), (values, expected)

def test_released_tokenizer(released):
    """The numbers, also of the AR model, are what the authors' code computed from these weights."""
    tokens = [10, 53, 1, 35, 1, 35, 17, 55, 32, 1, 1, 18, 34, 46, 10, 46, 54, 0, 29, 53, 24]
    one, two = load_tokenizer(released / "stage1.pth"), load_tokenizer(released / "AliTok.pth")
    assert (two.config.decoder, two.config.image_size, two.config.buffer_tokens) == ("bidirectional", 64, 32)
    assert one.quantizer.usage.equal(rebuild("tok/quantize.embed_prob", (64,)))
    image, strip = one.decode_causal(torch.tensor([tokens]))
    near(image[0, 1, ::13, 5], [0.39297, 0.1761, 0.32305, 0.56659, 0.01472])
    near(strip[0, 0, 7, ::16], [0.36142, 0.66845, 0.3732, 0.34959, 0.38617])
    near(two.decode(torch.tensor([tokens]))[0, 2, ::13, 40], [0.19103, 0.49124, 0.46226, 0.64453, 0.19848])
    # The encoder's numbers are ours. It agreed with the authors' on an image that is too large to keep here.
    ramp = torch.linspace(0, 1, 64)
    image = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, ramp[:, None] * ramp * 0.5 + 0.25])[None]
    near(two.encoder(image)[0, ::5, 3].detach(), [-1.19955, 0.88384, 0.08973, 0.083, 0.14676])
    assert two.encode(image).tolist() == [tokens[:7] + [34] + tokens[8:19] + [10, 24]]
    row, four = image[:, :, :16], small_tokenizer(image_size=64, patch_size=16, prefix_tokens=4)
    assert strip_target(image, four).equal(row)
    assert strip_target(image, one).equal(torch.cat([row[..., :16], row], 3))

def test_full_size_presets_have_the_published_sizes():
    config = TokenizerConfig(decoder="bidirectional")
    with torch.device("meta"):
        assert abs(sum(p.numel() for p in Tokenizer(config).parameters()) - 390e6) < 1e6
        for name, published in {"B": 177_048_064, "L": 317_851_648, "XL": 662_141_696}.items():
            model = ARModel(ARConfig(**ar_model.PRESETS[name]))
            assert sum(p.numel() for p in model.parameters()) == published
            assert ARConfig(**ar_model.from_released(model.state_dict())["config"]) == model.config

# ---- ar_model.py ---------------------------------------------------------------------------------

@pytest.mark.parametrize("first", [1, 2, 8, 21])
def test_ar_model_never_looks_ahead(first):
    model, tokens, classes = small_ar(), torch.randint(64, (2, 21)), torch.tensor([3, 10])
    changed = tokens.where(torch.arange(1, 22) < first, (tokens + 1) % 64)
    with torch.no_grad():
        a, b = model(tokens, classes), model(changed, classes)
    assert torch.equal(a[:, :first], b[:, :first]) and (a[:, first:] != b[:, first:]).any(2).all()

def guided(one, null, scale, power):
    return null + torch.tensor([guidance(t, 21, scale, power) for t in range(21)])[:, None] * (one - null)

def test_released_ar_model(released, tmp_path):
    ids = [44, 34, 29, 9, 25, 13, 18, 51, 44, 52, 58, 31, 63, 23, 26, 21, 51, 12, 56, 22, 23]
    model = load_ar(released / "ar.bin", grid=4)
    assert (model.config.heads, model.config.num_classes, model.config.depth) == (2, 10, 2)
    with torch.no_grad():
        one, null = (model(torch.tensor([ids]), torch.tensor([label]))[0, :-1] for label in (9, 10))
    near(one[::5, 17], [1.33625, 1.11961, -0.65183, 2.94142, 0.13733])
    near(null[::5, 17], [-1.92443, 1.40302, -0.83471, 2.87064, 0.01246])
    near(guided(one, null, 5.0, 1.3)[::5, 17], [1.33625, 1.05389, -0.41946, 3.14554, 0.63216])
    words = f"--tokenizer {released}/AliTok.pth --png {tmp_path}/x.png --n 2"
    for task, width in (f"--ar {released}/ar.bin --class 3", 132), ("--reconstruct shapes", 262):
        must(sample, words, task)
        assert Image.open(tmp_path / "x.png").size == (width, 262)

@pytest.mark.parametrize("scale, compiled", [
    (1.0, False), (3.0, False), pytest.param(3.0, True, marks=[slow, needs_compiler])])
def test_cached_generation_equals_the_full_forward(scale, compiled):
    model, classes = small_ar(), torch.tensor([1, 7, 3])
    tokens = model.generate(classes, top_k=1, cfg_scale=scale, cfg_power=0.7, compiled=compiled)
    both, caches = torch.cat([classes, torch.full_like(classes, 10)]), model.caches_for(6)
    rows = torch.cat([65 + both[:, None], tokens.repeat(2, 1)], 1)
    with torch.no_grad():
        logits = model(rows[:, 1:], both)[:, :-1]
        steps = torch.stack([model.step(rows[:, t], t, caches) for t in range(21)], 1)
    assert torch.allclose(steps, logits, atol=1e-4)
    assert torch.allclose(model(rows[:, 1:], both)[:, :-1], logits, atol=1e-4)         # as in training
    assert torch.equal(guided(*logits.chunk(2), scale, 0.7).argmax(-1), tokens)

def test_sampling_follows_the_distribution():
    p = np.array([0.5, 0.0, 0.3, 0.15, 0.05])
    logits, uniforms = torch.tensor(p).log().expand(20_000, -1), image_uniforms(0, range(20), 1000).flatten()
    assert not set(uniforms.tolist()) & set(image_uniforms(1, range(20), 1000).flatten().tolist())
    for options, weights in (({}, p), ({"temperature": 0.5}, p ** 2), ({"top_k": 2}, p * (p >= 0.3)),
                             ({"top_k": 1}, p * (p >= 0.5)), ({"temperature": 0}, p * (p >= 0.5))):
        drawn, some = sample_tokens(logits, uniforms, **options).bincount(minlength=5).numpy(), weights > 0
        assert drawn[~some].sum() == 0, options
        expected = weights[some] / weights.sum() * len(logits)
        assert some.sum() == 1 or scipy.stats.chisquare(drawn[some], expected).pvalue > 0.001, options

# ---- train_tokenizer.py, train_ar.py -------------------------------------------------------------

def test_training_learns_and_stage_2_reconstructs_better_on_the_same_tokens(trained):
    mse, losses = log_of(trained, "tokenizer stage 1", "mse"), log_of(trained, "ar", "loss")
    assert np.mean(mse[-3:]) < 0.7 * mse[0] and losses[-1] < losses[0] - 0.3
    one, two = (log_of(trained, f"tokenizer stage {stage}", "val_psnr")[-1] for stage in (1, 2))
    assert two > one and log_of(trained, "tokenizer stage 1", "val_codes")[-1] > 8
    assert len(list(trained.glob("pictures/*.png"))) == 3     # of the last step of each run
    one, two = (load_tokenizer(trained / name) for name in ("tokenizer_stage1.pt", "tokenizer.pt"))
    assert not differing(one.encoder.state_dict(), two.encoder.state_dict())
    assert not differing(one.quantizer.state_dict(), two.quantizer.state_dict())
    images = pictures(range(20)) / 255
    tokens = one.encode(images)
    assert torch.equal(two.encode(images), tokens)
    assert all(map(torch.equal, one.decode_causal(tokens), two.decode_causal(tokens)))
    assert load_ar(trained / "ar.pt").tokenizer == two.fingerprint()         # there of packed layers

def test_discriminator_computes_what_the_released_one_would():
    net = train_tokenizer.Discriminator(128)
    assert sum(parameter.numel() for parameter in net.parameters()) == 1_909_889
    for ours, theirs in {"stem": "block_in.0", **{f"convs.{k}": f"blocks.{k}.0" for k in range(3)},
                         **{f"norms.{k}": f"blocks.{k}.2" for k in range(3)},
                         "mix": "to_logits.0", "to_logits": "to_logits.2"}.items():
        for part, value in net.get_submodule(ours).named_parameters():
            value.data = rebuild(f"disc/{theirs}.{part}", value.shape, 7)
    pixels = np.random.RandomState(64).randint(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    images = (torch.stack([*map(data.to_tensor, pixels)]) / 255).requires_grad_()
    logits = net(images)
    near(logits.flatten()[::100].detach(), [0.38434, 0.920737, 0.84204, 0.955258, 0.300864, 0.078489])
    gradient, = torch.autograd.grad(-logits.mean(), images)
    assert gradient.abs().sum().item() == pytest.approx(2.568108)

def test_vision_networks_compute_what_the_published_ones_would(tmp_path):
    judges = fid.load_judges("random", CPU)
    states = {kind: {name: rebuild(f"{kind}/{name}", value.shape, 7)
                     for name, value in judges[judge].state_dict().items() if not name.startswith("lin.")}
              for kind, judge in (("convnext", "convnext"), ("vgg", "lpips"))}
    states["vgg"]["classifier.0.bias"] = torch.zeros(9)
    lins = {f"lin{k}.model.1.weight": value.shape for k, value in enumerate(judges["lpips"].lin)}
    states["lpips"] = {name: rebuild(f"lpips/{name}", shape, 7).abs() for name, shape in lins.items()}
    for name, state in states.items():
        torch.save(state, tmp_path / os.path.basename(fid.WEIGHTS[name][0]))
    judges = fid.load_judges(str(tmp_path), CPU)
    shutil.rmtree(tmp_path)                   # pytest would keep it for a while
    a, b = (pictures((0, 7), 256) / 255).requires_grad_(), pictures((14, 21), 256) / 255
    losses = [train_tokenizer.perceptual_loss(judges["convnext"], a, b), *judges["lpips"](a, b)]
    assert all(torch.autograd.grad(loss, a, retain_graph=True)[0].any() for loss in losses[:2])
    numbers = [*judges["convnext"](a)[0, ::250].tolist(), *torch.stack(losses).tolist()]
    expected = [-1.7676, -1.90766, 1.5448, -0.0408118, 3.0557, 0.300521, 0.274872]     # logits, loss, LPIPS
    assert np.allclose(numbers, expected, rtol=1e-4), numbers

def copy_saves(monkeypatch, folder):
    """Keep a copy of every save of a training state, as <name>.<step>.pt in `folder`."""
    def save_and_copy(path, save=data.save_checkpoint, **content):
        save(path, **content)
        if "step" in content:
            shutil.copy(path, folder / f"{os.path.basename(path)[:-3]}.{content['step']:02d}.pt")
    folder.mkdir()
    monkeypatch.setattr(data, "save_checkpoint", save_and_copy)

@pytest.mark.parametrize("module", [train_tokenizer, train_ar])
def test_steps_that_are_not_finite_change_nothing_and_end_the_run(module, trained, tmp_path, monkeypatch):
    """The first step at such a rate spoils the weights; of all that follow, none is taken."""
    copy_saves(monkeypatch, tmp_path / "saves")
    words = f"{TOKENIZER} --steps 60 1" if module is train_tokenizer else on_tokens(trained)
    code, _, err = command(module, words, f"--out {tmp_path} --lr 1e30 --save-every 1 --warmup 0")
    first, *others = [load(path) for path in sorted((tmp_path / "saves").iterdir())]
    assert code == 2 and "10 gradients in a row" in err and "Traceback" not in err, err
    assert [state["skipped"] for state in (first, *others)] == list(range(10)) and first["step"] == 1
    moved = {place[0] for state in others for place in differing(first, state)}
    assert not moved & {"model", "optimizer", "discriminator", "disc_optimizer"}, moved

# ---- sample.py -----------------------------------------------------------------------------------

def cells(path, columns, size=32):
    """The pictures of a grid, rows one after the other, (n, 3, size, size) in [0, 1]."""
    zoom, pixels = 128 // size, data.to_tensor(np.asarray(Image.open(path)))[:, 2:, 2:]
    rows = pixels.unflatten(2, (columns, -1)).unflatten(1, (-1, size * zoom + 2))[:, :, :-2:zoom, :, :-2:zoom]
    return rows.permute(1, 3, 0, 2, 4).flatten(0, 1) / 255

def test_shipped_pair_paints_a_red_triangle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)               # where there is no out/
    assert "red triangle on rose" in must(sample, "--class 207 --n 2 --png grid.png")
    tokenizer, model = load_tokenizer(HERE / "weights/tokenizer.pt"), load_ar(HERE / "weights/ar.pt")
    tokens = model.generate(torch.tensor([207, 207]), image_uniforms(0, [0, 1], 73), temperature=0.6)
    assert tokens[0, :10].tolist() == [202, 521, 873, 664, 297, 297, 297, 828, 828, 202]
    grid = cells("grid.png", 1, 64)
    assert torch.allclose(grid, tokenizer.decode(tokens), atol=BITS)
    must(sample, "--n 2 --batch-size 1 --png again.png --class", Path("red triangle on rose"))     # not split
    assert torch.equal(cells("again.png", 1, 64), grid)
    must(sample, "--class 207 --n 2 --dtype bfloat16 --png coarse.png")
    assert (cells("coarse.png", 1, 64) - grid).abs().mean() < 0.1
    out = must(sample, "--reconstruct shapes -n 1 --png both.png")
    original, *painted = cells("both.png", 3, 64)             # by the causal decoder, and by the other
    told = [float(number) for number in re.findall(r"([\d.]+) dB", out)]
    assert told == pytest.approx(fid.psnr(torch.stack(painted), original).tolist(), abs=0.2)

def test_painted_patches_are_certain():
    model = small_tokenizer()
    tokens, others = torch.randint(0, 64, (2, 2, 21), generator=torch.Generator().manual_seed(0))
    def frame(tokens, k):
        return sample.so_far(*model.decode_causal(tokens), model, k)
    whole = frame(tokens, 21)
    for k in range(22):
        shown = frame(torch.cat([tokens[:, :k], others[:, k:]], 1), k)
        known = shown != sample.UNPAINTED
        assert torch.equal(shown.where(known, whole), whole), k
        assert (known.any(1).sum((1, 2)) - 64 * k).abs().max() < 3           # as many patches as tokens
    assert torch.equal(whole[:, :, 16:, :32], model.decode(tokens))

def test_completions_go_on_from_the_picture(trained, tmp_path):
    photo, path = tmp_path / "photo.jpg", tmp_path / "c.png"
    Image.fromarray(data.draw_shape(0, "val", 207, 90)[0]).convert("CMYK").save(photo)
    words = f"--out {trained} --image {photo} --png {path} --n 3 --keep"
    tokenizer, original = load_tokenizer(trained / "tokenizer.pt"), sample.read_pictures(str(photo), 32, 1)
    must(sample, words, "1")
    assert torch.allclose(cells(path, 5)[2:], tokenizer.decode(tokenizer.encode(original)), atol=BITS)
    must(sample, words, "0 --class 207 --seed 4 --batch-size 2")
    must(sample, f"--out {trained} --class 207 3 --n 3 --seed 4 --png {tmp_path}/d.png")
    assert torch.equal(cells(path, 5)[2:], cells(tmp_path / "d.png", 3)[:3])
    must(sample, words, "0.6")
    first, kept, *_ = cells(path, 5)
    assert torch.allclose(first, original[0], atol=BITS) and kept[:, :16].std() > 0.01
    assert (kept[:, 16:] - sample.UNPAINTED).abs().max() < BITS              # 13 tokens: 8 patches

# ---- fid.py --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file in the format of the published weights, with other numbers in it."""
    path, state = tmp_path_factory.mktemp("inception") / "weights.pth", fid.Inception().state_dict()
    torch.save({name: rebuild("inception/" + name, old.shape, 7) if old.ndim else old
                for name, old in state.items()}, path)
    return path

def test_inception_computes_what_the_published_network_would(inception):
    """Pool and spatial features and logits without bias of two pictures, at places spread over each."""
    net = fid.load_inception(inception, CPU)
    with torch.no_grad():
        pool, spatial = net(fid.prepare(pictures((0, 7), 64))).split([2048, 2023], 1)
    numbers = [*pool[0, ::600], *spatial[1, ::600], *(pool @ net.fc.weight.T)[1, ::400]]
    near(numbers, [0.103443, 0.078771, 0.002228, 0.346496, 0.340519, 0, 0, 0, 0.180033, -0.35957, 0.00812])

def test_frechet_distance():
    rng, zero = np.random.default_rng(0), torch.zeros(300)
    rows = torch.from_numpy(rng.standard_normal((2, 500, 40)) @ rng.standard_normal((2, 40, 40))) + 3
    (mu1, sigma1), (mu2, sigma2) = (fid.gaussian(fid.moments(part)) for part in rows)
    assert np.allclose(sigma1, np.cov(rows[0].numpy(), rowvar=False))
    trace = np.trace(scipy.linalg.sqrtm(sigma1.numpy() @ sigma2.numpy())).real
    expected = ((mu1 - mu2) ** 2).sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    assert fid.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected.item(), rel=1e-9)
    # Covariances of rank 20 and 25, as of few images: in a common basis the answer is known.
    turn = torch.from_numpy(np.linalg.qr(rng.standard_normal((300, 300)))[0])
    a, b = (torch.from_numpy(rng.uniform(0, 2, 300)) * (torch.arange(300) < rank) for rank in (20, 25))
    distance = fid.frechet_distance(zero, turn @ a.diag() @ turn.T, zero, turn @ b.diag() @ turn.T)
    assert distance == pytest.approx(((a.sqrt() - b.sqrt()) ** 2).sum().item(), abs=1e-6)

def test_inception_score():
    p = np.random.default_rng(0).dirichlet(np.ones(1008), 30)
    runs = [np.exp(scipy.stats.entropy(part, part.mean(0), axis=1).mean()) for part in (p[:20], p[20:])]
    score = fid.inception_score(torch.from_numpy(p).log(), torch.eye(1008), split=20)
    assert score == pytest.approx(np.mean(runs))

def test_precision_and_recall():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((60, 5)) + 100, rng.standard_normal((90, 5)) * 0.7 + 100.4
    def covered(points, centres):
        radii = scipy.spatial.cKDTree(centres).query(centres, k=4)[0][:, 3]  # of the third nearest other one
        return np.mean((scipy.spatial.distance.cdist(points, centres) <= radii).any(1))
    expected, (a, b) = (covered(b, a), covered(a, b)), map(torch.from_numpy, (a, b))
    assert fid.precision_recall(a.float(), b.float(), block=1000) == pytest.approx(expected)
    assert 0 < min(expected) < max(expected) < 1 and fid.precision_recall(a, a) == (1, 1)
    assert fid.precision_recall(a, a + 50) == (0, 0) and fid.precision_recall(a[:3], b) == (None, None)

def test_weights_are_downloaded_once_and_checked(tmp_path, monkeypatch, inception):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    photos, place = write_images(tmp_path / "photos", ["cat"], 2), tmp_path / "hub/checkpoints/weights.pth"
    here, nowhere, digest = inception.as_uri(), "file:///nowhere/weights.pth", data.file_digest(inception)[:8]
    for address, expected, works in ((nowhere, digest, False), (here, "0" * 8, False), (here, digest, True),
                                     (nowhere, digest, True)):               # the last time it is there
        monkeypatch.setitem(fid.WEIGHTS, "inception", (address, expected))
        code, out, err = command(fid, photos, "--crop 32")
        assert place.exists() == (code == 0) == works and (str(place) in err) != works, err
        assert not works or json.loads(out)["inception"] == digest

# ---- Bad input of every kind: exit code 2, a message that names it, nothing written --------------

@pytest.fixture(scope="module")
def bad(tmp_path_factory, trained):
    """A folder of things that are wrong, for the table below."""
    bad = tmp_path_factory.mktemp("bad")
    photo = (write_images(bad / "other", ["bird"]) / "bird" / "0.jpg").read_bytes()
    (write_images(bad / "broken") / "cat" / "7.jpg").write_bytes(photo[:len(photo) // 2])
    Image.new("RGB", (1, 1), "red").save(bad / "broken" / "cat" / "pixel.png")         # even this will do
    other = load(trained / "tokenizer.pt")
    other["model"]["quantizer.codebook"] += 1
    torch.save(other, bad / "other.pt")
    hostile = type("Hostile", (), {"__reduce__": lambda self: (os.mkdir, (str(bad / "pwned"),))})
    torch.save({"config": hostile()}, bad / "hostile.pt")
    (bad / "cut.pt").write_bytes((trained / "tokenizer.pt").read_bytes()[:-5000])
    shutil.copy(trained / "ar.pt", bad)       # without the state that it came from
    image = pictures([0]).permute(0, 2, 3, 1).numpy()
    np.savez(bad / "one.npz", arr_0=image)
    np.savez(bad / "float.npz", arr_0=image / 255)
    np.savez(bad / "origin.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    return bad

FEW = {train_tokenizer: f"{SHAPE} --steps 50 1 --batch-size 4", sample: "", fid: "--inception random",
       train_ar: "--steps 5 --batch-size 8 --num-pictures 200 --width 64 --depth 2"}
BAD = {train_tokenizer: {                     # {words: what the message has to name}
    "--data {bad}/nowhere": "{bad}/nowhere", "--data {bad}/broken --workers 2": "7.jpg",
    "--data {bad}/other --out {bad}/other/out": "among the pictures", "--prefix-tokens 3": "3 prefix",
    "--batch-size 9 --accum 2": "multiple", "--stage 2": "no such checkpoint",
    "--stage 2 --out {trained} --codebook-size 128": "takes its shape", "--out {trained}": "already",
    "--out {trained} --resume --steps 150 100 --batch-size 8 --lr 0.5": "now 0.5",
    "--out {trained} --resume --steps 151 100 --batch-size 8": "stage 2",
    "--out {trained} --resume --steps 20 100 --batch-size 8": "has done 150"
}, train_ar: {
    "": "no such checkpoint", "--out {bad} --resume": "ar.pt is there already",
    "--tokenizer {tok} --data {bad}/broken --val-data {bad}/other": "other classes",
    "--tokenizer {bad}/other.pt --cache {trained}/tokens": "tokenizer", "--tokenizer {bad}/cut.pt": "cut.pt",
    "--tokenizer {trained}/ar.pt": "kind 'tokenizer'", "--tokenizer {bad}/hostile.pt": "run code",
    "--tokenizer {tok} --width 9": "heads", "--tokenizer {tok} --cache {trained}/tokens --seed 1": "seed 1"
}, sample: {
    "": "--class", "--out {trained} --class 1000": "999", "--npz {bad}/one.npz --out {trained}": "already",
    "--class 1 --tokenizer {bad}/other.pt --ar {trained}/ar.pt": "another tokenizer",
    "--npz {out}.npz --num-images 9 --out {trained}": "multiple"
}, fid: {
    "{bad}/one.npz": "two images", "{bad}/float.npz": "float64", "{bad}/origin.npz": "rand",
    "{bad}/other": "one size", "{bad}/one.npz --inception {tok}": "does not fit",
    "{bad}/one.npz --save-stats {bad}/one.npz": "already"}}

@pytest.mark.parametrize("module, words", [(module, words) for module in BAD for words in BAD[module]])
def test_bad_input(module, words, bad, trained, tmp_path):
    def files():
        paths = [path for folder in (bad, trained) for path in folder.rglob("*") if path.name != ".lock"]
        return {path: path.stat().st_mtime_ns for path in paths}
    names = dict(bad=bad, trained=trained, tok=f"{trained}/tokenizer.pt", out=tmp_path / "out")
    before, out = files(), "" if module is fid or "--out" in words else f"--out {tmp_path}/out"
    code, _, err = command(module, FEW[module], out, words.format(**names))
    assert code == 2 and "error: " in err and "Traceback" not in err, err
    assert BAD[module][words].format(**names) in err and files() == before, err
    assert {path.suffix for path in tmp_path.rglob("*") if "tokens" not in path.parts} <= {"", ".jsonl"}

def test_image_folder_end_to_end_without_its_bad_image(bad, tmp_path):
    words = f"--data {bad}/broken --out {tmp_path} --batch-size 8 --skip-bad-images --dtype bfloat16 --steps"
    with pytest.warns(UserWarning, match="skipped: .*7.jpg"):
        must(train_tokenizer, SHAPE, words, "6 2")
    must(train_ar, words, "2 --depth 1 --ten-crop")
    train, val = (data.open_array(tmp_path / "tokens" / part / "tokens.npy") for part in ("train", "val"))
    assert (train.shape, val.shape) == ((13, 10, 21), (1, 2, 21)) and train.max() < 64
    assert "1 (dog), 0 (cat)" in must(sample, f"--out {tmp_path} --class dog 0 --n 2")
    assert (tmp_path / "tokens/train/stand_ins.txt").read_text() == "cat/pixel.png for cat/7.jpg\n"

# ---- What surrounds a run: folders, data that changes, two runs, a full disk ----------------------

def test_folders_as_people_have_and_change_them(tmp_path):
    """Two classes, one behind a link, and much that is no picture beside them. Then a picture changes."""
    folder, out = write_images(tmp_path / "photos", ["cat"], 3), tmp_path / "out"
    (folder / "Zoë").symlink_to(write_images(tmp_path / "elsewhere", ["dog"], 3) / "dog")
    shutil.copytree(folder / "cat", folder / "cat/.ipynb_checkpoints")
    (folder / "cat" / "loop").symlink_to(folder)
    (folder / "cat" / "notes.txt").write_text("none")
    words = f"--out {out} --steps 2"
    code, _, err = command(train_tokenizer, words, f"1 --data {folder} --val-data {folder}", TOKENIZER)
    assert code == 0 and "6 pictures in 2 folders (Zoë, cat); left out: 1 .txt\n" in err
    assert f"--data {folder}" in must(train_ar, words, "--workers 1")        # on the same pictures
    name = unicodedata.normalize("NFD", "Zoë")
    must(sample, f"--out {out} --n 2 --cfg-scale 2 --class {name} --png {out}/each/")
    names = {path.name for path in (out / "each").iterdir()}
    assert names == {"class_0_cfg_scale2.0_00000.png", "class_0_cfg_scale2.0_00001.png"}
    assert must(sample, f"--out {out} --classes").split() == ["0", "Zoë", "1", "cat"]
    moved = folder.rename(tmp_path / "moved")
    must(train_ar, words, f"--resume --data {moved} --val-data {moved}")
    Image.new("RGB", (40, 40)).save(moved / "cat" / "1.png")
    for module, more in ((train_ar, ""), (train_tokenizer, f"1 {TOKENIZER}")):
        code, _, err = command(module, words, more, f"--resume --data {moved} --val-data {moved}")
        assert code == 2 and "pictures of class cat" in err and "of class Zoë" not in err, err

def test_full_disk_leaves_the_last_checkpoint(tmp_path):
    def write_half(file):
        file.write(b"half")
        raise RuntimeError("file write failed")               # as torch.save has it
    data.save_checkpoint(tmp_path / "state.pt", step=1)
    with pytest.raises(data.InputError, match="can't write"):
        data.replace_file(tmp_path / "state.pt", write_half)
    assert load(tmp_path / "state.pt") == {"step": 1} and len(list(tmp_path.iterdir())) == 1

FAST = set(globals())     # ==== All tests below are slow: pipelines, kills, ranks, changes ===============

def test_two_runs_share_a_cache_but_not_a_folder(trained, tmp_path):
    words = f"{AR} --tokenizer {trained}/tokenizer.pt --num-pictures 5000 --steps 2 --cache {tmp_path}/tokens"
    call = Path(sys.executable), HERE / "train_ar.py", words, "--out"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    runs = [subprocess.Popen(split([*call, tmp_path / name]), **pipes) for name in "aab"]
    told = [run.communicate()[0] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 0, 2], told
    assert all(any(words in text for text in told) for words in ("a is in use", "waiting for it")), told

@pytest.mark.parametrize("flags, tokens", [("--prefix-tokens 0", 16), ("--prefix-tokens 4 --cold-swap", 20),
                                           ("--decoder bidirectional", 21), ("--encoder causal", 21)])
def test_other_tokenizers_train_longer_and_paint(flags, tokens, tmp_path):
    must(train_tokenizer, f"--out {tmp_path}", TOKENIZER, flags, "--steps 6 4")
    must(train_tokenizer, f"--out {tmp_path}", TOKENIZER, flags, "--stage 2 --steps 6 5 --resume")
    must(train_tokenizer, f"--out {tmp_path}", TOKENIZER, flags, "--stage 1 --steps 6 5 --resume")
    must(train_ar, f"--out {tmp_path}", AR, "--steps 4")
    must(train_ar, f"--out {tmp_path}", AR, "--steps 8 --resume")
    rates = [data.learning_rate(steps - 1, steps, steps // 4, 2e-3, 1e-5) for steps in (4, 8)]
    assert log_of(tmp_path, "ar", "lr") == pytest.approx(rates)
    tokenizer, words = load_tokenizer(tmp_path / "tokenizer.pt"), f"--out {tmp_path} --class 207 --n 1"
    must(sample, words)
    code, _, err = command(sample, words, f"--paint {tmp_path}/a.gif")
    if "--decoder" in flags:
        assert code == 2 and "no causal decoder" in err
    else:                                     # from 0 tokens to all, then the finished picture
        assert code == 0 and Image.open(tmp_path / "a.gif").n_frames == tokens + 2
    assert tokenizer.config.num_tokens == tokens and tokenizer.config.decoder == "bidirectional"
    assert "--encoder" not in flags or looks_ahead(tokenizer, pictures(range(64)) / 255) == 0

@pytest.mark.parametrize("compiler", ["/nowhere", pytest.param("g++", marks=needs_compiler)])
def test_training_with_and_without_a_compiler(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    python("-c", """if True:
        import data, test_all as t, torch
        plain, compiled = t.small_ar().train(), t.small_ar().train()
        args = t.argparse.Namespace(compile=True, grad_checkpoint=False)
        data.compile_and_checkpoint([compiled], 4000, args, t.CPU)
        for net in (plain, compiled):
            net(torch.arange(42).view(2, 21), torch.tensor([3, 4])).logsumexp(-1).sum().backward()
        for one, two in zip(plain.parameters(), compiled.parameters(), strict=True):
            assert torch.allclose(one.grad, two.grad, atol=1e-4)""")
    assert any(tmp_path.rglob("*.so")) == (compiler != "/nowhere")

def test_fine_tuning_starts_where_the_other_model_ended(trained, tmp_path):
    words, init = f"--warmup 0 --lr 1e-9 --out {tmp_path} --steps 1", f"--init {trained}/tokenizer.pt"
    must(train_ar, on_tokens(trained), f"--init {trained}/ar_state.pt", words)
    for stage in "12":
        must(train_tokenizer, TOKENIZER, words, f"1 --stage {stage} --out {tmp_path}/{stage}", init)
    for out, run in ("", "ar"), ("1", "tokenizer stage 1"), ("2", "tokenizer stage 2"):
        key, most = ("val_psnr", 0.1) if out else ("val_loss", 1e-4)
        assert log_of(tmp_path / out, run, key) == pytest.approx(log_of(trained, run, key)[-1:], abs=most)
    old = load_ar(trained / "ar.pt")
    model = ARModel(replace(old.config, num_classes=3))
    ar_model.start_from(model, old, [old.classes[7], "dodo", old.classes[0]])
    rows = [*range(65), 65 + 7, 65 + 1000, 65, 65 + 1000]     # tokens, two known classes, a new one, null
    assert model.embeddings.weight.equal(old.embeddings.weight[rows])

PAPER = (f"--recipe paper {SHAPE} --batch-size 1 --seed 3 --eval-images 2 --warmup 2 --dtype bfloat16 "
         "--vision-weights random --steps 6 6 --save-every 1")
STATES = "tokenizer_stage1.pt", "tokenizer_stage2.pt", "tokenizer.pt"

@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The paper's recipe, in small and undisturbed, with a copy of each save in saves/. -> its folder"""
    out = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        copy_saves(patch, out / "saves")
        must(train_tokenizer, f"--out {out} --data", write_images(out / "photos") / "cat", PAPER)    # flat
    return out

def test_losses_reach_tokenizer_and_discriminator_in_turns(paper):
    """Phases of 1, 3 and 2 steps. What moved in a step, by the states saved before and after it."""
    for stage in (1, 2):
        states = [load(paper / "saves" / f"tokenizer_stage{stage}.{step:02d}.pt") for step in range(1, 7)]
        for step, (before, after) in enumerate(zip(states, states[1:]), 1):
            moved = {place[place[0] == "model"].split(".")[0] for place in differing(before, after)}
            learning = {"encoder", "quantizer", "decoder"} if stage == 1 else {"decoder"}
            expected = {"optimizer"} | learning
            if step == 4:                     # stage 1 goes on reviving codes
                expected = {"discriminator", "disc_optimizer"} | learning & {"quantizer"}
            assert moved == expected | {"step", "losses"}, (stage, step)
        own = {"strip", "quantizer", "mse", "loss"} if stage == 1 else {"mse", "loss"}
        terms = {1: {"perceptual", "lpips"} | own, 2: {"perceptual"} | own, 5: {"discriminator"},
                 6: {"discriminator", "gan", "perceptual"} | own}
        assert all(set(states[step - 1]["losses"]) == terms[step] for step in terms), stage
    ends = (load(paper / "saves" / f"tokenizer_stage{name}.pt") for name in ("1.06", "2.01"))
    assert not differing(*(state["discriminator"] for state in ends))        # it goes on, decoder and all

def test_interrupted_in_every_phase_equals_uninterrupted(paper, tmp_path, monkeypatch):
    """The signals are real ones; only their moment, in the middle of given steps, is arranged."""
    breaks, read = [1, 3, 5, 1, 3, 5], data.StopFlag.read
    def interrupted(flag, step):
        if breaks and step == breaks[0]:
            breaks.pop(0)
            pids = [process.pid for process in multiprocessing.active_children()] + [os.getpid()]
            python("-c", f"import os\nfor pid in {pids}: os.kill(pid, 15)")     # from outside
        return read(flag, step)
    monkeypatch.setattr(data.StopFlag, "read", interrupted)
    words = f"--out {tmp_path} --data {paper}/photos/cat {PAPER} --resume --workers 1 --grad-checkpoint"
    while breaks:
        assert command(train_tokenizer, words)[0] == 128 + signal.SIGTERM
    must(train_tokenizer, words)
    for name in STATES:
        assert not differing(load(paper / name), load(tmp_path / name)), name
    assert (paper / "log.jsonl").read_text() == (tmp_path / "log.jsonl").read_text()

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_equals_uninterrupted(number, trained, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = f"{on_tokens(trained)} --dropout 0.1 --save-every 5"
    must(train_ar, f"--out {whole}", words)
    call = [sys.executable, *split([HERE / "train_ar.py", words, "--out", broken])]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and not (broken / "ar_state.pt").exists():
        time.sleep(0.01)
    process.stdout.close()                    # the screen goes away, as after Ctrl-C in `| tee log`
    process.send_signal(number)
    assert process.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    assert 0 < load(broken / "ar_state.pt")["step"] < 40
    must(train_ar, f"--out {broken} --resume --grad-checkpoint", words)                # changes nothing
    assert not differing(load(whole / "ar_state.pt"), load(broken / "ar_state.pt"))
    assert (whole / "log.jsonl").read_text() == (broken / "log.jsonl").read_text()

def test_npz_of_every_class_resumes(trained, tmp_path):
    path, done = tmp_path / "samples.npz", None
    words = f"--out {trained} --num-images 1000 --seed 5 --temperature 0.7 --npz {path} --batch-size"
    with subprocess.Popen([sys.executable, HERE / "sample.py", *split([words, "10"])]) as process:
        while process.poll() is None and (done is None or not np.load(done, mmap_mode="r").any()):
            done = next((name for name in tmp_path.glob("*/done.npy") if name.stat().st_size > 1000), None)
            time.sleep(0.01)
        process.kill()
    assert 0 < np.load(done, allow_pickle=False).sum() < 1000 and not path.exists()
    must(sample, words, "100")
    images = np.load(path, allow_pickle=False)["arr_0"]
    assert images.shape == (1000, 32, 32, 3) and images.dtype == np.uint8 and not list(tmp_path.glob("*/*"))
    model, tokenizer = load_ar(trained / "ar.pt"), load_tokenizer(trained / "tokenizer.pt")
    numbers = [0, 207, 999]                   # one a class: picture k shows class k
    tokens = model.generate(torch.tensor(numbers), image_uniforms(5, numbers, 21), temperature=0.7)
    painted = tokenizer.decode(tokens).permute(0, 2, 3, 1).numpy()
    assert np.allclose(images[numbers] / 255, painted, atol=BITS)

def test_npz_folder_and_statistics_give_the_same_numbers(tmp_path, inception):
    def judge(samples, *words):
        return json.loads(must(fid, f"{tmp_path}/a.npz {tmp_path}/{samples} --inception {inception}", *words))
    images = pictures(range(0, 98, 7)).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", arr_0=images[:8])
    np.savez_compressed(tmp_path / "b.npz", arr_0=images[4:])
    for k, image in enumerate(images[4:]):
        (tmp_path / "b" / str(k // 4) / "deep").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "b" / str(k // 4) / "deep" / f"{k}.png")
    one, two = judge("b.npz", "--batch-size 4"), judge("b", f"--save-stats {tmp_path}/stats.npz")
    assert one["images"] == [8, 10] and one["inception"] == data.file_digest(inception)[:8]
    stats = judge("stats.npz")
    for name in ("FID", "sFID", "IS", "precision", "recall"):
        assert one[name] == pytest.approx(two[name], rel=1e-4), name
        assert stats[name] == (pytest.approx(two[name]) if "FID" in name else None), name

def test_two_ranks_train_like_one(trained, tmp_path, monkeypatch):
    one_rank, two_ranks = tmp_path / "one", tmp_path / "two"
    words = f"--steps 20 20 {TOKENIZER} --recipe paper --no-perceptual --dtype float32 --save-every 5"
    copy_saves(monkeypatch, two_ranks)
    must(train_tokenizer, f"--out {one_rank} --accum 2", words)
    (two_ranks / "tokenizer_stage1.05.pt").rename(two_ranks / STATES[0])     # two ranks go on from there
    torchrun("train_tokenizer.py", f"--out {two_ranks} --resume", words)
    must(train_ar, f"--out {one_rank} --accum 2", on_tokens(trained))
    torchrun("train_ar.py", f"--out {two_ranks}", on_tokens(trained))
    for run, key in [("ar", "loss"), ("ar", "val_loss"), *itertools.product(
            ("tokenizer stage 1", "tokenizer stage 2"), ("loss", "discriminator", "val_psnr"))]:
        one, two = (log_of(out, run, key) for out in (one_rank, two_ranks))
        assert len(one) > 0 and np.allclose(one, two, rtol=5e-3), (run, key, one, two)
    for name, most in (("quantizer.usage", 1e-4), ("quantizer.codebook", 1e-2)):             # and cluster
        one, two = (load(out / STATES[0])["model"][name] for out in (one_rank, two_ranks))
        assert torch.allclose(one, two, atol=most), name

def test_two_ranks_paint_and_judge_like_one(trained, tmp_path):
    words = f"--out {trained} --class 1 2 -n 5 --png {tmp_path}"
    torchrun("sample.py", words + "/2.png --batch-size 3")
    must(sample, words + "/1.png")
    assert torch.allclose(*(cells(tmp_path / f"{ranks}.png", 5) for ranks in (1, 2)), atol=BITS)
    words = "--data shapes --num-images 9 --inception random --batch-size 2 --tokenizer", trained / STATES[2]
    one, two = json.loads(must(fid, *words)), json.loads(torchrun("fid.py", *words))
    assert one.pop("inception") == two.pop("inception") and one.pop("images") == two.pop("images") == [9]
    assert one == pytest.approx(two, rel=1e-4) and one["rFID"] > 0
    model, images = load_tokenizer(trained / STATES[2]), pictures(range(9)) / 255
    tokens = model.encode(images)
    painted = (model.decode(tokens) * 255).round() / 255
    psnr = -10 * (painted - images).square().mean((1, 2, 3)).log10()
    assert one["PSNR"] == pytest.approx(psnr.mean().item(), rel=1e-4)
    assert one["codebook_use"] == pytest.approx(len(tokens.unique()) / 64)

def test_error_on_one_rank_reaches_all(bad, tmp_path):
    words = f"--out {tmp_path}/out --data {bad}/broken {TOKENIZER} --steps 50 1"
    assert re.search(r"rank [01]: error: .*cat/7.jpg", torchrun("train_tokenizer.py", words, fails=True))

def changed_copy(folder, *sections):
    """Copy the code to `folder` and make the changes of sections of docs/changing.md, counted from 1."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, folder)
    texts = (HERE / "docs" / "changing.md").read_text().split("\n## ")
    text = "".join(texts[section] for section in sections)
    blocks = re.findall(r"(?ms)^`(\w+\.py)`:\n\n```diff\n(.*?)^```", text)
    assert blocks and len(blocks) == text.count("```diff"), "a diff without the name of its file"
    for name, block in blocks:
        code, lines = (folder / name).read_text(), [line or " " for line in block.splitlines()]
        old, new = ("".join(line[1:] + "\n" for line in lines if line[0] in signs) for signs in (" -", " +"))
        assert code.count(old) == 1, f"{name} holds this {code.count(old)} times:\n{old}"
        (folder / name).write_text(code.replace(old, new))

def test_change_of_the_quantizer(tmp_path):
    changed_copy(tmp_path, 1)
    words = "train_tokenizer.py --image-size 32 --patch-size 8 --batch-size 8 --steps 200 50"
    python(*words.split(), cwd=tmp_path)
    mse = log_of(tmp_path / "out", "tokenizer stage 1", "mse")
    assert np.mean(mse[-3:]) < 0.7 * mse[0], mse
    python("train_ar.py", *AR.split(), "--steps", 5, cwd=tmp_path)
    python(*"sample.py --class 207 --n 1 --png out/x.png".split(), cwd=tmp_path)

def test_changes_of_the_shapes_and_the_order(tmp_path):
    changed_copy(tmp_path, 2, 3)
    kept = "test_shapes_show or looks_ahead or painted_patches"
    python("-m", "pytest", "-q", "test_all.py", "-k", kept, cwd=tmp_path)
    told = python("-c", """if True:
        import data, test_all
        print(len(data.SHAPE_CLASSES), data.generation_order(2).tolist())
        print(test_all.small_tokenizer().fingerprint())""", cwd=tmp_path)
    assert told.startswith("1100 [0, 2, 1, 3]\n") and small_tokenizer().fingerprint() not in told
    changed = (tmp_path / "data.py").read_text().replace("view(grid, grid).T.flatten()", "fmod(3)")
    (tmp_path / "data.py").write_text(changed)
    words = "-c", "import test_all; test_all.small_tokenizer()"
    assert "generation_order must name every patch" in python(*words, cwd=tmp_path, fails=True)

# ==== Evidence, which is no part of the product, after its tests ==================================

def test_benchmark_judge_and_sheet(tmp_path, capsys):
    benchmark("cpu", ["tiny"], [1])
    times = json.loads(capsys.readouterr().out)
    assert times["ms, cached"] > 0 and times["ms, full forward"] > 0
    for name, first, flip in (("a-0", 0, 0), ("a-1", 0, 0), ("b", 100, 255)):
        (tmp_path / name).mkdir()
        samples = pictures(range(first, first + 1000), 32, "train").permute(0, 2, 3, 1) ^ flip
        np.savez(tmp_path / name / "samples.npz", arr_0=samples.numpy())
    args = argparse.Namespace(data="shapes", val_data=None, png=tmp_path / "a.png")
    judge([tmp_path / name for name in ("a-0", "a-1", "b")], args, steps=150)
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    rows = {row.strip(): [float(x.split()[0]) for x in cells if x.strip()] for row, *cells in lines[2:]}
    (right, wrong, ceiling), (near, far, _) = rows["shape"], rows["Frechet distance"]
    assert right > 0.5 > 0.25 > wrong and ceiling > 0.5 and 3 * near < far
    np.savez(tmp_path / "cats.npz", arr_0=np.full((8, 32, 32, 3), (220, 30, 30), np.uint8))
    judge([tmp_path / "cats.npz"], argparse.Namespace(
        data=write_images(tmp_path / "pets"), val_data=None, png=None), steps=30)
    assert re.search(r"class \| 0.5 \| 1 \|", capsys.readouterr().out)       # every second one is a cat
    contact_sheet(tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 960

def test_operations():
    model, (T, C) = small_ar(), (21, 48)                      # tokens, width
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    tokens = torch.zeros(1, T - 1, dtype=torch.long)
    count, hours = operations(lambda: model(tokens, tokens[:, 0]), "TF32")
    assert count == 2 * T * matrices + 2 * 4 * T * T * C and hours == pytest.approx(count / 7.1e17, 0.01)

def test_claims(tmp_path, capsys):
    study = [("leaves", "causal, causal encoder", 64, 4), ("shapes", "bidirectional", 64, 1)]
    claims(tmp_path, seeds=[0], study=study, share=0.004)
    first = capsys.readouterr().out
    claims(tmp_path, seeds=[0], study=study, share=0.004)     # finds all done
    again = capsys.readouterr().out
    assert again.startswith("\nleaves\n") and first.endswith(again)
    leaves = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", first.split("\nshapes\n")[0], re.M))
    bits = {name.removeprefix("bits, "): float(leaves[name]) for name in leaves if name.startswith("bits, ")}
    assert float(leaves["looks ahead"]) == 0 and len(set(bits.values())) == len(bits) == 4
    assert float(leaves["direction gap, bits"]) == pytest.approx(bits["backward"] - bits["forward"], abs=0.1)

def test_bits_where_the_second_token_repeats_the_first():
    tokens = torch.randint(4, (4000, 4), generator=torch.Generator().manual_seed(0))
    tokens[:, 1] = tokens[:, 0]
    sets = {"train": tokens[:3000], "val": tokens[3000:]}
    args = argparse.Namespace(device="cpu", dtype="float32", seed=0)
    for order in (torch.arange(4), torch.tensor([1, 3, 2, 0])):
        bits, accuracy = ar_bits(sets, ARConfig(4, 2, 0, 1, 64, 2, 2), order, 250, args)
        assert bits == pytest.approx(6, abs=0.3) and accuracy == pytest.approx((1 + 3 / 4) / 4, abs=0.05)

for name in [name for name in globals() if name.startswith("test_") and name not in FAST]:
    slow(globals()[name])

@torch.no_grad()
def benchmark(device, presets, batch_sizes):
    """A JSON line for each preset and batch size: times in the middle of a picture, guidance included."""
    device = data.start(argparse.Namespace(device=device, dtype="auto", batch_size=1))
    for preset, batch in itertools.product(presets, batch_sizes):
        model, times = ARModel(ARConfig(**ar_model.PRESETS[preset])).to(device).eval(), {}
        n, rows = model.config.num_tokens, torch.zeros(2 * batch, dtype=torch.long, device=device)
        caches, past = model.caches_for(2 * batch), rows[:, None].expand(-1, n // 2)
        ways = {"cached": lambda: model.step(rows, n // 2, caches), "full forward": lambda: model(past, rows)}
        if device.type == "cuda":
            ways["compiled, all tokens"] = lambda: model.generate(rows[:batch], compiled=True)
        for way, call in ways.items():
            seconds = timeit.repeat(lambda: call().flatten()[0].item(), repeat=4, number=1)
            times["ms, " + way] = 1000 * np.mean(seconds[1:])                # the first does not count
        print(json.dumps({"preset": preset, "batch": batch, "device": str(device), **times}), flush=True)

DIGITS = {"shape": len(data.SHAPES), "colour": len(data.COLOURS), "background": len(data.BACKGROUNDS)}

def train_classifier(train, counts, steps):
    """A small network that learns from true pictures what they show: (B, 3, size, size) in [0, 1] -> the
    logits of all that a label says, side by side. counts: a label's digits have so many values each."""
    torch.manual_seed(0)
    layers = []
    for a, b, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 2)):
        layers += [nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(2048, sum(counts)))
    optimizer = torch.optim.AdamW(net.parameters())
    for step in range(steps):
        images, labels = zip(*(train.read(step, k) for k in torch.randint(len(train), (64,)).tolist()))
        images = torch.stack(images) / 255 + 0.02 * torch.randn(64, 3, 1, 1)
        if step % 2:                          # blurred, so that softness is no clue
            half = F.avg_pool2d(images, 2)
            images = F.interpolate(half, images.shape[2:], mode="bilinear")
        logits = net(images.clamp(0, 1)).split(counts, 1)
        digits = torch.unravel_index(torch.tensor(labels), counts)
        sum(map(F.cross_entropy, logits, digits)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()

@torch.no_grad()
def classify(classifier, images, labels, counts):
    """Images (n, 3, H, W) uint8 -> share right of each digit of the labels, Gaussian of the features."""
    hidden = torch.cat([classifier[:-2](part) for part in (images / 255).split(100)])
    choices = [part.argmax(1) for part in classifier[-2:](hidden).split(counts, 1)]
    right = torch.stack(choices) == torch.stack(torch.unravel_index(labels, counts))
    shares = [part.double().mean().item() for part in (*right, right.all(0))]
    return shares, fid.gaussian(fid.moments(hidden.mean((2, 3))))

def print_table(rows):
    """{row: {column: numbers}} -> Markdown: mean ± standard deviation."""
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")
    for row, cells in rows.items():
        texts = []
        for numbers in (cells.get(column, []) for column in columns):
            spread = f" ± {np.std(numbers, ddof=1):.2g}" if len(numbers) > 1 else ""
            texts.append(f"{np.mean(numbers):.4g}{spread}" if numbers else "")
        print(f"| {row} | " + " | ".join(texts) + " |")

@torch.no_grad()
def looks_ahead(tokenizer, images):
    """Share of the upper half's tokens, prefix included, that change with the lower half of another of the
    images, (n, 3, H, W) in [0, 1]."""
    config = tokenizer.config
    rows, mixed = (config.grid + 1) // 2, images.roll(len(images) // 2, 0)
    mixed[:, :, :config.patch_size * rows] = images[:, :, :config.patch_size * rows]
    changed = [tokenizer.encode(a) != tokenizer.encode(b) for a, b in zip(images.split(32), mixed.split(32))]
    return torch.cat(changed)[:, :config.prefix_tokens + rows * config.grid].double().mean().item()

def judge(paths, args, steps=800):
    """Print a table of what samples show, a column of true pictures beside them. paths: .npz files, classes
    in turn, or folders of runs with samples.npz. Folders that differ only in a final -number share a column:
    mean and deviation. args.png: where a grid goes, first of samples, then of true pictures."""
    files = [path / "samples.npz" if path.is_dir() else path for path in paths]
    samples = [np.load(file, allow_pickle=False)["arr_0"] for file in files]
    args = argparse.Namespace(**vars(args), seed=0, num_pictures=50_000, skip_bad_images=False)
    train, val = data.open_data(args, samples[0].shape[1])
    n, counts, digits = len(train.classes), tuple(DIGITS.values()), [*DIGITS, "all of it"]
    if args.data != "shapes":
        counts, digits = (n,), ["class"]
    sets = [(str(path), torch.from_numpy(images).permute(0, 3, 1, 2), torch.arange(len(images)) % n)
            for path, images in zip(paths, samples)]
    true = torch.stack([val.read(0, k)[0] for k in range(len(val))])
    sets.append(("true pictures", true, torch.from_numpy(val.labels)))
    classifier, rows, shown = train_classifier(train, counts, steps), {}, {}
    images, labels = zip(*(train.read(0, k) for k in data.spread(len(train), 5000)))
    _, reference = classify(classifier, torch.stack(images), torch.tensor(labels), counts)
    for name, images, labels in sets:
        shares, features = classify(classifier, images, labels, counts)
        scores = dict(zip(digits, shares))
        scores["Frechet distance"] = fid.frechet_distance(*reference, *features)
        name, columns = re.sub(r"-\d+$", "", name), min(n, 16)
        for row, score in scores.items():
            rows.setdefault(row, {}).setdefault(name, []).append(score)
        places = [np.flatnonzero(labels == k * n // columns) for k in range(columns)]
        each = min(1 if n > 16 else 4, *map(len, places))
        shown.setdefault(name, images[[of_class[k] for k in range(each) for of_class in places]])
    if args.png:
        data.save_picture(args.png, data.grid_image(torch.cat(list(shown.values())) / 255, columns))
    print_table(rows)

RATES = {"bfloat16": 989e12, "TF32": 494e12, "float32": 67e12}    # an H100's, NVIDIA's data sheet, dense

def operations(call, dtype):
    """-> of call() by PyTorch's count, in which a multiplication and an addition are two, and the hours that
    they take at 40% of an H100's rate. No number is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), (
            FlopCounterMode(display=False)) as counter:
        call()
    return counter.get_total_flops() * np.array([1, 1 / (0.4 * RATES[dtype] * 3600)])

def costs():
    """Print what the published recipe costs, by calculation."""
    image, painted = torch.zeros(1, 3, 256, 256), torch.zeros(1, 3, 256, 256, requires_grad=True)
    model, judges = Tokenizer(TokenizerConfig()).eval(), fid.load_judges("random", "cpu")
    recipe, both, rows = train_tokenizer.RECIPES["paper"], torch.cat([image, image]), {}
    discriminator = train_tokenizer.Discriminator(recipe["discriminator"])
    difference = functools.partial(train_tokenizer.perceptual_loss, judges["convnext"])
    for stage, phases in enumerate(recipe["stages"], 1):
        if stage == 2:
            model.swap_decoder()
        total = 0
        for phase in phases:
            step = operations(lambda: model(image)[0].mean().backward(), "bfloat16")
            step += operations(lambda: difference(painted, image).backward(), "TF32")
            if phase.lpips:
                step += operations(lambda: judges["lpips"](painted, image).mean().backward(), "TF32")
            if phase.gan:                     # half of the steps are the discriminator's
                discriminator.requires_grad_(False)
                step += operations(lambda: discriminator(painted).mean().backward(), "TF32")
                discriminator.requires_grad_(True)
                step += operations(lambda: model(image), "bfloat16")
                step = (step + operations(lambda: discriminator(both).mean().backward(), "TF32")) / 2
            total += step * phase.steps * recipe["batch_size"]
        rows[f"tokenizer, stage {stage}"] = total
    rows["ten crops of ImageNet"] = 1_281_167 * 10 * operations(lambda: model.encode(image), "float32")
    for preset in ("B", "L", "XL"):
        model, recipe = ARModel(ARConfig(**ar_model.PRESETS[preset])), train_ar.RECIPES[preset]
        tokens = torch.zeros(1, model.config.num_tokens - 1, dtype=torch.long)
        step = operations(lambda: model(tokens, tokens[:, 0]).mean().backward(), "bfloat16")
        rows[f"AR model {preset}"] = step * recipe["batch_size"] * recipe["steps"]
        step = operations(lambda: model(tokens, tokens[:, 0]), "TF32")
        rows[f"50,000 pictures of {preset}"] = step * 2 * 50_000               # 2: guidance
    print_table({name: {"operations": [count], "hours of one H100": [hours], "of eight": [hours / 8]}
                 for name, (count, hours) in rows.items()})

# ---- The claims, see docs/claims.md. The pictures, sizes and steps are ours. ---------------------

def draw_leaves(rng, size=32):
    """Dead leaves, (size, size, 3) uint8: 40 discs whose radii r have density r^-3, each with a grating."""
    y, x = np.mgrid[:size, :size] + 0.5
    image = np.zeros((size, size, 3))
    for _ in range(40):
        radius, turn = min(0.5, 0.06 * (1 - rng.random()) ** -0.5) * size, rng.uniform(0, math.pi)
        (cx, cy), (one, other) = rng.uniform(0, size, 2), rng.random((2, 3))
        along = x * math.cos(turn) + y * math.sin(turn)
        wave = 0.5 + 0.5 * np.sin(along * 2 * math.pi / rng.uniform(3, 12))[..., None]
        cover = np.clip(radius + 0.5 - np.hypot(x - cx, y - cy), 0, 1)[..., None]
        image += cover * (one + (other - one) * wave - image)
    return (image * 255 + 0.5).astype(np.uint8)

def write_leaves(folder, count):
    """Draw `count` dead leaves into an image folder of one class. The folder's name is the split."""
    (folder / "all").mkdir(parents=True, exist_ok=True)
    for k in range(count):
        path = folder / "all" / f"{k:05d}.png"
        if not path.exists():
            data.save_picture(path, Image.fromarray(draw_leaves(data.generator(f"leaves {folder.name}", k))))

ARMS = {                                      # flags of train_tokenizer.py
    "causal": "--prefix-tokens 0",
    "bidirectional": "--prefix-tokens 0 --decoder bidirectional",
    "causal, g + 1 prefix tokens": "",
    "causal, g prefix tokens": "--prefix-tokens 8",
    "causal, causal encoder": "--prefix-tokens 0 --encoder causal"}
MAIN = "causal", "bidirectional"
# Pictures, arm, codes, number of AR models (forward, backward, random order, small). 4: fresh decoders, too.
STUDY = [("leaves", arm, 256, 4) for arm in MAIN]
STUDY += [("leaves", arm, 256, 2) for arm in ARMS if arm not in MAIN]
STUDY += [(name, arm, codes, 2) for name, codes in (("fashion", 64), ("shapes", 256)) for arm in MAIN]
STUDY += [("leaves", arm, codes, 1) for codes in (64, 1024) for arm in MAIN]

def fit(model, steps, n, batch_size, loss_of, args):
    """AdamW with warmup, a cosine and clipped gradients. loss_of: of pictures, an array of places below n."""
    rng, betas, weight_decay = np.random.default_rng(args.seed), train_ar.BETAS, train_ar.WEIGHT_DECAY
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    optimizer = torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=weight_decay, fused=True)
    for step in range(steps):
        with autocast:
            loss = loss_of(rng.integers(n, size=batch_size))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train_ar.CLIP)
        for group in optimizer.param_groups:
            group["lr"] = data.learning_rate(step, steps, min(100, steps // 4), 2e-3, 1e-5)
        optimizer.step()
        optimizer.zero_grad()

def ar_bits(tokens, config, order, steps, args):
    """Train an AR model on tokens, {"train": (n, N), "val": (n, N)}, in an order (N,). Each token keeps the
    position of its place in the picture. -> bits an image and accuracy, of val"""
    torch.manual_seed(args.seed)
    model = ARModel(config).to(args.device)
    train, val = (tokens[name][:, order] for name in ("train", "val"))
    model.table = model.table[:, F.pad(1 + order, (1, 0))]    # the class comes first, as before
    if args.device == "cpu" and steps >= 300:
        model.compile()                       # a minute to compile, then twice the speed

    def logits(batch):
        classes = torch.zeros(len(batch), dtype=torch.long, device=args.device)
        return model(batch[:, :-1], classes).float().transpose(1, 2)

    def loss_of(chosen):
        batch = train[chosen].to(args.device)
        return F.cross_entropy(logits(batch), batch)

    fit(model, steps, len(train), 32, loss_of, args)
    model.eval()
    val = val.to(args.device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        predicted = torch.cat([logits(batch) for batch in val.split(100)])
    bits = F.cross_entropy(predicted, val).item() * val.shape[1] / math.log(2)
    return bits, (predicted.argmax(1) == val).double().mean().item()

def fresh_psnr(model, decoder, images, tokens, steps, args):
    """PSNR of a new decoder, "causal" or "bidirectional", that learns to read tokens as they are."""
    torch.manual_seed(args.seed)
    net = Decoder(replace(model.config, decoder=decoder)).to(args.device)

    def paint(batch):
        return net(model.quantizer.codes(batch.to(args.device)))[0]

    def loss_of(chosen):
        return F.mse_loss(paint(tokens["train"][chosen]), data.to_float(images["train"][chosen], args.device))

    fit(net, steps, len(tokens["train"]), 16, loss_of, args)
    with torch.no_grad():
        painted = torch.cat([paint(batch) for batch in tokens["val"].split(100)])
    return fid.psnr(painted, data.to_float(images["val"], args.device)).mean().item()

def measure_tokens(args, ways, share):
    """Train AR models and, if ways is 4, fresh decoders on the tokens of a run. -> {measure: number}"""
    data.start(args)
    model = load_tokenizer(f"{args.out}/tokenizer.pt", args.device)
    images, tokens, n = {}, {}, model.config.num_tokens
    sets = data.open_data(args, 32, labelled=False)
    for name, dataset, count in zip(("train", "val"), sets, (args.num_pictures, args.eval_images)):
        images[name] = torch.stack([dataset.read(0, k)[0] for k in data.spread(len(dataset), count)])
        floats = (data.to_float(batch, args.device) for batch in images[name].split(100))
        tokens[name] = torch.cat([model.encode(batch).cpu() for batch in floats])
    counts = torch.bincount(tokens["val"].flatten()).double()
    measures = {"looks ahead": looks_ahead(model, data.to_float(images["val"], args.device)),
                "codes in use": (counts > 0).sum().item()}
    forward, small = torch.arange(n), dict(width=64, heads=2, depth=3)
    shuffled = torch.from_numpy(np.random.default_rng(args.seed).permutation(n))
    for way, order, changes in (("forward", forward, {}), ("backward", forward.flip(0), {}),
                                ("random order", shuffled, {}), ("small model", forward, small))[:ways]:
        config = ARConfig(model.config.codebook_size, model.config.grid, model.config.prefix_tokens, 1,
                          **ar_model.PRESETS["tiny"] | changes)
        bits, accuracy = ar_bits(tokens, config, order, round(1200 * share), args)
        measures[f"bits, {way}"] = bits
        if way == "forward":
            entropy = torch.distributions.Categorical(counts).entropy().item()
            measures |= {"accuracy": accuracy, "1 - L/H": 1 - bits / n * math.log(2) / entropy}
    if ways == 4:
        for decoder in MAIN:
            psnr = fresh_psnr(model, decoder, images, tokens, round(800 * share), args)
            measures[f"PSNR, fresh {decoder}"] = psnr
    return measures

def claims(out, fashion=None, seeds=(0, 1, 2), study=STUDY, share=1.0, device=data.DEVICES[0]):
    """Train and measure the runs of the study that `out` lacks, each in its own folder, and print the tables.
    Several processes may share the work. fashion: a folder with train and val. share: for tests, of all."""
    steps, num_pictures, eval_images = (round(count * share) for count in (2500, 32_000, 1000))
    with data.take_lock(out / "leaves", wait=True):
        write_leaves(out / "leaves" / "train", num_pictures)
        write_leaves(out / "leaves" / "val", eval_images)
    data_words = {"shapes": ["--data shapes"]}
    for name, folder in ("leaves", out / "leaves"), ("fashion", fashion):
        data_words[name] = folder and ["--data", folder / "train", "--val-data", folder / "val"]
    for seed, (name, arm, codes, ways) in itertools.product(seeds, study):
        run = out / re.sub(r"\W+", "-", f"{name} {arm} {codes} {seed}")
        try:
            lock = data.take_lock(out / "locks" / run.name)   # held until the next one is taken
        except data.InputError:               # another process is at it
            continue
        if (run / "result.json").exists() or not data_words[name]:
            continue
        data.say(f"{time.strftime('%H:%M')} {run}")
        shutil.rmtree(run, ignore_errors=True)                # what an interrupted process left
        words = [f"--stage 1 --image-size 32 --patch-size 4 --codebook-size {codes} --steps {steps} 1",
                 f"--eval-every {steps // 5} --eval-images {eval_images} --num-pictures {num_pictures}",
                 f"--workers 0 --seed {seed} --device {device} --out", run, ARMS[arm], *data_words[name]]
        code, _, errors = command(train_tokenizer, *words)
        if code:                              # also when a signal has stopped it
            sys.exit(errors)
        psnrs = log_of(run, "tokenizer stage 1", "val_psnr")  # the first is from before there are codes
        measures = {f"PSNR, {k}/5 of the steps": psnrs[k - 1] for k in range(2, 6)}
        with mock.patch("sys.argv", ["", *split(words)]):
            measures |= measure_tokens(train_tokenizer.parse_args(), ways, share)
        result = dict(pictures=name, arm=arm, codes=codes, seed=seed, measures=measures)
        data.replace_file(run / "result.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
    print_claims(out)

def print_claims(out):
    """A table for each kind of pictures, and bits an image at equal PSNR."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))]
    tables, curves = {}, {}
    for result in sorted(results, key=lambda run: (run["pictures"], run["codes"], [*ARMS].index(run["arm"]))):
        values = result["measures"]
        values["PSNR"] = values.pop("PSNR, 5/5 of the steps")
        for gap, one, other in (("direction gap, bits", "bits, backward", "bits, forward"),
                                ("small model costs, bits", "bits, small model", "bits, forward"),
                                ("decoder gap, dB", "PSNR, fresh causal", "PSNR, fresh bidirectional")):
            if one in values:
                values[gap] = values[one] - values[other]
        if result["pictures"] == "leaves" and result["arm"] in MAIN:
            curve = curves.setdefault((result["arm"], result["seed"]), [])
            curve.append((values["PSNR"], values["bits, forward"]))
        column = f"{result['arm']}, {result['codes']} codes"
        for measure, value in values.items():
            row = tables.setdefault(result["pictures"], {}).setdefault(measure, {})
            row.setdefault(column, []).append(value)
    curves = {key: curve for key, curve in curves.items() if len(curve) == 3}
    low = max((min(curve)[0] for curve in curves.values()), default=0)       # all reach from low to high
    high = min((max(curve)[0] for curve in curves.values()), default=0)
    for psnr in np.arange(math.ceil(5 * low) / 5, high, 0.2):
        row = tables.setdefault("leaves, bits at equal PSNR", {}).setdefault(f"{psnr:.1f} dB", {})
        for (arm, _), curve in curves.items():
            parabola = np.polyfit(*zip(*curve), 2)
            row.setdefault(arm, []).append(np.polyval(parabola, psnr))
    for name, rows in tables.items():
        print(f"\n{name}\n")
        print_table(rows)

def contact_sheet(path, size=96):
    """A row a shape, a column a colour, backgrounds along the diagonals, each with its class."""
    shapes, colours, grounds = DIGITS.values()
    sheet = Image.new("RGB", (colours * (size + 2), shapes * (size + 46)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for shape, colour in itertools.product(range(shapes), range(colours)):
        label = (shape * colours + colour) * grounds + (shape + colour) % grounds
        left, top = colour * (size + 2), shape * (size + 46)
        sheet.paste(Image.fromarray(data.draw_shape(0, "train", label, size)[0]), (left, top))
        words = f"{label} " + data.SHAPE_CLASSES[label].replace(" ", "\n", 2)
        draw.text((left + 2, top + size), words, "black", font, spacing=1)
    sheet.save(path)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter)
    parser.add_argument("command", choices=["benchmark", "claims", "costs", "judge", "sheet"])
    parser.add_argument("paths", metavar="PATH", nargs="*", type=Path,
                        help="judge: samples.npz or folders of runs; claims: a folder for its runs")
    parser.add_argument("--data", default="shapes", help="judge: the true pictures (%(default)s)")
    parser.add_argument("--val-data", help="judge: those for its last column")
    parser.add_argument("--fashion", type=Path, help="claims: Fashion-MNIST, README makes the folder")
    parser.add_argument("--png", help="where a grid of samples, or the sheet (shapes.png), goes")
    parser.add_argument("--device", **data.DEVICE)
    parser.add_argument("--preset", choices=ar_model.PRESETS, nargs="+", default=["tiny"])
    parser.add_argument("--batch-size", type=data.positive, nargs="+", default=[1, 16])
    args = parser.parse_args()
    if (args.command in ("claims", "judge")) != bool(args.paths):
        parser.error("claims and judge need a PATH, the others need none")
    calls = {"benchmark": lambda: benchmark(args.device, args.preset, args.batch_size), "costs": costs,
             "claims": lambda: claims(args.paths[0], args.fashion, device=args.device),
             "judge": lambda: judge(args.paths, args),
             "sheet": lambda: contact_sheet(args.png or "shapes.png")}
    calls[args.command]()

if __name__ == "__main__":
    data.run(main)
