"""The sheet of scene clusters: counted right, drawn, and refused where there are none."""

import json

import numpy as np
import pytest
import toy

from sarjax.errors import UserError
from sarjax.options import Clustering, SceneClustering, Supervised
from sarjax.reports import clusters
from sarjax.reports.clusters import report_clusters, summarise
from sarjax.reports.drawing import display, paint, save
from sarjax.train import loop


def test_summary():
    shares = np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.9, 0.1, 0.0], [0.2, 0.2, 0.6]])
    pixels = np.array([[4, 0, 0], [1, 1, 0], [2, 2, 0], [0, 0, 0]])
    first, second, empty = summarise(shares, pixels, toy.SPEC, nearest=1)
    assert [c["cluster"] for c in (first, second, empty)] == [0, 2, 1]
    assert (first["tiles"], first["share"], first["nearest"]) == (2, 0.5, [2])
    assert first["sureness"] == pytest.approx(0.8)
    assert list(first["classes"].values()) == [0.75, 0.25, 0.0]
    assert second["nearest"] == [1]
    assert list(second["classes"].values()) == [0.5, 0.5, 0.0]
    assert (empty["tiles"], empty["nearest"], empty["sureness"]) == (0, [], None)
    assert set(empty["classes"].values()) == {None}


def test_report_of_a_run(tmp_path, monkeypatch):
    data = toy.dataset()

    class Named(list):
        def name(self, i):
            return f"tile {i}"

    monkeypatch.setattr("sarjax.reports.run.data_of", lambda *args: data)
    split = type(data).split
    monkeypatch.setattr(type(data), "split", lambda self, *args, **kwargs: Named(split(self, *args, **kwargs)))
    options = SceneClustering(clustering=Clustering(clusters=3, warmup=0))
    loop.train(toy.config(options, steps=2), tmp_path / "run", dataset=data, say=lambda line: None)
    sheets = []
    monkeypatch.setattr(clusters, "save", lambda fig, path, dpi: (sheets.append(fig), save(fig, path, dpi=dpi))[1])
    found, (png, path) = report_clusters(tmp_path / "run", tiles=2, say=lambda line: None)
    assert png.read_bytes().startswith(b"\x89PNG")
    content = json.loads(path.read_text())
    assert content["clusters"] == found
    assert len(found) == 3
    assert sum(c["tiles"] for c in found) == content["tiles"] == len(data.tiles["val"])
    assert [c["names"] for c in found] == [[f"tile {i}" for i in c["nearest"]] for c in found]
    assert len({name for c in found for name in c["names"]}) > 1
    # What is drawn, column by column: an image of each of the nearest tiles, above its labels.
    (fig,) = sheets
    tiles, axes = data.tiles["val"], np.reshape(fig.axes, (2 * len(found), 3))
    for i, cluster in enumerate(found):
        drawn = [[ax.images[0].get_array() if ax.images else None for ax in axes[2 * i + j, 1:]] for j in range(2)]
        for column in range(2):
            if column >= len(cluster["nearest"]):
                assert drawn[0][column] is drawn[1][column] is None
                continue
            tile = tiles[cluster["nearest"][column]]
            image = display(tile["sar"][-1], tile["sar_valid"][-1], toy.SPEC.modalities[0])
            np.testing.assert_array_equal(drawn[0][column], image)
            np.testing.assert_array_equal(drawn[1][column], paint(tile["label"], toy.SPEC))
    with pytest.raises(UserError, match="--tiles is 0"):
        report_clusters(tmp_path / "run", tiles=0)
    loop.train(toy.config(Supervised(), steps=1), tmp_path / "plain", dataset=data, say=lambda line: None)
    with pytest.raises(UserError, match=r"finds no clusters of scenes .*'supervised'"):
        report_clusters(tmp_path / "plain")
