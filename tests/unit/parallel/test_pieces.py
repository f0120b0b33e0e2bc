"""Parts of tensors: cut and assembled again, whatever the division."""

from itertools import pairwise

import pytest
import torch

from easyllm.parallel.pieces import Piece, assemble


@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("parts", [1, 3])
def test_parts_assemble_to_the_full_tensor(axis, parts):
    full = torch.arange(42.0).view(6, 7)
    if axis < 0:
        slices = [Piece.whole(full.shape)]
    else:
        bounds = [0, 2, full.shape[axis]]
        slices = [Piece.slice(full.shape, axis, *pair) for pair in pairwise(bounds)]
    pieces = []
    for each in slices:
        width = -(-each.stop // parts)
        for rank in range(parts):
            start = min(each.stop, rank * width)
            pieces.append(each.flat(start, min(each.stop, start + width)))
    held = [(Piece.from_json(piece.to_json()), piece.cut(full)) for piece in pieces]
    assert torch.equal(assemble(held, full.dtype), full)
    with pytest.raises(ValueError, match="missing"):
        assemble(held[1:], full.dtype)


def test_a_part_is_a_range_of_the_flattened_slice():
    full = torch.arange(12.0).view(3, 4)
    piece = Piece.slice(full.shape, 1, 1, 3).flat(2, 5)
    assert piece.cut(full).tolist() == [5, 6, 9]
    target = torch.zeros(3, 4)
    piece.paste(target, torch.tensor([1.0, 2.0, 3.0]))
    assert target.tolist() == [[0, 0, 0, 0], [0, 1, 2, 0], [0, 3, 0, 0]]
