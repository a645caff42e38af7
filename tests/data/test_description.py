"""Descriptions in TOML: what they come to, and one sentence for everything that is not accepted."""

import re
import tomllib
from pathlib import Path

import pytest
from sarjax_datasets.paired_folder import description
from sarjax_datasets.paired_folder.presets import PRESETS

from sarjax.data.build import builders
from sarjax.errors import UserError
from sarjax.spec import Transform

README = Path(description.__file__).with_name("README.md").read_text(encoding="utf-8")
SMALL = """
name = "x"
[sar]
radiometry = "db"
[[class]]
name = "a"
value = 0
[[class]]
name = "b"
value = 1
"""


def parse(text, source=Path("nowhere")):
    content = tomllib.loads(text)
    return description.parse(content, "x.toml", source, "split" in content)


def test_little_has_to_be_said():
    d = parse(SMALL)
    (sar,) = d.modalities
    assert (d.name, d.tile, d.cover, d.label_folder, d.label_suffix) == ("x", 256, False, "label", "")
    assert sar == ("sar", ("sar",), ("",), None, ("db",), None, None, 1, ())
    assert d.labels == {0: 0, 1: 1}
    assert len({c.colour for c in d.classes}) == 2
    assert d.split_files == {s: f"split/{s}.txt" for s in ("train", "val", "test")}


def test_the_reference_is_a_description():
    d = parse(re.search(r"## dataset.toml\n```toml\n(.*?)```", README, re.S)[1])
    sar, optical = d.modalities
    assert d.labels == {255: 255, 1: 0, 0: 1, 2: 1, 3: 1}
    assert d.excluded == ("other",)
    assert sar.transforms == (Transform("lee", "amplitude", 7, 4.0), Transform("db", "amplitude"))
    assert (sar.no_data, sar.smallest_gap) == (0, 64)
    assert optical.bands == ("red", "green", "blue")
    assert d.split_files == {"train": "lists/train.txt", "test": "lists/test.txt"}


def test_every_example_says_a_name_and_known_keys():
    examples = re.findall(r"```toml\n(.*?)```", README, re.S)
    assert len(examples) == 3
    for text in examples:
        whole = text if "[[class]]" in text else text + SMALL[SMALL.index("[[class]]") :]
        assert parse(whole).name


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets(name):
    d = parse(PRESETS[name])
    assert d.name == name
    assert sorted(d.labels) == list(range(len(d.classes)))
    assert f"| `{name}`" in README
    listed = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
    assert ", ".join(c.name for c in d.classes) in listed


def test_own_keys_replace_those_of_a_preset():
    preset = {"name": "p", "sar": {"folder": "f", "radiometry": "db"}, "class": [1, 2]}
    own = {"sar": {"radiometry": "amplitude"}, "class": [3], "tile": 64}
    assert description.merged(preset, own) == {
        "name": "p",
        "sar": {"folder": "f", "radiometry": "amplitude"},
        "class": [3],
        "tile": 64,
    }


def test_several_dates():
    d = parse(SMALL.replace("[sar]", '[sar]\nfolder = ["a", "b"]\nsuffix = "_x"'))
    assert d.modalities[0].folders == ("a", "b")
    assert d.modalities[0].suffixes == ("_x", "_x")


def test_sensors_that_are_not_mentioned_are_those_that_are_there(tmp_path):
    text = SMALL.replace('[sar]\nradiometry = "db"\n', "")
    with pytest.raises(UserError, match=r"x.toml describes no images: a table \[sar\], \[optical\] or both is needed"):
        parse(text, tmp_path)
    (tmp_path / "optical").mkdir()
    assert [m.name for m in parse(text, tmp_path).modalities] == ["optical"]
    (tmp_path / "sar").mkdir()
    with pytest.raises(UserError, match=r"\[sar\] of x.toml has no radiometry: one of reflectance, amplitude,"):
        parse(text, tmp_path)


TOP, SAR = 'name = "x"', 'radiometry = "db"'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (TOP, "", "x.toml has no name: a name of letters, digits, _ and - is needed"),
        (TOP, 'name = "a b"', "name in x.toml is 'a b': a name of letters"),
        (TOP, 'name = "../b"', r"name in x.toml is '\.\./b': a name of letters"),
        (TOP, 'name = "1.0.0"', "name in x.toml is '1.0.0'"),
        (TOP, f"{TOP}\ntyle = 3", "unknown key in x.toml 'tyle': did you mean 'tile'"),
        (TOP, f"{TOP}\ntile = 0", "tile in x.toml is 0: a whole number from 8 to 8192"),
        (TOP, f"{TOP}\ntile = true", "tile in x.toml is True: a whole number"),
        (TOP, f"{TOP}\ntile = 2.5", "tile in x.toml is 2.5: a whole number"),
        (TOP, f"{TOP}\ncover = 1", "cover in x.toml is 1: true or false"),
        (TOP, f"{TOP}\nignore = 3", "ignore in x.toml is 3: a list of whole numbers"),
        (TOP, f"{TOP}\nignore = [1]", "x.toml has the value 1 in ignore and in class 'b': choose one"),
        (TOP, f'{TOP}\nexcluded = ["c"]', "unknown class in excluded of x.toml 'c'"),
        (TOP, f"{TOP}\nlabel = 3", "label in x.toml is 3: a table"),
        (TOP, f"{TOP}\nsar = 3", None),
        (SAR, 'radiometry = "dB"', "radiometry in .sar. of x.toml is 'dB': one of reflectance, "),
        (SAR, 'radiometry = ["db", "db"]\nbands = ["a"]', r"\[sar\] of x.toml has 2 radiometries for 1 bands"),
        (SAR, f"{SAR}\nfoldr = 'a'", r"unknown key in \[sar\] of x.toml 'foldr': did you mean 'folder'"),
        (SAR, f"{SAR}\nfolder = []", r"folder in \[sar\] of x.toml is \[\]: a folder's name, or a list"),
        (SAR, f"{SAR}\nfolder = ''", r"folder in \[sar\] of x.toml is '': a folder's name"),
        (SAR, f"{SAR}\nfolder = ['a','b']\nsuffix = ['', '', '']", r"\[sar\] of x.toml has 3 suffixes for 2 folders"),
        (SAR, f"{SAR}\nfolder = ['a','b']\n[optical]", "folders of 2 of sar and 1 of optical: every sensor needs one"),
        (SAR, f"{SAR}\nbands = ['a', 'a']", r"bands in \[sar\] of x.toml are a, a: each needs a name of its own"),
        (SAR, f"{SAR}\ndtype = 'float64'", r"dtype in \[sar\] of x.toml is 'float64': one of uint8, uint16, float32"),
        (SAR, f"{SAR}\nno_data = nan", r"no_data in \[sar\] of x.toml is nan: a number"),
        (SAR, f"{SAR}\nno_data = true", r"no_data in \[sar\] of x.toml is True: a number"),
        (SAR, f"{SAR}\nsmallest_gap = 9", r"\[sar\] of x.toml has a smallest_gap but no no_data"),
        (SAR, f"{SAR}\nno_data = 0\nsmallest_gap = 0", "smallest_gap .* is 0: a whole number from 1 to 4096"),
        (
            SAR,
            f"{SAR}\ntransforms = [{{name = 'log'}}]",
            r"name in transform of .* number 1 .* is 'log': one of",
        ),
        (SAR, f"{SAR}\ntransforms = [{{name = 'db'}}]", "has no quantity: one of intensity, amplitude is needed"),
        (
            SAR,
            f"{SAR}\ntransforms = [{{name = 'lee', quantity = 'amplitude'}}]",
            r"radiometry in \[sar\] of x.toml is db, but its transforms give amplitude: say that",
        ),
        (
            SAR,
            f"{SAR}\ntransforms = [{{name='db', quantity='amplitude'}}, {{name='lee', quantity='amplitude'}}]",
            "go on after db: it is the last one",
        ),
        (
            SAR,
            f"{SAR}\ntransforms = [{{name='lee', quantity='amplitude', window=4}}]",
            "window in transform of .* is 4: an odd number from 3 to 31",
        ),
        (
            SAR,
            f"{SAR}\ntransforms = [{{name='lee', quantity='amplitude', looks=0}}]",
            "looks in transform of .* is 0: a number above 0",
        ),
        (
            SAR,
            f"{SAR}\ntransforms = [{{name='db', quantity='intensity', window=3}}]",
            "unknown key in transform .*'window'",
        ),
        (
            SAR,
            f"{SAR}\ndtype = 'uint8'\ntransforms = [{{name = 'db', quantity = 'intensity'}}]",
            r"dtype in \[sar\] of x.toml is 'uint8': transforms give float32",
        ),
        ("value = 1", "value = 0", "x.toml has the value 0 in class 'a' and in class 'b'"),
        ("value = 1", "value = [1, 1]", "x.toml has the value 1 in class 'b' and in class 'b'"),
        ("value = 1", "value = []", r"value in \[\[class\]\] number 2 of x.toml is \[\]: a whole number or a list"),
        ("value = 1", "value = 1.5", "value in .* is 1.5: a whole number or a list of them"),
        ("value = 1", "", r"\[\[class\]\] number 2 of x.toml has no value: a whole number"),
        ('name = "b"', 'name = "a"', "x.toml has two classes called 'a'"),
        ("value = 1", "value = 1\ncolour = [1, 2]", r"colour in .* is \[1, 2\]: three whole numbers from 0 to 255"),
        ("value = 1", "value = 1\ncolour = [1, 2, 256]", "colour in .* three whole numbers from 0 to 255"),
        (
            "value = 1",
            "value = 1\ncolor = [1, 2, 3]",
            "unknown key in .*number 2 of x.toml 'color': did you",
        ),
        (
            'name = "x"',
            'name = "x"\nexcluded = ["b", "a"]',
            "excluded in x.toml names all classes: averages need at least one",
        ),
        ('[[class]]\nname = "b"\nvalue = 1', "", r"x.toml has 1 \[\[class\]\] tables: 2 to 255 are accepted"),
        (
            "value = 1",
            "value = 1\n[split]\ntrian = 'a'",
            r"key in \[split\] of x.toml 'trian': did you mean 'train'",
        ),
    ],
)
def test_what_is_not_accepted(tmp_path, old, new, message):
    assert old in SMALL
    text = SMALL.replace(old, new, 1)
    if message is None:
        (tmp_path / "d.toml").write_text(text)
        with pytest.raises(UserError, match=r"d.toml is no TOML: Cannot overwrite a value"):
            description.read(tmp_path / "d.toml")
        return
    with pytest.raises(UserError, match=message) as e:
        parse(text)
    assert len(str(e.value).splitlines()) == 1


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"gone.toml cannot be read \(No such file"):
        description.read(tmp_path / "gone.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bytes.toml is no TOML"):
        description.read(tmp_path / "bytes.toml")


def test_it_is_among_the_builders():
    assert "paired_folder" in builders()
