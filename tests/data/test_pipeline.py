"""The global batch is the same, row for row, for any number of processes and from any step on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sarjax.data.pipeline import Batches, Order, evaluation_batches, labelled_split
from sarjax.errors import UserError
from sarjax.spec import Stream

TILES = [
    {"id": np.int32(100 + i), "label": np.full((2, 2), i % 3, np.uint8), "sar": np.full((1, 2, 2, 1), i, np.uint8)}
    for i in range(13)
]
TABLE = np.array([[(i + 1) % 13, (i + 2) % 13, -1] for i in range(13)])
STREAMS = {
    "labelled": Stream("labelled"),
    "unlabelled": Stream("unlabelled", 0.5),
    "partner": Stream("follow", 1.0, "labelled", "table"),
}


def make(process=0, processes=1, seed=3, tiles=TILES):
    return Batches(
        tiles,
        STREAMS,
        batch_size=8,
        seed=seed,
        labelled=0.6,
        process=process,
        processes=processes,
        tables={"table": TABLE},
    )


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_are_those_of_one_process(processes):
    whole = make()
    parts = [make(p, processes) for p in range(processes)]
    for step in (0, 1, 5, 17):
        for name in STREAMS:
            for key, rows in whole[step][name].items():
                np.testing.assert_array_equal(
                    rows, np.concatenate([p[step][name][key] for p in parts]), f"{name} {key}"
                )


class Watched(list):
    """Tiles that remember which of them were read."""

    def __getitem__(self, i):
        self.read.append(i)
        return super().__getitem__(i)

    def since(self):
        read, self.read = self.read, []
        return read

    read = ()


@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_reads_its_own_rows_only(processes):
    """Of a training batch, of all streams, and of an evaluation batch."""
    whole = make()
    for process in range(processes):
        tiles = Watched(TILES)
        tiles.since()
        mine = make(process, processes, tiles=tiles)
        assert tiles.since() == [], "none before the first batch"
        for step in (0, 3):
            mine[step]
            parts = (np.split(whole.indices(step, name), processes)[process] for name in STREAMS)
            assert tiles.since() == [int(i) for part in parts for i in part]
        batches = evaluation_batches(tiles, 4, process=process, processes=processes)
        for first, _ in zip(range(0, 12, 4), batches, strict=False):
            rows = 4 // processes
            assert tiles.since() == list(range(first + process * rows, first + (process + 1) * rows))


@pytest.mark.parametrize("start", [0, 1, 7])
def test_resumes_at_any_step(start):
    for step, batch in zip(range(start, 9), make().iterate(start, 9), strict=True):
        for name, rows in make()[step].items():
            for key, expected in rows.items():
                np.testing.assert_array_equal(batch[name][key], expected)


def test_row_r_of_step_s_is_the_order():
    batches, (pool, _) = make(), labelled_split(13, 0.6, 0)
    order = Order(pool, 3, "labelled")
    for step in (0, 4):
        np.testing.assert_array_equal(batches.indices(step, "labelled"), order[step * 8 + np.arange(8)])


@given(st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_pass_holds_every_tile_once(size, seed):
    order = Order(np.arange(size) * 7, seed, "x")
    for epoch in (0, 1, 3):
        np.testing.assert_array_equal(np.sort(order[epoch * size + np.arange(size)]), np.arange(size) * 7)


def test_seeds_and_passes_differ():
    a, b = Order(np.arange(50), 0, "x"), Order(np.arange(50), 1, "x")
    assert (a[np.arange(50)] != b[np.arange(50)]).any()
    assert (a[np.arange(50)] != a[50 + np.arange(50)]).any()


def test_unlabelled_rows_hide_their_truth():
    with_labels, without = labelled_split(13, 0.6, 0)
    batch = make()[2]
    hidden = batch["unlabelled"]
    assert (hidden["label"] == 255).all()
    np.testing.assert_array_equal(hidden["hidden_label"][:, 0, 0], (hidden["id"] - 100) % 3)
    assert set(hidden["id"] - 100) <= set(without)
    assert set(batch["labelled"]["id"] - 100) <= set(with_labels)
    assert "hidden_label" not in batch["labelled"]


def test_partners_come_from_the_table():
    batches, own = make(), 0
    for step in range(20):
        leader, partner = batches.indices(step, "labelled"), batches.indices(step, "partner")
        assert all(p in (i, (i + 1) % 13, (i + 2) % 13) for i, p in zip(leader, partner, strict=True))
        own += (leader == partner).sum()
    assert 20 < own < 90, "uniform over the tile itself and its two neighbours: about a third of 160"


@given(st.integers(1, 60), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=50, deadline=None)
def test_labelled_lists_are_nested(tiles, a, b):
    small, large = sorted((a, b))
    (few, rest), (many, _) = labelled_split(tiles, small, 1), labelled_split(tiles, large, 1)
    assert set(few) <= set(many)
    assert sorted([*few, *rest]) == list(range(tiles))
    assert len(few) >= 1


@pytest.mark.parametrize("processes", [1, 2])
def test_the_last_evaluation_batch_is_padded(processes):
    parts = [list(evaluation_batches(TILES, 4, process=p, processes=processes)) for p in range(processes)]
    batches = [{k: np.concatenate([p[i][k] for p in parts]) for k in parts[0][i]} for i in range(len(parts[0]))]
    assert [len(b["id"]) for b in batches] == [4, 4, 4, 4]
    np.testing.assert_array_equal(batches[-1]["row_valid"], [1, 0, 0, 0])
    assert (batches[-1]["label"][1:] == 255).all()
    ids = np.concatenate([b["id"][b["row_valid"] > 0] for b in batches])
    np.testing.assert_array_equal(ids, 100 + np.arange(13))


def test_reading_ahead_hands_errors_on():
    class Broken(list):
        def __getitem__(self, i):
            raise OSError("disk")

    batches = Batches(Broken(TILES), {"labelled": Stream("labelled")}, batch_size=2, seed=0)
    with pytest.raises(Exception, match="disk"):
        next(batches.iterate(0, 3))


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="3 processes cannot share"):
        Batches(TILES, {"labelled": Stream("labelled")}, batch_size=8, seed=0, processes=3)
    with pytest.raises(UserError, match="leaves none of 13"):
        Batches(TILES, {"u": Stream("unlabelled")}, batch_size=8, seed=0)
    with pytest.raises(UserError, match=r"labelled is 0"):
        Batches(TILES, {"labelled": Stream("labelled")}, batch_size=8, seed=0, labelled=0.0)
