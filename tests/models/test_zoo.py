"""Every registered model, through one table; then what single models promise."""

from __future__ import annotations

import hashlib
import inspect
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec, Net, buffer_names, parameter_names, roles
from flowerbed.models.zoo import MODELS, build_model, list_models


@dataclass(frozen=True)
class Case:
    """What a model is tested with."""

    input_shape: tuple[int, ...] = (3, 8, 8)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_text(self) -> bool:
        return len(self.input_shape) == 1

    @property
    def classes(self) -> int:
        return 11 if self.is_text else 5

    def spec(self, name: str) -> ModelSpec:
        return ModelSpec(name, self.input_shape, self.classes, self.options)

    def inputs(self, batch: int = 3, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, *self.input_shape)
        if self.is_text:
            return torch.randint(self.classes, shape, generator=generator)
        return torch.randn(shape, generator=generator)


CASES = {
    "linear": Case((1, 8, 8)),
    "mlp": Case((1, 8, 8), {"hidden": [16, 12]}),
    "lenet5": Case((1, 8, 8)),
    "leaf_cnn": Case((1, 8, 8)),
    "pfl_cnn": Case(),
    "small_cnn": Case((1, 8, 8)),
    "dlg_lenet": Case((1, 8, 8)),
    "imprinted": Case((1, 8, 8), {"bins": 6}),
    "resnet8": Case(options={"shortcut": "B"}),
    "resnet20": Case(options={"norm": "gn", "groups": 4}),
    "resnet32": Case(),
    "resnet18": Case(options={"norm": "gn"}),
    "wrn16_2": Case(),
    "wrn28_2": Case(options={"norm": "gn"}),
    "wrn28_10": Case(),
    "mobilenet_tiny": Case(),
    "vit_tiny": Case(),
    "gpt_tiny": Case((7,), {"width": 32}),
    "char_lstm": Case((7,)),
    "char_gru": Case((7,)),
}
NAMES = sorted(CASES)
IMAGE_NAMES = [name for name in NAMES if not CASES[name].is_text]


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_every_registered_model_is_in_the_table() -> None:
    assert {name for name in MODELS if name in MODELS} == set(CASES)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_finite_gradients(name: str) -> None:
    case = CASES[name]
    model = case.spec(name).build(0)
    assert isinstance(model, Net)
    positions = case.input_shape if case.is_text else ()
    x = case.inputs()
    outputs = model(x)
    assert outputs.shape == (3, *positions, case.classes)
    assert outputs.dtype == torch.float32
    outputs.logsumexp(-1).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
    model.eval()
    features = model.features(x)
    assert features.shape == (3, *positions, model.feature_dim)
    assert torch.equal(model.head(features), model(x))
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_names_and_roles(name: str) -> None:
    model = CASES[name].spec(name).build(0)
    state = model.state_dict()
    assert all(key.startswith(("body.", "head.")) for key in state)
    assert roles(model) == {key: "head" if key.startswith("head.") else "backbone" for key in state}
    assert "head" in roles(model).values()
    assert parameter_names(model) == [key for key, _ in model.named_parameters()]
    assert set(buffer_names(model)) == {key for key, _ in model.named_buffers()}
    assert sorted(parameter_names(model) + buffer_names(model)) == sorted(state)


@pytest.mark.parametrize("name", NAMES)
def test_round_trips_keep_every_bit(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    spec = case.spec(name)
    model = spec.build(0)
    state = model.state_dict()
    other = pickle.loads(pickle.dumps(spec)).build(1)
    assert not same_bits(other.state_dict(), state)
    save_file(state, tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same_bits(other.state_dict(), state)
    pickled = pickle.loads(pickle.dumps(model))
    assert same_bits(pickled.state_dict(), state)
    x = case.inputs()
    expected = model.eval()(x)
    assert torch.equal(other.eval()(x), expected)
    assert torch.equal(pickled.eval()(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_a_function_of_the_seed(name: str) -> None:
    spec = CASES[name].spec(name)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = spec.build(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_bits(spec.build(5).state_dict(), first.state_dict())


def digest(name: str) -> str:
    state = build_model(name, CASES[name].input_shape, CASES[name].classes, seed=7).state_dict()
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


def test_weights_are_the_same_in_another_process() -> None:
    names = ("resnet8", "char_lstm")
    calls = "; ".join(
        f"print(d({name!r}, {CASES[name].input_shape}, {CASES[name].classes}))" for name in names
    )
    program = (
        "import hashlib\n"
        "from flowerbed.models.zoo import build_model\n"
        "def d(n, s, c):\n"
        "    v = build_model(n, s, c, seed=7).state_dict().values()\n"
        "    return hashlib.sha256(b''.join(t.numpy().tobytes() for t in v)).hexdigest()\n" + calls
    )
    path = str(Path(inspect.getfile(ConfigError)).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    assert run.stdout.split() == [digest(name) for name in names]


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "count"),
    [
        # 784 * 10 + 10; McMahan et al. 2017 report 199,210 for the 2NN and 1,663,370 for the CNN.
        ("linear", (1, 28, 28), 10, {}, 7_850),
        ("mlp", (1, 28, 28), 10, {"hidden": [200, 200]}, 199_210),
        ("leaf_cnn", (1, 28, 28), 10, {}, 1_663_370),
        ("lenet5", (1, 28, 28), 10, {}, 61_706),
        ("lenet5", (3, 32, 32), 10, {}, 62_006),
        ("pfl_cnn", (3, 32, 32), 10, {}, 1_626_442),
        # The LeNet of Zhu et al. 2019: 912 + 3612 + 3612 + 7690.
        ("dlg_lenet", (3, 32, 32), 10, {}, 15_826),
        # He et al. 2016, table 6: 0.27M and 0.46M.
        ("resnet20", (3, 32, 32), 10, {"norm": "bn", "shortcut": "A"}, 269_722),
        ("resnet32", (3, 32, 32), 10, {"norm": "bn", "shortcut": "A"}, 464_154),
        ("resnet18", (3, 32, 32), 10, {}, 11_173_962),
        ("resnet18", (3, 224, 224), 1000, {"stem": "imagenet"}, 11_689_512),
        # Zagoruyko & Komodakis 2016: 36.5M for WRN-28-10.
        ("wrn16_2", (3, 32, 32), 10, {}, 691_674),
        ("wrn28_2", (3, 32, 32), 10, {}, 1_467_610),
        ("wrn28_10", (3, 32, 32), 10, {}, 36_479_194),
    ],
)
def test_published_parameter_counts(
    name: str, shape: tuple[int, ...], classes: int, options: dict[str, Any], count: int
) -> None:
    model = build_model(name, shape, classes, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", IMAGE_NAMES)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 48)])
def test_images_of_other_sizes(name: str, shape: tuple[int, ...]) -> None:
    if name == "wrn28_10":
        pytest.skip("same code as wrn28_2, too slow at this size")
    model = build_model(name, shape, 4).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, 4)


SMALLEST = {"lenet5": 1, "leaf_cnn": 4, "pfl_cnn": 6, "small_cnn": 4, "resnet8": 4, "mobilenet_tiny": 8}


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(SMALLEST)),
    channels=st.integers(1, 4),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    batch=st.integers(1, 3),
)
def test_an_image_either_fits_or_is_refused(
    name: str, channels: int, height: int, width: int, batch: int
) -> None:
    if min(height, width) < SMALLEST[name]:
        with pytest.raises(ConfigError, match=f"'{name}' needs images of at least"):
            build_model(name, (channels, height, width), 4)
        return
    outputs = build_model(name, (channels, height, width), 4).eval()(
        torch.ones(batch, channels, height, width)
    )
    assert outputs.shape == (batch, 4)
    assert torch.isfinite(outputs).all()


def test_resnet18_imagenet_stem_divides_by_32() -> None:
    model = build_model("resnet18", (3, 64, 64), 3, stem="imagenet", norm="gn")
    assert isinstance(model, Net)
    body = model.body
    assert isinstance(body, nn.Sequential)
    assert body[:-1](torch.zeros(1, 3, 64, 64)).shape == (1, 512, 2, 2)


def test_text_models_take_shorter_sequences_and_gpt_refuses_longer() -> None:
    for name in ("char_lstm", "char_gru", "gpt_tiny"):
        model = build_model(name, (6,), 9)
        assert model(torch.zeros(2, 4, dtype=torch.int64)).shape == (2, 4, 9)
    with pytest.raises(ConfigError, match="at most 6 positions and got 7"):
        build_model("gpt_tiny", (6,), 9)(torch.zeros(2, 7, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("resnet9", (3, 8, 8), {}, "Unknown model 'resnet9'. Did you mean 'resnet8'?"),
        ("resnet8", (3, 8, 8), {"nrom": "gn"}, r"Did you mean 'norm'\? Known: groups, norm, shortcut"),
        ("linear", (4,), {"hidden": [3]}, r"Unknown option of model 'linear' 'hidden'. Known: softmax"),
        ("mlp", (4,), {"hidden": 3}, "hidden=3 of model 'mlp' must be of type list of int"),
        ("mlp", (4,), {"hidden": "16"}, "hidden='16' of model 'mlp' must be of type list of int"),
        ("mlp", (4,), {"hidden": []}, "must be at least 1"),
        ("mlp", (4,), {"hidden": [8, "x"]}, "must be of type list of int"),
        ("vit_tiny", (3, 8, 8), {"patch": True}, "must be of type int"),
        ("vit_tiny", (3, 8, 8), {"patch": 0}, "patch=0 of model 'vit_tiny' must be at least 1"),
        ("vit_tiny", (3, 9, 8), {}, "does not divide 9x8; set the option patch"),
        ("vit_tiny", (3, 8, 8), {"heads": 3}, "heads=3 of model 'vit_tiny' must divide width=128"),
        ("gpt_tiny", (7,), {"depth": -1}, "depth=-1"),
        ("gpt_tiny", (3, 8, 8), {}, "takes sequences"),
        ("char_lstm", (3, 8, 8), {}, "takes sequences"),
        ("char_gru", (7,), {"hidden": 0}, "hidden=0"),
        ("resnet8", (7,), {}, "takes images"),
        ("resnet8", (3, 3, 9), {}, "at least 4x4, not 3x9; enlarge them"),
        ("resnet8", (3, 8, 8), {"norm": "ln"}, "'bn' .* or 'gn'"),
        ("resnet8", (3, 8, 8), {"norm": "gn", "groups": 3}, "groups=3 must divide the 16 channels"),
        ("resnet8", (3, 8, 8), {"shortcut": "C"}, "must be one of A, B"),
        ("resnet18", (3, 8, 8), {"stem": "big"}, "must be one of cifar, imagenet"),
        ("resnet18", (3, 16, 16), {"stem": "imagenet"}, "at least 32x32"),
    ],
)
def test_bad_settings_name_the_remedy(
    name: str, shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name, shape, 5, **options)


def test_patterns_list_models() -> None:
    assert list_models("resnet*") == ["resnet18", "resnet20", "resnet32", "resnet8"]
    assert list_models("nothing*") == []
    assert set(CASES) <= set(list_models())


def test_models_by_import_path() -> None:
    model = ModelSpec("flowerbed.models.dense:mlp", (4,), 3, {"hidden": (5,)}).build(0)
    assert model(torch.zeros(2, 4)).shape == (2, 3)


def test_a_user_s_own_class_is_a_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        def __init__(self, input_shape: tuple[int, ...], num_classes: int, scale: float = 1.0) -> None:
            super().__init__(input_shape[0], num_classes)
            self.scale = scale

    module = ModuleType("own_models")
    vars(module)["Own"] = Own
    monkeypatch.setitem(sys.modules, "own_models", module)
    model = build_model("own_models:Own", (4,), 3, scale=2)
    assert isinstance(model, Own)
    assert model.scale == 2
    assert same_bits(build_model("own_models:Own", (4,), 3).state_dict(), model.state_dict())
    with pytest.raises(ConfigError, match="scale='2' of model 'own_models:Own' must be of type float"):
        build_model("own_models:Own", (4,), 3, scale="2")


def test_mlp_takes_flat_features_as_well() -> None:
    assert build_model("mlp", (6,), 3)(torch.zeros(2, 6)).shape == (2, 3)


def test_a_foreign_module_declares_its_head() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 4)
            self.fc = nn.Linear(4, 2)

    class WithHead(Plain):
        def get_classifier(self) -> nn.Module:
            return self.fc

    class Wrong(Plain):
        def get_classifier(self) -> tuple[nn.Module, nn.Module]:
            return self.fc, self.stem

    assert set(roles(Plain()).values()) == {"backbone"}
    assert roles(WithHead()) == {
        "stem.weight": "backbone",
        "stem.bias": "backbone",
        "fc.weight": "head",
        "fc.bias": "head",
    }
    with pytest.raises(ConfigError, match="must return the one module"):
        roles(Wrong())


def test_names_of_tied_and_unsaved_tensors() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2, bias=False)
            self.second = nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("kept", torch.zeros(1))
            self.register_buffer("unsaved", torch.zeros(1), persistent=False)

    assert parameter_names(Tied()) == ["first.weight", "second.weight"]
    assert buffer_names(Tied()) == ["kept"]
