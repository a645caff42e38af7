"""What import-linter cannot say: who alone may use a library."""

import ast
from pathlib import Path

import pytest

import sarjax

PACKAGE = Path(sarjax.__file__).parent
ALONE = {
    "orbax": "train/checkpoint.py",
    "rasterio": "raster.py",
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


def test_no_paper_is_named_outside_methods():
    """The step, the loop, checkpoints and sharding know nothing of papers."""
    for folder in ("train", "evaluate", "data", "augment"):
        for path in (PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Compare):
                    text = ast.unparse(node)
                    assert "method.NAME" not in text, f"{path}: {text}"
                    assert "method.name" not in text, f"{path}: {text}"
