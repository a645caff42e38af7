"""Collectives read from programs: the forms in which groups are written, loops, starts, and a program compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sarjax.train.collectives import collectives, ring, totals

HEAD = "HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=8\n"
MESH = {"data": 4, "fsdp": 2}


def read(line, head=HEAD):
    return collectives(f"{head}\nENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}\n")


@pytest.mark.parametrize(
    ("groups", "first", "axes"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6), ("data",)),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", (0, 1), ("fsdp",)),
        ("replica_groups={}", tuple(range(8)), ("data", "fsdp")),
        ("replica_groups=[4,2]<=[8]", (0, 1), ("fsdp",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6), ("data",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", (0, 1), ("fsdp",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", tuple(range(8)), ("data", "fsdp")),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6), ("data",)),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", (0, 2, 4, 6), ("data",)),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", (0, 1), ("fsdp",)),
    ],
)
def test_groups(groups, first, axes):
    (one,) = read(f"%g = f32[3,16]{{1,0}} all-gather(%p), channel_id=1, {groups}, dimensions={{1}}")
    assert (one.groups[0], one.devices, one.axes(MESH)) == (first, len(first), axes)
    assert sorted(sum(one.groups, ())) == list(range(8))
    assert (one.kind, one.dtype, one.shape, one.size) == ("all-gather", "f32", (3, 16), 192)


def test_groups_that_are_not_known_are_not_guessed():
    with pytest.raises(ValueError, match="not known"):
        read("%g = f32[8]{0} all-reduce(%p), replica_groups=somehow, to_apply=%add")


def test_arrays():
    """Of several in one collective, of one that is split in two, and of none in a line that merely uses one."""
    found = read("%r = (bf16[4,2]{1,0}, /*index=1*/s32[]) all-reduce(%a, %b), replica_groups={}, to_apply=%add")
    assert [(one.dtype, one.shape, one.size) for one in found] == [("bf16", (4, 2), 16), ("s32", (), 4)]
    start = "%s = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}"
    assert [one.shape for one in read(start)] == [(8,)]
    assert read("%d = f32[8]{0} all-gather-done(%s)") == read("%x = f32[8]{0} add(%all-reduce.1, %p)") == []
    sent = read("%c = u8[8]{0} collective-permute(%p), channel_id=1, source_target_pairs={{0,1},{1,2}}")
    assert [(one.size, one.groups, one.axes(MESH)) for one in sent] == [(8, ((0, 1), (1, 2)), ("data", "fsdp"))]


def test_loops_are_counted():
    program = (
        HEAD + "%body (p: f32[8]) -> f32[8] {\n"
        "  %r = f32[8]{0} all-reduce(%p), replica_groups={}, to_apply=%add\n}\n"
        "ENTRY %main (p: f32[8]) -> f32[8] {\n"
        "  %w = f32[8]{0} while(%p), condition=%cond, body=%body, "
        'backend_config={"known_trip_count":{"n":"5"}}\n}\n'
    )
    assert [one.times for one in collectives(program)] == [5]
    assert totals(collectives(program)) == {"all-reduce": {"count": 5, "bytes": 160, "sent": 280.0}}


def test_what_a_ring_sends():
    kinds = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
    assert [ring(kind, 80, 4) for kind in kinds] == [60, 120, 60, 240, 80]
    assert ring("all-reduce", 80, 1) == 0


def test_a_program_compiled_here():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    at = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: E731

    def f(x, w):
        def body(c, _):
            return c + jax.lax.with_sharding_constraint(x @ w, at("data")).sum(), None

        return jax.lax.scan(body, jnp.zeros(()), None, length=3)[0]

    args = (np.ones((8, 16), np.float32), np.ones((16, 32), np.float32))
    jitted = jax.jit(f, in_shardings=(at("data"), at(None, "fsdp")), out_shardings=at())
    sums = totals(collectives(jitted.lower(*args).compile().as_text()))
    assert set(sums) <= {"all-gather", "all-reduce"}
    assert "all-reduce" in sums
