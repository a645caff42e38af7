"""The tables of the papers, row by row, with the figures that they print; and how a row is put on other data.

`sarjax reproduce PAPER` runs them. A new row is one `Row` here; a new paper is a tuple of `Table` and a line in
`TABLES`.
"""

import dataclasses
from collections.abc import Callable, Mapping

from sarjax.config import Config, Experiment, Inputs
from sarjax.errors import UserError, unknown
from sarjax.options import Change
from sarjax.recipes import cpu, ombria, synthetic


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    name: by which it is chosen, and its runs are called; a row of several tables has one name, recipe and teacher.
    paper: {metric: printed figure}; empty where the source prints none. teacher: the row whose run teaches this one
    ("" = none); it is run first. test: looked at on the test split, when that is asked for. draws: every seed has
    labelled tiles of its own.
    """

    name: str
    recipe: str
    paper: Mapping[str, float]
    teacher: str = ""
    test: bool = False
    draws: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a paper.

    baseline: the row that the others are compared with. metrics: those shown, by the names of `Evaluation.scalars`.
    source: where it is printed ("" = nowhere). data: what its figures were measured on, or are to be. note: what a
    reader of it should know. of_change: metrics that are shown of the class of changed pixels, before the others.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    baseline: str
    metrics: tuple[str, ...]
    source: str
    data: str = "whu_opt_sar"
    note: str = ""
    of_change: tuple[str, ...] = ()


SCALARS = ("pixel_accuracy", "kappa", "macro_f1", "miou", "map")
MACRO = ("pixel_accuracy", "macro_precision", "macro_recall", "macro_f1")
CHENG = (
    "Cheng et al., A Semantic Segmentation Method for SAR Image with Assistance of Self-Supervised Scene Classification"
)


def _figures(*values: float) -> dict[str, float]:
    return dict(zip(MACRO, values, strict=True))


TABLES: dict[str, tuple[Table, ...]] = {
    "cheng": (
        Table(
            name="table1",
            title="comparison with other networks",
            rows=(
                Row("fcn_se", "cheng_fcn_se", _figures(0.7223, 0.5579, 0.5955, 0.5631)),
                Row("deeplabv3", "cheng_deeplabv3", _figures(0.7473, 0.5823, 0.6153, 0.5880)),
                Row("pspnet", "cheng_pspnet", _figures(0.7518, 0.5810, 0.6439, 0.5955)),
                Row("lanet", "cheng_lanet", _figures(0.7347, 0.5861, 0.6373, 0.6034), test=True),
                Row("both", "cheng_both", _figures(0.7714, 0.6162, 0.6714, 0.6527), test=True),
            ),
            baseline="lanet",
            metrics=(*MACRO, "miou"),
            source=f"{CHENG}, Table 1",
            note="The F1 of .6527 that is printed for `both` cannot follow from the precision and recall beside it, "
            "which allow .6426 at most; Table 3 prints .6257 for the same row.",
        ),
        Table(
            name="table3",
            title="auxiliary tasks",
            rows=(
                Row("lanet", "cheng_lanet", _figures(0.7347, 0.5861, 0.6373, 0.6034), test=True),
                Row("instance", "cheng_instance", _figures(0.7702, 0.6137, 0.6523, 0.6212)),
                Row("cluster", "cheng_cluster", _figures(0.7621, 0.5922, 0.6431, 0.6085)),
                Row("both", "cheng_both", _figures(0.7714, 0.6162, 0.6714, 0.6257), test=True),
            ),
            baseline="lanet",
            metrics=(*MACRO, "miou"),
            source=f"{CHENG}, Table 3",
        ),
        Table(
            name="open",
            title="what the paper leaves open",
            rows=(
                Row("lanet", "cheng_lanet", {}),
                Row("both", "cheng_both", {}),
                Row("both_augmentation", "cheng_both_augmentation", {}),
                Row("both_bank", "cheng_both_bank", {}),
                Row("both_tenth", "cheng_both_tenth", {}),
            ),
            baseline="lanet",
            metrics=(*MACRO, "miou"),
            source="",
            note="_augmentation: another view of the same tile is the partner; _bank: a neighbour's stored feature is; "
            "_tenth: a tenth of both weights.",
        ),
    ),
}

TABLES["dhfa"] = (
    Table(
        name="all",
        title="all labels",
        rows=(
            Row("teacher", "dhfa_teacher", {}, test=True),
            Row("teacher_both", "dhfa_teacher_both", {}, test=True),
            Row("alone", "dhfa_alone", {}, test=True),
            Row("logits", "dhfa_logits", {}, teacher="teacher"),
            Row("direct", "dhfa_direct", {}, teacher="teacher"),
            Row("hallucinate", "dhfa_hallucinate", {}, teacher="teacher"),
            Row("fuse", "dhfa_fuse", {}, teacher="teacher"),
            Row("head", "dhfa_head", {}, teacher="teacher"),
            Row("student", "dhfa_student", {}, teacher="teacher", test=True),
            Row("student_of_both", "dhfa_student", {}, teacher="teacher_both", test=True),
        ),
        baseline="alone",
        metrics=SCALARS,
        source="",
        note="teacher: optical images; teacher_both: optical and SAR; all others: SAR alone. logits ... head: a part "
        "of the method each; student: all of them.",
    ),
    Table(
        name="few",
        title="few labels, many pairs",
        rows=(
            Row("few_teacher", "dhfa_few_teacher", {}, test=True),
            Row("few_teacher_both", "dhfa_few_teacher_both", {}, test=True),
            Row("few_alone", "dhfa_few_alone", {}, test=True),
            Row("few_logits", "dhfa_few_logits", {}, teacher="few_teacher"),
            Row("few_student", "dhfa_few_student", {}, teacher="few_teacher"),
            Row("few_student_of_all", "dhfa_few_student", {}, teacher="teacher"),
            Row("few_hard", "dhfa_few_hard", {}, teacher="few_teacher", test=True),
            Row("few_hard_of_both", "dhfa_few_hard", {}, teacher="few_teacher_both", test=True),
            Row("few_hard_of_all", "dhfa_few_hard", {}, teacher="teacher", test=True),
            Row("few_hard_of_all_both", "dhfa_few_hard", {}, teacher="teacher_both", test=True),
        ),
        baseline="few_alone",
        metrics=SCALARS,
        source="",
        note="Labels on 1/8 of the tiles, the teacher's signal on all; as many steps, on as many labelled tiles a "
        "step, as with all labels. few_hard: supervised by the teacher's answers too. _of_both: the teacher "
        "saw optical and SAR images; _of_all: it saw all labels.",
    ),
    Table(
        name="alignment",
        title="feature alignment (HFAM)",
        rows=(
            Row("alone", "dhfa_alone", {}),
            Row("alone_plain", "dhfa_alone_plain", {}),
            Row("teacher", "dhfa_teacher", {}),
            Row("teacher_plain", "dhfa_teacher_plain", {}),
            Row("student", "dhfa_student", {}, teacher="teacher"),
            Row("student_plain", "dhfa_student_plain", {}, teacher="teacher_plain"),
        ),
        baseline="alone",
        metrics=SCALARS,
        source="",
        note="_plain: a feature pyramid that is not aligned.",
    ),
)

LEVELS = ("dllr_prediction", "dllr_prototype", "dllr_region", "dllr_levels")
WITHOUT = ("unmasked", "uncomplementary", "likeliest", "uncrossed", "inconsistent", "credulous", "hard")
TABLES["dllr"] = (
    Table(
        name="parts",
        title="few labels",
        rows=(
            Row("supervised", "dllr_supervised", {}, test=True, draws=True),
            Row("cps", "dllr_cps", {}, draws=True),
            *(Row(recipe.removeprefix("dllr_"), recipe, {}, draws=True) for recipe in LEVELS),
            Row("full", "dllr", {}, test=True, draws=True),
            Row("all_labels", "dllr_all_labels", {}, test=True),
        ),
        baseline="supervised",
        metrics=SCALARS,
        source="",
        note="The fused head. Every seed draws other labelled tiles, the same for all rows, and all rows take as many "
        "steps on as many labelled tiles. cps: cross pseudo-supervision; prediction, prototype, region: with labels "
        "reassigned by that level of transport; levels: by the first two; all_labels: supervised by all of them.",
    ),
    Table(
        name="without",
        title="the method without each part",
        rows=(
            Row("full", "dllr", {}, test=True, draws=True),
            *(Row(name, f"dllr_{name}", {}, draws=True) for name in WITHOUT),
        ),
        baseline="full",
        metrics=SCALARS,
        source="",
        note="unmasked: no masks; uncomplementary: no complementary learning; likeliest: no transport; uncrossed: no "
        "cross supervision; inconsistent: no supervision by the fused head; credulous: with pseudo-labels of any "
        "confidence, from a fifth of the training on; hard: classes get exactly the expected mass.",
    ),
)

TABLES["frd"] = (
    Table(
        name="students",
        title="a small change-detection network and its teacher",
        rows=(
            Row("teacher", "frd_teacher", {}, test=True),
            Row("alone", "frd_alone", {}, test=True),
            Row("logits", "frd_logits", {}, teacher="teacher"),
            Row("bfdd", "frd_bfdd", {}, teacher="teacher"),
            Row("ccrd", "frd_ccrd", {}, teacher="teacher"),
            Row("frd", "frd", {}, teacher="teacher"),
            Row("full", "frd_full", {}, teacher="teacher", test=True),
        ),
        baseline="alone",
        metrics=("pixel_accuracy", "kappa"),
        of_change=("f1", "iou", "precision", "recall", "ap", "tile_mean_iou"),
        source="",
        data="levir_cd",
        note="teacher: ResNet-50; the others ResNet-18 of a quarter of its width. logits: with logit distillation; "
        "bfdd, ccrd: with that part of the method; frd: with both; full: with all three.",
    ),
    Table(
        name="sizes",
        title="a student of twice the width, another teacher's network, and a classical one",
        rows=(
            Row("alone", "frd_alone", {}),
            Row("half_alone", "frd_half_alone", {}),
            Row("half_full", "frd_half_full", {}, teacher="teacher"),
            Row("teacher", "frd_teacher", {}),
            Row("teacher_r34", "frd_teacher_r34", {}),
            Row("fc_siam_diff", "frd_fc_siam_diff", {}),
        ),
        baseline="alone",
        metrics=("pixel_accuracy", "kappa"),
        of_change=("f1", "iou", "precision", "recall", "ap", "tile_mean_iou"),
        source="",
        data="levir_cd",
    ),
)


def _own(e: Experiment) -> Experiment:
    return e


def _bitemporal(config: str) -> Callable[[Experiment], Experiment]:
    """Another set of the family of LEVIR-CD, whose tiles are as large."""
    return lambda e: dataclasses.replace(e, data=dataclasses.replace(e.data, config=config))


def _ombria(e: Experiment) -> Experiment:
    """Two dates, SAR stretched image by image: what the network sees and how it is trained are those of `ombria_s1`.

    Networks that compare dates see SAR alone, each date by itself, and what came is told from what went: a flood has a
    before and an after.
    """
    if e.inputs.by_date:
        inputs = dataclasses.replace(ombria.S1, by_date=True, date_difference=False)
        if isinstance(e.network, Change):
            e = dataclasses.replace(e, network=dataclasses.replace(e.network, difference="signed"))
    else:
        inputs = dataclasses.replace(
            ombria.S1 if "sar" in e.inputs.modalities else Inputs(), modalities=e.inputs.modalities
        )
    data = dataclasses.replace(e.data, name="ombria", config="")
    return dataclasses.replace(_trained_like(e, ombria.ombria_s1().experiment), data=data, inputs=inputs)


def _synthetic(e: Experiment) -> Experiment:
    """Made-up scenes in WHU-OPT-SAR's layout: trained like `synthetic_sar`.

    Networks that compare dates see the SAR images of two dates.
    """
    like = synthetic.synthetic_sar().experiment
    if e.inputs.by_date:
        data = dataclasses.replace(e.data, name="bitemporal", config="synthetic")
        e = dataclasses.replace(e, data=data, inputs=dataclasses.replace(like.inputs, by_date=True))
    return _trained_like(e, like)


def _trained_like(e: Experiment, like: Experiment) -> Experiment:
    """As many steps, too: where a share of the tiles is labelled, an epoch is that much shorter."""
    same = {name: getattr(like, name) for name in ("augment", "optimizer", "batch_size")}
    return dataclasses.replace(e, steps=0, epochs=like.epochs / e.data.labelled, **same)


def _cpu(config: Config) -> Config:
    """The preset `cpu` of recipes (a quarter of the width, a third of the epochs) on crops of 128 pixels."""
    config = cpu(config)
    augment = dataclasses.replace(config.experiment.augment, crop=128)
    return dataclasses.replace(config, experiment=dataclasses.replace(config.experiment, augment=augment))


CHANGE_SETS = ("levir_cd", "whu_cd", "clcd", "s2looking", "dsifn", "sysu_cd")
DATA: dict[str, Callable[[Experiment], Experiment]] = {
    "whu_opt_sar": _own,
    **{name: _bitemporal(name) for name in CHANGE_SETS},
    "ombria": _ombria,
    "synthetic": _synthetic,
}
PRESETS: dict[str, Callable[[Config], Config]] = {"cpu": _cpu}
# Metrics that every table shows on that data, after its own.
METRICS: dict[str, tuple[str, ...]] = {"ombria": ("iou/flood", "tile_mean_iou/flood", "ap/flood")}
ABOUT: dict[str, str] = {
    "whu_opt_sar": "WHU-OPT-SAR, the papers' own data; the split by scene is ours",
    **{name: f"{name}: changed buildings or land, two dates" for name in CHANGE_SETS},
    "ombria": "OMBRIA: floods, two dates, two classes",
    "synthetic": "made-up scenes",
}


def check_names(data: str, preset: str) -> None:
    """UserError, with the nearest, for data and presets that are not there."""
    if data not in DATA:
        raise unknown("data", data, DATA)
    if preset and preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)


def home(config: Config) -> str:
    """What of `DATA` a recipe is of: WHU-OPT-SAR's are of that, those of change of LEVIR-CD."""
    data = config.experiment.data
    return data.config if data.name == "bitemporal" and data.config in CHANGE_SETS else data.name


def reached(config: Config) -> tuple[str, ...]:
    """The data that a recipe can be put on, its own first.

    From WHU-OPT-SAR, and from a set of change, OMBRIA and made-up scenes; from a set of change every other one.
    """
    own = home(config)
    family = (own, *(name for name in CHANGE_SETS if name != own)) if own in CHANGE_SETS else (own,)
    return (*family, "ombria", "synthetic") if own in ("whu_opt_sar", *CHANGE_SETS) else family


def on(config: Config, data: str, preset: str = "") -> Config:
    """The configuration of a row on `data`, by `preset` ("" = none); network and method options stay the row's own.

    UserError for an unknown name, and for data that is not `reached`.
    """
    check_names(data, preset)
    if data not in reached(config):
        raise UserError(
            f"recipe {config.recipe!r} is of {home(config)}, and cannot be put on {data}: "
            f"{', '.join(reached(config))} would be accepted."
        )
    name = "+".join(part for part in (config.recipe, data, preset) if part)
    config = dataclasses.replace(config, recipe=name, experiment=DATA[data](config.experiment))
    return PRESETS[preset](config) if preset else config


def shown(table: Table, data: str) -> tuple[str, ...]:
    """The metrics that `table` shows on `data`."""
    changed = "flood" if data == "ombria" else "changed"
    ours = (*(f"{metric}/{changed}" for metric in table.of_change), *table.metrics)
    return tuple(dict.fromkeys((*ours, *METRICS.get(data, ()))))


def all_rows(tables: tuple[Table, ...]) -> dict[str, Row]:
    """Every row of the tables once, by name, a teacher before those that it teaches.

    ValueError where two tables mean different runs by one name, or where a teacher or a baseline is no row.
    """
    found: dict[str, Row] = {}
    for table in tables:
        for row in table.rows:
            known = found.setdefault(row.name, row)
            if (known.recipe, known.teacher, known.draws) != (row.recipe, row.teacher, row.draws):
                raise ValueError(f"row {row.name!r} is {known.recipe} and {row.recipe}")
            found[row.name] = dataclasses.replace(known, test=known.test or row.test)
        if table.baseline not in [row.name for row in table.rows]:
            raise ValueError(f"the baseline {table.baseline!r} of {table.name} is none of its rows")
    ordered: dict[str, Row] = {}

    def add(name: str, taught: tuple[str, ...] = ()) -> None:
        if name not in found or name in taught:
            raise ValueError(f"the teacher {name!r} is no row, or its own teacher")
        if found[name].teacher:
            add(found[name].teacher, (*taught, name))
        ordered.setdefault(name, found[name])

    for name in found:
        add(name)
    return ordered
