"""The position basis: its starts, its lengths, and the algebra of the posterior."""

import pytest
import torch

from approx_attn.attention.eigen.position_basis import (
    PositionBasis,
    dct_basis,
    full_precision,
    posterior_covariance,
    random_basis,
)


def test_dct_columns_are_orthogonal_to_each_other_and_to_the_constant() -> None:
    columns = torch.cat([torch.ones(11, 1, dtype=torch.float64), dct_basis(11, 5)], dim=1)
    torch.testing.assert_close(columns.T @ columns, 11 * torch.eye(6, dtype=torch.float64))


def test_random_basis_follows_its_seed() -> None:
    assert torch.equal(random_basis(6, 2, 3), random_basis(6, 2, 3))
    assert not torch.equal(random_basis(6, 2, 3), random_basis(6, 2, 4))
    assert torch.equal(PositionBasis(1, 6, 2, init="random", seed=3).basis[0], random_basis(6, 2, 3).float())


def test_prior_is_the_whitened_basis() -> None:
    basis = PositionBasis(2, 6, 3).double()
    with torch.no_grad():
        basis.log_eigenvalues.copy_(torch.randn(2, 3))
    prior = basis.prior(6)
    covariance = basis.basis @ torch.diag_embed(basis.log_eigenvalues.exp()) @ basis.basis.transpose(1, 2)
    torch.testing.assert_close(prior.factor @ prior.factor.transpose(1, 2), covariance)
    torch.testing.assert_close(prior.noise, basis.log_noise.exp())


@pytest.mark.parametrize("length", [1, 4, 6, 9])
def test_truncation_keeps_entries_in_place(length: int) -> None:
    basis = PositionBasis(1, 6, 3)
    with torch.no_grad():
        basis.mean.copy_(torch.arange(1.0, 7.0))
    prior = basis.prior(length)
    expected = torch.zeros(1, length)
    expected[:, : min(length, 6)] = basis.mean[:, :length]
    assert torch.equal(prior.mean, expected)
    assert torch.equal(prior.factor[:, :6], basis.prior(6).factor[:, :length])
    assert bool((prior.factor[:, 6:] == 0).all())


def test_rank_clamps_to_the_positions() -> None:
    assert PositionBasis(1, 3, 8).basis.shape == (1, 3, 3)


def test_covariance_stays_positive_definite_in_float32() -> None:
    factor = torch.ones(1, 50, 4)  # rank one: only noise and jitter hold it up
    second = factor.transpose(1, 2) @ factor
    covariance = posterior_covariance(second, torch.zeros(1))
    assert bool(covariance.isfinite().all())
    assert bool((covariance.diagonal(dim1=-2, dim2=-1) > 0).all())


def test_full_precision_switches_autocast_off() -> None:
    with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_load_refuses_before_it_copies() -> None:
    basis = PositionBasis(2, 4, 2)
    before = {name: value.clone() for name, value in basis.state_dict().items()}
    with pytest.raises(ValueError, match=r"noise .*\(3,\).*\(2,\)"):
        basis.load(torch.ones(2, 4), torch.ones(2, 4, 2), torch.ones(2, 2), torch.ones(3))
    assert all(torch.equal(value, before[name]) for name, value in basis.state_dict().items())
    basis.load(torch.ones(1, 4), torch.ones(2, 4, 2), torch.tensor([[2.0, 0.0]]), torch.ones(1))
    assert bool(torch.isfinite(basis.log_eigenvalues).all())
