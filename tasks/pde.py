"""Solvers for the PDE tasks: batched, in double precision, on CPU or GPU, with the parameters of the benchmarks.

    python tasks/pde.py --task all --samples 100        solve 100 samples of each dataset and print the time

A simulated dataset is fixed like a downloaded file: its random seeds do not depend on the seed of the run, so all runs use the
same samples. A smaller set (`--n-train`) is not a subset of a larger one; below 180 training samples the test set differs, too.
Random numbers are drawn on the CPU, whatever the device.

    advection1d           exact: the translated initial function
    burgers1d             exact in time by the Cole-Hopf transformation, spectral in space
    diffusion_reaction1d  Strang splitting into two exact flows: order 2 in time, spectral in space
    diffusion_sorption1d  finite volumes, two-stage L-stable Runge-Kutta method: order 2 in space and time
    navier_stokes1d       Lagrangian finite volumes, linearly implicit midpoint rule: order 2 in space and time
    darcy, darcy2d        finite volumes, conjugate gradients: order 2 where the coefficient is smooth, 1 at its jumps
    shallow_water2d       radial finite volumes, HLL fluxes with limited slopes: order 2 where smooth, 1 at the shock
    diffusion_reaction2d  the finite volumes of the benchmark, Strang splitting into three exact flows: order 2 in time

Mistakes of the benchmarks are corrected. `released=True` reproduces those of the released files and loader (docs/pde.md).
Shapes: B samples, n cells per row, m wave numbers. Each solver is tested against an independent reference.
"""

import math
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import pad

VERSION = 1  # increase it with each change of a solver or of the random draws: cached data of other versions are not used

# ---------------------------------------------------------------------------------------------------------------------
# Shared by the solvers
# ---------------------------------------------------------------------------------------------------------------------


def centres(n, begin=0.0, end=1.0, device="cpu"):
    """Centres of n cells of equal width: (n,)."""
    return begin + (end - begin) * (torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n


def graded(t, steps, power=2):
    """List of time step sizes that grow like i^(power - 1): small at the beginning, where rough initial data become smooth."""
    return [t * (((i + 1) / steps) ** power - (i / steps) ** power) for i in range(steps)]


def tridiagonal(a, b, c, d):
    """Solve a_i x_{i-1} + b_i x_i + c_i x_{i+1} = d_i, all (n, B), n a power of 2, i modulo n: periodic, or a_0 = c_{n-1} = 0.

    Cyclic reduction (Hockney 1965): the odd unknowns are eliminated from the even equations, which leaves a system of half the
    size. Takes 2 log2 n batched steps instead of the 2 n sequential steps of Gaussian elimination. For diagonally dominant
    systems.
    """
    if len(b) == 1:
        return d / (a + b + c)
    (a_e, b_e, c_e, d_e), (a_o, b_o, c_o, d_o) = ([v[part::2] for v in (a, b, c, d)] for part in (0, 1))
    a_b, b_b, c_b, d_b = (v.roll(1, 0) for v in (a_o, b_o, c_o, d_o))  # the odd equation before each even one
    left, right = -a_e / b_b, -c_e / b_o  # factors that eliminate the two odd unknowns
    x_e = tridiagonal(left * a_b, b_e + left * c_b + right * a_o, right * c_o, d_e + left * d_b + right * d_o)  # (n / 2, B)
    x_o = (d_o - a_o * x_e - c_o * x_e.roll(-1, 0)) / b_o
    return torch.stack([x_e, x_o], 1).flatten(0, 1)  # (n, B)


def interpolate(x, at, values, length):
    """Periodic linear interpolation of values (B, n), given at increasing points `at` (B, n), to the points x (m,): (B, m)."""
    at, values = torch.cat([at, at[:, :1] + length], 1), torch.cat([values, values[:, :1]], 1)  # (B, n + 1)
    x = at[:, :1] + (x - at[:, :1]) % length  # (B, m)
    right = torch.searchsorted(at, x, right=True).clamp(1, at.shape[1] - 1)
    share = (x - at.gather(1, right - 1)) / (at.gather(1, right) - at.gather(1, right - 1))
    return torch.lerp(values.gather(1, right - 1), values.gather(1, right), share)


def cosines(n, device="cpu"):
    """Eigenvectors of the second difference on n cells with no-flux boundaries, as rows (n, n), and eigenvalues (n,).

    c_ki ~ cos(pi k (i + 1/2) / n), k = 0..n - 1, orthonormal; (c_k,i+1 - 2 c_ki + c_k,i-1) n^2 = -4 n^2 sin^2(pi k / 2n) c_ki.
    Multiplication by this matrix is the cosine transform (DCT-II), which torch does not provide.
    """
    k = torch.arange(n, dtype=torch.float64, device=device)
    basis = torch.cos(math.pi * k[:, None] * (k + 0.5) / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis, -4 * n**2 * torch.sin(math.pi * k / (2 * n)) ** 2


def sines(n, device="cpu"):
    """The same for zero Dirichlet boundaries: s_ki ~ sin(pi k (i + 1/2) / n), k = 1..n (DST-II)."""
    k = torch.arange(1, n + 1, dtype=torch.float64, device=device)
    basis = torch.sin(math.pi * k[:, None] * (k - 0.5) / n) * math.sqrt(2 / n)
    basis[-1] /= math.sqrt(2)
    return basis, -4 * n**2 * torch.sin(math.pi * k / (2 * n)) ** 2


# ---------------------------------------------------------------------------------------------------------------------
# One dimension
# ---------------------------------------------------------------------------------------------------------------------


def advection(u0, x, t, speed):
    """u_t + speed u_x = 0, period 1:   u(x, t) = u0(x - speed t). Exact. u0: (m,) -> (B, m), x (m,) -> (B, m)"""
    return u0((x - speed * t) % 1)


def burgers(u, t, diffusion, length=1.0):
    """u_t + (u^2 / 2)_x = D u_xx, periodic. u (B, n) at equally spaced points -> (B, n)

    Exact in time, spectral in space. Let c be the mean and u = c + w(x - c t, t). The transformation of Cole (1951) and Hopf
    (1950) makes the equation for w linear:
        w = -2 D phi_x / phi,   phi_t = D phi_xx,   phi(x, 0) = exp(-W(x) / 2D),   W_x = w.
    exp must not overflow: max |W| / D has to be below 1000. A smaller D needs a shock-capturing scheme.
    """
    n, mean = u.shape[1], u.mean(1, keepdim=True)
    k = 2 * math.pi / length * torch.arange(n // 2 + 1, dtype=u.dtype, device=u.device)  # (m,)
    integral = torch.fft.irfft(torch.fft.rfft(u - mean) / (1j * k.clamp(min=1e-300)) * (k > 0), n)  # W (B, n)
    phi = torch.fft.rfft(torch.exp(-integral / (2 * diffusion))) * torch.exp(-diffusion * k**2 * t - 1j * k * mean * t)
    slope = 1j * k * phi
    slope[:, -1] = 0  # the derivative at the Nyquist frequency is not defined
    return mean - 2 * diffusion * torch.fft.irfft(slope, n) / torch.fft.irfft(phi, n)


def diffusion_reaction(u, t, diffusion=0.5, rate=1.0, length=1.0, steps=50):
    """u_t = D u_xx + r u (1 - u), periodic. u (B, n) in [0, 1] -> (B, n)

    Strang splitting (1968), order 2: half a step of growth, a step of diffusion, half a step of growth, each solved exactly:
        u' = r u (1 - u):   u <- u / (u + (1 - u) e^(-r dt))          u' = D u_xx:   u_k <- e^(-D k^2 dt) u_k.
    """
    n = u.shape[1]
    k = 2 * math.pi / length * torch.arange(n // 2 + 1, dtype=u.dtype, device=u.device)  # (m,)

    def grow(u, dt):
        return u / (u + (1 - u) * math.exp(-rate * dt))

    for dt in graded(t, steps):
        u = grow(u, dt / 2)
        u = torch.fft.irfft(torch.fft.rfft(u) * torch.exp(-diffusion * k**2 * dt), n)
        u = grow(u, dt / 2)
    return u


D_SORPTION, N_F = 5e-4, 0.874  # diffusion coefficient; Freundlich exponent
RETAINED = (1 - 0.29) / 0.29 * 2880 * 3.5e-4  # (1 - porosity) / porosity * bulk density * Freundlich factor


def diffusion_sorption(u, t, steps=40, newton=3):
    """R(u) u_t = D u_xx on (0, 1), R = 1 + s n_f (u + 1e-6)^(n_f - 1); u = 1 on the left, u = -D u_x on the right. (B, n)

    The total amount, dissolved and sorbed, is S(u) = u + s (u + 1e-6)^n_f with S' = R, which gives the conservation law
    S(u)_t = D u_xx. Space: finite volumes, order 2. Time: the two-stage implicit method of Alexander (1977), order 2, L-stable
    because the initial data do not satisfy the boundary conditions:
        S(u1) = S(u) + g dt D u1_xx,   S(u2) = S(u) + (1 - g) dt D u1_xx + g dt D u2_xx,   g = 1 - 1 / sqrt 2,   u <- u2.
    Each stage is solved by Newton's method; its matrix R - g dt D d_xx is tridiagonal and diagonally dominant.
    """
    n, gamma, u = u.shape[1], 1 - 1 / math.sqrt(2), u.T  # (n, B)
    mirror = (D_SORPTION * n - 0.5) / (D_SORPTION * n + 0.5)  # ghost value u' on the right: (u + u') / 2 = -D (u' - u) n
    below, middle, above = torch.ones(3, n, 1, dtype=u.dtype, device=u.device)  # diagonals of the second difference, (n, 1)
    middle *= -2
    below[0], middle[0], middle[-1], above[-1] = 0, -3, mirror - 2, 0  # ghost value on the left: u' = 2 - u

    def total(u):
        return u + RETAINED * (u + 1e-6) ** N_F

    def flow(u):  # D u_xx
        return D_SORPTION * n**2 * torch.cat([2 - u[:1], u, mirror * u[-1:]]).diff(n=2, dim=0)

    def stage(u, known, c):  # S(u) - c D u_xx = known
        scale = -c * D_SORPTION * n**2
        for _ in range(newton):
            capacity = 1 + RETAINED * N_F * (u + 1e-6) ** (N_F - 1)  # R
            wrong = total(u) - c * flow(u) - known
            u = (u - tridiagonal(scale * below, capacity + scale * middle, scale * above, wrong)).clamp(min=0)
        return u

    for dt in graded(t, steps, 3):
        before = total(u)
        u1 = stage(u, before, gamma * dt)
        u = stage(u1, before + (1 - gamma) * dt * flow(u1), gamma * dt)
    return u.T


GAMMA = 5 / 3  # ratio of specific heats


def gas(mass, x, v, p, t, viscosity, length, steps):
    """Compressible flow in Lagrangian coordinates: cells of constant mass, whose left faces x move with velocity v; all (n, B).

        x_t = v,   v_t = (s - p)_m,   e_t = (s - p) v_m,   s = nu rho^2 v_m,   e = p / ((g - 1) rho),   m the mass coordinate

    Staggered grid (von Neumann and Richtmyer 1950): v at the faces, p and rho = mass / width in the cells. A time step is the
    implicit midpoint rule with linearised pressure, p(t + dt/2) = p - dt/2 g p rho v_m + heating: one tridiagonal system for
    the velocity at the midpoint. Order 2. Mass, momentum and energy are conserved up to rounding errors. Structures that move
    with the gas, such as density jumps, are not smeared. The step size is not limited by the speed of sound (explicit: to 1e-4)
    or by the viscosity (explicit: to 4e-6).

    Returns: x, v, p after the time t.
    """
    at_face = (mass + mass.roll(1, 0)) / 2  # mass assigned to a face

    def widths(x):
        return torch.cat([x[1:], x[:1] + length]) - x

    width = widths(x)
    e = p * width / ((GAMMA - 1) * mass)
    for dt in graded(t, steps, 1.5):
        now = (v.roll(-1, 0) - v) / mass  # v_m
        volume = width / mass + dt / 2 * now  # 1 / rho at the midpoint
        friction = viscosity / volume**2
        p_known = p + dt / 2 * (GAMMA - 1) * friction * now**2 / volume
        stiffness = friction + dt / 2 * GAMMA * p * mass / width  # stress = stiffness v_m - p_known
        coupling = stiffness / mass
        inertia, before = 2 / dt * at_face, coupling.roll(1, 0)
        push = inertia * v + p_known.roll(1, 0) - p_known
        middle = tridiagonal(-before, inertia + before + coupling, -coupling, push)  # v at the midpoint
        change = (middle.roll(-1, 0) - middle) / mass
        e = e + dt * (stiffness * change - p_known) * change
        x, v = x + dt * middle, 2 * middle - v
        width = widths(x)
        p = (GAMMA - 1) * e * mass / width
    return x, v, p


def compressible(density, pressure, velocity, t, viscosity, begin=-1.0, end=1.0, steps=300):
    """Compressible flow in Eulerian coordinates, periodic, g = 5/3: three fields (B, n) at cell centres -> those after time t.

        rho_t + (rho v)_x = 0,   (rho v)_t + (rho v^2 + p - s)_x = 0,   s = nu rho v_x,
        (p / (g - 1) + rho v^2 / 2)_t + ((g p / (g - 1) + rho v^2 / 2 - s) v)_x = 0

    nu (viscosity) is zeta + 4/3 eta. The result on the moved cells is interpolated linearly, order 2. For flows with resolved
    shocks: their width is about nu / |jump of v|.
    """
    n, length = density.shape[1], end - begin
    places = centres(n, begin, end, density.device)
    mass, at_face = density.T * (length / n), (velocity + velocity.roll(1, 1)).T / 2  # (n, B)
    faces = (places - length / n / 2)[:, None].expand_as(mass)
    x, v, p = gas(mass, faces, at_face, pressure.T, t, viscosity, length, steps)
    right = torch.cat([x[1:], x[:1] + length])
    read = ((mass / (right - x), (x + right) / 2), (p, (x + right) / 2), (v, x))
    return tuple(interpolate(places, at.T.contiguous(), values.T, length) for values, at in read)


# ---------------------------------------------------------------------------------------------------------------------
# Two dimensions
# ---------------------------------------------------------------------------------------------------------------------


def darcy(a, force, tolerance=1e-7):
    """-div(a grad u) = force on the unit square, u = 0 on the boundary. Cell values a (B, n, n) > 0 -> u (B, n, n)

    Finite volumes: the flux between two cells uses the harmonic mean of their a, which is correct at jumps of a. Order 2 where
    a is smooth. Conjugate gradients, preconditioned by the Laplacian, which sine transforms invert: the number of iterations
    depends only on the contrast max a / min a (about 13 for 4, 19 for 10), not on the grid. Stops at
    |residual| < tolerance |force|.
    """
    n = a.shape[-1]
    basis, eigenvalues = sines(n, a.device)
    inverse = -1 / (eigenvalues[:, None] + eigenvalues)  # (n, n)
    columns = pad(2 * a[:, :, 1:] * a[:, :, :-1] / (a[:, :, 1:] + a[:, :, :-1]), (1, 1))  # (B, n, n + 1) faces
    rows = pad(2 * a[:, 1:] * a[:, :-1] / (a[:, 1:] + a[:, :-1]), (0, 0, 1, 1))  # (B, n + 1, n)
    columns[:, :, [0, -1]], rows[:, [0, -1]] = 2 * a[:, :, [0, -1]], 2 * a[:, [0, -1]]  # the boundary is half a cell away

    def apply(u):
        across, down = columns * pad(u, (1, 1)).diff(dim=2), rows * pad(u, (0, 0, 1, 1)).diff(dim=1)  # minus the flux, times h
        return -(n**2) * (across.diff(dim=2) + down.diff(dim=1))

    def precondition(r):
        return basis.T @ (inverse * (basis @ r @ basis.T)) @ basis

    def dot(v, w):  # clamped: a sample that has converged must not divide by 0 while others continue
        return (v * w).sum((1, 2), keepdim=True).clamp(min=1e-300)

    u, r = torch.zeros_like(a), force * torch.ones_like(a)
    enough = tolerance**2 * dot(r, r)
    z = direction = precondition(r)
    size = dot(r, z)
    while (dot(r, r) > enough).any():
        moved = apply(direction)
        step = size / dot(direction, moved)
        u, r = u + step * direction, r - step * moved
        z = precondition(r)
        size, before = dot(r, z), size
        direction = z + size / before * direction
    return u


def shallow_water(h, t, size, radial=True, g=1.0):
    """Shallow water from rest, radial around r = 0 or, with radial=False, on a line. Heights h (B, n) on (0, size) -> (B, n)

        (r h)_t + (r q)_r = 0,   (r q)_t + (r (q v + g h^2 / 2))_r = g h^2 / 2,   q = h v    (a line: r = 1, no right-hand side)

    A radial dam break stays radial until it reaches a wall. It can therefore be solved in one dimension, with a finer grid than
    in two. Finite volumes: van Leer's (1977) limiter for the slopes of h and v, fluxes of Harten, Lax and van Leer (HLL, 1983),
    Heun's two-stage method (strong-stability-preserving). Order 2 where smooth, 1 at a shock. Outflow at the boundaries.
    """
    n = h.shape[1]
    width, q = size / n, torch.zeros_like(h)
    face = torch.arange(n + 1, dtype=h.dtype, device=h.device) * width if radial else h.new_ones(n + 1)  # r
    middle = (face[1:] + face[:-1]) / 2

    def rate(h, q):
        w = pad(torch.stack([h, q / h], 1), (2, 2), mode="replicate")  # (B, 2, n + 4)
        d = w.diff()
        product = (d[..., 1:] * d[..., :-1]).clamp(min=0)
        slope = torch.where(product > 0, 2 * product / (d[..., 1:] + d[..., :-1]), 0)  # harmonic mean, (B, 2, n + 2)
        w_l, w_r = (w[..., 1:-1] + slope / 2)[..., :-1], (w[..., 1:-1] - slope / 2)[..., 1:]  # at the n + 1 faces
        (h_l, v_l), (h_r, v_r) = w_l.unbind(1), w_r.unbind(1)
        c_l, c_r = (g * h_l).sqrt(), (g * h_r).sqrt()
        s_l, s_r = torch.minimum(v_l - c_l, v_r - c_r).clamp(max=0), torch.maximum(v_l + c_l, v_r + c_r).clamp(min=0)

        def hll(f_l, f_r, u_l, u_r):
            return face * (s_r * f_l - s_l * f_r + s_l * s_r * (u_r - u_l)) / (s_r - s_l)

        q_l, q_r = h_l * v_l, h_r * v_r
        mass = hll(q_l, q_r, h_l, h_r).diff()
        momentum = hll(q_l * v_l + g / 2 * h_l**2, q_r * v_r + g / 2 * h_r**2, q_l, q_r).diff()
        return -mass / (middle * width), -momentum / (middle * width) + radial * g / 2 * h**2 / middle

    while t > 0:
        dt = min(t, 0.45 * width / float(((q / h).abs() + (g * h).sqrt()).max()))
        h_t, q_t = rate(h, q)
        h1, q1 = h + dt * h_t, q + dt * q_t
        h_t, q_t = rate(h1, q1)
        h, q, t = (h + h1 + dt * h_t) / 2, (q + q1 + dt * q_t) / 2, t - dt
    return h


def fitzhugh_nagumo(u, v, t, size=2.0, d_u=1e-3, d_v=5e-3, k=5e-3, steps=80):
    """u_t = D_u lap u + u - u^3 - k - v,   v_t = D_v lap v + u - v   on a square, no-flux boundaries. u, v (B, n, n)

    lap is the five-point difference, as in the benchmark: the initial values are independent noise per cell, so the grid is a
    part of the problem. Strang splitting, order 2, into three flows that are solved exactly:
        linear     u' = u - v - k, v' = u - v:      with w = u - v, w' = -k: both change by dt w - dt^2 k / 2, u also by -dt k
        cubic      u' = -u^3:                       u <- u / sqrt(1 + 2 u^2 dt)
        diffusion  along rows and columns: u <- H u H^T, H = exp(dt D d_xx) in the cosine basis.
    """
    n = u.shape[-1]
    basis, eigenvalues = cosines(n, u.device)

    def cubic(u, dt):
        return u * torch.rsqrt(1 + 2 * dt * u**2)

    def linear(u, v, dt):
        more = dt * (u - v) - dt**2 * k / 2
        return u + more - dt * k, v + more

    for dt in graded(t, steps, 1.5):
        u, v = linear(u, v, dt / 2)
        u = cubic(u, dt / 2)
        heat_u, heat_v = ((basis.T * torch.exp(dt * d / size**2 * eigenvalues)) @ basis for d in (d_u, d_v))  # (n, n)
        u, v = heat_u @ u @ heat_u, heat_v @ v @ heat_v  # H is symmetric
        u, v = linear(cubic(u, dt / 2), v, dt / 2)
    return u, v


# ---------------------------------------------------------------------------------------------------------------------
# Random initial functions, as in the benchmark
# ---------------------------------------------------------------------------------------------------------------------


def waves(rng, n, modes, length=1.0, windowed=0.1, device="cpu"):
    """Draw n random functions u(x) = +-sum_j A_j sin(2 pi j c_j x / length + phi_j), j = 1..modes.

    Two j are drawn with replacement, and c_j = 0, 1, 2 counts how often j was drawn. A wave that was not drawn is therefore a
    constant, which gives most functions a nonzero mean, and a wave drawn twice has twice the wave number (as in the benchmark's
    generator, but not in its paper). A is in (0, 1). With probability 0.1 the absolute value is taken. With probability
    `windowed`, u is set to 0 outside an interval from 0.1..0.45 to 0.55..0.9, with edges of width 0.01. All draws are
    independent (the benchmark reuses some keys), and the waves are periodic (those of the benchmark are off by one cell).

    Returns: function of x (m,) -> (n, m).
    """
    drawn = rng.integers(1, modes + 1, (n, 2))
    count = (drawn[:, :, None] == np.arange(1, modes + 1)).sum(1)  # c (n, modes)
    k = 2 * math.pi / length * np.arange(1, modes + 1) * count
    amplitude, phase = rng.random((n, modes)), 2 * math.pi * rng.random((n, modes))
    absolute, sign, window = rng.random((n, 1)) < 0.1, rng.choice([-1.0, 1.0], (n, 1)), rng.random((n, 1)) < windowed
    left, right = rng.uniform(0.1, 0.45, (n, 1)), rng.uniform(0.55, 0.9, (n, 1))
    parts = (k, amplitude, phase, absolute, sign, window, left, right)
    k, amplitude, phase, absolute, sign, window, left, right = (torch.from_numpy(part).to(device) for part in parts)

    def u(x):
        total = sum(amplitude[:, j, None] * torch.sin(k[:, j, None] * x + phase[:, j, None]) for j in range(modes))  # (n, m)
        total = sign * torch.where(absolute, total.abs(), total)
        inside = (torch.tanh((x - left) / 0.01) - torch.tanh((x - right) / 0.01)) / 2
        return torch.where(window, total * inside, total)

    return u


def to_unit(u):
    """Scale each function to minimum 0 and maximum 1: (B, n) -> (B, n)"""
    low, high = u.amin(1, keepdim=True), u.amax(1, keepdim=True)
    return (u - low) / (high - low)


# ---------------------------------------------------------------------------------------------------------------------
# The datasets: (rng, samples B, cells per row n, device, released, test) -> input x, target y, (B, n) or (B, n, n)
# ---------------------------------------------------------------------------------------------------------------------


def advection1d(rng, B, n, device, released, test):
    """From t = 0 to 2 at speed 0.4. Released: 0.8, since the flux lacked a factor 1/2 (until August 2023)."""
    u0, x = waves(rng, B, 4, device=device), centres(n, device=device)
    return u0(x), advection(u0, x, 2.0, 0.8 if released else 0.4)


def burgers1d(rng, B, n, device, released, test):
    """From t = 0 to 2 with D = 1 / pi, on (0, 1). Released: the flux is u^2, the domain (-1, 1) (until October 2023)."""
    begin, flux = (-1.0, 2) if released else (0.0, 1)
    u = waves(rng, B, 4, 1 - begin, device=device)(centres(n, begin, device=device))
    return u, burgers(flux * u, 2.0, 1 / math.pi, 1 - begin) / flux  # u has flux u^2 if 2 u has flux u^2 / 2


def diffusion_reaction1d(rng, B, n, device, released, test):
    """From t = 0 to 0.29. Released: the targets of the test set are at t = 0.99."""
    u = to_unit(waves(rng, B, 4, device=device)(centres(n, device=device)))
    return u, diffusion_reaction(u, 0.99 if released and test else 0.29)


def diffusion_sorption1d(rng, B, n, device, released, test):
    """From a constant, uniform in (0, 0.2), at t = 0 to t = 500. Released: the targets of the test set are at t = 495."""
    u = torch.from_numpy(rng.uniform(0, 0.2, (B, 1))).to(device).expand(B, n)
    return u, diffusion_sorption(u, 495.0 if released and test else 500.0)


def navier_stokes1d(rng, B, n, device, released, test):
    """Density, pressure and velocity, concatenated (B, 3 n), from t = 0 to 1 on (-1, 1), eta = zeta = 0.1.

    Initial density and pressure: waves scaled to (0, 1), times a factor plus an offset, both log-uniform in (1, 10) for the
    density and in (10, 100) for the pressure.
    """
    x = centres(n, -1, device=device)
    density, pressure, velocity = (waves(rng, B, 3, 2.0, 0.5, device)(x) for _ in range(3))
    scales = torch.from_numpy(10 ** rng.random((4, B, 1))).to(device)
    density, pressure = to_unit(density) * scales[0] + scales[1], 10 * (to_unit(pressure) * scales[2] + scales[3])
    y = compressible(density, pressure, velocity, 1.0, viscosity=0.1 + 4 / 3 * 0.1)
    return torch.cat([density, pressure, velocity], 1), torch.cat(y, 1)


def darcy_nas(rng, B, n, device, released, test):
    """NAS-Bench-360: a = 12 where a Gaussian field with covariance (-lap + 9)^-2 is positive, else 3; force 1."""
    k = np.arange(n)
    strength = 1 / (math.pi**2 * (k[:, None] ** 2 + k**2) + 9)  # of each cosine mode; only the sign of the field matters
    strength[0, 0] = 0
    basis = cosines(n, device)[0]
    field = basis.T @ torch.from_numpy(strength * rng.standard_normal((B, n, n))).to(device) @ basis
    a = 3 + 9 * (field >= 0).to(field.dtype)
    return a, darcy(a, 1.0)


BELLS = 1.8521453  # expected sum, 5 E_s[g^2]; g = sqrt(pi s) erf(1 / sqrt s) - s (1 - exp(-1 / s)): expected bell in 1D


def darcy2d(rng, B, n, device, released, test):
    """PDEBench: a = 1 where the sum of five bells exp(-r^2 / s), s uniform in (0, 0.5), exceeds its mean, else 0.1.

    The force is 0.1. The mean is the expected value; the benchmark takes the mean of 200 samples, which makes them depend on
    each other. The target is the steady solution; the benchmark stops a relaxation at t = 1.75, where much of its random
    initial state is still left.
    """
    place, s = (torch.from_numpy(rng.random(shape)).to(device) for shape in ((2, B, 5, 1), (B, 5, 1)))
    x = centres(n, device=device)
    rows, columns = (torch.exp(-((x - centre) ** 2) / (s / 2)) for centre in place)  # (B, 5, n)
    field = rows.transpose(1, 2) @ columns  # (B, n, n)
    a = 0.1 + 0.9 * (field > BELLS).to(field.dtype)
    return a, darcy(a, 0.1)


def shallow_water2d(rng, B, n, device, released, test):
    """Water height on (-2.5, 2.5)^2, from 2 inside a disc and 1 outside, to t = 1. Released: the test set is at t = 0.99.

    The radius is uniform in (0.3, 0.7). The radial solution on 4 n cells is averaged over 4 x 4 points per cell of the plane.
    At t = 1 the front is at 2.0, so the boundaries have no influence.
    """
    radius = torch.from_numpy(rng.uniform(0.3, 0.7, (B, 1))).to(device)
    face = torch.linspace(0, 2.5, 4 * n + 1, dtype=radius.dtype, device=device)
    inside = (radius**2 - face[:-1] ** 2) / (face[1:] ** 2 - face[:-1] ** 2)  # area share of a ring within the radius
    h = shallow_water(1 + inside.clamp(0, 1), 0.99 if released and test else 1.0, 2.5)  # (B, 4 n)
    x, fine = centres(n, -2.5, 2.5, device), centres(4 * n, -2.5, 2.5, device)
    at = (torch.hypot(fine[:, None], fine) * 4 * n / 2.5 - 0.5).clamp(0, 4 * n - 1.001)  # (4 n, 4 n) radial index
    below = at.long()
    plane = torch.lerp(h[:, below], h[:, below + 1], at - below)  # (B, 4 n, 4 n)
    y = plane.view(B, n, 4, n, 4).mean((2, 4))  # (B, n, n)
    return 1 + (torch.hypot(x[:, None], x) <= radius[:, :, None]).to(y.dtype), y


def diffusion_reaction2d(rng, B, n, device, released, test):
    """The inhibitor v at t = 5 from the activator u at t = 0, both normal noise at t = 0. Released: the test set is at 4.95."""
    u, v = torch.from_numpy(rng.standard_normal((2, B, n, n))).to(device)
    return u, fitzhugh_nagumo(u, v, 4.95 if released and test else 5.0)[1]


@dataclass(frozen=True)
class Set:
    """A simulated dataset."""

    draw: Callable
    n: int  # cells per row
    every: int  # of which each `every`-th is kept
    tiny: int  # cells per row at the tiny scale, all are kept
    samples: tuple[int, int] = (9000, 1000)  # training, test
    space: int = 1  # dimensions


SETS = {
    "darcy": Set(darcy_nas, 421, 5, 85, (1000, 100), 2),
    "advection1d": Set(advection1d, 1024, 4, 256),
    "burgers1d": Set(burgers1d, 1024, 1, 256),
    "diffusion_reaction1d": Set(diffusion_reaction1d, 1024, 1, 256),
    "diffusion_sorption1d": Set(diffusion_sorption1d, 1024, 1, 256),
    "navier_stokes1d": Set(navier_stokes1d, 1024, 1, 256),
    "darcy2d": Set(darcy2d, 128, 2, 64, (9000, 1000), 2),
    "shallow_water2d": Set(shallow_water2d, 128, 1, 64, (900, 100), 2),
    "diffusion_reaction2d": Set(diffusion_reaction2d, 128, 1, 64, (900, 100), 2),
}


def simulate(name, samples, n, every=1, test=False, released=False, device="cpu"):
    """Solve a dataset piece by piece.

    Args:
        name: key of SETS; samples: number of samples; n: cells per row, of which each `every`-th is kept.
        test: the test set, which has separate random draws.
        released: as in the official files, including their mistakes.
    Yields: arrays x, y, float32, (B, L) or (B, H, W).
    """
    of = SETS[name]
    piece = max(1, 2**18 // n**of.space)  # 2 MB per array, to fit into the CPU cache
    for i in range(0, samples, piece):
        rng = np.random.default_rng([zlib.crc32(name.encode()), test, i // piece])
        fields = of.draw(rng, min(piece, samples - i), n, torch.device(device), released, test)
        yield tuple(u[:, *(slice(None, None, every),) * of.space].float().cpu().numpy() for u in fields)


# ---------------------------------------------------------------------------------------------------------------------
# python tasks/pde.py
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    task: Literal["all", *SETS] = "all"
    """the dataset"""
    samples: int | None = None
    """number of solutions; default: all of the training and test set"""
    n: int | None = None
    """cells per row; default: as in the benchmark"""
    device: Literal["cpu", "cuda"] = "cpu"
    """device of the solvers"""


def main(args):
    if args.device == "cuda" and not torch.cuda.is_available():
        print("pde.py: no GPU is available. Omit --device cuda.", file=sys.stderr)
        raise SystemExit(2)
    for name in ("samples", "n"):
        if (value := getattr(args, name)) is not None and value < 1:
            print(f"pde.py: --{name} {value} must be positive.", file=sys.stderr)
            raise SystemExit(2)
    if args.n and args.n & (args.n - 1) and args.task in ("all", "navier_stokes1d", "diffusion_sorption1d"):
        print(f"pde.py: --n {args.n} must be a power of 2 for diffusion_sorption1d and navier_stokes1d.", file=sys.stderr)
        raise SystemExit(2)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU cores"
    print(f"Solved on {where}, torch {torch.__version__}\n")
    print("| task | cells | solutions | seconds | full set | seconds for it |\n|---|---|---|---|---|---|")
    for name in SETS if args.task == "all" else [args.task]:
        n, full = args.n or SETS[name].n, sum(SETS[name].samples)
        samples, start = args.samples or full, time.perf_counter()
        for _ in simulate(name, samples, n, device=args.device):
            pass
        seconds = time.perf_counter() - start
        print(f"| {name} | {n} | {samples:,} | {seconds:.1f} | {full:,} | {seconds * full / samples:.0f} |", flush=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args, description=__doc__))
