"""The table of tile sizes answers for the nearest shape; what a kernel makes of it fits the shape and the memory."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas import tiles as table
from kernels_pallas.grouped_matmul import tpu, tpu_groups, tpu_rows
from kernels_pallas.tiles import tiles


@pytest.fixture
def three_rows(monkeypatch, tmp_path):
    """A table of two sizes on one chip, and one that is found by another name."""
    rows = [
        {"kernel": "matmul", "chip": "v5p", "shape": {"inner": 1000, "out": 1000}, "tiles": {"rows": 1}},
        {"kernel": "matmul", "chip": "v5p", "shape": {"inner": 8000, "out": 1000}, "tiles": {"rows": 2}},
        {"kernel": "matmul", "chip": "v5p", "shape": {"vocabulary": 5}, "tiles": {"rows": 3}},
    ]
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(table, "TABLE", path)
    table.table.cache_clear()
    yield
    table.table.cache_clear()


@pytest.mark.parametrize("inner, rows", [(1, 1), (2000, 1), (2828, 1), (2829, 2), (9000, 2)])
def test_the_nearest_shape_is_the_nearest_by_ratio(three_rows, inner, rows):
    assert tiles("matmul", "v5p", inner=inner, out=1000) == {"rows": rows}


def test_rows_of_other_kernels_chips_and_names_do_not_count(three_rows):
    assert tiles("matmul", "v5p", vocabulary=100000) == {"rows": 3}
    assert tiles("matmul", "v5p", inner=1000) == tiles("matmul", "v6e", inner=1, out=1) == tiles("flash", "v5p") == {}


def test_every_row_of_the_table_says_how_it_was_found_and_is_one_of_its_kind():
    rows = table.table()
    assert all(row.keys() == {"kernel", "chip", "shape", "tiles", "found_by"} for row in rows)
    kinds = [(row["kernel"], row["chip"], tuple(sorted(row["shape"].items()))) for row in rows]
    assert len(kinds) == len(set(kinds))


sizes = st.integers(1, 20000)


@given(
    rows=sizes, inner=sizes, width=sizes, chip=st.sampled_from(["v5e", "v5p", "v6e", "v7x"]), pairs=st.integers(1, 2)
)
def test_tiles_fit_any_shape(rows, inner, width, chip, pairs):
    shape = tpu_rows.RowsShape(rows, inner, width, 1, pairs, 1)
    found = tpu_rows.fit(
        tiles("grouped_swiglu", chip, inner=inner, out=width), shape, tpu.cores(chip), tpu.memory(chip)
    )
    inner = -(-inner // 128) * 128
    assert found.rows % found.granule == 0 and found.granule % found.edge == 0 and found.rows <= max(rows + 15, 16)
    assert found.columns % found.sub_columns == 0 and inner % found.chunk == 0
    assert tpu_rows.used_memory(found, shape) <= tpu.memory(chip)


@given(rows=sizes, inner=sizes, width=sizes, chip=st.sampled_from(["v5e", "v5p", "v6e", "v7x"]))
def test_tiles_of_the_weights_gradient_fit_any_shape(rows, inner, width, chip):
    shape = tpu_groups.GroupsShape(rows, inner, width)
    wanted = tiles("grouped_matmul_weights", chip, inner=inner, out=width)
    found = tpu_groups.fit(wanted, shape, tpu.cores(chip), tpu.memory(chip))
    assert found.rows % found.granule == 0 and found.rows <= max(rows + 15, 16)
    assert found.inner % found.sub_inner == 0 and found.columns % found.sub_columns == 0
    assert tpu_groups.used_memory(found, shape) <= tpu.memory(chip)


def test_a_contraction_too_long_for_the_vector_memory_is_refused_with_the_cure():
    with pytest.raises(
        NotImplementedError, match="a contraction of 1000064 needs .* bytes of vector memory, .*ragged_dot"
    ):
        tpu_rows.fit({}, tpu_rows.RowsShape(4096, 1_000_000, 128), 1, tpu.memory("v5p"))


def test_both_cores_of_a_chip_get_as_many_columns():
    for width in (2048, 1408, 7168, 1536):
        found = tpu_rows.fit({}, tpu_rows.RowsShape(4096, 2048, width), 2, tpu.memory("v5p"))
        assert -(-width // found.columns) % 2 == 0, (width, found)
