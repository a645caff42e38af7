"""Tables of toy size, and what tests read of their runs."""

import dataclasses
import json
import re
from pathlib import Path

import toy

from sarjax.config import Config, Mesh
from sarjax.experiments import make_plan
from sarjax.options import FCN
from sarjax.recipes.tables import Row, Table

TWO = (
    Table(
        name="first",
        title="loss",
        rows=(
            Row("dice", "ombria_s1", {"macro_f1": 0.5, "miou": 0.4}, draws=True),
            Row("plain", "ombria_s1_plain", {"macro_f1": 0.25, "miou": 0.4}, test=True),
        ),
        baseline="plain",
        metrics=("pixel_accuracy", "macro_f1", "miou", "iou/water"),
        source="nowhere",
        data="elsewhere",
        note="A note.",
    ),
    Table("second", "the same row", (Row("plain", "ombria_s1_plain", {}),), "plain", ("miou",), "nowhere"),
)
TAUGHT = (
    Table(
        "taught",
        "a student before its teacher",
        (
            Row("student", "toy_student", {}, teacher="teacher"),
            Row("teacher", "toy_teacher", {}),
            Row("missing", "toy_to_come", {}),
            Row("orphan", "toy_student", {}, teacher="missing"),
        ),
        "teacher",
        ("miou",),
        "nowhere",
    ),
)


def shrunk(given: Config) -> Config:
    e = given.experiment
    e = dataclasses.replace(
        e,
        network=e.network if isinstance(e.network, toy.ToyNetwork) else FCN(width=0.0625, stages=1),
        augment=dataclasses.replace(e.augment, crop=64),
        batch_size=2,
        steps=2,
    )
    execution = dataclasses.replace(given.execution, mesh=Mesh(data=1), tensorboard=False, checkpoint_every=1)
    return dataclasses.replace(given, experiment=e, execution=execution)


def small(paper, workdir, data="ombria", **options):
    return dataclasses.replace(make_plan(paper, workdir, data=data, **options), adapt=shrunk)


def strict(path: Path):
    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def started(said):
    return [line.split("] ")[1] for line in said if re.match(r"\[\d+/\d+\] ", line)]
