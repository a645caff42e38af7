"""The command line as tests call it."""

import pytest

from sarjax import cli

SHRINK = [
    *("--steps", "2", "--batch-size", "2", "--augment.crop", "64", "--network.width", "0.0625"),
    *("--mesh.data", "1", "--no-tensorboard"),
]


def run(*args):
    cli.main([str(a) for a in args])


def fails(capsys, *args):
    """The one line that a user reads."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run(*args)
    assert e.value.code == 2
    out, err = (text.strip() for text in capsys.readouterr())
    assert out == ""
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    return err
