"""How fast maps are made, and in how much memory: `python tests/benchmarks/predict.py [HEIGHTxWIDTH[:striped] ...]`.

Scenes are tiled and deflated, or striped and LZW: a window then decodes whole lines of the scene. Each scene is mapped
by a process of its own, so that its peak is its own. One JSON line: per size seconds without compilation, megapixels
per second, and the peak resident memory in MB, of the whole process and of what mapping adds to the loaded and compiled
network. With `--space N` scenes are mapped at once over N devices, and the compiler's bytes per device are there too;
with `--figures` nothing is run.
"""

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = ["1024x1024", "2048x2048", "4096x4096", "4096x4096:striped", "2048x16384", "2048x16384:striped"]
BANDS, CLASSES = 2, 8


def make_scene(path, size):
    """uint8 speckle, a tenth of it without data; written by blocks, or in strips, which are made in memory."""
    import numpy as np

    from sarjax import raster

    (height, width), striped = parsed(size)
    rng = np.random.default_rng(0)
    scene = np.empty((height, width, BANDS), np.uint8) if striped else None
    with contextlib.nullcontext() if striped else raster.create(path, height, width, BANDS, "uint8", no_data=0) as f:
        for y in range(0, height, 256):
            for x in range(0, width, 256):
                h, w = min(256, height - y), min(256, width - x)
                block = rng.integers(1, 256, (h, w, BANDS), np.uint8) * (rng.random() > 0.1)
                if striped:
                    scene[y : y + h, x : x + w] = block
                else:
                    f.write((y, x, h, w), block)
    if striped:
        raster.write(path, scene, nodata=0)


def parsed(size):
    """((height, width), whether it is striped) of "HxW" or "HxW:striped"."""
    sides, _, layout = size.partition(":")
    if layout not in ("", "striped"):
        raise SystemExit(f"size {size!r} is not understood: HEIGHTxWIDTH or HEIGHTxWIDTH:striped is.")
    height, width = map(int, sides.split("x"))
    return (height, width), layout == "striped"


def network_of(options):
    """(what it reads of scenes, its field of view, (params, stats), (params, stats, batch) -> logits) of a LANet."""
    import jax

    from sarjax.augment.inputs import network_inputs
    from sarjax.config import Inputs
    from sarjax.models import build_network
    from sarjax.options import LANet
    from sarjax.scenes.inputs import Reads
    from sarjax.spec import BandSpec, BandStatistics, ClassSpec, DatasetSpec, ModalitySpec, Statistics

    bands = tuple(BandSpec(name, "amplitude") for name in ("VV", "VH"))
    classes = tuple(ClassSpec(str(i), (30 * i, 0, 0)) for i in range(CLASSES))
    spec = DatasetSpec("benchmark", (ModalitySpec("sar", bands),), classes)
    statistics = Statistics({"sar": BandStatistics((128.0,) * 2, (74.0,) * 2, (0.0,) * 2, (255.0,) * 2, 1)}, (), {}, {})
    inputs = Inputs(normalisation="tile" if options.by_scene else "dataset")
    network = build_network(LANet(width=options.width), CLASSES)
    variables = jax.jit(lambda key: network.init(key, jax.numpy.zeros((1, 64, 64, BANDS)), False))(jax.random.key(0))

    def predict(params, stats, batch):
        x = network_inputs(batch, inputs, spec, statistics)
        return network.apply({"params": params, "batch_stats": stats}, x, train=False).logits

    return Reads(spec, ("sar",), (0,)), network.context, (variables["params"], variables["batch_stats"]), predict


def by_windows(options, height, width):
    """(what is known before, a function that maps a scene) with the program compiled."""
    import jax
    import numpy as np

    from sarjax.scenes.predict import Engine, map_scene
    from sarjax.scenes.windows import choose, cut

    reads, context, variables, predict = network_of(options)
    step = jax.jit(lambda params, stats, batch: jax.nn.softmax(predict(params, stats, batch), -1))
    windows = choose(context, 256, options.window)
    engine = Engine(
        lambda batch: step(*variables, batch), reads, context, windows, options.batch, by_scene=options.by_scene
    )
    h, w = (cut(n, engine.windows, context.alignment).length for n in (height, width))
    batch = {
        "sar": np.zeros((engine.rows, 1, h, w, BANDS), np.uint8),
        "sar_valid": np.zeros((engine.rows, 1, h, w), np.uint8),
    }
    if engine.by_scene:
        batch |= {f"sar_{name}": np.ones((engine.rows, 1, BANDS), np.float32) for name in ("mean", "std")}
    np.asarray(engine.apply(batch))
    return {"window": windows.side, "overlap": windows.overlap}, lambda *paths: map_scene(engine, *paths)


def at_once(options, height, width):
    """The same for a scene in strips over devices."""
    import jax

    from sarjax.config import Mesh
    from sarjax.scenes.whole import Whole, footprint, map_whole
    from sarjax.train.mesh import make_mesh

    jax.config.update("jax_num_cpu_devices", options.space)
    reads, context, variables, predict = network_of(options)
    mesh = make_mesh(Mesh(1, 1, options.space), jax.devices()[: options.space])
    variables = jax.device_put(variables, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    whole = Whole(predict, variables, reads, context, mesh, by_scene=options.by_scene, window=1216)
    layout, start = whole.lay(height, width), time.perf_counter()
    program = whole.program(layout, True)
    about = {
        "strips": options.space,
        "compiler_mb_per_device": round(footprint(program, whole, layout).total / 1e6),
        "compilation_seconds": round(time.perf_counter() - start, 1),
    }
    return about, lambda *paths: map_whole(whole, *paths)


def one(options):
    """Maps one scene, and prints what it took."""
    from sarjax.scenes.inputs import Scene

    (height, width), striped = parsed(options.sizes[0])
    about, work = (at_once if options.space else by_windows)(options, height, width)
    about = {"size": f"{height}x{width}", "layout": "striped, LZW" if striped else "tiled, deflate", **about}
    if not options.figures:
        before, start = peak(), time.perf_counter()
        out = options.folder
        work(Scene("scene", {"sar": (out / "scene.tif",)}), out / "map.tif", out / "probabilities.tif")
        seconds = time.perf_counter() - start
        about |= {
            "seconds": round(seconds, 2),
            "megapixels_per_second": round(height * width / 1e6 / seconds, 3),
            "peak_mb": round(peak()),
            "added_mb": round(peak() - before),
        }
    print(json.dumps(about))


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", default=SIZES)
    parser.add_argument("--width", type=float, default=0.25, help="of the network")
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--space", type=int, default=0, help="map scenes at once over so many devices")
    parser.add_argument("--figures", action="store_true", help="with --space: only compile, and print what it says")
    parser.add_argument("--by-scene", action="store_true", help="normalise by the scene's own statistics")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        return one(options)
    found = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
            command = [c for c in command if c not in options.sizes] + [size]
            make = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path\n"
            make += f"import predict; predict.make_scene(Path({folder!r}) / 'scene.tif', {size!r})"
            if not options.figures:
                subprocess.run([sys.executable, "-c", make], check=True)
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps({"benchmark": "predict", "network_width": options.width, "scenes": found}))


if __name__ == "__main__":
    main()
