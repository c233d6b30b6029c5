"""In which order the cells of a grid stand in a row, so that a stretch of the row is a compact part of the grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

GridOrder = Literal["rows", "tiles", "hilbert"]
ORDERS: tuple[str, ...] = get_args(GridOrder)


def cells_in_order(grid: tuple[int, int], order: GridOrder, tile: tuple[int, int] = (1, 1)) -> list[int]:
    """The cells of a grid, numbered row by row, in another order.

    `rows` is row by row; `hilbert` follows `hilbert_path`; `tiles` goes through tiles along that path, and through the
    cells of each tile row by row, so that every `tile[0] * tile[1]` consecutive cells are one tile.

    >>> cells_in_order((2, 4), "tiles", (2, 2))
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    rows, columns = grid
    if order == "rows":
        return list(range(rows * columns))
    height, width = tile if order == "tiles" else (1, 1)
    return [
        (height * tile_row + row) * columns + width * tile_column + column
        for tile_row, tile_column in hilbert_path(rows // height, columns // width)
        for row in range(height)
        for column in range(width)
    ]


def hilbert_path(rows: int, columns: int) -> list[tuple[int, int]]:
    """Every cell (row, column) once, by Hilbert's curve where the grid is square and a power of two.

    Any other grid is split by the same rule into unequal parts (Cerveny's generalised curve). Each step goes to a
    neighbour, diagonally at most once, and only if the longer side is odd and the shorter one even.
    """
    # complex numbers as vectors: the real part counts columns
    path = _walk(0j, 1 + 0j, columns, 1j, rows) if columns >= rows else _walk(0j, 1j, rows, 1 + 0j, columns)
    return [(round(cell.imag), round(cell.real)) for cell in path]


def _walk(start: complex, along: complex, length: int, across: complex, breadth: int) -> Iterator[complex]:
    """From the corner `start` to the other end of the side that goes `along`."""
    if breadth == 1 or length == 1:
        step = along if breadth == 1 else across
        yield from (start + place * step for place in range(length * breadth))
    elif 2 * length > 3 * breadth:
        half = _even_half(length)
        yield from _walk(start, along, half, across, breadth)
        yield from _walk(start + half * along, along, length - half, across, breadth)
    else:
        half, middle = _even_half(breadth), length // 2
        corner = start + (length - 1) * along + (half - 1) * across
        yield from _walk(start, across, half, along, middle)
        yield from _walk(start + half * across, along, length, across, breadth - half)
        yield from _walk(corner, -across, half, -along, length - middle)


def _even_half(size: int) -> int:
    half = size // 2
    return half + 1 if half % 2 and size > 2 else half
