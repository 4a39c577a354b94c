"""The PDE solvers against something independent of each: exact solutions, scipy's integrators, orders, conserved sums."""

import itertools
import math
import runpy
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

from tasks import pde

NU = 0.1 + 4 / 3 * 0.1


def tensor(*rows):
    return torch.tensor(np.array(rows), dtype=torch.float64)


def error(u, exact):
    """|u - exact| / |exact|, the worst sample."""
    u, exact = (torch.as_tensor(np.asarray(v), dtype=torch.float64).flatten(1) for v in (u, exact))
    return float(((u - exact).norm(dim=1) / exact.norm(dim=1)).max())


def orders(errors):
    """log2 of how much each error falls when the resolution doubles."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def drawn(n, modes=4, B=3, seed=0, **options):
    """The benchmark's random functions on n cells of (0, 1)."""
    return pde.waves(np.random.default_rng(seed), B, modes, **options)(pde.centres(n))


# ---- what the solvers share


def test_cyclic_reduction_solves_periodic_and_walled_systems():
    a, b, c, d = torch.rand(4, 32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b += 2.5
    for walled in (False, True):
        if walled:
            a[0], c[-1] = 0, 0
        x = pde.tridiagonal(a, b, c, d)
        for s in range(3):
            i = np.arange(32)
            matrix = np.zeros((32, 32))
            matrix[i, i - 1] += a[:, s].numpy()
            matrix[i, i] += b[:, s].numpy()
            matrix[i, (i + 1) % 32] += c[:, s].numpy()
            assert np.allclose(np.linalg.solve(matrix, d[:, s].numpy()), x[:, s])


@pytest.mark.parametrize("transform, ghost", [(pde.cosines, 1), (pde.sines, -1)])
def test_transforms_are_orthonormal_and_diagonal_for_their_walls(transform, ghost):
    basis, eigenvalues = transform(9)
    second = -2 * np.eye(9) + np.eye(9, k=1) + np.eye(9, k=-1)
    second[0, 0], second[-1, -1] = -2 + ghost, -2 + ghost  # the value behind a wall is u, or -u
    assert np.allclose(basis @ basis.T, np.eye(9)) and np.allclose(
        basis.numpy() @ second * 81, np.diag(eigenvalues) @ basis.numpy()
    )


def test_interpolation_is_exact_for_lines_and_periodic():
    at = tensor([0.9, 1.2, 1.5], [-0.3, 0.1, 0.45])  # a period of 1, begun anywhere
    values = tensor([1.0, 4.0, 1.0], [0.0, 4.0, 0.5])
    x = np.array([0.05, 0.35, 0.7, 0.95])
    exact = [np.interp(x, a, v, period=1.0) for a, v in zip(at.numpy(), values.numpy(), strict=True)]
    assert np.allclose(pde.interpolate(torch.from_numpy(x), at, values, 1.0), exact)


# ---- advection


def test_advection_moves_the_function_by_speed_times_time():
    x = pde.centres(100)
    u0 = pde.waves(np.random.default_rng(1), 50, 4)
    assert torch.allclose(pde.advection(u0, x, 2.0, 0.4), u0(x).roll(80, 1), atol=1e-9)  # 0.8 of the circle
    assert torch.allclose(pde.advection(u0, x, 2.5, 0.4), u0(x), atol=1e-9)
    bump = lambda x: torch.exp(-200 * (x - 0.3) ** 2)[None]
    assert torch.allclose(pde.advection(bump, x, 0.5, 0.4), torch.exp(-200 * (x - 0.5) ** 2)[None], atol=1e-7)


# ---- Burgers


def test_burgers_equals_an_exact_solution():
    """phi = 2 + e^(-D k^2 t) cos k x, seen from a frame that moves (Benton and Platzman 1972)."""
    D, k, c, t, x = 0.05, 2 * math.pi, 0.7, 0.6, pde.centres(64)
    exact = lambda x, t: (
        c + 2 * D * k * (e := math.exp(-D * k**2 * t)) * torch.sin(k * (x - c * t)) / (2 + e * torch.cos(k * (x - c * t)))
    )
    assert error(pde.burgers(exact(x, 0.0)[None], t, D), exact(x, t)[None]) < 1e-12


@pytest.mark.parametrize("length", [1.0, 2.0])
def test_burgers_equals_scipys_integration_of_the_equation(length):
    D, t, N = 0.02, 0.3, 256

    def start(n):
        angle = 2 * math.pi * pde.centres(n)
        return 0.3 + torch.sin(angle) + 0.5 * torch.cos(2 * angle)

    k = 2j * math.pi / length * np.fft.rfftfreq(N, 1 / N)
    rate = lambda t, u: np.fft.irfft(D * k**2 * np.fft.rfft(u) - k * np.fft.rfft(u**2 / 2), N)
    exact = solve_ivp(rate, (0, t), start(N).numpy(), "DOP853", rtol=1e-10, atol=1e-12).y[:, -1]
    assert error(pde.burgers(start(N)[None], t, D, length), exact[None]) < 1e-8
    coefficients, errors = np.fft.rfft(exact) / N, []
    for n in (16, 32, 64):  # the exact solution read between its points
        waves = np.exp(2j * math.pi * np.outer(pde.centres(n) - pde.centres(N)[0], np.arange(N // 2 + 1)))
        between = (2 * waves @ coefficients - coefficients[0]).real
        errors.append(error(pde.burgers(start(n)[None], t, D, length), between[None]))
    assert orders(errors)[0] > 4 and errors[2] < 1e-7, errors  # no fixed order: spectral


def test_burgers_small_waves_follow_the_heat_equation_and_the_mean_stays():
    x, k, D = pde.centres(64), 4 * math.pi, 1 / math.pi
    u = 1e-6 * torch.sin(k * x)[None]
    assert error(pde.burgers(u, 0.02, D), u * math.exp(-D * k**2 * 0.02)) < 1e-5
    u = drawn(256, B=50)
    later = pde.burgers(u, 0.05, D)
    assert torch.allclose(later.mean(1), u.mean(1), atol=1e-9)
    assert (later.amax(1) <= u.amax(1) + 1e-9).all() and (later.amin(1) >= u.amin(1) - 1e-9).all()


# ---- diffusion and reaction


def test_diffusion_reaction_equals_scipys_stiff_integrator_with_order_2():
    n, t = 32, 0.1
    u0 = pde.to_unit(drawn(n, B=2, seed=4))
    k = 2 * math.pi * np.fft.rfftfreq(n, 1 / n)
    rate = lambda t, u: np.fft.irfft(-0.5 * k**2 * np.fft.rfft(u), n) + 3 * u * (1 - u)
    exact = [solve_ivp(rate, (0, t), u, "BDF", rtol=1e-10, atol=1e-12).y[:, -1] for u in u0.numpy()]
    errors = [error(pde.diffusion_reaction(u0, t, rate=3.0, steps=steps), exact) for steps in (5, 10, 20, 40)]
    assert errors[-1] < 1e-5 and all(1.8 < order < 2.2 for order in orders(errors)), errors


def test_a_uniform_concentration_grows_by_the_logistic_law():
    u = pde.diffusion_reaction(tensor([0.2] * 8, [0.9] * 8), 0.7)
    assert torch.allclose(u[:, 0], 1 / (1 + (1 / tensor(0.2, 0.9) - 1) * math.exp(-0.7))) and u.std(1).max() < 1e-12


# ---- diffusion and sorption


def sorption_by_scipy(u0, n, t):
    """u_t = D / R(u) u_xx on n cells by the book, with scipy's BDF."""
    h, D = 1 / n, 5e-4

    def rate(t, u):
        right = u[-1] * (D / h - 0.5) / (D / h + 0.5)  # (u + u') / 2 = -D (u' - u) / h
        v = np.concatenate([[2 - u[0]], u, [right]])  # (2 - u + u) / 2 = 1
        R = 1 + (1 - 0.29) / 0.29 * 2880 * 3.5e-4 * 0.874 * (np.maximum(u, 0) + 1e-6) ** (0.874 - 1)
        return D / R * (v[2:] - 2 * v[1:-1] + v[:-2]) / h**2

    return solve_ivp(rate, (0, t), np.full(n, u0), "BDF", rtol=1e-9, atol=1e-11).y[:, -1]


def test_diffusion_sorption_equals_scipys_stiff_integrator_with_order_2_in_time():
    exact = [sorption_by_scipy(u0, 32, 500) for u0 in (0.02, 0.2)]
    start = tensor([0.02] * 32, [0.2] * 32)
    errors = [error(pde.diffusion_sorption(start, 500.0, steps), exact) for steps in (10, 20, 40, 80)]
    assert errors[2] < 2e-4 and all(1.8 < order < 2.3 for order in orders(errors)), errors


def test_diffusion_sorption_has_order_2_in_space():
    fine, errors = pde.diffusion_sorption(tensor([0.1] * 1024), 500.0), []
    for n in (32, 64, 128):
        errors.append(error(pde.diffusion_sorption(tensor([0.1] * n), 500.0), fine.view(1, n, -1).mean(2)))
    assert errors[-1] < 1e-4 and all(1.8 < order < 2.3 for order in orders(errors)), errors


def test_a_substance_ends_in_the_line_between_its_walls():
    """u = 1 - s x with u(1) = -D u_x(1) = D s: s = 1 / (1 + D)."""
    u = pde.diffusion_sorption(tensor([0.1] * 64), 1e7, steps=200)
    assert torch.allclose(u, 1 - pde.centres(64) / (1 + 5e-4), atol=1e-6)
    early = pde.diffusion_sorption(tensor([0.0] * 64, [0.2] * 64), 5.0)
    assert (early >= 0).all() and (early <= 1).all()


# ---- compressible flow


def smooth_gas(n):
    x = pde.centres(n, -1)
    waves = [torch.sin(math.pi * x + phase) + 0.3 * torch.cos(2 * math.pi * x - phase) for phase in (0.0, 1.0, 2.0)]
    return 3 + waves[0][None], 20 + 8 * waves[1][None], 0.7 * waves[2][None]


def gas_by_scipy(n, t):
    """The equations in fixed coordinates, by Fourier collocation and DOP853: nothing in common with the solver."""
    k = 1j * math.pi * np.fft.rfftfreq(n, 1 / n)
    d = lambda f: np.fft.irfft(k * np.fft.rfft(f), n)

    def rate(t, y):
        rho, m, E = y.reshape(3, n)
        v = m / rho
        p, s = (E - m * v / 2) * 2 / 3, NU * rho * d(v)
        return np.concatenate([-d(m), d(s - m * v - p), d((s - p - E) * v)])

    rho, p, v = (f[0].numpy() for f in smooth_gas(n))
    y = solve_ivp(rate, (0, t), np.concatenate([rho, rho * v, p * 1.5 + rho * v**2 / 2]), "DOP853", rtol=1e-9, atol=1e-9).y[
        :, -1
    ]
    rho, m, E = y.reshape(3, n)
    return rho, (E - m * m / rho / 2) * 2 / 3, m / rho


def test_compressible_flow_equals_collocation_in_fixed_coordinates_with_order_2():
    n, t = 64, 0.25
    exact, errors = gas_by_scipy(n, t), []
    k = np.fft.rfftfreq(n, 1 / n)
    for m, steps in ((64, 40), (128, 80), (256, 160), (512, 320)):
        shift = np.exp(1j * math.pi * np.outer(pde.centres(m, -1) - pde.centres(n, -1)[0], k))  # read between its points
        fields = pde.compressible(*smooth_gas(m), t, NU, steps=steps)
        parts = [np.fft.rfft(f) / n for f in exact]
        errors.append([error(f, (2 * shift @ part - part[0]).real[None]) for f, part in zip(fields, parts, strict=True)])
    for e in np.array(errors).T:
        assert e[-1] < 5e-4 and all(1.7 < order < 2.4 for order in orders(e)), errors


def test_mass_momentum_and_energy_of_the_gas_are_conserved_to_rounding():
    rng, n = np.random.default_rng(3), 128
    x, _ = pde.navier_stokes1d(rng, 8, n, "cpu", False, False)
    density, pressure, velocity = (f.T for f in x.view(8, 3, n).unbind(1))
    mass, faces = density * 2 / n, pde.centres(n, -1)[:, None].expand(n, 8)

    def sums(x, v, p):
        width = torch.cat([x[1:], x[:1] + 2]) - x
        at_face = (mass + mass.roll(1, 0)) / 2
        return (mass / width * width).sum(0), (at_face * v).sum(0), (1.5 * p * width).sum(0) + (at_face * v**2 / 2).sum(0)

    before = sums(faces, velocity, pressure)
    after = sums(*pde.gas(mass, faces, velocity, pressure, 0.3, NU, 2.0, 100))
    for a, b in zip(before, after, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-11)


def test_mass_momentum_and_energy_stay_in_fixed_coordinates_too():
    lost = []
    for n in (128, 256):
        before, after = smooth_gas(n), pde.compressible(*smooth_gas(n), 1.0, NU)
        sums = [(rho.mean(), (rho * v).mean(), (1.5 * p + rho * v**2 / 2).mean()) for rho, p, v in (before, after)]
        lost.append([float(abs(b - a)) for a, b in zip(*sums, strict=True)])
    assert max(lost[1]) < 1e-2 and np.allclose(np.array(lost[0]) / lost[1], 4, atol=2.5), lost


def test_a_weak_sound_wave_turns_and_decays_as_linear_theory_says():
    """p'' + nu k^2 p' + c^2 k^2 p = 0: p = cos(w t) e^(-nu k^2 t / 2) and a little sine."""
    x, k, t, c2 = pde.centres(256, -1), math.pi, 0.7, 5 / 3 * 10 / 2
    wave = 1e-5 * torch.cos(k * x)[None]
    ones = torch.ones_like(wave)
    density, pressure, _ = pde.compressible(2 * ones + 2 * wave, 10 * ones + 10 * 5 / 3 * wave, 0 * ones, t, NU, steps=800)
    decay, w = NU * k**2 / 2, math.sqrt(c2 * k**2 - (NU * k**2 / 2) ** 2)
    factor = math.exp(-decay * t) * (math.cos(w * t) + decay / w * math.sin(w * t))
    assert error(pressure - 10, 10 * 5 / 3 * factor * wave) < 2e-3 and error(density - 2, 2 * factor * wave) < 2e-3


def riemann(left, right, xi, g=5 / 3):
    """Density, pressure, velocity at x / t = xi of the exact solution between two states at rest, the higher pressure left."""
    (rho_l, p_l), (rho_r, p_r) = left, right
    c_l = math.sqrt(g * p_l / rho_l)
    behind = lambda p: (p - p_r) * math.sqrt(2 / ((g + 1) * p + (g - 1) * p_r) / rho_r)  # speed of the gas behind the shock
    fan = lambda p: 2 * c_l / (g - 1) * (1 - (p / p_l) ** ((g - 1) / 2 / g))  # and at the end of the rarefaction
    p = brentq(lambda p: behind(p) - fan(p), p_r, p_l)
    v, rho_1 = behind(p), rho_l * (p / p_l) ** (1 / g)
    rho_2 = rho_r * (p / p_r + (g - 1) / (g + 1)) / ((g - 1) / (g + 1) * p / p_r + 1)
    shock, tail = v * rho_2 / (rho_2 - rho_r), v - math.sqrt(g * p / rho_1)
    inside = 2 / (g + 1) + (g - 1) / (g + 1) / c_l * -xi
    conditions = [xi < -c_l, xi < tail, xi < v, xi < shock]
    rho = np.select(conditions, [rho_l, rho_l * inside ** (2 / (g - 1)), rho_1, rho_2], rho_r)
    pressure = np.select(conditions, [p_l, p_l * inside ** (2 * g / (g - 1)), p, p], p_r)
    return rho, pressure, np.select(conditions, [0, 2 / (g + 1) * (c_l + xi), v, v], 0)


@pytest.mark.matrix
def test_sods_shock_tube_converges_to_the_exact_solution_as_the_viscosity_vanishes():
    t, errors = 0.2, []
    for n in (256, 512, 1024):
        x = pde.centres(n, -1)
        high = (x.abs() < 0.5)[None]  # two tubes, mirrored
        start = torch.where(high, 1.0, 0.125).double(), torch.where(high, 1.0, 0.1).double(), torch.zeros(1, n).double()
        fields = pde.compressible(*start, t, 3 / n, steps=n)
        half = x > 0
        exact = riemann((1, 1), (0.125, 0.1), (x[half].numpy() - 0.5) / t)
        errors.append([float(abs(f[0, half].numpy() - e).mean()) for f, e in zip(fields, exact, strict=True)])
        assert all(torch.allclose(f, sign * f.flip(1), atol=1e-9) for f, sign in zip(fields, (1, 1, -1), strict=True))
    for e in np.array(errors).T:
        assert e[-1] < 0.015 and all(0.55 < order < 1.4 for order in orders(e)), errors


# ---- Darcy


def test_darcy_has_order_2_where_the_coefficient_is_smooth():
    errors = []
    for n in (16, 32, 64, 128):
        x, y = np.meshgrid(*2 * [pde.centres(n).numpy()], indexing="ij")
        sx, sy, cx, cy = np.sin(np.pi * x), np.sin(np.pi * y), np.cos(np.pi * x), np.cos(np.pi * y)
        a, u = 1 + 0.5 * x * y + 0.3 * np.sin(3 * x), sx * sy
        force = (
            2 * np.pi**2 * a * u - np.pi * (0.5 * y + 0.9 * np.cos(3 * x)) * cx * sy - np.pi * 0.5 * x * sx * cy
        )  # -div(a grad u)
        errors.append(error(pde.darcy(tensor(a), tensor(force)), [u]))
    assert errors[-1] < 2e-4 and all(1.8 < order < 2.2 for order in orders(errors)), errors


@pytest.mark.parametrize("low, high", [(3.0, 12.0), (0.1, 1.0)])
def test_darcy_equals_a_direct_solution_where_the_coefficient_jumps(low, high):
    from scipy.sparse import lil_matrix
    from scipy.sparse.linalg import spsolve

    n = 21
    a = np.where(np.random.default_rng(0).random((n, n)) < 0.5, low, high)
    matrix = lil_matrix((n * n, n * n))
    for i in range(n):
        for j in range(n):
            for di, dj in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                inside = 0 <= i + di < n and 0 <= j + dj < n
                # two half cells in a row: resistances add up; a wall is half a cell away
                conductance = 1 / (0.5 / a[i, j] + 0.5 / a[i + di, j + dj]) if inside else 2 * a[i, j]
                matrix[i * n + j, i * n + j] += conductance * n**2
                if inside:
                    matrix[i * n + j, (i + di) * n + j + dj] -= conductance * n**2
    exact = spsolve(matrix.tocsr(), np.full(n * n, 0.5)).reshape(1, n, n)
    assert error(pde.darcy(tensor(a), 0.5), exact) < 1e-6


def test_darcy_of_one_coefficient_is_known():
    """The largest value for a = force = 1: 16 / pi^4 sum over odd j, k of (-1)^((j + k) / 2 - 1) / (j k (j^2 + k^2))."""
    odd = np.arange(1, 400, 2)
    sign = np.where(odd % 4 == 1, 1, -1)
    largest = 16 / np.pi**4 * np.sum(np.outer(sign, sign) / (np.outer(odd, odd) * (odd[:, None] ** 2 + odd**2)))
    u = pde.darcy(torch.full((1, 65, 65), 12.0, dtype=torch.float64), 1.0)
    assert float(u.max()) * 12 == pytest.approx(largest, rel=5e-4)


def test_samples_that_are_solved_wait_for_the_others():
    """A coefficient without a jump needs one iteration: those that follow must not divide by its residual."""
    a = torch.ones(3, 32, 32, dtype=torch.float64)
    a[1, 10:20] = 0.1
    u = pde.darcy(a, 0.1)
    assert torch.allclose(u[0], pde.darcy(a[:1], 0.1)[0], rtol=1e-6) and torch.allclose(
        u[1], pde.darcy(a[1:2], 0.1)[0], rtol=1e-6
    )


# ---- shallow water


def stoker(high, low, xi, g=1.0):
    """Height at x / t = xi after a dam between two depths breaks (Stoker 1957)."""
    c = math.sqrt(g * high)
    v = lambda h: (h - low) * math.sqrt(g / 2 * (1 / h + 1 / low))
    h = brentq(lambda h: v(h) - 2 * (c - math.sqrt(g * h)), low, high)
    shock = h * v(h) / (h - low)
    return np.select([xi < -c, xi < v(h) - math.sqrt(g * h), xi < shock], [high, (2 * c - xi) ** 2 / 9 / g, h], low)


def test_a_straight_dam_break_converges_to_the_exact_solution():
    errors = []
    for n in (100, 200, 400):
        x = pde.centres(n, 0, 4)
        h = pde.shallow_water(torch.where(x < 2, 2.0, 1.0).double()[None], 1.0, 4.0, radial=False)
        errors.append(float(abs(h[0].numpy() - stoker(2, 1, x.numpy() - 2)).mean()))
        assert float(h.mean()) == pytest.approx(1.5, abs=1e-12) and h.diff().max() < 3e-4  # nothing has left; no wiggles
    assert errors[-1] < 3e-3 and all(0.7 < order < 1.4 for order in orders(errors)), errors


def test_smooth_water_has_order_2_and_still_water_stays_still():
    hump = lambda n: 1 + 0.2 * torch.exp(-2 * pde.centres(n, 0, 5) ** 2)[None]
    fine, errors = pde.shallow_water(hump(1600), 1.0, 5.0), []
    for n in (50, 100, 200):
        errors.append(float((pde.shallow_water(hump(n), 1.0, 5.0) - fine.view(1, n, -1).mean(2)).abs().mean()))
    assert all(1.5 < order < 2.6 for order in orders(errors)), errors
    still = torch.full((1, 64), 1.3, dtype=torch.float64)
    assert torch.allclose(pde.shallow_water(still, 1.0, 2.5), still, atol=1e-13)


def plane_water(h, t, width):
    """Two dimensions, Rusanov's flux, first order: crude, and nothing in common with the solver but the equation."""
    q = np.zeros((3, *h.shape))
    q[0] = h
    while t > 0:
        dt = min(t, 0.4 * width / 3)
        change = np.zeros_like(q)
        for axis in (1, 2):
            v = np.concatenate([q.take([0], axis), q, q.take([-1], axis)], axis)
            flux = v[axis] / v[0] * v
            flux[axis] += v[0] ** 2 / 2
            speed = abs(v[axis] / v[0]) + np.sqrt(v[0])
            left, right = (np.moveaxis(np.stack([*v, *flux, speed]), axis, -1)[..., part] for part in (np.s_[:-1], np.s_[1:]))
            between = (left[3:6] + right[3:6]) / 2 - np.maximum(left[6], right[6]) / 2 * (right[:3] - left[:3])
            between = np.moveaxis(between, -1, axis)
            change += np.diff(between, axis=axis)
        q, t = q - dt / width * change, t - dt
    return q[0]


@pytest.mark.matrix
def test_the_round_dam_break_equals_a_solution_in_the_plane():
    x, y = (part[0].numpy() for part in pde.shallow_water2d(np.random.default_rng(2), 1, 64, "cpu", False, False))
    errors = []
    for fine in (2, 4):
        fine_x = pde.centres(64 * fine, -2.5, 2.5)
        radius = np.random.default_rng(2).uniform(0.3, 0.7)
        start = 1 + (torch.hypot(fine_x[:, None], fine_x) <= radius).numpy()
        h = plane_water(start, 1.0, 5 / 64 / fine).reshape(64, fine, 64, fine).mean((1, 3))
        errors.append(np.linalg.norm(h - y) / np.linalg.norm(y - 1))
    assert errors[1] < 0.22 and orders(errors)[0] > 0.5, errors  # the crude one comes nearer
    assert np.allclose(y, y.T) and np.allclose(y, y[::-1]) and np.allclose(y, y[:, ::-1])
    edge = np.concatenate([y[0], y[-1], y[:, 0], y[:, -1]])
    assert np.allclose(edge, 1, atol=1e-6)  # the wave has not come to the walls
    assert abs((x - 1).sum() - np.pi * radius**2 / 25 * 64**2) < 8 and set(np.unique(x)) == {1, 2}  # the disc it comes from
    assert abs(y.mean() - 1 - np.pi * radius**2 / 25) < 2e-4  # no water is lost


# ---- FitzHugh and Nagumo


def test_fitzhugh_nagumo_equals_scipys_stiff_integrator_with_order_2():
    n, t, rng = 12, 2.0, np.random.default_rng(0)
    start = rng.standard_normal((2, n, n))

    def rate(t, w):
        u, v = w.reshape(2, n, n)
        lap = []
        for f in (u, v):
            p = np.pad(f, 1, mode="edge")  # no flux: the value behind a wall is the one before it
            lap.append((p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * f) / (2 / n) ** 2)
        return np.stack([1e-3 * lap[0] + u - u**3 - 5e-3 - v, 5e-3 * lap[1] + u - v]).ravel()

    exact = solve_ivp(rate, (0, t), start.ravel(), "BDF", rtol=1e-10, atol=1e-12).y[:, -1].reshape(2, n, n)
    errors = [error(torch.stack(pde.fitzhugh_nagumo(*tensor(*start), t, steps=steps)), exact) for steps in (10, 20, 40, 80)]
    assert errors[-1] < 1e-3 and all(1.8 < order < 2.2 for order in orders(errors)), errors


# ---- what is drawn


def test_waves_are_the_benchmarks():
    rng, x = np.random.default_rng(0), pde.centres(2048)
    u = pde.waves(rng, 4000, 4)(x)
    assert float(u.abs().max()) <= 4
    windowed = (u[:, 0].abs() < 1e-6) & (u[:, -1].abs() < 1e-6)
    assert abs(float(windowed.double().mean()) - 0.1) < 0.02
    spectrum = torch.fft.rfft(u[~windowed]).abs() / 1024
    waves = spectrum[:, 9:].amax(1) < 1e-9  # they fit the domain, in at most eight periods; an absolute value has kinks
    assert 0.9 <= float(waves.double().mean()) < 0.96  # the absolute value of what has one sign has none
    counts = (spectrum[waves, 1:9] > 1e-6).sum(1)
    assert set(counts.tolist()) == {1, 2} and abs(float((counts == 1).double().mean()) - 0.25) < 0.03  # one number, twice
    share = (spectrum[waves] > 1e-6).double().mean(0)[1:9]  # of 1 to 8 periods: drawn once, 6 / 16 each, or twice, 1 / 16
    once, twice = torch.tensor([6, 6, 6, 6, 0, 0, 0, 0]) / 16, torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]) / 16
    assert torch.allclose(share, (once + twice).double(), atol=0.03) and share[4] == share[6] == 0
    whole = u[~windowed][waves]
    assert whole.mean(1).abs().mean() > 0.3  # waves that were not drawn are constants
    inside = u[windowed][:, (x > 0.45) & (x < 0.55)]
    assert float(inside.abs().amax(1).median()) > 0.3
    many = pde.waves(rng, 4000, 3, 2.0, 0.5)(pde.centres(512, -1))
    assert abs(float(((many[:, 255].abs() < 1e-6) & (many[:, -1].abs() < 1e-6)).double().mean()) - 0.5) < 0.03


def test_states_of_the_gas_lie_in_the_benchmarks_ranges():
    x, y = (u.view(64, 3, 128) for u in pde.navier_stokes1d(np.random.default_rng(0), 64, 128, "cpu", False, False))
    density, pressure, velocity = x.unbind(1)
    for field, unit in ((density, 1), (pressure, 10)):
        low, high = field.amin(1) / unit, field.amax(1) / unit
        assert low.min() >= 1 and low.max() <= 10 and (high - low).min() >= 1 and (high - low).max() <= 10 + 1e-9
        assert abs(float(low.log10().mean()) - 0.5) < 0.12  # log-uniform
    assert velocity.abs().max() <= 3 and (y[:, :2] > 0).all() and y.isfinite().all()


def test_coefficients_are_the_benchmarks():
    a, u = pde.darcy_nas(np.random.default_rng(0), 40, 33, "cpu", False, False)
    assert a.unique().tolist() == [3, 12] and abs(float((a == 12).double().mean()) - 0.5) < 0.1
    assert 0.0737 / 12 < u.amax((1, 2)).min() and u.amax((1, 2)).max() < 0.0737 / 3
    a, u = pde.darcy2d(np.random.default_rng(0), 200, 32, "cpu", False, False)
    assert a.unique().tolist() == [0.1, 1] and 0.35 < float((a == 1).double().mean()) < 0.65
    assert 0.00737 < u.amax((1, 2)).min() and u.amax((1, 2)).max() < 0.0737
    rng = np.random.default_rng(1)
    place, centre, s = rng.random((100_000, 1, 2)), rng.random((100_000, 5, 2)), rng.uniform(0, 0.5, (100_000, 5))
    assert np.exp(-((place - centre) ** 2).sum(-1) / s).sum(1).mean() == pytest.approx(pde.BELLS, abs=0.01)
    x, y = pde.diffusion_reaction2d(np.random.default_rng(0), 4, 32, "cpu", False, False)
    assert abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05


def test_the_gaussian_field_of_darcy_has_its_covariance():
    """Two places of a Gaussian field with correlation r have one sign with probability 1/2 + asin(r) / pi."""
    n = 16
    a, _ = pde.darcy_nas(np.random.default_rng(0), 2500, n, "cpu", False, False)
    at = [(0, 0), (0, 1), (3, 8), (4, 8), (8, 8), (15, 15)]
    wave = lambda k, i: 1.0 if k == 0 else math.sqrt(2) * math.cos(math.pi * k * (i + 0.5) / n)
    modes = [(k, m) for k in range(n) for m in range(n) if k + m > 0]
    product = [[wave(k, i) * wave(m, j) / (math.pi**2 * (k * k + m * m) + 9) for k, m in modes] for i, j in at]
    covariance = np.array(product) @ np.array(product).T
    r = covariance / np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal()))
    high = np.array([(a[:, i, j] == 12).numpy() for i, j in at])
    same = (high[:, None] == high[None]).mean(2)
    assert np.allclose(same, 0.5 + np.arcsin(r.clip(-1, 1)) / np.pi, atol=0.03)


def later(name, test, released, n=None):
    (x, y), *_ = pde.simulate(name, 4, n or {"darcy": 33, "diffusion_reaction2d": 16}.get(name, 64), 1, test, released)
    return x, y


SLOW = ("shallow_water2d", "navier_stokes1d")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.matrix if n in SLOW else ()) for n in pde.SETS])
def test_released_targets_differ_where_and_only_where_the_benchmark_is_wrong(name):
    same_draws, test_draws = (later(name, False, False), later(name, True, False))
    assert not np.array_equal(same_draws[0], test_draws[0]) and np.allclose(later(name, False, False)[1], same_draws[1], 1e-5)
    moved = [not np.allclose(later(name, test, True)[1], later(name, test, False)[1], 1e-5) for test in (False, True)]
    in_both, in_test = ("advection1d", "burgers1d"), ("diffusion_reaction1d", "diffusion_sorption1d", "shallow_water2d",
                                                      "diffusion_reaction2d")  # fmt: skip
    assert moved == ([True, True] if name in in_both else [False, name in in_test])


def test_released_waves_travel_twice_as_far_and_burgers_does_not_fade_as_fast():
    x, y = later("advection1d", False, False, 100)
    assert np.allclose(y, np.roll(x, 80, 1), atol=1e-6)
    assert np.allclose(later("advection1d", False, True, 100)[1], np.roll(x, 160, 1), atol=1e-6)
    x, y = later("burgers1d", False, False, 256)
    assert np.allclose(y, x.mean(1, keepdims=True), atol=1e-6)  # e^-25
    x, y = later("burgers1d", False, True, 256)
    left = (y.std(1) / x.std(1)).max()
    assert 1e-4 < left < 2e-2  # e^-6.3 for a wave of one period, less for others
    x, y = x[0], y[0]
    k = 1j * math.pi * np.fft.rfftfreq(256, 1 / 256)
    rate = lambda t, u: np.fft.irfft(-k * np.fft.rfft(u**2) + k**2 / math.pi * np.fft.rfft(u), 256)  # u_t + (u^2)_x = u_xx / pi
    assert np.allclose(solve_ivp(rate, (0, 2), x.astype(float), "BDF", rtol=1e-6, atol=1e-8).y[:, -1], y, atol=1e-4)


# ---- the command line


def test_pde_py_prints_the_table_of_times(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pde.py", "--task", "advection1d", "--samples", "10"])
    runpy.run_path(str(ROOT / "tasks" / "pde.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "| advection1d | 1024 | 10 | " in out and "| 10,000 | " in out


@pytest.mark.parametrize("options, words", [({"samples": 0}, "--samples 0"), ({"n": 100}, "must be a power of 2")])
def test_sizes_that_cannot_be_solved_are_refused(capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        pde.main(pde.Args("navier_stokes1d", **options))
    assert stop.value.code == 2 and words in capsys.readouterr().err
