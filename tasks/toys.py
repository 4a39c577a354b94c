"""Toy data: generated samples with the shapes of a task's files, for the tiny scale, tests and CI. (n, seed) -> x, y"""

import functools

import numpy as np

from tasks.fields import FAR, SIDE
from tasks.files import of_files
from tasks.images import project_to_sphere, random_rotations
from tasks.signals import RATE
from tasks.text import WORDS

SHAPES, TEXTURES = ("ring", "triangle", "cross"), ("plain", "striped", "dotted")
IMAGE_NAMES = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)  # 3 shape + texture


def wave_names(classes, lowest=2.0, ratio=1.5):
    """What the classes of `signals` are: (classes,) str"""
    return tuple(f"wave of {lowest * ratio**k:.3g} periods" for k in range(classes))


def images(n, seed, size):
    """Images whose class is the combination of a shape (ring, triangle, cross) and its texture (plain, stripes, dots).

    Position, size, angle and all colours are random: neither the colours nor the texture nor the outline alone determine the
    class.

    Returns: images (n, 3, size, size) uint8, labels (n,) int64 in 0..8, 3 shape + texture.
    """
    rng = np.random.default_rng(seed)
    shape, texture = rng.integers(3, size=n), rng.integers(3, size=n)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    row, column = axis[None, :, None], axis[None, None, :]  # coordinates of the image, in [-1, 1]

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    def turned(rows, columns, angle):
        c, s = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        return c * rows + s * columns, c * columns - s * rows

    def pattern(kind):  # (n, size, size) in {0, 1}; a period is about a quarter of the image
        u, v = turned(row, column, uniform(0, 2 * np.pi))
        frequency, phase = uniform(10, 14, 1, 1), uniform(0, 2 * np.pi, 2, 1, 1)
        a, b = np.sin(frequency * u + phase[:, 0]), np.sin(frequency * v + phase[:, 1])
        kinds = [np.zeros_like(a), a, a + b - 0.7]  # plain, stripes, dots
        return np.take_along_axis(np.stack(kinds), kind[None, :, None, None], axis=0)[0] > 0

    radius = uniform(0.7, 0.95)[:, None, None]
    u, v = turned(row - uniform(-0.1, 0.1)[:, None, None], column - uniform(-0.1, 0.1)[:, None, None], uniform(0, 2 * np.pi))
    u, v = u / radius, v / radius
    r, big, small = np.hypot(u, v), np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    triangle = np.maximum(abs(v) * 0.866 + u * 0.5, -u)  # distance to the nearest side
    inside = [(r > 0.45) & (r < 1), triangle < 0.55, (small < 0.3) & (big < 1)]  # ring, triangle, cross
    inside = np.take_along_axis(np.stack(inside), shape[None, :, None, None], axis=0)[0][:, None]  # (n, 1, size, size)
    colours = uniform(0, 255, 3, 3, 1, 1)
    front = np.where(pattern(texture)[:, None], colours[:, 0], colours[:, 1])
    x = np.where(inside, front, colours[:, 2]) + rng.normal(0, 15, (n, 3, size, size)).astype(np.float32)
    return x.clip(0, 255).astype(np.uint8), 3 * shape + texture


def spherical(n, seed, size):
    """Toy images in the projection of the real task: x (n, 3, size, size) uint8, y (n,)."""
    x, y = images(n, seed, 32)
    return project_to_sphere(x, random_rotations(n, [seed, 1]), b=size // 2), y  # rotations have a separate random stream


def fields(n, seed, shape, output, cycles=3):
    """Travelling waves: x (n, *shape) at the start, y (n, *output) shifted by a tenth; high frequencies are damped.

    Four waves with random direction, phase and amplitude, and up to `cycles` periods per axis: their sum if C = 1, otherwise
    one wave per channel. Shapes: (1, L) and (1, L) in 1D, (C, H, W) and (H, W) in 2D.
    """
    rng, space = np.random.default_rng(seed), shape[1:]
    k = rng.integers(1, cycles + 1, (n, 4, len(space))) * rng.choice([-1, 1], (n, 4, len(space)))  # periods
    now = rng.uniform(0.2, 1, (n, 4)) * np.exp(2j * np.pi * rng.random((n, 4)))  # amplitude and phase
    later = now * np.exp(-2j * np.pi * 0.1 * k.sum(-1) - 0.05 * (k**2).sum(-1))
    along = [np.exp(2j * np.pi * k[..., i, None] * np.arange(m) / m).astype(np.complex64) for i, m in enumerate(space)]
    axes = "hw"[: len(space)]
    product = ",".join(["nj", *(f"nj{axis}" for axis in axes)])  # of each wave (n, 4, *space)
    x = np.einsum(f"{product}->n{'j' * (shape[0] > 1)}{axes}", now.astype(np.complex64), *along, optimize=True).imag
    y = np.einsum(f"{product}->n{axes}", later.astype(np.complex64), *along, optimize=True).imag
    x = x[:, np.arange(shape[0]) % 4] if shape[0] > 1 else x[:, None]  # (n, C, *space)
    return x, y.reshape(n, *output)


def proteins(n, seed):
    """Waves with the shapes of psicov, generated when accessed: x (n, 57, 512, 512), y (n, 512, 512) from 2 to 16."""

    def enlarged(row, part):
        coarse = fields(1, (seed, row), (57, SIDE // 8, SIDE // 8), (SIDE // 8, SIDE // 8))[part][0]
        fine = coarse.repeat(8, -1).repeat(8, -2)  # (..., 64, 64) -> (..., 512, 512)
        return (9 + 4 * fine).clip(2, FAR) if part else fine

    return tuple(of_files(functools.partial(enlarged, part=part), range(n)) for part in (0, 1))


def hits(n, seed):
    """Raw layout of cosmic: bright bars on waves. x (n, 1, 129, 128), row 128: sky level; y (n, 128, 128): mask of the bars."""
    rng = np.random.default_rng(seed)
    x, _ = fields(n, seed, (1, 128, 128), (128, 128))
    y = np.zeros((n, 128, 128), np.float32)
    for i, (row, column, height, width) in enumerate(zip(*rng.integers(8, 64, (4, n)), strict=True)):
        y[i, 2 * row - 8 : 2 * row - 8 + height, 2 * column - 8 : 2 * column - 8 + width] = 1
    y[:, 0, :8] = np.nan
    return np.pad(x + 3 * np.nan_to_num(y)[:, None], ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=0.1), y


def signals(n, seed, shape, classes, many=False, lowest=2.0, ratio=1.5):
    """Noisy waves whose number of periods is the class: x (n, *shape) float32, the last axis is time.

    Class k has lowest * ratio^k periods. many=True: multi-label, y (n, classes) 0 or 1; else y (n,).
    """
    rng = np.random.default_rng(seed)
    present = rng.random((n, classes)) < 0.3 if many else np.eye(classes, dtype=bool)[rng.integers(classes, size=n)]
    time = np.arange(shape[-1], dtype=np.float32) / shape[-1]
    rows = int(np.prod(shape[:-1]))
    x = 0.3 * rng.standard_normal((n, rows, shape[-1]), dtype=np.float32)
    for k in range(classes):
        phase, strength = rng.random((2, n, rows, 1), dtype=np.float32)
        wave = (0.5 + strength) * np.sin(2 * np.pi * np.float32(lowest * ratio**k) * time + 2 * np.pi * phase)
        x += present[:, k, None, None] * wave  # (n, rows, time)
    return x.reshape(n, *shape), present.astype(np.float32) if many else present.argmax(1)


def dna(n, seed):
    """Layout of deepsea: the largest of four noisy signals at each position, one-hot. x (n, 4, 1000), y (n, 6) 0 or 1."""
    x, y = signals(n, seed, (4, 1000), 6, many=True)
    return np.eye(4, dtype=np.float32)[x.argmax(1)].transpose(0, 2, 1), y  # (n, 1000, 4) -> (n, 4, 1000)


def sounds(n, seed):
    """Raw layout of fsd50k, generated when accessed: tones of 200 to 1,500 Hz in noise. x (n, 2, 22050), y (n, 6) 0 or 1."""

    def sample(row):
        x, y = signals(1, (seed, row), (1, RATE), 6, many=True, lowest=200.0)
        return np.concatenate([x[0], np.zeros_like(x[0])]), y[0]

    return of_files(lambda row: sample(row)[0], range(n)), np.stack([sample(row)[1] for row in range(n)])


def table(n, seed, columns=12, classes=3):
    """Normal clusters whose centres have the same standard deviation as the clusters: x (n, 1, columns), y (n,)."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(0, 1, (classes, columns))  # the same for training and test
    y = rng.integers(classes, size=n)
    return np.float32(centres[y] + rng.normal(0, 1, (n, columns)))[:, None], y


TOPICS = ["river stone bird rain forest leaf wind hill", "market bank price trade money loan share tax",
          "goal match team player ball coach win league", "doctor nurse fever cure blood heart pill clinic"]  # fmt: skip


def text(n, seed):
    """Texts of 32 words: 30% from one of four topics, the others common words. Returns: [[str]], y (n,), 4 (classes)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(4, size=n)
    common = "the of and to a in is it was for on with".split()
    pieces = [[str(rng.choice(TOPICS[k].split() if rng.random() < 0.3 else common)) for _ in range(WORDS)] for k in y]
    return pieces, y, 4


def masks(n, seed):
    """Layout of voc: regions in one colour on another, x (n, 3, 224, 224) uint8; y (n, 128, 128), 1 inside, NaN in row 0."""
    rng = np.random.default_rng(seed)
    y = (fields(n, seed, (1, 128, 128), (128, 128), cycles=1)[0][:, 0] > 0).astype(np.float32)
    pixel = np.arange(224) * 128 // 224
    colours = rng.integers(0, 256, (2, n, 3, 1, 1), dtype=np.uint8)
    x = np.where(y[:, None, pixel[:, None], pixel] > 0, *colours)  # (n, 3, 224, 224)
    y[:, 0] = np.nan
    return x, y
