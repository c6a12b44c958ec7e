"""Tests of spherical_code against known optima, and of separate_optimally."""

import math

import pytest
import torch

from modeling_uhop import FeatureMap, spherical_code
from modeling_uhop.spherical import closest_similarity, separate_optimally
from tests.conftest import assert_close


# Exact optima: (dim, points) -> cosine of the smallest angle.
EXACT = {(3, 12): 1 / math.sqrt(5), (4, 10): 1 / 6, (5, 16): 1 / 5, (4, 24): 1 / 2, (6, 27): 1 / 4}
# Best known angles in three dimensions, in degrees (Sloane, Hardin & Smith, tables of spherical
# codes).
BEST_KNOWN = {7: 77.8695, 13: 57.1367, 24: 43.6908}


@pytest.mark.parametrize(("dim", "num_points"), EXACT)
def test_spherical_codes_reach_known_optima(dim, num_points):
    code = spherical_code(num_points, dim)
    assert code.shape == (num_points, dim)
    assert_close(code.norm(dim=-1), torch.ones(num_points))
    angle = math.acos(closest_similarity(code))
    assert angle == pytest.approx(math.acos(EXACT[dim, num_points]), rel=1e-5)


@pytest.mark.parametrize("num_points", BEST_KNOWN)
def test_spherical_codes_reach_the_best_known_angles_in_three_dimensions(num_points):
    angle = math.degrees(math.acos(closest_similarity(spherical_code(num_points, 3))))
    assert angle == pytest.approx(BEST_KNOWN[num_points], rel=5e-4)


@pytest.mark.parametrize("dim", [2, 3, 5, 8])
def test_up_to_twice_the_dimension_it_is_a_simplex_or_a_cross_polytope(dim):
    for num_points in range(2, 2 * dim + 1):
        code = spherical_code(num_points, dim)
        assert_close(code.norm(dim=-1), torch.ones(num_points))
        best = -1 / (num_points - 1) if num_points <= dim + 1 else 0.0
        assert_close(closest_similarity(code), best)


def test_on_a_circle_points_are_evenly_spread():
    for num_points in (5, 9):
        assert_close(closest_similarity(spherical_code(num_points, 2)), math.cos(2 * math.pi / num_points), scale=1e3)


def test_one_point():
    assert_close(spherical_code(1, 3), torch.tensor([[1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("arguments", [(0, 3), (3, 0), (3, 1), (9, 3, 1)])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"at least|at most"):
        spherical_code(*arguments[:2], restarts=arguments[2] if len(arguments) > 2 else None)


def test_separate_optimally_puts_features_on_the_code():
    memories = torch.randn(12, 20) + 1.0
    phi = FeatureMap(20, 3)
    separate_optimally(phi, memories)
    features = phi(memories)
    assert_close(features.norm(dim=-1), torch.ones(12))
    assert_close(closest_similarity(features.double()), 1 / math.sqrt(5), dtype=torch.float32)
    with pytest.raises(ValueError, match="linearly independent"):
        separate_optimally(phi, torch.cat([memories, 2 * memories[:1]]))
