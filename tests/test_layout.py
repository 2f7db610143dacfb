"""The layout that keeps imports unambiguous; each rule was broken once to see its test fail."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("server", "clients", "strategies", "datasets", "models", "experiments")
# What a room may import; flowerbed's own foundation modules are open to all.
MAY_IMPORT = {
    "models": {"models"},
    "datasets": {"datasets"},
    "clients": {"clients", "models", "datasets"},
    "strategies": {"strategies", "clients", "models", "datasets"},
    "server": {"server", "strategies", "models", "datasets"},
    "experiments": set(ROOMS),
}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_a_link_to_the_top_level_folder_without_init(room: str) -> None:
    link = ROOT / "src" / "flowerbed" / room
    assert link.is_symlink(), "a checkout without symbolic links; set git's core.symlinks"
    assert link.resolve() == ROOT / room
    assert not (ROOT / room / "__init__.py").exists(), (
        "would shadow packages of that name, see pyproject.toml"
    )


def test_the_package_takes_no_short_name() -> None:
    """In a process started in the root, importing the package must not import e.g. our folder `datasets`."""
    code = (
        "import sys, flowerbed.experiments.simulation, flowerbed.datasets.sources\n"
        "# A regular package (Hugging Face's) has a file, our folder as a namespace package has none.\n"
        f"print([n for n in {ROOMS} if n in sys.modules and sys.modules[n].__file__ is None])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=_environment(), capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            for name in names:
                head, _, rest = name.partition(".")
                target = rest.split(".")[0]
                if head == "flowerbed" and target in ROOMS:
                    assert target in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {name}"


def test_clients_need_only_the_base_install() -> None:
    code = (
        "import sys, flowerbed.clients.app, flowerbed.strategies.fedavg\n"
        "heavy = ('ray', 'hydra', 'omegaconf', 'wandb', 'matplotlib', 'sklearn', 'scipy', 'datasets', 'rich', 'yaml',\n"
        "'torch._dynamo')\n"
        "print([n for n in heavy if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd="/", env=_environment(), capture_output=True,
                          text=True, check=True)  # fmt: skip
    # Flower itself imports rich for its log.
    assert set(ast.literal_eval(done.stdout.strip())) <= {"rich", "yaml"}


@pytest.mark.slow
def test_the_wheel_built_through_the_sdist_holds_every_module(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "-n", "-o", str(tmp_path), str(ROOT)], check=True,
                   capture_output=True)  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            if path.suffix in (".py", ".yaml", ".html", ".css", ".js") and "flower-app" not in path.parts:
                assert f"flowerbed/{path.relative_to(ROOT)}" in held
    assert "flowerbed/py.typed" in held


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}
