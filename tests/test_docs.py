"""The page on data says what the code does."""

import re
import tomllib
from pathlib import Path

import fake_data
import numpy as np

from sarjax.data.build import builder_class, builders
from sarjax.data.doctor import KINDS
from sarjax.data.layout import Options

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_check_is_explained():
    rows = dict(re.findall(r"^\| ([a-zA-Z -]+) \| (.*) \|$", PAGE, re.MULTILINE))
    assert {kind: rows[kind] for kind in KINDS} == KINDS


def test_every_set_is_listed():
    for name in builders():
        assert f"`{name}`" in PAGE
        for config in builder_class(name).BUILDER_CONFIGS:
            assert f"`{config.name}`" in PAGE, config.name


def test_the_description_is_accepted(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    tomllib.loads(text)
    (tmp_path / "dataset.toml").write_text(text)
    for folder, image in (("sar", np.ones((256, 256, 2), np.float32)), ("label", np.zeros((256, 256), np.uint8))):
        fake_data.write_tiff(tmp_path / folder / "1.tif", image)
    layout = builder_class("paired_folder").layout(tmp_path, "", Options())
    assert not [p for p in layout.problems if p.severity == "fatal"]
    assert [t.name for t in layout.spec.modality("sar").transforms] == ["lee", "db"]
    assert [s.name for s in layout.scenes] == ["1"]
