"""What import-linter cannot say: who alone may use a library."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sarjax

PACKAGE = Path(sarjax.__file__).parent
ALONE = {
    "orbax": "train/checkpoint.py",
    # Beside our own: scripts as users of PyTorch write them, which benchmarks measure.
    "rasterio": ("georeference.py", "raster.py", "bench/torch_input.py", "bench/torch_scene.py"),
    "ott": "losses/transport.py",
    "grain": "data/pipeline.py",
    "safetensors": ("train/teacher.py", "models/torchvision.py"),
    "tensorboardX": "train/loggers.py",
    "tensorflow": (),
}


def imports(path, outermost=False):
    """Top names of the modules that a file imports; only those at module level when `outermost`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if outermost else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("library", ALONE)
def test_one_file_alone_uses_it(library):
    allowed = ALONE[library] if isinstance(ALONE[library], tuple) else (ALONE[library],)
    users = [p for p in PACKAGE.rglob("*.py") if any(name.split(".")[0] == library for name in imports(p))]
    assert {str(p.relative_to(PACKAGE)) for p in users} <= set(allowed)


def test_data_uses_no_jax():
    for path in (PACKAGE / "data").glob("*.py"):
        assert not {"jax", "flax", "optax"} & {name.split(".")[0] for name in imports(path)}, path
        assert "grain" not in {name.split(".")[0] for name in imports(path, outermost=True)}, path


def test_recipes_are_values():
    for path in (PACKAGE / "recipes").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("sarjax")}
        assert ours <= {"sarjax.config", "sarjax.errors", "sarjax.options", "sarjax.recipes"}, path


PEERS = {PACKAGE / "bench" / name for name in ("peers.py", "objectives.py")}  # of each paper, in PyTorch


def general_modules():
    """What knows nothing of papers: step, loop, checkpoints, sharding, data, evaluation, reports, command line."""
    for folder in ("train", "evaluate", "data", "augment", "reports", "scenes", "bench", "cli"):
        yield from sorted(set((PACKAGE / folder).glob("*.py")) - PEERS)
    yield from (PACKAGE / f"{name}.py" for name in ("experiments", "export", "sidecar", "demo"))


BASES = {"MethodOptions", "Named", "NetworkOptions"}
GENERAL = {f"sarjax.{name}" for name in ("options", "options.base", "methods", "methods.record", "methods.neighbours")}


def papers(source):
    """Lines of a module that name a paper: that ask for a method's name, or import its options or its module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and any(name in ast.unparse(node) for name in ("method.NAME", "method.name")):
            yield ast.unparse(node)
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names} - {"sarjax.methods", "sarjax.methods.record"}
            if any(name.startswith(("sarjax.options", "sarjax.methods")) for name in names):
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {alias.name for alias in node.names}
            if (
                (node.module in ("sarjax.options", "sarjax.options.base") and names - BASES)
                or (node.module.startswith(("sarjax.options.", "sarjax.methods.")) and node.module not in GENERAL)
                or (node.module == "sarjax" and "options" in names)
            ):
                yield ast.unparse(node)


@pytest.mark.parametrize("path", list(general_modules()), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_paper_is_named_outside_methods(path):
    assert list(papers(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from sarjax.options import NetworkOptions, MethodOptions", False),
        ("from sarjax.options.base import Named", False),
        ("from sarjax.methods.record import Method", False),
        ("from sarjax.methods import build_method", False),
        ("from sarjax.options import NetworkOptions, LANet", True),
        ("from sarjax.options.lanet import LANet", True),
        ("def f():\n    from sarjax.options import *", True),
        ("from sarjax import options", True),
        ("import sarjax.options as o", True),
        ("import sarjax.options.lanet", True),
        ("from sarjax.methods.supervised import supervised", True),
        ("x = experiment.method.NAME == 'supervised'", True),
    ],
)
def test_the_search_for_papers(source, found):
    assert bool(list(papers(source))) == found


def python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_contracts():
    """The layers of pyproject.toml. In a process of its own: the linter disables the loggers that it finds."""
    pytest.importorskip("importlinter")
    how = f"config_filename={str(Path(__file__).parent.parent / 'pyproject.toml')!r}, no_cache=True"
    said = python(f"from importlinter.cli import lint_imports; print('code', lint_imports({how}))")
    assert said.endswith("code 0"), said


def test_importing_sarjax_is_light():
    heavy = "('jax', 'flax', 'numpy', 'tyro', 'tensorflow_datasets', 'matplotlib', 'rasterio')"
    assert python(f"import sys, sarjax; print(sarjax.__version__, [m for m in {heavy} if m in sys.modules])").endswith(
        " []"
    )
    light = "sarjax.Config, sarjax.UserError, sarjax.DatasetSpec, sarjax.open_dataset, sarjax.build_network"
    assert python(f"import sys, sarjax; {light}; print('jax' in sys.modules)") == "False"


def test_public_names():
    for name in sarjax.__all__:
        value = getattr(sarjax, name)
        module = importlib.import_module(sarjax._PUBLIC[name])
        assert value is getattr(module, name)
        assert value.__module__.startswith("sarjax."), name
        assert not (PACKAGE / name).exists(), f"{name} is a folder: which of the two it is would depend on imports"
        assert not (PACKAGE / f"{name}.py").exists(), name
    assert {"Config", "open_dataset", "__version__"} <= set(dir(sarjax))
    with pytest.raises(AttributeError, match="no attribute 'Confg'"):
        sarjax.Confg  # noqa: B018
    from sarjax import Config, config

    assert Config is config.Config
