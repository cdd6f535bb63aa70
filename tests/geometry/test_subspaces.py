"""Row and null spaces: P² = P = Pᵀ, J P_null = 0, angles of known size, and the patch embedding's null space."""

from __future__ import annotations

import pytest
import torch
from cases import EIGHT, images, linear

from hf_equiv.geometry.directions import RowSpace, patch_null_space, principal_angles, row_space
from hf_equiv.jacobian import Jacobian

every_case = pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)


@every_case
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 1e-7)])
def test_projections(case, dtype, atol):
    x = images(1, seed=2, dtype=dtype)[0]
    J = Jacobian(case.f, x)
    rows = row_space(J)
    assert rows.rank == case.rank
    random = torch.randn(5, *x.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    null = rows.project_null(random)
    top = rows.basis[0].view(1, *x.shape)
    for v in (random, null + 100 * top):
        rest = rows.project_null(v)
        moved = J.mv(rest).double().norm(dim=1) / (v.double().flatten(1).norm(dim=1) * float(rows.singular_values[0]))
        assert float(moved.max()) <= atol
        torch.testing.assert_close(rows.project_null(rest), rest, rtol=0, atol=100 * atol)
        torch.testing.assert_close(rows.project_row(v) + rest, v, rtol=0, atol=100 * atol)
    inner = rows.project_null(random).flatten(1) @ random.flatten(1).T
    torch.testing.assert_close(inner, inner.T, rtol=0, atol=1e4 * atol)
    assert rows.project_null(random[0]).shape == x.shape


def test_a_matrix_at_hand_is_used():
    x = images(1, dtype=torch.float64)[0]
    matrix = linear().A.clone()
    matrix[:, :50] = 0  # held pixels
    rows = row_space(Jacobian(linear(), x), matrix=matrix)
    assert float(rows.basis[:, :50].abs().max()) == 0
    with pytest.raises(ValueError, match="`image` must be"):
        row_space(linear())
    with pytest.raises(ValueError, match="must have a finite Jacobian"):
        row_space(Jacobian(linear(), x), matrix=matrix / 0)


def test_principal_angles():
    eye = torch.eye(6, dtype=torch.float64)
    angles = torch.tensor([1e-9, 0.3, 1.2], dtype=torch.float64)
    turned = angles.cos()[:, None] * eye[:3] + angles.sin()[:, None] * eye[3:]

    def space(basis):
        return RowSpace(basis, torch.ones(len(basis)), basis[:, :0], 0.0)

    torch.testing.assert_close(principal_angles(space(eye[:3]), space(turned)), angles, rtol=1e-9, atol=1e-16)
    assert principal_angles(space(eye[:2]), space(eye[:5])).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="over the same pixels"):
        principal_angles(space(eye), space(eye[:, :4]))


def test_patch_null_space():
    weight = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    null = patch_null_space(weight)
    assert null.shape == (38, 3, 4, 4)
    torch.testing.assert_close(null.flatten(1) @ null.flatten(1).T, torch.eye(38, dtype=torch.float64))
    assert float((null.flatten(1) @ weight.double().flatten(1).T).abs().max()) < 1e-13
    assert len(patch_null_space(torch.randn(60, 3, 4, 4))) == 0
    with pytest.raises(ValueError, match="`weight` must be"):
        patch_null_space(torch.ones(3, 4))
