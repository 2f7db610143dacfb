"""StyleGAN2 and BigGAN from a file: against slow twins of their papers' formulas, and cut without a jump."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from flowerbed.datasets.augment import PIXELS
from flowerbed.errors import ConfigError
from flowerbed.models.published_generators import BigGAN, StyleGAN2, published
from flowerbed.strategies.attacks.generative import FeatureMaps, Latent, Prior, Weights

WIDTH, CHANNELS = 6, (5, 4, 3)
"""Of the tiny stand-in of StyleGAN2: sides 4, 8 and 16."""


def style_state(seed: int = 0) -> dict[str, Tensor]:
    """Return random weights by the names and shapes of the published layout."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    found = {"input.input": draw(1, CHANNELS[0], 4, 4)}
    for layer in (1, 2):
        found |= {f"style.{layer}.weight": draw(WIDTH, WIDTH) * 100, f"style.{layer}.bias": draw(WIDTH)}

    def conv(name: str, before: int, after: int, size: int) -> None:
        found[f"{name}.conv.weight"] = draw(1, after, before, size, size)
        found[f"{name}.conv.modulation.weight"] = draw(before, WIDTH)
        found[f"{name}.conv.modulation.bias"] = torch.ones(before)

    def styled(name: str, before: int, after: int) -> None:
        conv(name, before, after, 3)
        found[f"{name}.noise.weight"], found[f"{name}.activate.bias"] = draw(1), draw(after)

    def picture(name: str, before: int) -> None:
        conv(name, before, 3, 1)
        found[f"{name}.bias"] = draw(1, 3, 1, 1)

    styled("conv1", CHANNELS[0], CHANNELS[0])
    picture("to_rgb1", CHANNELS[0])
    for block, (before, after) in enumerate(itertools.pairwise(CHANNELS)):
        styled(f"convs.{2 * block}", before, after)
        found[f"convs.{2 * block}.conv.blur.kernel"] = torch.ones(4, 4) / 4
        styled(f"convs.{2 * block + 1}", after, after)
        picture(f"to_rgbs.{block}", after)
    found["noises.noise_0"] = draw(1, 1, 4, 4)
    return found


def spread(x: Tensor, taps: int) -> Tensor:
    """Return a sum over ``taps`` x taps positions in plain loops: zeros between pixels, then the row 1 3 3 1 twice."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    side = x.shape[-1]
    wide = torch.zeros(*x.shape[:2], 2 * side + taps, 2 * side + taps)
    for i in range(side):
        for j in range(side):
            wide[:, :, 2 * i + 2, 2 * j + 2] = x[:, :, i, j]
    found = torch.zeros(*x.shape[:2], 2 * side, 2 * side)
    for i in range(2 * side):
        for j in range(2 * side):
            for a in range(4):
                for b in range(4):
                    found[:, :, i, j] += row[a] * row[b] * wide[:, :, i + a, j + b]
    return found


def slow_style(state: dict[str, Tensor], styles: Tensor, noise: list[Tensor]) -> Tensor:
    """Return StyleGAN2's picture of one sample: every convolution with its own modulated, demodulated weight."""

    def weight_of(name: str, style: Tensor, demodulated: bool) -> Tensor:
        weight = state[f"{name}.conv.weight"][0]
        s = state[f"{name}.conv.modulation.weight"] @ style / math.sqrt(WIDTH)
        s = s + state[f"{name}.conv.modulation.bias"]
        weight = weight / math.sqrt(weight[0].numel()) * s[None, :, None, None]
        if demodulated:
            weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        return weight

    def finish(x: Tensor, name: str, one: Tensor) -> Tensor:
        x = x + state[f"{name}.noise.weight"] * one + state[f"{name}.activate.bias"][None, :, None, None]
        return torch.where(x > 0, x, 0.2 * x) * 2**0.5

    def picture(x: Tensor, name: str, style: Tensor) -> Tensor:
        return F.conv2d(x, weight_of(name, style, False)) + state[f"{name}.bias"]

    x = F.conv2d(state["input.input"], weight_of("conv1", styles[0], True), padding=1)
    x = finish(x, "conv1", noise[0])
    skip = picture(x, "to_rgb1", styles[1])
    for block in range(2):
        name = f"convs.{2 * block}"
        weight = weight_of(name, styles[2 * block + 1], True)
        y = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        kernel = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = kernel[:, None] * kernel / kernel.sum() ** 2 * 4
        y = F.pad(y, (1, 1, 1, 1))
        y = torch.cat([F.conv2d(y[:, c : c + 1], kernel[None, None]) for c in range(y.shape[1])], 1)
        x = finish(y, name, noise[2 * block + 1])
        name = f"convs.{2 * block + 1}"
        x = F.conv2d(x, weight_of(name, styles[2 * block + 2], True), padding=1)
        x = finish(x, name, noise[2 * block + 2])
        skip = spread(skip, 4) + picture(x, f"to_rgbs.{block}", styles[2 * block + 3])
    return skip


@pytest.fixture(scope="module")
def style() -> StyleGAN2:
    return StyleGAN2(style_state(), 16)


def test_style_pictures_are_those_of_modulated_weights(style: StyleGAN2) -> None:
    h = torch.randn(2, *style.latent)
    made = style.part(h, style.condition(torch.zeros(2, dtype=torch.int64)), 0, style.layers)
    code, noise = h[:, : 6 * WIDTH].view(2, 6, WIDTH), h[:, 6 * WIDTH :]
    assert noise.shape[1] == 16 + 2 * 64 + 2 * 256
    for sample in range(2):
        styles = F.leaky_relu(style.mean + style.std * code[sample], 0.2)
        maps, at = [], 0
        for side in (4, 8, 8, 16, 16):
            maps.append(noise[sample, at : at + side**2].view(1, 1, side, side))
            at += side**2
        expected = (slow_style(style_state(), styles, maps) + 1) / 2
        torch.testing.assert_close(made[sample : sample + 1], expected, rtol=1e-4, atol=1e-4)


def test_styles_begin_where_the_mapping_network_puts_them(style: StyleGAN2) -> None:
    state = style_state()
    z = torch.randn(3000, WIDTH, generator=torch.Generator().manual_seed(5))
    w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for layer in (1, 2):
        w = (
            w @ state[f"style.{layer}.weight"].T * 0.01 / math.sqrt(WIDTH)
            + 0.01 * state[f"style.{layer}.bias"]
        )
        w = torch.where(w > 0, w, 0.2 * w) * 2**0.5
    before = torch.where(w > 0, w, 5 * w)
    torch.testing.assert_close(style.mean, before.mean(0), rtol=0.1, atol=0.1)
    torch.testing.assert_close(style.std, before.std(0), rtol=0.1, atol=0.02)


def big_state(seed: int = 0) -> dict[str, Tensor]:
    """Return BigGAN-deep's layout with two blocks at 4, attention, two at 8: pictures of 16."""
    rng = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {"embeddings.weight": torch.randn(4, 7, generator=rng)}

    def normal(name: str, *shape: int, bias: bool = True) -> None:
        weight = torch.randn(*shape, generator=rng)
        u, v = (F.normalize(torch.randn(n, generator=rng), dim=0) for n in (shape[0], weight[0].numel()))
        for _ in range(30):
            v = F.normalize(weight.flatten(1).T @ u, dim=0)
            u = F.normalize(weight.flatten(1) @ v, dim=0)
        found.update({f"{name}.weight_orig": weight, f"{name}.weight_u": u, f"{name}.weight_v": v})
        if bias:
            found[f"{name}.bias"] = torch.randn(shape[0], generator=rng)

    def statistics(name: str, size: int) -> None:
        found[f"{name}.running_means"] = torch.randn(51, size, generator=rng)
        found[f"{name}.running_vars"] = torch.rand(51, size, generator=rng) + 0.5

    def block(number: int, before: int, after: int) -> None:
        name, middle = f"generator.layers.{number}", before // 4
        for i, (a, b, size) in enumerate(
            [(before, middle, 1), (middle, middle, 3), (middle, middle, 3), (middle, after, 1)]
        ):
            statistics(f"{name}.bn_{i}", a)
            normal(f"{name}.bn_{i}.scale", a, 8, bias=False)
            normal(f"{name}.bn_{i}.offset", a, 8, bias=False)
            normal(f"{name}.conv_{i}", b, a, size, size)

    normal("generator.gen_z", 16 * 16, 8)
    block(0, 16, 16)
    block(1, 16, 8)
    name = "generator.layers.2"
    for part, (a, b) in {"theta": (8, 1), "phi": (8, 1), "g": (8, 4), "o_conv": (4, 8)}.items():
        normal(f"{name}.snconv1x1_{part}", b, a, 1, 1, bias=False)
    found[f"{name}.gamma"] = torch.tensor([0.7])
    block(3, 8, 8)
    block(4, 8, 4)
    statistics("generator.bn", 4)
    found["generator.bn.weight"], found["generator.bn.bias"] = torch.rand(4, generator=rng), torch.zeros(4)
    normal("generator.conv_to_rgb", 4, 4, 3, 3)
    return found


def test_big_pictures_depend_on_class_and_code_and_norms_are_one() -> None:
    big = BigGAN(big_state(), 16).requires_grad_(False)
    assert (big.layers, big.latent, big.classes) == (6, (4,), 7)
    largest = torch.linalg.svdvals(big._of("generator.layers.0.conv_1.weight").flatten(1))[0]
    assert float(largest) == pytest.approx(1, abs=1e-3)
    z = torch.randn(2, 4)
    a, b = (big.part(z, big.condition(torch.tensor([c, c])), 0, 6) for c in (0, 3))
    assert a.shape == (2, 3, 16, 16)
    assert bool(((a >= 0) & (a <= 1)).all())
    assert float((a - b).abs().max()) > 1e-3 < float((a[0] - a[1]).abs().max())


def test_a_big_block_by_hand() -> None:
    """The first block, written out with the layers of torch."""
    state, big = big_state(), BigGAN(big_state(), 16)
    z, y = torch.randn(2, 4), torch.tensor([1, 5])
    condition = torch.cat([z, state["embeddings.weight"].T[y]], 1)
    h1 = big.part(z, big.condition(y), 0, 1)
    x = h1[:, :-4].view(2, 16, 4, 4)
    assert torch.equal(h1[:, -4:], z)
    gen = big._of("generator.gen_z.weight")
    flat = (condition @ gen.T + state["generator.gen_z.bias"]).view(2, 16, 16)
    torch.testing.assert_close(x.flatten(2), flat.transpose(1, 2))
    after = x
    for i in range(4):
        name = f"generator.layers.0.bn_{i}"
        norm = torch.nn.BatchNorm2d(after.shape[1], eps=1e-4, affine=False).eval()
        norm.running_mean, norm.running_var = (
            state[f"{name}.running_means"][50],
            state[f"{name}.running_vars"][50],
        )
        gain = 1 + condition @ big._of(f"{name}.scale.weight").T
        offset = condition @ big._of(f"{name}.offset.weight").T
        after = (norm(after) * gain[:, :, None, None] + offset[:, :, None, None]).clamp(min=0)
        conv = f"generator.layers.0.conv_{i}"
        after = F.conv2d(
            after, big._of(f"{conv}.weight"), state[f"{conv}.bias"], padding=0 if i in (0, 3) else 1
        )
    h2 = big.part(h1, big.condition(y), 1, 2)
    torch.testing.assert_close(h2[:, :-4].view(2, 16, 4, 4), x + after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [StyleGAN2, BigGAN])
def test_no_cut_makes_the_picture_jump(kind: type[StyleGAN2 | BigGAN]) -> None:
    generator = kind(style_state() if kind is StyleGAN2 else big_state(), 8)
    y = torch.tensor([0, 2])
    h = torch.randn(2, *generator.latent)
    c = generator.condition(y)
    whole = generator.part(h, c, 0, generator.layers)
    assert whole.shape == (2, 3, 8, 8)
    for k in range(generator.layers):
        torch.testing.assert_close(generator.part(h, c, k, generator.layers), whole)
        h = generator.part(h, c, k, k + 1) if k + 1 < generator.layers else h


def test_the_skip_and_the_noise_are_part_of_a_cut(style: StyleGAN2) -> None:
    """Each piece of h_2 matters for the picture: without the skip it would be another one."""
    c = style.condition(torch.zeros(1, dtype=torch.int64))
    h = style.part(torch.randn(1, *style.latent), c, 0, 2)
    whole = style.part(h, c, 2, style.layers)
    pieces = style._unpacked(h, 2)
    assert [tuple(p.shape[1:]) for p in pieces] == [
        (4, 8, 8),
        (3, 8, 8),
        (6, WIDTH),
        (16 + 2 * 64 + 2 * 256,),
    ]
    for place in range(4):
        changed = [p.clone() for p in pieces]
        changed[place] *= 0
        other = style.part(torch.cat([p.flatten(1) for p in changed], 1), c, 2, style.layers)
        assert float((other - whole).abs().max()) > 1e-3, place


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_an_attack_goes_through_a_users_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"g_ema": style_state(), "latent_avg": torch.zeros(WIDTH)}, path)
    else:
        save_file(style_state(), path)
    prior = Prior.load(path, (3, 12, 12), 10, PIXELS, torch.device("cpu"))
    labels = torch.tensor([[0, 1]])
    space, variables = Latent(prior, stages=2), {"z": torch.randn(1, 2, *prior.generator.latent)}
    image = torch.func.vmap(space.decode)(variables, labels)
    assert image.shape == (1, 2, 3, 12, 12)
    following = space.advance(variables, labels)
    assert following is not None
    assert isinstance(following[0], FeatureMaps)
    torch.testing.assert_close(torch.func.vmap(following[0].decode)(following[1], labels), image)
    # And GIAS's copies of the weights begin with the same picture.
    copies, own = Weights.after(prior, variables["z"], labels)
    again = torch.func.vmap(copies.decode)({**own, **copies.fixed}, labels)
    torch.testing.assert_close(again, image, rtol=1e-4, atol=1e-4)


def test_other_files_are_refused() -> None:
    assert published({"stem.weight": torch.zeros(1)}, (3, 8, 8)) is None
    with pytest.raises(ConfigError, match="takes 1 channel"):
        published(style_state(), (1, 8, 8))
    broken = style_state()
    del broken["to_rgbs.1.bias"]
    with pytest.raises(ConfigError, match=r"lack 'to_rgbs\.1\.bias'"):
        published(broken, (3, 8, 8))
