"""`sarjax bench scene`: maps of whole scenes, ours and a PyTorch script's."""

from tyro.conf import FlagCreatePairsOff, Positional

from sarjax.cli import common
from sarjax.cli.common import note


def scene(
    sizes: Positional[tuple[str, ...]] = ("3704x5556",),
    width: float = 1.0,
    classes: int = 8,
    window: int = 0,
    batch: int = 0,
    devices: int = 0,
    space: tuple[int, ...] = (),
    torch: FlagCreatePairsOff[bool] = True,
    compile: FlagCreatePairsOff[bool] = True,
    probabilities: FlagCreatePairsOff[bool] = False,
    by_scene: FlagCreatePairsOff[bool] = False,
    figures: FlagCreatePairsOff[bool] = False,
    repetitions: int = 5,
    json: FlagCreatePairsOff[bool] = False,
) -> None:
    """Time maps of a made-up scene, from TIFF to GeoTIFF, by LANet-R18: windows, at once, and PyTorch's windows

    Each side is a process that stays alive; they take turns. Seconds of reading, preparing batches, computing, putting
    together and writing are there too, and for which share of the time the slowest of these was busy.

    Args:
        sizes: HEIGHTxWIDTH in pixels (tiled, deflate), or HEIGHTxWIDTH:striped (strips, LZW).
        width: of the network.
        classes: of the map.
        window: side of the windows in pixels (0 = by the network).
        batch: windows per device at a time, of PyTorch in all (0 = by the size of the window).
        devices: host devices that share the windows (0 = one per core).
        space: also the scene at once in so many strips, each on a host device; several numbers are accepted.
        torch: time PyTorch beside it; `--no-torch`: ours alone.
        compile: time torch.compile too, which compiles for a minute.
        probabilities: also write the probability of every class.
        by_scene: normalise by the scene's own statistics (without PyTorch).
        figures: run nothing, and print what the compiler says of scenes at once.
        repetitions: timed maps of each side.
        json: print one JSON line instead of a table.
    """
    import jax

    common.devices(1)
    jax.config.update("jax_platforms", "cpu")  # here nothing is computed: an accelerator is left to what measures
    from sarjax.bench.scene import PEERS, bench_scene
    from sarjax.cli.bench import show

    with common.stoppable("nothing was written"):
        found = bench_scene(
            sizes,
            width=width,
            classes=classes,
            window=window,
            batch=batch,
            devices=devices,
            space=space,
            peers=PEERS[: 1 + compile] if torch else (),
            probabilities=probabilities,
            by_scene=by_scene,
            figures=figures,
            repetitions=repetitions,
            say=note,
        )
    show(found, json)
