"""Everything that could break, on the CPU, in a few minutes:  python -m pytest test_all.py"""
import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ar_model
import data
import fid
import sample
import train_ar
import train_tokenizer
from ar_model import ARConfig, ARModel, image_uniforms, load_ar, sample_tokens
from data import InputError
from tokenizer import Tokenizer, TokenizerConfig, causal_encoder_mask, load_causal_decoder, load_tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
SMALL = dict(image_size=32, patch_size=8, encoder_width=32, encoder_depth=2, decoder_width=32, decoder_depth=2, head_dim=16,
             codebook_size=64, codebook_dim=8, buffer_tokens=4, init="narrow")


def small_tokenizer(**changes):
    torch.manual_seed(0)
    return Tokenizer(TokenizerConfig(**{**SMALL, **changes})).eval()


def small_ar(**changes):
    torch.manual_seed(0)
    small = dict(codebook_size=64, grid=4, num_classes=10, width=48, depth=2, heads=2, dropout=0.0)
    model = ARModel(ARConfig(**{**small, **changes}))
    torch.nn.init.normal_(model.output.weight, std=0.3)       # zero at initialisation, which would hide every difference
    return model.eval()


def command(module, *words):
    """Run a script's main() as its command line does, in this process. -> exit code, stdout, stderr."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [module.__name__ + ".py", *map(str, words)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            data.run(module.main)
    except SystemExit as error:
        code = error.code
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def torchrun(ranks, script, *words):
    """Run a script on so many ranks. CalledProcessError, with what it said on the screen, when it fails."""
    found = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone",
                            os.path.join(HERE, script), *map(str, words)], capture_output=True, text=True, timeout=300)
    print(found.stderr)
    found.check_returncode()
    return found


def log_of(out, run, key):
    with open(f"{out}/log.jsonl") as file:
        return [entry[key] for entry in map(json.loads, file) if entry["run"] == run and key in entry]


# -----------------------------------------------------------------------------
# Pictures in

def test_shapes_show_their_class():
    for label in range(0, 1000, 37):
        image, found = data.draw_shape(0, "train", label, 64)
        assert found == label and image.shape == (64, 64, 3) and image.dtype == np.uint8
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]].mean(0) / 255          # the shape never reaches two corners
        assert np.abs(data.GROUNDS - corners).sum(1).argmin() == label % 10
    for shape in range(10):
        image = data.draw_shape(1, "train", 100 * shape, 64)[0].astype(int)
        assert 0.03 < (np.abs(image - image[0, 0]).sum(2) > 100).mean() < 0.6   # and is neither lost nor all there is


def test_shapes_are_a_function_of_seed_split_index():
    one = data.draw_shape(0, "train", 207, 64)[0]
    assert (one == data.draw_shape(0, "train", 207, 64)[0]).all()
    for other in [(1, "train", 207), (0, "val", 207), (0, "train", 1207)]:
        assert (one != data.draw_shape(*other, 64)[0]).mean() > 0.3
    large = np.asarray(Image.fromarray(data.draw_shape(0, "train", 207, 256)[0]).resize((64, 64), Image.BOX)).astype(int)
    assert np.abs(large - one).max() < 40 and np.abs(large - one).mean() < 0.4  # antialiased: the same picture at any size


def test_contact_sheet(tmp_path):
    code, out, _ = command(data, "--out", tmp_path / "sheet.png", "--size", 48)
    assert code == 0 and "sheet.png" in out and Image.open(tmp_path / "sheet.png").width > 480


def write_images(folder, classes=("cat", "dog"), each=6):
    """A folder of pictures in mixed formats, modes and sizes: class k is mostly colour k."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(classes):
        os.makedirs(folder / name, exist_ok=True)
        for n in range(each):
            pixels = rng.integers(0, 60, (50 + 17 * (n % 6), 140 - 13 * (n % 6), 3)).astype(np.uint8)
            pixels[..., k % 3] += 190
            suffix = ["jpg", "png", "webp", "bmp", "JPEG", "png"][n % 6]
            Image.fromarray(pixels).save(folder / name / f"{n}.{suffix}")
    return folder


def test_every_kind_of_image_becomes_rgb(tmp_path):
    colour = (200, 60, 20)
    image = Image.new("RGB", (40, 30), colour)
    for name, made in {"rgb.png": image, "palette.png": image.quantize(8), "cmyk.jpg": image.convert("CMYK"), "web.webp": image,
                       "bitmap.bmp": image, "photo.jpg": image, "alpha.png": image.convert("RGBA"), "moving.webp": image,
                       "moving.png": image}.items():
        made.save(tmp_path / name, **({"save_all": True, "append_images": [image.rotate(90)]} if "moving" in name else {}))
        found = data.read_image(tmp_path / name)
        assert found.mode == "RGB" and np.abs(np.asarray(found).reshape(-1, 3).mean(0) - colour).max() < 6, name
    Image.new("L", (40, 30), 128).save(tmp_path / "grey.png")
    Image.fromarray(np.full((30, 40), 128 * 257, np.uint16)).save(tmp_path / "grey16.png")
    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    for name, value in {"grey.png": 128, "grey16.png": 128, "clear.png": 255}.items():
        assert (np.asarray(data.read_image(tmp_path / name)) == value).all(), name
    turned = Image.new("RGB", (40, 30), colour)
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    assert data.read_image(tmp_path / "turned.jpg").size == (30, 40)


def test_crops():
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3))
    crop = data.centre_crop(Image.fromarray(ramp), 50)
    assert crop.shape == (50, 50, 3) and abs(crop[..., 0].mean() - 99.5) < 1 and abs(crop[25, 0, 0] - 51) <= 1
    rngs = [data.generator("crop", 0, 0, k) for k in range(40)]
    crops = [data.random_crop(Image.fromarray(ramp), 50, rng)[25, :, 0].astype(int) for rng in rngs]
    assert {np.sign(c[-1] - c[0]) for c in crops} == {-1, 1} and np.ptp([c.min() for c in crops]) > 50
    for shape in [(1, 1), (1, 500), (500, 3)]:
        assert data.centre_crop(Image.new("RGB", shape), 32).shape == (32, 32, 3)


def test_folder_ids_and_held_out_images(tmp_path):
    folder = write_images(tmp_path / "train", ("tench", "goldfish", "shark"), 20)
    train, val = data.open_data(str(folder), None, 32, 0)
    assert train.classes == ["goldfish", "shark", "tench"]
    assert len(train) + len(val) == 60 and len(val) == 3 and not set(train.paths) & set(val.paths)
    assert all(os.path.basename(os.path.dirname(path)) == train.classes[label] for path, label in zip(train.paths, train.labels))


def test_ten_crops(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (44, 60, 3), dtype=np.uint8)       # 44 = 1.1 * 40: nothing to resize
    os.makedirs(tmp_path / "cat")
    for name in "ab":
        Image.fromarray(pixels).save(tmp_path / "cat" / f"{name}.png")
    train, val = data.open_data(str(tmp_path), None, 40, 0, ten_crop=True)
    found = train.read_crops(0).permute(0, 2, 3, 1).numpy()
    assert found.shape == (10, 40, 40, 3) and len(set(train.crops)) == 10 and len(val.crops) == 2
    for k, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]):             # the square begins at column 8
        expected = pixels[top:top + 40, 8 + left:48 + left]
        assert np.array_equal(found[k], expected) and np.array_equal(found[5 + k], expected[:, ::-1])


def test_batches_do_not_depend_on_ranks_accumulation_or_workers(tmp_path):
    def keys(ranks, accum, start=0, steps=5):
        streams = [data.batch_keys(23, 7, 8, accum, start, rank, ranks) for rank in range(ranks)]
        return [[tuple(key) for stream in streams for _ in range(accum) for key in next(stream)] for _ in range(steps)]

    assert keys(1, 1) == keys(2, 1) == keys(2, 2) == keys(4, 2)
    assert keys(1, 1)[3:] == keys(1, 1, start=3, steps=2)
    flat = [key for batch in keys(1, 1, steps=23) for key in batch]
    assert len(set(flat)) == 23 * 8                                            # every epoch sees every image once
    train, _ = data.open_data(str(write_images(tmp_path / "train")), None, 32, 0)
    with_workers, without = ([images for images, _ in itertools.islice(data.batches(
        train, data.batch_keys(len(train), 0, 4, 1, 0, 0, 1), workers), 4)] for workers in (2, 0))
    assert all(torch.equal(a, b) for a, b in zip(with_workers, without))


def test_key_uniforms_are_uniform_and_of_each_key_alone():
    keys = [(epoch, index) for epoch in range(20) for index in range(500)]
    found = data.key_uniforms("test", 0, keys)
    assert found[777] == data.key_uniforms("test", 0, keys[777:778])[0] != data.key_uniforms("test", 1, keys[777:778])[0]
    assert np.abs(np.histogram(found, 10, (0, 1))[0] - 1000).max() < 120
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03 and abs(np.corrcoef(found[:500], found[500:1000])[0, 1]) < 0.12


# -----------------------------------------------------------------------------
# The idea: nobody looks ahead

@pytest.mark.parametrize("first", [0, 1, 4, 5, 6, 12, 20])
def test_causal_decoder_never_looks_ahead(first):
    """Changing tokens from `first` on leaves every earlier patch, strip included, unchanged to the bit."""
    model = small_tokenizer()
    tokens = torch.randint(64, (3, 21))
    changed = tokens.clone()
    changed[:, first:] = (changed[:, first:] + 1 + torch.randint(62, (3, 21 - first))) % 64
    with torch.no_grad():
        (image, strip), (image2, strip2) = (model.decoder(model.quantizer.codebook[t]) for t in (tokens, changed))
    patches = [F.unfold(x, 8, stride=8).transpose(1, 2) for x in (image, image2)]              # (B, 16, 192)
    strips = [F.unfold(x, 8, stride=8).transpose(1, 2) for x in (strip, strip2)]               # (B, 5, 192)
    before, after = (torch.cat([s, p], 1) for s, p in zip(strips, patches))                    # in token order
    assert torch.equal(before[:, :first], after[:, :first])
    assert (before[:, first:] != after[:, first:]).flatten(2).any(2).all()                     # and the later ones do change


@pytest.mark.parametrize("patch", [0, 1, 3, 4, 9, 15])
def test_causal_encoder_never_looks_ahead(patch):
    """Changing the pixels of patch j and later leaves every token before j's first token unchanged."""
    model = small_tokenizer(encoder="causal")
    images = torch.rand(3, 3, 32, 32)
    patches = F.unfold(images, 8, stride=8)
    patches[:, :, patch:] = torch.rand_like(patches[:, :, patch:])
    changed = F.fold(patches, 32, 8, stride=8)
    first = 0 if patch == 0 else 1 + patch if patch < 4 else 5 + patch          # the first token that may see the patch
    with torch.no_grad():
        a, b = model.encoder(images), model.encoder(changed)
    assert torch.equal(a[:, :first], b[:, :first]) and (a[:, first:] != b[:, first:]).any(2).all()
    assert torch.equal(model.encode(images)[:, :first], model.encode(changed)[:, :first])
    with torch.no_grad():                                                       # the default encoder does look ahead
        free = small_tokenizer()
        assert patch == 0 or (free.encoder(images)[:, :first] != free.encoder(changed)[:, :first]).any()


def test_encoder_mask_by_hand():
    """2 x 2 patches: latents are [prefix 0, prefix 1, prefix 2, image 0 .. 3] with patches 0, 0, 1, 0, 1, 2, 3."""
    mask = causal_encoder_mask(TokenizerConfig(image_size=4, patch_size=2))
    assert mask.shape == (11, 11)
    assert mask[:4, :4].equal(torch.ones(4, 4).tril().bool()) and not mask[:4, 4:].any()
    assert mask[4:, :4].sum(1).tolist() == [1, 1, 2, 1, 2, 3, 4] and mask[4:, 4:].equal(torch.ones(7, 7).tril().bool())


@pytest.mark.parametrize("first", [0, 1, 7, 20])
def test_ar_model_never_looks_ahead(first):
    model = small_ar()
    tokens, classes = torch.randint(64, (2, 21)), torch.tensor([3, 10])
    changed = tokens.clone()
    changed[:, first:] = (changed[:, first:] + 1) % 64
    with torch.no_grad():
        a, b = model(tokens, classes), model(changed, classes)
    assert torch.equal(a[:, :first + 1], b[:, :first + 1]) and not torch.equal(a[:, first + 1:], b[:, first + 1:])


# -----------------------------------------------------------------------------
# Tokenizer

def test_quantizer_takes_the_nearest_code_and_passes_gradients():
    quantizer = small_tokenizer().quantizer
    z = (torch.randn(2, 21, 8) * 0.03).requires_grad_()
    codes, tokens, loss = quantizer(z)
    assert torch.equal(tokens, torch.cdist(z.flatten(0, 1), quantizer.codebook).argmin(1).view(2, 21))
    assert torch.allclose(codes, quantizer.codebook[tokens])
    expected = 1.25 * (z - quantizer.codebook[tokens]).pow(2).mean()
    assert torch.allclose(loss, expected)
    (codes * torch.arange(8.0)).sum().backward()
    assert torch.allclose(z.grad, torch.arange(8.0).expand_as(z))


@pytest.mark.parametrize("usage,grace,steps", [(0.0, 0, 300), (1 / 64, 300, 1000)])
def test_dead_codes_come_back(usage, grace, steps):
    """Codes moved where no latent is get no token. Clustering brings them back once their running usage has faded."""
    torch.manual_seed(0)
    quantizer = small_tokenizer().quantizer.train()
    optimizer = torch.optim.Adam([quantizer.codebook], 1e-2)

    def used_after(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            quantizer(torch.randn(8, 32, 8))[2].backward()
            optimizer.step()
            quantizer.revive()
        with torch.no_grad():
            return len(quantizer.distances(torch.randn(1, 4096, 8)).argmin(1).unique())

    assert used_after(300) > 60 and quantizer.use() > 0.95
    with torch.no_grad():
        quantizer.codebook[8:] += 100
        quantizer.usage[8:] = usage
    assert used_after(grace) <= 8                             # codes in use a moment ago are given time
    assert used_after(steps) > 60 and quantizer.use() > 0.95


def test_clustering_gathers_micro_batches():
    """Two halves, observed one after the other, revive codes as the whole batch does."""
    results = []
    for parts in (1, 2):
        quantizer = small_tokenizer().quantizer.train()
        z = torch.randn(4, 21, 8, generator=torch.Generator().manual_seed(1))
        for part in z.chunk(parts):
            quantizer(part)
        quantizer.revive()
        results.append((quantizer.codebook.detach().clone(), quantizer.usage.clone()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results))


def test_swap_keeps_tokens():
    model = small_tokenizer()
    images = torch.rand(2, 3, 32, 32)
    before, tokens, name = model.encoder.state_dict(), model.encode(images), model.fingerprint()
    before = {key: value.clone() for key, value in before.items()}
    model.swap_decoder()
    assert all(torch.equal(value, before[key]) for key, value in model.encoder.state_dict().items())
    assert torch.equal(model.encode(images), tokens) and model.fingerprint() == name
    image, strip, _, _ = model.train()(images)
    assert strip is None and len(model.decoder.buffer_tokens) == 4
    image.sum().backward()
    assert all((p.grad is None) != name.startswith("decoder") for name, p in model.named_parameters())


def test_full_size_presets_have_the_published_sizes():
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig(decoder="bidirectional"))
        assert abs(sum(p.numel() for p in tokenizer.parameters()) - 390e6) < 1e6
        for name, published in {"B": 177_048_064, "L": 317_851_648, "XL": 662_141_696}.items():
            assert sum(p.numel() for p in ARModel(ARConfig(**ar_model.PRESETS[name])).parameters()) == published


# -----------------------------------------------------------------------------
# Released checkpoints: weights that anyone can rebuild, and what the authors' code makes of them

RELEASED_TOKENIZER = ("latent_tokens 21,64 encoder.positional_embedding 16,64 encoder.latent_token_positional_embedding 21,64 "
                      "encoder.patch_embed.weight 64,3,16,16 encoder.patch_embed.bias 64 encoder.ln_pre.weight 64 "
                      "encoder.ln_pre.bias 64 encoder.ln_post.weight 64 encoder.ln_post.bias 64 "
                      "encoder.conv_out.weight 16,64,1,1 encoder.conv_out.bias 16 quantize.embedding.weight 64,16 "
                      "decoder.decoder_embed.weight 128,16 "
                      "decoder.decoder_embed.bias 128 decoder.ln_pre.weight 128 decoder.ln_pre.bias 128 "
                      "decoder.ln_post.weight 128 decoder.ln_post.bias 128 decoder.ffn.0.weight 768,128,1,1 "
                      "decoder.ffn.0.bias 768 "
                      "decoder.conv_out.weight 3,3,1,1 decoder.conv_out.bias 3 ")
RELEASED_STAGE = {1: "decoder.class_embedding 1,128 decoder.latent_token_positional_embedding 22,128 decoder.ffn_aux.0.weight "
                     "768,128,1,1 decoder.ffn_aux.0.bias 768 decoder.conv_out_aux.weight 3,3,1,1 decoder.conv_out_aux.bias 3",
                  2: "decoder.class_embedding 32,128 decoder.latent_token_positional_embedding 53,128"}
RELEASED_BLOCK = ("ln_1.weight 1 ln_1.bias 1 attn.in_proj.weight 3,1 attn.in_proj.bias 3 "
                  "attn.out_proj.weight 1,1 attn.out_proj.bias 1 ln_2.weight 1 ln_2.bias 1 "
                  "mlp.c_fc.weight 4,1 mlp.c_fc.bias 4 mlp.c_proj.weight 1,4 mlp.c_proj.bias 1")
RELEASED_AR = "embeddings.weight 76,96 norm.weight 96 output.weight 64,96 output.bias 64"
RELEASED_AR_BLOCK = ("norm1.weight 96 attn.qkv.weight 288,96 attn.qkv.bias 288 attn.q_norm.weight 48 attn.k_norm.weight 48 "
                     "attn.proj.weight 96,96 attn.proj.bias 96 norm2.weight 96 mlp.w1.weight 256,96 mlp.w3.weight 256,96 "
                     "mlp.w2.weight 96,256")


def shapes(text, prefix="", scale=1):
    words = text.split()
    return {prefix + name: tuple(int(n) * scale for n in shape.split(",")) for name, shape in zip(words[::2], words[1::2])}


def rebuild(name, shape, seed=0):
    """A weight that follows from its name and shape alone."""
    w = np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode())).standard_normal(shape)
    if "embedding" not in name and "latent_tokens" not in name:
        w = (w * np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else w / np.sqrt(shape[1]) if len(shape) == 2 else
             1 + 0.1 * w if name.endswith("weight") else 1 + 0.1 * abs(w) if "running_var" in name else 0.1 * w)
    return torch.from_numpy(np.asarray(w, np.float32))


def released_tokenizer(stage):
    found = shapes(RELEASED_TOKENIZER + RELEASED_STAGE[stage])
    for part, width in (("encoder", 64), ("decoder", 128)):
        for block in range(2):
            found |= shapes(RELEASED_BLOCK, f"{part}.transformer.{block}.", width)
    return {name: rebuild("tok/" + name, shape) for name, shape in found.items()}


def released_ar():
    found = shapes(RELEASED_AR) | shapes(RELEASED_AR_BLOCK, "blocks.0.") | shapes(RELEASED_AR_BLOCK, "blocks.1.")
    return {name: rebuild("ar/" + name, shape) for name, shape in found.items()}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    torch.save({"model_state": released_tokenizer(1), "step": 5}, folder / "stage1.pth")
    torch.save(released_tokenizer(2), folder / "AliTok.pth")
    torch.save(released_ar(), folder / "alitok.bin")
    return folder


# What the authors' code computed from these weights, for these tokens and classes.
TOKENS = [10, 53, 1, 35, 1, 35, 17, 55, 32, 1, 1, 18, 34, 46, 10, 46, 54, 0, 29, 53, 24]
IDS = [44, 34, 29, 9, 25, 13, 18, 51, 44, 52, 58, 31, 63, 23, 26, 21, 51, 12, 56, 22, 23]


def near(found, expected):
    assert np.allclose(found, expected, atol=3e-5), (found, expected)


def test_released_tokenizer_decodes_as_the_authors_code(released):
    one, two = load_tokenizer(released / "stage1.pth"), load_tokenizer(released / "AliTok.pth")
    assert one.config.decoder == "causal" and two.config.decoder == "bidirectional"
    assert (two.config.image_size, two.config.patch_size, two.config.buffer_tokens) == (64, 16, 32)
    with torch.no_grad():
        image, strip = one.decoder(one.quantizer.codebook[torch.tensor([TOKENS])])
    near(image[0, 1, ::13, 5], [0.39297, 0.1761, 0.32305, 0.56659, 0.01472])
    near(strip[0, 0, 7, ::16], [0.36142, 0.66845, 0.3732, 0.34959, 0.38617])
    near(two.decode(torch.tensor([TOKENS]))[0, 2, ::13, 40], [0.19103, 0.49124, 0.46226, 0.64453, 0.19848])


def test_released_encoder(released):
    """The numbers are ours, taken when this encoder agreed with the authors' on an image that is too large to keep here."""
    model, ramp = load_tokenizer(released / "AliTok.pth"), torch.linspace(0, 1, 64)
    image = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, ramp[:, None] * ramp * 0.5 + 0.25])[None]
    with torch.no_grad():
        near(model.encoder(image)[0, ::5, 3], [-1.19955, 0.88384, 0.08973, 0.083, 0.14676])
    assert model.encode(image).tolist() == [TOKENS[:7] + [34] + TOKENS[8:19] + [10, 24]]


def test_released_ar_model(released):
    model = load_ar(released / "alitok.bin", grid=4)
    assert (model.config.heads, model.config.num_classes, model.config.depth) == (2, 10, 2)
    with torch.no_grad():
        rows = [model(torch.tensor([IDS]), torch.tensor([label]))[0, :-1] for label in (9, 10)]
    guided = torch.stack([rows[1][t] + ar_model.guidance(t, 21, 5.0, 1.3) * (rows[0][t] - rows[1][t]) for t in range(21)])
    near(rows[0][::5, 17], [1.33625, 1.11961, -0.65183, 2.94142, 0.13733])
    near(rows[1][::5, 17], [-1.92443, 1.40302, -0.83471, 2.87064, 0.01246])
    near(guided[::5, 17], [1.33625, 1.05389, -0.41946, 3.14554, 0.63216])


def test_released_pair_paints(released, tmp_path):
    code, out, err = command(sample, "--class", 3, "--n", 2, "--tokenizer", released / "AliTok.pth",
                             "--ar", released / "alitok.bin", "--png", tmp_path / "x.png")
    assert code == 0 and Image.open(tmp_path / "x.png").width > 64, err


@pytest.mark.parametrize("change,says", [
    (lambda s: s.pop("encoder.ln_pre.bias"), "encoder.ln_pre.bias is missing"),
    (lambda s: s.pop("decoder.class_embedding"), "decoder.buffer_tokens is missing"),
    (lambda s: s.pop("quantize.embedding.weight"), "quantizer.codebook is missing"),
    (lambda s: s.update(extra=torch.zeros(3)), "extra is unexpected"),
    (lambda s: s.update({"decoder.ln_post.bias": torch.zeros(5)}), r"decoder.ln_post.bias is \(5,\), not \(128,\)"),
])
def test_every_released_tensor_is_accounted_for(change, says, tmp_path):
    state = released_tokenizer(2)
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError, match="does not fit the model.*" + says):
        load_tokenizer(tmp_path / "x.pth")


def test_half_downloaded_file_says_so(released, tmp_path):
    whole = (released / "alitok.bin").read_bytes()
    (tmp_path / "half.bin").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="is incomplete"):
        load_ar(tmp_path / "half.bin")
    (tmp_path / "empty.bin").touch()
    with pytest.raises(InputError, match="is damaged"):
        load_ar(tmp_path / "empty.bin")


def test_guidance_follows_the_size_of_a_released_model():
    with torch.device("meta"):
        for name, guidance in {"B": (16, 1.8), "L": (6, 0.7), "XL": (13, 1.4)}.items():
            state = ARModel(ARConfig(**ar_model.PRESETS[name])).state_dict()
            config = ar_model.from_released(state)["config"]
            assert (config["cfg_scale"], config["cfg_power"]) == guidance and config["heads"] == 16
            assert (config["num_classes"], config["codebook_size"]) == (1000, 4096)


# -----------------------------------------------------------------------------
# AR model and sampling

@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cached_generation_equals_the_full_forward(scale):
    """Greedy tokens from the cache, and the logits of every step, are those of the whole sequence."""
    model, classes = small_ar(), torch.tensor([1, 7, 3])
    seen = []
    step = model.step
    model.step = lambda *args: seen.append(step(*args)) or seen[-1]
    tokens = model.generate(classes, temperature=0, cfg_scale=scale, cfg_power=0.7)
    both = classes if scale == 1 else torch.cat([classes, torch.full_like(classes, 10)])
    with torch.no_grad():
        logits = model(tokens.repeat(len(both) // 3, 1), both)[:, :-1]
    assert torch.allclose(torch.stack(seen, 1), logits, atol=1e-4)
    if scale != 1:
        one, null = logits.chunk(2)
        logits = torch.stack([null[:, t] + ar_model.guidance(t, 21, scale, 0.7) * (one - null)[:, t] for t in range(21)], 1)
    assert torch.equal(logits.argmax(-1), tokens)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_generation_equals_the_plain_one():
    model = small_ar()
    for size, options in ((3, {"top_k": 20, "top_p": 0.9, "cfg_scale": 3.0}), (2, {"cfg_scale": 1}), (3, {"temperature": 0}),
                          (3, {"cfg_scale": 3.0, "kept": torch.arange(15).view(3, 5)})):
        classes, uniforms = torch.tensor([1, 7, 3])[:size], image_uniforms(0, range(size), 21)
        plain = model.generate(classes, uniforms, **options)
        assert torch.equal(model.generate(classes, uniforms, compiled=True, **options), plain), options


def test_bfloat16_weights_give_nearly_the_same_logits():
    model, tokens, classes = small_ar(), torch.arange(40).view(2, 20), torch.tensor([1, 2])
    with torch.no_grad():
        exact = model(tokens, classes)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.halve()(tokens, classes).float()
    assert model.output.weight.dtype == torch.float32 and 0 < (rounded - exact).std() < 0.02 * exact.std()


def test_guidance_grows_along_the_picture():
    strengths = [ar_model.guidance(t, 100, 5.0, 1.0) for t in range(100)]
    assert strengths[0] == 1 and abs(strengths[50] - 3) < 1e-6 and 4.9 < strengths[-1] < 5 and strengths == sorted(strengths)


def test_sampling_follows_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    logits, uniforms = probabilities.log().expand(2000, -1), (torch.arange(2000).double() + 0.5) / 2000
    assert torch.allclose(sample_tokens(logits, uniforms).bincount(minlength=5) / 2000, probabilities, atol=1e-3)
    assert set(sample_tokens(logits, uniforms, top_k=2).tolist()) == {0, 2}
    assert set(sample_tokens(logits, uniforms, top_p=0.81).tolist()) == {0, 2, 3}
    assert set(sample_tokens(logits, uniforms, top_p=0.2).tolist()) == {0}
    assert set(sample_tokens(logits, uniforms, top_p=0).tolist()) == {0}
    assert set(sample_tokens(logits, uniforms, temperature=0).tolist()) == {0}
    cold = sample_tokens(logits, uniforms, temperature=0.5).bincount(minlength=5) / 2000
    assert torch.allclose(cold, probabilities ** 2 / (probabilities ** 2).sum(), atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 1.0}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.3}])
def test_image_k_follows_from_seed_and_k_alone(options):
    model, classes = small_ar(), torch.arange(7) % 10
    whole = model.generate(classes, image_uniforms(3, range(7), 21), **options)
    pieces = [model.generate(classes[part], image_uniforms(3, part, 21), **options) for part in ([0, 1, 2], [3, 4, 5, 6])]
    assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(model.generate(classes, image_uniforms(4, range(7), 21), **options), whole)


# -----------------------------------------------------------------------------
# The scripts, as users run them

TOKENIZER = ["--image-size", 32, "--patch-size", 8, "--codebook-size", 256, "--batch-size", 16, "--eval-images", 64]
AR = ["--steps", 40, "--batch-size", 16, "--num-pictures", 400, "--eval-images", 64]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the three commands have run, small."""
    out = tmp_path_factory.mktemp("trained")
    assert command(train_tokenizer, "--out", out, "--steps", 400, 300, "--eval-every", 300, *TOKENIZER)[0] == 0
    assert command(train_ar, "--out", out, *AR)[0] == 0
    return out


def test_stage_2_reconstructs_better_on_the_same_tokens(trained):
    assert log_of(trained, "tokenizer stage 2", "val_psnr")[-1] > log_of(trained, "tokenizer stage 1", "val_psnr")[-1]
    one, two = (load_tokenizer(trained / f"tokenizer_stage{stage}.pt") for stage in (1, 2))
    for name, value in one.state_dict().items():
        assert name.startswith("decoder") or torch.equal(value, two.state_dict()[name]), name
    images = torch.stack([data.Shapes("val", 32, 0, 64).read(0, k)[0] for k in range(64)]).float() / 255
    assert torch.equal(one.encode(images), two.encode(images))


def test_training_learns_and_writes_what_it_says(trained):
    first, *_, last = log_of(trained, "tokenizer stage 1", "mse")
    assert last < 0.6 * first
    first, *_, last = log_of(trained, "ar", "loss")
    assert last < first - 0.3
    for name in ("tokenizer_stage1_000400", "tokenizer_stage2_000300", "ar_000040"):
        assert Image.open(trained / "pictures" / f"{name}.png").width > 200
    assert 0 < log_of(trained, "tokenizer stage 1", "codebook_use")[-1] <= 1


def test_sample_by_number_and_name(trained):
    code, out, _ = command(sample, "--out", trained, "--class", 207, "--n", 4)
    assert code == 0 and "red triangle on rose" in out and Image.open(trained / "class_207.png").size == (70, 70)
    a = Image.open(trained / "class_207.png").tobytes()
    code, _, _ = command(sample, "--out", trained, "--class", "red triangle on rose", "--n", 4, "--batch-size", 3,
                         "--png", trained / "b.png")
    assert code == 0 and Image.open(trained / "b.png").tobytes() == a


def test_painted_patches_are_certain(trained):
    """What a frame shows is what every continuation will show, to the bit; at the end it is the whole picture."""
    causal = load_causal_decoder(trained / "tokenizer.pt")
    tokens, others = torch.randint(0, 256, (2, 2, 21), generator=torch.Generator().manual_seed(0))

    def frame(tokens, k):
        with torch.no_grad():
            return sample.so_far(*causal.decoder(F.embedding(tokens, causal.quantizer.codebook)), causal.config, k)

    whole = frame(tokens, 21)
    for k in range(22):
        found = frame(torch.cat([tokens[:, :k], others[:, k:]], 1), k)
        painted = (found != sample.UNPAINTED).any(1).sum((1, 2))
        assert torch.equal(found.where(found != sample.UNPAINTED, whole), whole) and (painted - 64 * k).abs().max() < 3, k
    assert torch.equal(whole[:, :, 16:, :32], causal.decode(tokens))


def test_paint_gif(trained, tmp_path):
    code, out, err = command(sample, "--out", trained, "--class", 207, "--n", 2, "--paint", tmp_path / "a.gif")
    assert code == 0 and command(sample, "--out", trained, "--class", 207, "--n", 2, "--png", tmp_path / "a.png")[0] == 0, err
    film, still = Image.open(tmp_path / "a.gif"), np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    assert film.n_frames == 23 and film.width == 2 * (4 * 40 + 2) + 2          # 0 to 21 tokens, then the finished picture
    film.seek(22)
    last = np.asarray(film.convert("RGB")).astype(int)[2::4, 2::4][16:48, :32]
    assert np.abs(last - still[2:34, 2:34]).mean() < 8                         # 256 colours


def cells(path, n):
    """The pictures of a grid of one row, 32 x 32 each, as integers."""
    pixels = np.asarray(Image.open(path)).astype(int)
    return [pixels[2:34, 2 + 34 * k:34 + 34 * k] for k in range(n)]


def test_completions_go_on_from_the_picture(trained, tmp_path):
    Image.fromarray(data.draw_shape(0, "val", 207, 90)[0]).convert("CMYK").save(tmp_path / "photo.jpg")
    words = ["--out", trained, "--image", tmp_path / "photo.jpg", "--png", tmp_path / "c.png", "--n", 3]
    tokenizer = load_tokenizer(trained / "tokenizer.pt")
    original = sample.read_pictures(str(tmp_path / "photo.jpg"), 32, 1)
    whole = (tokenizer.decode(tokenizer.encode(original))[0] * 255).round().permute(1, 2, 0).numpy()
    assert command(sample, *words, "--keep", 1)[0] == 0
    assert all(np.abs(cell - whole).max() <= 1 for cell in cells(tmp_path / "c.png", 5)[2:])
    assert command(sample, *words, "--keep", 0, "--class", 207, "--seed", 4)[0] == 0
    assert command(sample, "--out", trained, "--class", 207, 3, "--n", 3, "--seed", 4, "--png", tmp_path / "d.png")[0] == 0
    assert all((a == b).all() for a, b in zip(cells(tmp_path / "c.png", 5)[2:], cells(tmp_path / "d.png", 3)))
    assert command(sample, *words, "--keep", 0.6)[0] == 0
    first, kept, *others = cells(tmp_path / "c.png", 5)
    assert np.abs(first - (original[0] * 255).permute(1, 2, 0).numpy()).max() <= 1
    assert (kept[16:] == round(255 * sample.UNPAINTED)).all() and kept[:16].std() > 5       # 13 tokens: 8 patches, two rows


def test_completions_of_many_pictures(trained, tmp_path):
    """A row a picture, whatever the batch size; what is printed is the distance over the patches that were hidden."""
    words = ["--out", trained, "--image", "shapes", "--num-images", 3, "--n", 2, "--keep", 0.6, "--png"]
    texts = [command(sample, *words, tmp_path / f"{size}.png", "--batch-size", size)[1] for size in (4, 6)]
    sheets = [np.asarray(Image.open(tmp_path / f"{size}.png")).astype(int) for size in (4, 6)]
    assert (sheets[0] == sheets[1]).all() and sheets[0].shape[:2] == (3 * 34 + 2, 4 * 34 + 2)
    cells = sheets[0][2:, 2:].reshape(3, 34, 4, 34, 3)[:, :32, :, :32].transpose(0, 2, 1, 3, 4) / 255     # (3, 4, 32, 32, 3)
    mse = ((cells[:, 2:] - cells[:, :1])[:, :, 16:] ** 2).mean((1, 2, 3, 4))
    found = re.search(r"completions (.*) dB PSNR, reconstruction from all tokens (.*) dB", texts[0])
    assert abs(float(found[1]) - (-10 * np.log10(mse)).mean()) < 0.05 and float(found[2]) > float(found[1])


@pytest.mark.parametrize("flags, tokens", [(["--no-prefix"], 16), (["--decoder", "bidirectional"], 21), (["--encoder", "causal"], 21)])
def test_other_tokenizers_for_comparison(flags, tokens, tmp_path):
    """What the table of claims compares: each trains through both stages and the AR model, and paints."""
    out = ["--out", tmp_path]
    assert command(train_tokenizer, *out, *TOKENIZER, *flags, "--steps", 6, 4)[0] == 0
    assert command(train_ar, *out, *AR, "--steps", 4, "--depth", 2, "--width", 64)[0] == 0
    model, tokenizer = load_ar(tmp_path / "ar.pt"), load_tokenizer(tmp_path / "tokenizer.pt")
    assert (model.config.width, model.config.depth, model.config.heads) == (64, 2, 2)
    assert model.config.num_tokens == tokenizer.config.num_tokens == tokens
    log = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    found = log[-1]
    parts = {"prefix": tokens - 16, "first_row": 4, "rest": 12}
    assert ("val_loss_prefix" in found) == (tokens > 16)
    nats = sum(found.get(f"val_loss_{part}", 0) * count for part, count in parts.items())
    assert abs(nats - found["val_loss"] * tokens) < 1e-3 and abs(nats / math.log(2) - found["val_bits_per_image"]) < 1e-3
    code, _, err = command(sample, *out, "--class", 207, "--n", 1, "--paint", tmp_path / "a.gif")
    ahead = [entry["val_looks_ahead"] for entry in log if "val_looks_ahead" in entry]
    assert all(share == 0 for share in ahead) if "--encoder" in flags else all(0 < share < 1 for share in ahead), ahead
    assert len(ahead) == 2                    # an evaluation at the end of each stage
    if "--decoder" in flags:
        assert code == 2 and "keeps no causal decoder" in err
        code, _, err = command(sample, *out, "--class", 207, "--n", 1)
    assert code == 0, err


def test_reconstruct_shows_both_stages(trained, tmp_path):
    folder = write_images(tmp_path / "photos", ["cat"], 4)
    code, out, _ = command(sample, "--tokenizer", trained / "tokenizer.pt", "--reconstruct", folder, "--out", tmp_path / "r.png", "-n", 3)
    assert code == 0 and str(tmp_path / "r.png") in out and Image.open(tmp_path / "r.png").size == (3 * 68, 3 * 50 + 16)


def test_half_precision_files_hold_the_same_model(trained, tmp_path):
    code, _, _ = command(train_ar, "--out", tmp_path, "--tokenizer", trained / "tokenizer.pt", *AR, "--save-dtype", "float16")
    assert code == 0 and os.path.getsize(tmp_path / "ar.pt") < 0.6 * os.path.getsize(trained / "ar.pt")
    full, half = load_ar(trained / "ar.pt"), load_ar(tmp_path / "ar.pt")
    assert torch.allclose(full.output.weight, half.output.weight, atol=1e-3)


@pytest.mark.parametrize("script", ["train_tokenizer", "train_ar"])
def test_two_ranks_train_like_one(script, trained, tmp_path):
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        if script == "train_tokenizer":
            torchrun(ranks, "train_tokenizer.py", "--out", out, "--steps", 20, 20, *TOKENIZER, "--accum", 3 - ranks,
                     "--recipe", "paper", "--no-perceptual", "--dtype", "float32")
        else:
            torchrun(ranks, "train_ar.py", "--out", out, "--tokenizer", trained / "tokenizer.pt", *AR, "--accum", ranks,
                     "--dtype", "float32")
    compared = {"train_tokenizer": [("tokenizer stage 1", "loss"), ("tokenizer stage 1", "discriminator"),
                                    ("tokenizer stage 2", "loss"), ("tokenizer stage 2", "val_psnr")],
                "train_ar": [("ar", "loss"), ("ar", "val_loss")]}
    for run, key in compared[script]:
        one, two = (log_of(tmp_path / ranks, run, key) for ranks in "12")
        assert len(one) >= 1 and np.allclose(one, two, rtol=2e-3), (run, key, one, two)


def test_two_ranks_cluster_like_one(tmp_path):
    """The first step moves every code onto a latent of some rank: the same one, as there is no rounding to part them yet."""
    for ranks in (1, 2):
        torchrun(ranks, "train_tokenizer.py", "--out", tmp_path / str(ranks), "--stage", 1, "--steps", 1, 1, *TOKENIZER,
                 "--accum", 3 - ranks, "--dtype", "float32")
    one, two = (load_tokenizer(tmp_path / ranks / "tokenizer_stage1.pt").quantizer for ranks in "12")
    assert torch.allclose(one.codebook, two.codebook, atol=1e-6) and torch.allclose(one.usage, two.usage)


def test_two_ranks_paint_like_one(trained):
    for ranks in (1, 2):
        torchrun(ranks, "sample.py", "--out", trained, "--class", 1, 2, "-n", 5, "--batch-size", ranks + 1,
                 "--png", trained / f"r{ranks}.png")
    a, b = (np.asarray(Image.open(trained / f"r{ranks}.png")).astype(int) for ranks in (1, 2))
    assert np.abs(a - b).max() <= 1


def test_npz_of_every_class_resumes(trained, tmp_path):
    words = ["--out", trained, "--num-images", 1000, "--batch-size", 100, "--temperature", 0.7]
    path = tmp_path / "samples.npz"
    call = [sys.executable, os.path.join(HERE, "sample.py"), "--npz", str(path), *map(str, words)]
    with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        done = tmp_path / "samples.npz.part" / "done.npy"
        while process.poll() is None:
            if done.exists() and done.stat().st_size > 1000 and np.load(done, mmap_mode="r").any():
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not path.exists()
    before = int(np.load(done, allow_pickle=False).sum())
    assert 0 < before < 1000
    code, _, err = command(sample, "--npz", path, *words, "--seed", 1)
    assert code == 2 and "painted with other settings (seed 0, now 1)" in err
    code, _, err = command(sample, "--npz", path, *words)
    assert code == 0 and f"/{1000 - before}" in err and not done.exists()
    images = np.load(path, allow_pickle=False)["arr_0"]
    assert images.shape == (1000, 32, 32, 3) and images.dtype == np.uint8 and images.std((1, 2, 3)).min() > 0
    model, tokenizer = load_ar(trained / "ar.pt"), load_tokenizer(trained / "tokenizer.pt")
    numbers = [0, 207, 999]                                                    # one a class: picture k shows class k
    tokens = model.generate(torch.tensor(numbers), image_uniforms(0, numbers, 21), temperature=0.7)
    expected = (tokenizer.decode(tokens) * 255).round().byte().permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(images[numbers] - expected).max() <= 1
    assert command(sample, "--npz", path, *words)[0] == 2                      # never painted over


def long_words(script, trained):
    """A training run that is long enough to be interrupted."""
    words = (["--steps", 60, 1, "--stage", 1, *TOKENIZER] if script == "train_tokenizer" else
             ["--tokenizer", trained / "tokenizer.pt", *AR, "--dropout", 0.1])
    return [*words, "--save-every", 5, "--dtype", "float32"]


@pytest.fixture(scope="module", params=[("train_tokenizer", "tokenizer_stage1.pt"), ("train_ar", "ar_state.pt")],
                ids=["train_tokenizer", "train_ar"])
def uninterrupted(request, trained, tmp_path_factory):
    """Script, name of its state, words, and the folder of a run that nothing disturbed."""
    script, state = request.param
    words, whole = long_words(script, trained), tmp_path_factory.mktemp("whole")
    assert command(sys.modules[script], "--out", whole, *words)[0] == 0
    return script, state, words, whole


def start(out, state, call, *words):
    """Start a command and wait for its second save in `out`. -> the process"""
    process = subprocess.Popen([sys.executable, *call, "--out", str(out), *map(str, words)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (out / f"{state}.previous").exists() and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    return process


def assert_same_run(whole, broken, state):
    a, b = (torch.load(folder / state, weights_only=True) for folder in (whole, broken))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    moments = [[value for state in optimizer["state"].values() for value in state.values()] for checkpoint in (a, b)
               for optimizer in checkpoint.get("optimizers", {"": checkpoint.get("optimizer")}).values()]
    assert len(moments) == 2 and len(moments[0]) > 60 and all(map(torch.equal, *moments))
    assert (whole / "log.jsonl").read_text() == (broken / "log.jsonl").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_equals_uninterrupted(number, uninterrupted, tmp_path):
    script, state, words, whole = uninterrupted
    process = start(tmp_path, state, [os.path.join(HERE, script + ".py")], *words, "--workers", 2)
    os.killpg(process.pid, number)            # reading processes and all, as a terminal and a cluster do it
    err = process.communicate()[1]
    saved = torch.load(tmp_path / state, weights_only=True)["step"]
    assert saved < torch.load(whole / state, weights_only=True)["step"]
    if number == signal.SIGKILL:              # and the newest save is damaged in the middle: the one before is used
        with open(tmp_path / state, "r+b") as file:
            file.seek(os.path.getsize(tmp_path / state) // 2)
            file.write(bytes(5000))
    else:
        assert process.returncode == 128 + number and f"stopped by {number.name} at step {saved}" in err, err
    code, _, err = command(sys.modules[script], "--out", tmp_path, *words, "--resume", "--workers", 1)
    assert code == 0 and ("going on from the save before it" in err) == (number == signal.SIGKILL), err
    assert_same_run(whole, tmp_path, state)


@pytest.mark.parametrize("script,state", [("train_tokenizer", "tokenizer_stage1.pt"), ("train_ar", "ar_state.pt")])
def test_rank_that_dies_ends_the_job_and_two_ranks_resume(script, state, trained, tmp_path):
    words, whole, broken = long_words(script, trained), tmp_path / "whole", tmp_path / "broken"
    torchrun(2, script + ".py", "--out", whole, *words)
    process = start(broken, state, ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                                    os.path.join(HERE, script + ".py")], *words)
    ranks = [int(pid) for pid in open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()]
    victim = next(pid for pid in ranks if b"RANK=1" in open(f"/proc/{pid}/environ", "rb").read().split(b"\0"))
    os.kill(victim, signal.SIGKILL)
    assert "local_rank: 1" in process.communicate(timeout=60)[1] and process.returncode != 0
    torchrun(2, script + ".py", "--out", broken, *words, "--resume", "--workers", 1)
    assert_same_run(whole, broken, state)


def test_error_on_one_rank_reaches_all(tmp_path):
    folder = write_images(tmp_path / "photos", each=20)
    (folder / "dog" / "7.jpg").write_text("this is no picture")
    with pytest.raises(subprocess.CalledProcessError) as error:
        torchrun(2, "train_tokenizer.py", "--out", tmp_path / "out", "--data", folder, "--steps", 50, 1, *TOKENIZER)
    assert "dog/7.jpg is not a readable image" in error.value.stderr and "error: " in error.value.stderr
    assert "rank 0: " in error.value.stderr or "rank 1: " in error.value.stderr


def test_full_disk_leaves_the_last_checkpoint(trained, tmp_path):
    words, out = [*long_words("train_ar", trained), "--out", str(tmp_path)], tmp_path / "ar_state.pt"
    assert command(train_ar, *words, "--save-every", 1000, "--steps", 20)[0] == 0
    size, before = out.stat().st_size, out.read_bytes()
    limited = (f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 10}, {size // 10}));"
               f"sys.argv = ['train_ar.py'] + {list(map(str, words))} + ['--steps', '20', '--resume'];"
               f"sys.path.insert(0, {HERE!r}); import data, train_ar; data.run(train_ar.main)")
    os.remove(tmp_path / "ar.pt")
    found = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True)
    assert found.returncode == 2 and f"can't write {tmp_path}/ar.pt" in found.stderr and "Traceback" not in found.stderr, found.stderr
    assert out.read_bytes() == before and not (tmp_path / "ar.pt").exists() and not list(tmp_path.glob("*.tmp"))
    with pytest.raises(InputError, match="can't write .*/text/x.pt"):
        (tmp_path / "text").write_text("a file, not a folder")
        data.save_checkpoint(str(tmp_path / "text" / "x.pt"), "ar", {}, {})


def test_token_cache_resumes_and_refuses(trained, tmp_path):
    tokenizer, shapes = load_tokenizer(trained / "tokenizer.pt"), data.Shapes("train", 32, 0, 100)
    folder = str(tmp_path / "cache")
    whole = np.array(data.open_cache(folder, shapes, tokenizer, "cpu").tokens)
    assert whole.shape == (100, 1, 21) and whole.max() < 256
    tokens = np.lib.format.open_memmap(folder + "/tokens.npy", "r+")
    tokens[10:60], tokens[80, 0, 5:] = data.UNWRITTEN, data.UNWRITTEN           # as a kill leaves it
    tokens.flush()
    note = json.load(open(folder + "/cache.json"))
    data.write_text(folder + "/cache.json", json.dumps({**note, "finished": False}))
    assert (np.array(data.open_cache(folder, shapes, tokenizer, "cpu", batch_size=7).tokens) == whole).all()
    with pytest.raises(InputError, match="made for something else.*tokenizer"):
        data.open_cache(folder, shapes, Tokenizer(tokenizer.config), "cpu")
    with pytest.raises(InputError, match="made for something else"):
        data.open_cache(folder, data.Shapes("train", 32, 1, 100), tokenizer, "cpu")


def test_image_folder_end_to_end(tmp_path):
    """The three commands on image files in mixed formats and sizes; classes go by folder name."""
    folder, out = write_images(tmp_path / "photos", ("cat", "dog", "newt"), 8), tmp_path / "out"
    common = ["--data", folder, "--out", out, "--batch-size", 8, "--eval-images", 8]
    small = ["--image-size", 32, "--patch-size", 8, "--codebook-size", 64]
    assert command(train_tokenizer, *common, "--steps", 6, 4, *small)[0] == 0
    assert command(train_ar, *common, "--steps", 4)[0] == 0
    tokens = np.load(out / "tokens" / "train" / "tokens.npy", mmap_mode="r", allow_pickle=False)
    assert tokens.shape == (23, 2, 21) and tokens.max() < 64                                   # the centre crop and its mirror image
    code, words, _ = command(sample, "--out", out, "--class", "dog", "0", "--n", 2)
    assert code == 0 and "1 (dog), 0 (cat)" in words


# -----------------------------------------------------------------------------
# The published recipe: perceptual and adversarial losses, phases

def vision_state(net, kind):
    """Weights by the rule that the reference outputs of these networks were made with."""
    def named(name):
        return f"lpips/lin{name[4:]}.model.1.weight" if name.startswith("lin.") else f"{kind}/{name}"

    state = {name: rebuild(named(name), value.shape, 7) for name, value in net.state_dict().items()}
    return {name: value.abs() if name.startswith("lin.") else value for name, value in state.items()}


def test_vision_networks_compute_what_the_published_ones_would():
    a, b = (torch.from_numpy(pictures(2, 256, first)).permute(0, 3, 1, 2) / 255 for first in (0, 2))
    convnext, lpips = train_tokenizer.ConvNeXt(), train_tokenizer.LPIPS()
    convnext.load_state_dict(vision_state(convnext, "convnext"))
    lpips.load_state_dict(vision_state(lpips, "vgg"))
    with torch.no_grad():
        found = [*convnext(a)[0, ::250], train_tokenizer.perceptual_loss(convnext, a, b), *lpips(a, b)]
    assert np.allclose(found, VISION, rtol=1e-4), np.array(found).tolist()


VISION = [-1.7676, -1.90766, 1.5448, -0.0408118, 3.0557, 0.300521, 0.274872]    # four logits, the loss, two distances


RECIPE = ["--recipe", "paper", "--image-size", 32, "--patch-size", 8, "--codebook-size", 64, "--batch-size", 2, "--seed", 3,
          "--eval-images", 2, "--warmup", 2, "--dtype", "float32", "--vision-weights", "random"]


def stage_args(out, *words):
    """The arguments that training with the paper's recipe gets, as its main() makes them."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer, "train_stage", lambda *args: found.update(args=args[4]) or sys.exit(0))
        command(train_tokenizer, "--out", out, *RECIPE, *words)
    return found["args"]


def test_losses_reach_the_decoder_in_turns_and_never_the_networks(tmp_path):
    args, device = stage_args(tmp_path, "--steps", 12, 12), torch.device("cpu")
    vision = train_tokenizer.load_vision("random", device)
    stage = train_tokenizer.Stage(1, small_tokenizer().train(), args, vision, device, 1)
    assert [(phase.name, phase.steps) for phase in stage.phases] == [("lpips", 2), ("perceptual", 7), ("gan", 3)]
    parts = {"tokenizer": stage.model.encoder, "decoder": stage.model.decoder, "discriminator": stage.discriminator, **vision}
    images = torch.from_numpy(pictures(2)).permute(0, 3, 1, 2)
    for step, (moved, terms) in {0: ("tokenizer", "lpips"), 2: ("tokenizer", "perceptual"), 9: ("discriminator", ""),
                                 10: ("tokenizer", "gan"), 11: ("discriminator", "")}.items():
        before = {name: [p.clone() for p in net.parameters()] for name, net in parts.items()}
        stage.step(step, [images])
        for name, net in parts.items():
            same = all(map(torch.equal, before[name], net.parameters()))
            assert same == (name not in {"tokenizer": ("tokenizer", "decoder"), "discriminator": ("discriminator",)}[moved]), name
        assert all(p.grad is None for net in vision.values() for p in net.parameters())
        assert ("gan" in stage.last) == (step > 9) and ("discriminator" in stage.last) == (step > 8) and (
            ("lpips" in stage.last) == (step < 2)), (step, stage.last)
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    for loss in (train_tokenizer.perceptual_loss(vision["perceptual"], image, images / 255),
                 vision["lpips"](image, images / 255).mean(), -stage.discriminator(image).mean()):
        assert torch.autograd.grad(loss, image)[0].abs().max() > 0


def test_step_that_is_not_finite_changes_nothing(tmp_path):
    stage = train_tokenizer.Stage(1, small_tokenizer().train(), stage_args(tmp_path, "--no-perceptual"), {},
                                  torch.device("cpu"), 1)
    images = torch.from_numpy(pictures(2)).permute(0, 3, 1, 2).float()
    stage.step(0, [images])
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    stage.step(1, [images.where(images < 200, torch.nan)])
    assert all(torch.equal(value, before[name]) for name, value in stage.model.state_dict().items())
    optimizer = stage.optimizers["tokenizer"]
    assert (optimizer.skipped, optimizer.in_row) == (1, 1) and stage.skipped() == 1
    stage.step(2, [images])
    assert (optimizer.skipped, optimizer.in_row) == (1, 0) and not torch.equal(before["quantizer.codebook"], stage.model.quantizer.codebook)


def test_interrupted_in_every_phase_equals_uninterrupted(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "photos", each=6)
    words = ["--data", folder, *RECIPE, "--steps", 6, 6, "--save-every", 1]
    assert command(train_tokenizer, "--out", tmp_path / "whole", *words)[0] == 0
    breaks, step = [(1, 0), (1, 2), (1, 5), (2, 0), (2, 3), (2, 4)], train_tokenizer.Stage.step

    def interrupted(stage, at, batches):
        if (stage.number, at) in breaks:
            breaks.remove((stage.number, at))
            raise KeyboardInterrupt
        return step(stage, at, batches)

    monkeypatch.setattr(train_tokenizer.Stage, "step", interrupted)
    resume = []
    while breaks:
        assert command(train_tokenizer, "--out", tmp_path / "broken", *words, *resume)[0] == 130
        resume = ["--resume"]
    assert command(train_tokenizer, "--out", tmp_path / "broken", *words, *resume)[0] == 0
    for number in (1, 2):
        a, b = (torch.load(tmp_path / name / f"tokenizer_stage{number}.pt", weights_only=True) for name in ("whole", "broken"))
        for part in ("model", "discriminator"):
            assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
        assert a["losses"] == b["losses"] and {"gan", "discriminator", "perceptual"} < set(a["losses"])
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "broken" / "log.jsonl").read_text()
    assert torch.load(tmp_path / "whole" / "tokenizer.pt", weights_only=True)["perceptual"] == "random"


def test_recomputing_activations_changes_no_gradient():
    images, classes, gradients = torch.rand(2, 3, 32, 32), torch.tensor([1, 2]), []
    for recompute in (False, True):
        tokenizer, model = small_tokenizer().train(), small_ar(dropout=0.1).train()
        tokenizer.encoder.recompute = tokenizer.decoder.recompute = model.recompute = recompute
        tokenizer(images)[0].sum().backward()
        torch.manual_seed(1)
        model(torch.zeros(2, 20, dtype=torch.long), classes).logsumexp(-1).sum().backward()
        gradients.append([p.grad for net in (tokenizer, model) for p in net.parameters() if p.grad is not None])
    assert len(gradients[0]) > 60 and all(map(torch.equal, *gradients))


@pytest.mark.parametrize("module", [train_tokenizer, train_ar])
def test_benchmark_measures_a_step(module):
    code, out, _ = command(module, "--benchmark", "--batch-size", 4, "--grad-checkpoint")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["batch"] == 4 and 0 < found["mfu"] < 1 and found["peak_memory_gb"] > 0


# -----------------------------------------------------------------------------
# Metrics

@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file in the format of the published weights, with other numbers in it."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    state = fid.Inception().state_dict()
    torch.save({name: rebuild("inception/" + name, old.shape, 7) if old.ndim else old for name, old in state.items()}, path)
    return path


def pictures(n, size=32, first=0):
    return np.stack([data.draw_shape(0, "val", 7 * k, size)[0] for k in range(first, first + n)])


# Pool and spatial features and logits without bias of two shapes, at places spread over each.
INCEPTION = {
    64: [0.103443, 0.078771, 0.002228, 0.346496, 0.340519, 0.0, 0.0, 0.0, 0.180033, -0.35957, 0.00812],
    350: [0.102393, 0.071999, 0.002005, 0.343482, 0.343279, 0.0, 0.0, 0.0, 0.175414, -0.367821, 0.015162],
}


@pytest.mark.parametrize("size", INCEPTION)
def test_inception_computes_what_the_published_network_would(size, inception):
    net = fid.load_inception(inception)
    with torch.no_grad():
        pool, spatial = net(fid.prepare(torch.from_numpy(pictures(2, size)).permute(0, 3, 1, 2))).split([2048, 2023], 1)
    logits = pool @ net.fc.weight.T
    found = [[*pool[0, ::600], *spatial[1, ::600], *logits[1, ::400]]]
    assert np.allclose(found, INCEPTION[size], rtol=1e-4, atol=1e-5), np.array(found).round(6).tolist()


def test_resize_is_tensorflows():
    image = torch.randint(0, 256, (1, 3, 7, 400), dtype=torch.uint8)
    found = fid.prepare(image)[0] * 128 + 128
    for row, column in [(0, 0), (298, 298), (297, 1), (150, 77), (43, 200)]:
        y, x = row * 7 / 299, column * 400 / 299
        top, left, bottom, right = int(y), int(x), min(int(y) + 1, 6), min(int(x) + 1, 399)
        a, b, c, d = (image[0, :, i, j].float() for i in (top, bottom) for j in (left, right))
        assert torch.allclose(found[:, row, column], (a * (1 - x % 1) + b * (x % 1)) * (1 - y % 1)
                              + (c * (1 - x % 1) + d * (x % 1)) * (y % 1), atol=1e-3)


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    turn = torch.from_numpy(np.linalg.qr(rng.standard_normal((300, 300)))[0])
    for rank in (300, 20):                                                     # 20: covariances of few images
        a, b = (torch.from_numpy(rng.uniform(0, 2, 300)) * (torch.arange(300) < rank) for _ in range(2))
        b = b.roll(5)
        mu = torch.from_numpy(rng.standard_normal((2, 300)))
        one, two = (mu[0], turn @ torch.diag(a) @ turn.T), (mu[1], turn @ torch.diag(b) @ turn.T)
        known = ((mu[0] - mu[1]) ** 2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum()
        assert abs(fid.frechet_distance(*one, *two) - known) < 1e-6
        assert abs(fid.frechet_distance(*one, *two) - fid.frechet_distance(*two, *one)) < 1e-9
        assert fid.frechet_distance(*one, *one) < 1e-6
    s, t = (torch.from_numpy(x @ x.T) for x in rng.standard_normal((2, 2, 2)))  # in two dimensions there is a formula
    trace = ((s @ t).trace() + 2 * (s.det() * t.det()).sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    assert abs(fid.frechet_distance(zero, s, zero, t) - (s.trace() + t.trace() - 2 * trace)) < 1e-9
    rows = torch.from_numpy(rng.standard_normal((5000, 30)).astype(np.float32)) + 10
    mean, covariance = fid.gaussian(rows)
    assert np.allclose(mean, rows.double().mean(0)) and np.allclose(covariance, np.cov(rows.double().numpy(), rowvar=False))


def test_inception_score_by_hand():
    sure = torch.eye(1008)[torch.arange(40) % 8] * 100                          # forty images, each surely of one of 8 classes
    assert fid.inception_score(sure, torch.eye(1008)) == pytest.approx(8)
    assert fid.inception_score(torch.zeros(40, 1008), torch.eye(1008)) == pytest.approx(1)
    assert fid.inception_score(sure[[0, 8, 1, 2]], torch.eye(1008), split=2) == pytest.approx(1.5)        # (1 + 2) / 2
    p = torch.rand(30, 1008).double()
    q = p / p.sum(1, keepdim=True)
    expected = (q * (q / q.mean(0)).log()).sum(1).mean().exp()
    assert fid.inception_score(p.log(), torch.eye(1008)) == pytest.approx(expected.item())


def test_precision_recall_by_brute_force():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((60, 5)) + 100, rng.standard_normal((90, 5)) * 0.7 + 100.4

    def inside(points, centres):
        radius = [sorted(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius)) for p in points])

    found = fid.precision_recall(torch.from_numpy(a).float(), torch.from_numpy(b).float(), block=1000)
    assert found == pytest.approx((inside(b, a), inside(a, b))) and 0 < min(found) < max(found) < 1
    assert fid.precision_recall(torch.from_numpy(a), torch.from_numpy(a)) == (1, 1)
    assert fid.precision_recall(torch.from_numpy(a), torch.from_numpy(a) + 50) == (0, 0)
    assert fid.precision_recall(torch.from_numpy(a[:3]), torch.from_numpy(b)) == (None, None)


def test_ssim_by_brute_force():
    a, b = torch.rand(2, 3, 14, 12), torch.rand(2, 3, 14, 12)
    line = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    window = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for x, y in zip(a[0].double().numpy(), b[0].double().numpy()):
        for top in range(4):
            for left in range(2):
                p, q = x[top:top + 11, left:left + 11], y[top:top + 11, left:left + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq, cov = ((window * x * y).sum() - m * n for x, y, m, n in ((p, p, mp, mp), (q, q, mq, mq), (p, q, mp, mq)))
                values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
    assert fid.ssim(a, b)[0].item() == pytest.approx(np.mean(values), abs=1e-5)
    assert torch.allclose(fid.ssim(a, a), torch.ones(2)) and fid.psnr(a, a + 0.1)[0].item() == pytest.approx(20, abs=1e-3)


def test_npz_and_folder_give_the_same_numbers(tmp_path, inception):
    images = pictures(14)
    np.savez(tmp_path / "a.npz", arr_0=images[:8])
    np.savez_compressed(tmp_path / "b.npz", arr_0=images[4:])
    for k, image in enumerate(images[4:]):
        os.makedirs(tmp_path / "b" / str(k // 4) / "deep", exist_ok=True)
        Image.fromarray(image).save(tmp_path / "b" / str(k // 4) / "deep" / f"{k}.png")
    results = []
    for samples, batch in (("b.npz", 4), ("b", 7)):
        code, out, err = command(fid, tmp_path / "a.npz", tmp_path / samples, "--inception", inception, "--json",
                                 "--batch-size", batch)
        assert code == 0 and "biased" in err and "not comparable" in err, err
        results.append(json.loads(out))
        assert results[-1]["images"] == [8, 10] and results[-1]["comparable"] is False
    for name in ("FID", "sFID", "IS", "precision", "recall"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4), name
    rows = fid.extract(fid.NpzImages(tmp_path / "b.npz"), fid.load_inception(inception), torch.device("cpu"))
    assert np.allclose(rows["sigma"], np.cov(rows["pool"].double().numpy(), rowvar=False), atol=1e-12)
    some = list(fid.NpzImages(tmp_path / "b.npz").batches([[1, 2], [5, 9]]))    # read in passing, none but these
    assert (torch.cat([part[0] for part in some]).permute(0, 2, 3, 1).numpy() == images[[5, 6, 9, 13]]).all()
    few = fid.extract(fid.NpzImages(tmp_path / "b.npz"), fid.load_inception(inception), torch.device("cpu"), count=5)
    assert torch.allclose(few["pool"], rows["pool"][::2], atol=1e-5)


def test_statistics_stand_for_the_images_beside_them(tmp_path, inception):
    images, call = pictures(9), ["--inception", inception, "--json"]
    np.savez(tmp_path / "a.npz", arr_0=images[:5])
    np.savez(tmp_path / "b.npz", arr_0=images[2:])
    assert command(fid, tmp_path / "a.npz", "--save-stats", tmp_path / "s.npz", "--inception", inception)[0] == 0
    direct, stats = (json.loads(command(fid, tmp_path / name, tmp_path / "b.npz", *call)[1]) for name in ("a.npz", "s.npz"))
    assert stats["FID"] == pytest.approx(direct["FID"], abs=1e-9) and stats["sFID"] == pytest.approx(direct["sFID"], abs=1e-9)
    assert stats["precision"] is None and stats["IS"] == direct["IS"] and stats["images"] == [5, 7]
    kept = dict(np.load(tmp_path / "s.npz", allow_pickle=False))
    np.savez(tmp_path / "both.npz", arr_0=images[2:], **{**kept, "mu": kept["mu"] + 1, "mu_s": kept["mu_s"] + 2})
    both = json.loads(command(fid, tmp_path / "both.npz", tmp_path / "b.npz", *call)[1])
    assert both["precision"] == both["recall"] == 1 and abs(both["FID"] - direct["FID"]) > 1000
    code, _, err = command(fid, tmp_path / "s.npz", tmp_path / "b.npz", "--inception", "random")
    assert code == 2 and "this run's is random" in err


def test_two_ranks_judge_like_one(tmp_path, inception):
    np.savez(tmp_path / "a.npz", arr_0=pictures(9))
    np.savez(tmp_path / "b.npz", arr_0=pictures(11, first=5))
    model = small_tokenizer()
    data.save_checkpoint(tmp_path / "t.pt", "tokenizer", vars(model.config), model.state_dict())
    for words in ([tmp_path / "a.npz", tmp_path / "b.npz"],
                  ["--tokenizer", tmp_path / "t.pt", "--data", "shapes", "--num-images", 10]):
        words = [*words, "--inception", inception, "--batch-size", 2, "--json"]
        code, out, _ = command(fid, *words)
        one, two = json.loads(out), json.loads(torchrun(2, "fid.py", *words).stdout)
        assert code == 0 and one["images"] == two["images"]
        for name, value in one.items():
            if isinstance(value, float):
                assert two[name] == pytest.approx(value, rel=1e-5), name


def test_tokenizer_report(tmp_path):
    tokenizer = small_tokenizer()
    data.save_checkpoint(tmp_path / "t.pt", "tokenizer", vars(tokenizer.config), tokenizer.state_dict())
    code, out, err = command(fid, "--tokenizer", tmp_path / "t.pt", "--data", "shapes", "--num-images", 6,
                             "--inception", "random")
    assert code == 0 and "random network" in err and "biased" in err
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert list(lines) == ["rFID", "PSNR", "SSIM", "codebook_use", "codebook_entropy"]
    assert "not comparable" in lines["rFID"] and "not comparable" not in lines["PSNR"]
    images = torch.stack([data.Shapes("val", 32, 0, 6).read(0, k)[0] for k in range(6)]).float() / 255
    tokens = tokenizer.encode(images)
    painted = (tokenizer.decode(tokens) * 255).round() / 255
    assert float(lines["PSNR"].split()[1]) == pytest.approx(fid.psnr(painted, images).mean().item(), rel=1e-4)
    assert float(lines["codebook_use"].split()[1]) == pytest.approx(len(tokens.unique()) / 64, rel=1e-4)
    share = tokens.flatten().bincount() / tokens.numel()
    entropy = -(share * share.clamp_min(1e-9).log2()).sum().item()
    assert float(lines["codebook_entropy"].split()[1]) == pytest.approx(entropy, rel=1e-4)
    code, out, _ = command(fid, "--tokenizer", tmp_path / "t.pt", "--data", write_images(tmp_path / "photos"),
                           "--inception", "random", "--json")
    assert code == 0 and json.loads(out)["images"] == [12]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    at = tmp_path_factory.mktemp("wrong")
    images = pictures(4)
    np.savez(at / "good.npz", arr_0=images)
    np.savez(at / "one.npz", arr_0=images[:1])
    np.savez(at / "none.npz", arr_0=images[:0])
    np.savez(at / "float.npz", arr_0=images / 255)
    np.savez(at / "chw.npz", arr_0=images.transpose(0, 3, 1, 2).copy())
    mixed = np.empty(2, object)
    mixed[:] = [images[0], images[1, :20]]
    np.savez(at / "mixed.npz", arr_0=mixed)
    np.savez(at / "other.npz", x=images)
    np.savez(at / "width.npz", mu=np.zeros(64), sigma=np.eye(64))
    (at / "text.npz").write_text("hello")
    whole = (at / "good.npz").read_bytes()
    (at / "cut.npz").write_bytes(whole[:len(whole) // 2])
    (at / "flipped.npz").write_bytes(whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:])
    (at / "empty").mkdir()
    (write_images(at / "broken", ["cat"], 3) / "cat" / "1.png").write_text("this is no picture")
    write_images(at / "sizes", ["cat"], 3)
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, at / "torchvision.pth")
    (at / "text.pth").write_text("hello")
    return at


@pytest.mark.parametrize("words,says", [
    ("{at}/nowhere {at}/good.npz", "no such file or folder: {at}/nowhere"),
    ("{at}/one.npz {at}/good.npz", "statistics need two images at least, found 1 in {at}/one.npz"),
    ("{at}/none.npz", "found 0 in {at}/none.npz"),
    ("{at}/float.npz", "must be images of one size, uint8 (n, H, W, 3) from 0 to 255; it is float64 (4, 32, 32, 3)"),
    ("{at}/chw.npz", "it is uint8 (4, 3, 32, 32)"),
    ("{at}/mixed.npz", "images of different sizes"),
    ("{at}/other.npz", "has neither images (arr_0) nor statistics (mu, sigma), only x"),
    ("{at}/width.npz {at}/good.npz", "mu in {at}/width.npz must be finite floats (2048,), it is float64 (64,)"),
    ("{at}/text.npz", "text.npz is not an .npz file, or it is damaged"),
    ("{at}/cut.npz", "cut.npz is not an .npz file, or it is damaged"),
    ("{at}/flipped.npz", "flipped.npz is damaged or incomplete"),
    ("{at}/empty", "found 0 in {at}/empty"),
    ("{at}/broken --crop 32", "1.png is not a readable image"),
    ("{at}/broken --crop 32 --workers 1", "1.png is not a readable image"),
    ("{at}/sizes", "images must be of one size"),
    ("{at}/good.npz --inception {at}/torchvision.pth", "holds another network than the Inception of 2015-12-05"),
    ("{at}/good.npz --inception {at}/text.pth", "text.pth can't be loaded as weights"),
    ("{at}/good.npz --inception {at}/nowhere.pth", "{at}/nowhere.pth can't be loaded as weights ([Errno 2] No such file"),
    ("{at}/good.npz --batch-size 0", "--batch-size is at least 1, found 0"),
    ("{at}/good.npz --data shapes", "name one or two sets of images, or --tokenizer and --data"),
    ("{at}/good.npz --shapes {at}/good.npz", "name one or two sets of images, or --tokenizer and --data, or --shapes"),
    ("--shapes {at}/text.npz", "text.npz is not an .npz file of images"),
    ("", "name one or two sets of images, or --tokenizer and --data"),
    ("--tokenizer {at}/nowhere.pt --data shapes", "no such checkpoint: {at}/nowhere.pt"),
    ("--tokenizer {at}/nowhere.pt --data {at}/nowhere", "no such file or folder: {at}/nowhere"),
])
def test_bad_images(words, says, wrong):
    words = words.format(at=wrong).split()
    code, _, err = command(fid, *words, *([] if "--inception" in words else ["--inception", "random"]))
    assert code == 2 and says.format(at=wrong) in err and "Traceback" not in err, err


def test_weights_are_downloaded_once_and_checked(wrong, tmp_path, monkeypatch, inception):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(fid, "ADDRESS", "http://127.0.0.1:9/weights.pth")
    place = tmp_path / "hub" / "checkpoints" / "weights.pth"
    code, _, err = command(fid, wrong / "good.npz")
    assert code == 2 and all(word in err for word in (fid.ADDRESS, str(place), "--inception PATH", "--inception random")), err
    monkeypatch.setattr(fid, "ADDRESS", inception.as_uri())
    code, _, err = command(fid, wrong / "good.npz")
    assert code == 2 and "invalid hash value" in err and not place.exists()
    monkeypatch.setattr(fid, "PUBLISHED", data.file_digest(inception)[:8])
    code, out, err = command(fid, wrong / "good.npz")
    assert code == 0 and place.exists() and "100%" in err and "not comparable" not in out
    monkeypatch.setattr(fid, "ADDRESS", "http://127.0.0.1:9/weights.pth")
    assert command(fid, wrong / "good.npz")[0] == 0
    place.write_text("half a download")
    code, _, err = command(fid, wrong / "good.npz")
    assert code == 2 and "is damaged" in err


def test_trainers_log_the_metrics(trained, tmp_path):
    words = ["--eval-fid", "--inception", "random", "--out", tmp_path]
    few = [*TOKENIZER, "--eval-images", 6]
    assert command(train_tokenizer, *words, *few, "--stage", 1, "--steps", 1, 1)[0] == 0
    assert command(train_ar, *words, "--tokenizer", trained / "tokenizer.pt", *AR, "--eval-images", 6, "--steps", 1)[0] == 0
    for run, names in (("tokenizer stage 1", "rFID PSNR SSIM codebook_entropy"), ("ar", "FID sFID IS precision recall")):
        assert log_of(tmp_path, run, "inception") == ["random"]
        assert all(np.isfinite(log_of(tmp_path, run, f"val_{name}")).all() for name in names.split())
    ours, theirs = (log_of(tmp_path, "tokenizer stage 1", name)[0] for name in ("val_psnr", "val_PSNR"))
    assert ours == pytest.approx(theirs, abs=0.05)                             # the second is of 8-bit pictures


def test_shapes_table(tmp_path, capsys):
    """True pictures are near the reference and mostly right, negatives of other classes neither; seeds are averaged, logs read."""
    for name, first, flip in (("a-0", 0, 0), ("a-1", 0, 0), ("b", 100, 255)):
        os.makedirs(tmp_path / name)
        pictures = [data.draw_shape(0, "train", first + k, 16)[0] ^ flip for k in range(1000)]
        np.savez(tmp_path / name / "samples.npz", arr_0=np.stack(pictures))
        data.Log(str(tmp_path / name / "log.jsonl"), "tokenizer stage 1", 0).write(1, val_psnr=int(name == "a-1"))
    names = [tmp_path / name for name in ("a-0", "a-1", "b/samples.npz")]
    fid.judge_shapes([str(name) for name in names], tmp_path / "a.png", steps=200)
    out = capsys.readouterr().out
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in out.splitlines()}
    assert rows[""] == [f"{tmp_path}/a (2 runs)", f"{tmp_path}/b/samples.npz", "true pictures"]
    assert rows["stage 1 val_psnr"] == ["0.5 ± 0.71", "", ""]
    right, wrong, ceiling = (float(cell.split()[0]) for cell in rows["samples shape"])
    assert right > 0.6 > 0.2 > wrong and ceiling > 0.6
    near, far, _ = (float(cell.split()[0]) for cell in rows["samples Frechet distance"])
    assert command(fid, names[2], "--png", tmp_path / "b.png")[0] == 2                         # which goes with --shapes
    assert 3 * near < far and Image.open(tmp_path / "a.png").size == (16 * 18 + 2, 3 * 18 + 2)


def test_shape_classifier_knows_right_from_wrong():
    classifier, labels = fid.shape_classifier(32, steps=150), torch.arange(0, 1000, 3)
    images = torch.stack([data.Shapes("val", 32, 0, 1000).read(0, int(k))[0] for k in labels]) / 255
    found = fid.shape_accuracy(classifier, images, labels)
    assert found["colour"] > 0.9 and found["background"] > 0.9 and found["shape"] > 0.6 and found["all"] <= min(found.values())
    assert fid.shape_accuracy(classifier, images, (labels + 100) % 1000)["shape"] < 0.1


def test_crop_makes_photos_one_size(wrong):
    code, out, _ = command(fid, wrong / "sizes", "--crop", 32, "--inception", "random", "--json", "--benchmark",
                           "--batch-size", 2)
    assert code == 0 and json.loads(out)["images"] == [3] and json.loads(out)["IS"] >= 1


# -----------------------------------------------------------------------------
# Bad input: one clear line, exit code 2, nothing written

class Hostile:
    """Unpickling this would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def bad(tmp_path_factory, trained):
    """Names of things that are wrong, for the table below."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "empty").mkdir()
    (tmp / "nothing" / "cat").mkdir(parents=True)
    write_images(tmp / "single", ["cat"], 1)
    (tmp / "loop").mkdir()
    os.symlink(tmp / "loop" / "cat", tmp / "loop" / "cat")
    photo = (write_images(tmp / "other", ["bird"]) / "bird" / "0.jpg").read_bytes()
    (tmp / "flat").mkdir()
    (tmp / "flat" / "1.jpg").write_bytes(photo)
    for kind, content in {"broken": b"this is no picture", "zero": b"", "truncated": photo[:len(photo) // 2]}.items():
        (write_images(tmp / kind) / "cat" / "7.jpg").write_bytes(content)
    for kind, image in {"bomb": Image.new("1", (20_000, 20_000)), "thin": Image.new("RGB", (5000, 1))}.items():
        image.save(write_images(tmp / kind) / "cat" / "7.png")
    (tmp / "text.pt").write_text("hello")
    (tmp / "zero.pt").write_bytes(b"")
    (tmp / "cut.pt").write_bytes((trained / "tokenizer.pt").read_bytes()[:-5000])
    torch.save([1, 2], tmp / "list.pt")
    torch.save({"kind": "tokenizer", "config": Hostile(tmp / "pwned")}, tmp / "hostile.pt")
    tokenizer = torch.load(trained / "tokenizer.pt", weights_only=True)
    torch.save({**tokenizer, "config": {**tokenizer["config"], "codebook_size": 128}}, tmp / "misfit.pt")
    torch.save({**tokenizer, "model": {**tokenizer["model"], "quantizer.codebook": torch.zeros(256, 8)}}, tmp / "tokenizer2.pt")
    (tmp / "half").mkdir()
    os.link(trained / "tokenizer_stage1.pt", tmp / "half" / "tokenizer_stage1.pt")
    early = torch.load(trained / "tokenizer_stage1.pt", weights_only=True)
    (tmp / "early").mkdir()
    torch.save({**early, "step": 300}, tmp / "early" / "tokenizer_stage1.pt")
    for kind in ("short", "labels", "codes", "note"):
        shutil.copytree(trained / "tokens", tmp / kind)
    os.truncate(tmp / "short" / "train" / "tokens.npy", 9000)
    np.save(tmp / "labels" / "train" / "labels.npy", np.full(400, 5000, np.int32))
    np.save(tmp / "codes" / "train" / "tokens.npy", np.full((400, 1, 21), 300, np.uint16))
    (tmp / "note" / "train" / "cache.json").write_text("{")
    (tmp / "there.npz").write_text("hello")
    (tmp / "part.npz.part").mkdir()
    (tmp / "part.npz.part" / "settings.json").write_text("[]")
    return {"tmp": tmp, "trained": trained, "tok": f"{trained}/tokenizer.pt"}


@pytest.mark.parametrize("script,words,says", [
    ("train_tokenizer", "--data {tmp}/nowhere", "no such folder: {tmp}/nowhere"),
    ("train_tokenizer", "--data {tmp}/empty", "no images in {tmp}/empty"),
    ("train_tokenizer", "--data {tmp}/nothing", "no images in {tmp}/nothing/cat"),
    ("train_tokenizer", "--data {tmp}/broken --steps 50 50 --batch-size 4", "{tmp}/broken/cat/7.jpg is not a readable image"),
    ("train_tokenizer", "--data {tmp}/broken --steps 50 50 --batch-size 4 --workers 2", "cat/7.jpg is not a readable image"),
    ("train_tokenizer", "--data {tmp}/zero --steps 50 1 --batch-size 4", "zero/cat/7.jpg is not a readable image"),
    ("train_tokenizer", "--data {tmp}/truncated --steps 50 1 --batch-size 4", "truncated/cat/7.jpg is not a readable image"),
    ("train_tokenizer", "--data {tmp}/bomb --steps 50 1 --batch-size 4", "bomb/cat/7.png is not a readable image (Image size"),
    ("train_tokenizer", "--data {tmp}/thin --steps 50 1 --batch-size 4", "5000x1 is too long and thin to crop"),
    ("train_ar", "--data {tmp}/truncated --tokenizer {tok}", "truncated/cat/7.jpg is not a readable image"),
    ("train_tokenizer", "--data {tmp}/flat", "no images in {tmp}/flat: it needs one sub-folder a class"),
    ("train_tokenizer", "--data {tmp}/loop", "can't read {tmp}/loop ([Errno 40] Too many levels of symbolic links"),
    ("train_tokenizer", "--data {tmp}/single", "holds a single image"),
    ("train_tokenizer", "--data {tmp}/broken --val-data {tmp}/other", "has other classes than"),
    ("train_tokenizer", "--data {tmp}/text.pt", "no such folder: {tmp}/text.pt"),
    ("train_tokenizer", "--image-size 60", "image size 60 is not a multiple of the patch size 8"),
    ("train_tokenizer", "--recipe paper --vision-weights {tmp}/empty", "no {tmp}/empty/convnext_small-0c510722.pth"),
    ("train_tokenizer", "--recipe paper --no-perceptual --steps 2 9", "2 steps are too few for the 3 phases of a stage"),
    ("train_tokenizer", "--lr 1e30 --steps 60 1 --batch-size 4 --image-size 32", "10 steps in a row, before step 20, had gradients that are not finite; nothing is saved"),
    ("train_ar", "--ten-crop --tokenizer {trained}/tokenizer.pt", "--ten-crop goes with an image folder"),
    ("train_tokenizer", "--batch-size 9 --accum 2", "a batch of 9 can't be shared evenly by 1 ranks in 2 micro-batches"),
    ("train_tokenizer", "--batch-size 0", "--batch-size is above zero, found 0"),
    ("train_tokenizer", "--steps 0 5", "--steps takes two numbers above zero"),
    ("train_tokenizer", "--lr -1", "--lr is above zero, found -1.0"),
    ("train_tokenizer", "--seed -1", "--seed is at least 0"),
    ("train_ar", "--width 100", "--width is a multiple of 32, the size of a head, and --depth at least 1, found 100 and 6"),
    ("train_ar", "--depth 0", "found 160 and 0"),
    ("train_tokenizer", "--encoder sideways", "encoder is bidirectional or causal, found 'sideways'"),
    ("train_tokenizer", "--stage 2", "no such checkpoint: {out}/tokenizer_stage1.pt"),
    ("train_tokenizer", "--device cuda", "device cuda is not available here"),
    ("train_tokenizer", "--out {trained}", "tokenizer_stage1.pt is there already: --resume"),
    ("train_tokenizer", "--out {trained} --resume --lr 0.5", "trained with other settings (--lr"),
    ("train_tokenizer", "--patch-size 0", "a patch has at least 1 pixel, found 0"),
    ("train_tokenizer", "--codebook-size 1", "a codebook needs at least 2 entries, found 1"),
    ("train_tokenizer", "--save-every 0", "--save-every is above zero, found 0"),
    ("train_tokenizer", "--save-minutes -1", "--save-minutes is at least 0, found -1"),
    ("train_tokenizer", "--clip nan", "--clip is above zero, found nan"),
    ("train_tokenizer", "--stage 2 --out {tmp}/early --image-size 32 --patch-size 8 --codebook-size 256", "holds step 300 of 400"),
    ("train_tokenizer", "--out {tmp}/text.pt/x --steps 1 1 --batch-size 2", "can't make the folder {tmp}/text.pt/x"),
    ("train_ar", "--tokenizer {tmp}/zero.pt", "zero.pt is not a checkpoint"),
    ("train_ar", "--tokenizer {tmp}/cut.pt", "cut.pt is incomplete"),
    ("train_ar", "--tokenizer {tmp}/list.pt", "it holds something this project does not know"),
    ("train_ar", "--tokenizer {tmp}/hostile.pt", "loading it would run code: posix.mkdir"),
    ("train_ar", "--tokenizer {tmp}/misfit.pt", "does not fit the model: quantizer.codebook is (256, 8), not (128, 8)"),
    ("train_ar", "--tokenizer {tok} --cache {tmp}/short --num-pictures 400", "the token cache in {tmp}/short/train is damaged"),
    ("train_ar", "--tokenizer {tok} --cache {tmp}/labels --num-pictures 400", "the token cache in {tmp}/labels/train is damaged"),
    ("train_ar", "--tokenizer {tok} --cache {tmp}/codes --num-pictures 400", "the token cache in {tmp}/codes/train is damaged"),
    ("train_ar", "--tokenizer {tok} --cache {tmp}/note --num-pictures 400", "cache.json is damaged"),
    ("train_ar", "--tokenizer {tmp}/tokenizer2.pt --cache {trained}/tokens --num-pictures 400", "made for something else (tokenizer"),
    ("train_ar", "--tokenizer {tok} --dropout 1", "dropout is at least 0 and below 1, found 1.0"),
    ("train_ar", "--tokenizer {tok} --class-dropout 2", "--class-dropout between 0 and 1, found 9000 and 2.0"),
    ("train_ar", "--tokenizer {tok} --steps 0", "--steps is above zero"),
    ("sample", "--class 1 --tokenizer {tmp}/tokenizer2.pt --ar {trained}/ar.pt", "the tokens of another tokenizer"),
    ("sample", "--out {trained}", "say what to paint: --class"),
    ("sample", "--out {trained} --class 1 --npz {tmp}/x.npz", "found npz and class"),
    ("sample", "--out {trained} --class 1 --png {tmp}/x.pdf", "--png names a .png file, found {tmp}/x.pdf"),
    ("sample", "--out {tmp}/half --class 1", "no tokenizer.pt and no ar.pt in {tmp}/half: train_tokenizer.py"),
    ("sample", "--out {trained} --reconstruct {tmp}/nowhere", "no such image or folder: {tmp}/nowhere"),
    ("train_tokenizer", "--lr 1e6 --steps 3 1 --batch-size 4 --image-size 32", "validation PSNR is not finite any more"),
    ("sample", "--out {trained} --image {tmp}/nowhere.png", "no such image or folder: {tmp}/nowhere.png"),
    ("sample", "--out {trained} --image {tmp}/zero/cat/7.jpg", "7.jpg is not a readable image"),
    ("sample", "--out {trained} --image {tmp}/flat/1.jpg --keep 1.5", "--keep from 0 to 1, found 0 and 1.5"),
    ("sample", "--out {trained} --class 3 --keep 0.5", "--keep goes with --image"),
    ("sample", "--out {trained} --reconstruct {tmp}/empty", "no images in {tmp}/empty"),
    ("sample", "--out {tmp} --tokenizer {tmp}/tokenizer2.pt --reconstruct {tmp}/broken", "7.jpg is not a readable image"),
    ("sample", "--class 1 --temperature -1 --out {trained}", "--temperature is at least 0, found -1.0"),
    ("sample", "--class 1 --top-k 0 --out {trained}", "--top-k is at least 1, found 0"),
    ("sample", "--npz {tmp}/part.npz --num-images 1000 --out {trained}", "settings"),
    ("sample", "--npz {tmp}/there.npz --num-images 1000 --out {trained}", "there.npz is there already"),
    ("train_ar", "", "no such checkpoint: {out}/tokenizer.pt"),
    ("train_ar", "--tokenizer {tmp}/text.pt", "text.pt is not a checkpoint that can be loaded safely"),
    ("train_ar", "--tokenizer {trained}/ar.pt", "ar.pt is not a checkpoint of kind 'tokenizer', it holds kind 'ar'"),
    ("train_ar", "--out {trained} --resume --num-pictures 400 --batch-size 8", "trained with other settings (--"),
    ("train_ar", "--tokenizer {trained}/tokenizer.pt --cache {trained}/tokens --num-pictures 300", "made for something else"),
    ("sample", "--class 1000 --out {trained}", "no class '1000': classes are 0 to 999"),
    ("sample", "--class=-5 --out {trained}", "no class '-5'"),
    ("train_tokenizer", "--stage 2 --out {tmp}/half", "has another shape than these flags ask for"),
    ("train_tokenizer", "--val-data {tmp}/empty", "--val-data goes with an image folder"),
    ("sample", "--class dodo --out {trained}", "no class 'dodo'"),
    ("sample", "--class 1 --tokenizer {trained}/ar.pt --ar {trained}/ar.pt", "not a checkpoint of kind 'tokenizer'"),
    ("sample", "--class 1 --n 0 --out {trained}", "--n is at least 1"),
    ("sample", "--npz {tmp}/x.npz --num-images 1500 --out {trained}", "not a multiple of the 1000 classes; choose 1000"),
    ("sample", "--class 1 --top-p 1.5 --out {trained}", "--top-p is at most 1, found 1.5"),
    ("data", "--size 0", "--size is from 8 to 1024"),
    ("data", "--size 100000", "--size is from 8 to 1024"),
])
def test_bad_input(script, words, says, bad, tmp_path):
    def files():
        return {path: (os.lstat(path).st_size, os.lstat(path).st_mtime_ns) for key in ("tmp", "trained") for path in bad[key].rglob("*") if not path.is_dir()}

    names, before = {**bad, "out": tmp_path / "out"}, files()
    words = words.format(**names).split()
    if script != "data" and "--out" not in words:
        words += ["--out", str(names["out"])]
    code, _, err = command(sys.modules[script], *words)
    said = [line for line in err.splitlines() if line and not set("|█") & set(line)]
    assert code == 2 and says.format(**names) in err and len(said) <= 2 and "Traceback" not in err, err
    assert files() == before and not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.tmp"))


def test_one_pixel_will_do(tmp_path):
    for k in range(2):
        os.makedirs(tmp_path / "photos" / "cat", exist_ok=True)
        Image.new("RGB", (1, 1), "red").save(tmp_path / "photos" / "cat" / f"{k}.png")
    assert command(train_tokenizer, "--data", tmp_path / "photos", "--out", tmp_path, "--steps", 1, 1, "--batch-size", 2)[0] == 0


def test_skip_bad_images(bad, tmp_path):
    words = ["--data", bad["tmp"] / "broken", "--out", tmp_path, "--batch-size", 8, "--skip-bad-images"]
    code, _, err = command(train_tokenizer, *words, "--steps", 4, 2, "--image-size", 32, "--dtype", "bfloat16",
                           "--encoder", "causal")
    assert code == 0 and "skipped: " in err
    assert command(train_ar, *words, "--steps", 2, "--dtype", "bfloat16")[0] == 0
    folder, _ = data.open_data(str(bad["tmp"] / "broken"), None, 32, 0, skip_bad=True)
    at = folder.paths.index(str(bad["tmp"] / "broken" / "cat" / "7.jpg"))
    assert folder.labels[at] == 0 and folder.read_crops(at)[0].float().mean((1, 2)).argmax() == 0     # a cat stands in
