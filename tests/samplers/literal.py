"""Solvers as their papers and k-diffusion write them: float64 loops over an array, independent of the code under test.

All take a denoiser ``D(y, r)`` in the coordinates y = x / alpha and noise levels r = sigma / alpha, ``levels`` (N + 1,), and a list
``noise`` that is popped from the front; they return the final y.
"""

from __future__ import annotations

from itertools import pairwise
from math import exp, expm1, inf, log, sqrt

import numpy as np


def euler(D, y, levels, noise=(), s_churn=0.0, s_tmin=0.0, s_tmax=inf, s_noise=1.0, correct=False):
    """Karras et al. 2022, algorithm 2; without its correction it is Euler's method."""
    noise, n = list(noise), len(levels) - 1
    for i in range(n):
        r, r_next = levels[i], levels[i + 1]
        gamma = min(s_churn / n, sqrt(2) - 1) if s_tmin <= r <= s_tmax else 0.0
        r_hat = r + gamma * r
        if gamma > 0:
            y = y + sqrt(r_hat**2 - r**2) * s_noise * noise.pop(0)
        slope = (y - D(y, r_hat)) / r_hat
        y_next = y + (r_next - r_hat) * slope
        if correct and r_next != 0:
            y_next = y + (r_next - r_hat) * (0.5 * slope + 0.5 * (y_next - D(y_next, r_next)) / r_next)
        y = y_next
    return y


def heun(D, y, levels, noise=(), **churn):
    return euler(D, y, levels, noise, correct=True, **churn)


def euler_ancestral(D, y, levels, noise, eta=1.0, s_noise=1.0):
    noise = list(noise)
    for r, r_next in pairwise(levels):
        up = min(r_next, eta * sqrt(r_next**2 * (r**2 - r_next**2) / r**2))
        down = sqrt(r_next**2 - up**2)
        y = y + (down - r) * (y - D(y, r)) / r
        if r_next > 0:
            y = y + s_noise * up * noise.pop(0)
    return y


def ddim(D, y, levels, noise=(), eta=0.0):
    """Song et al. 2021a, equation 12, on the variance preserving process with these levels."""
    noise = list(noise)
    for r, r_next in pairwise(levels):
        a, a_next = 1 / (1 + r**2), 1 / (1 + r_next**2)  # alpha-bar
        x = y * sqrt(a)
        d = D(y, r)
        eps = (x - sqrt(a) * d) / sqrt(1 - a)
        std = eta * sqrt((1 - a_next) / (1 - a)) * sqrt(1 - a / a_next)
        x = sqrt(a_next) * d + sqrt(1 - a_next - std**2) * eps
        if std > 0:
            x = x + std * noise.pop(0)
        y = x / sqrt(a_next)
    return y


def ddpm(D, y, levels, noise, variance="small"):
    """Ho et al. 2020, equations 6 and 7, on the variance preserving process with these levels."""
    noise = list(noise)
    for r, r_next in pairwise(levels):
        a, a_next = 1 / (1 + r**2), 1 / (1 + r_next**2)
        beta = 1 - a / a_next
        x = sqrt(a_next) * beta / (1 - a) * D(y, r) + sqrt(1 - beta) * (1 - a_next) / (1 - a) * (y * sqrt(a))
        if r_next > 0:
            x = x + sqrt(beta if variance == "large" else (1 - a_next) / (1 - a) * beta) * noise.pop(0)
        y = x / sqrt(a_next)
    return y


def consistency(D, y, levels, noise):
    """Song et al. 2023, algorithm 1, with epsilon = 0."""
    noise = list(noise)
    for r, r_next in pairwise(levels):
        y = D(y, r)
        if r_next > 0:
            y = y + r_next * noise.pop(0)
    return y


def lms(D, y, levels, noise=(), order=4):
    """k-diffusion's sample_lms: the Lagrange polynomials of the last slopes, integrated by quadrature."""
    slopes = []
    for i in range(len(levels) - 1):
        slopes.append((y - D(y, levels[i])) / levels[i])
        nodes = levels[max(i + 1 - order, 0) : i + 1]
        points, weights = np.polynomial.legendre.leggauss(4)
        half = (levels[i + 1] - levels[i]) / 2
        for j, slope in zip(range(len(nodes)), slopes[-len(nodes) :], strict=True):
            u = levels[i] + half * (points + 1)
            basis = np.prod([(u - nodes[k]) / (nodes[j] - nodes[k]) for k in range(len(nodes)) if k != j], axis=0)
            y = y + half * np.sum(weights * basis) * slope
    return y


def dpmpp_2m(D, y, levels, noise=(), variant="midpoint"):
    """Lu et al. 2022b, algorithm 2; "heun" replaces the second term's weight by that of the exactly integrated line."""
    old = h_last = None
    for r, r_next in pairwise(levels):
        d, h = D(y, r), (log(r) - log(r_next) if r_next > 0 else inf)
        phi = -expm1(-h)
        y_next = r_next / r * y + phi * d
        if old is not None and r_next > 0:
            y_next = y_next + (0.5 * phi if variant == "midpoint" else 1 - phi / h) * (d - old) * h / h_last
        y, old, h_last = y_next, d, h
    return y


def dpmpp_2m_sde(D, y, levels, noise, variant="midpoint", eta=1.0, s_noise=1.0):
    """k-diffusion's sample_dpmpp_2m_sde."""
    noise = list(noise)
    old = h_last = None
    for r, r_next in pairwise(levels):
        d = D(y, r)
        if r_next == 0:
            y = d
            continue
        h = log(r) - log(r_next)
        eta_h = eta * h
        phi = -expm1(-h - eta_h)
        y = r_next / r * exp(-eta_h) * y + phi * d
        if old is not None:
            slope = (d - old) / (h_last / h)
            y = y + (0.5 * phi if variant == "midpoint" else 1 + phi / (-h - eta_h)) * slope
        if eta:
            y = y + r_next * sqrt(-expm1(-2 * eta_h)) * s_noise * noise.pop(0)
        old, h_last = d, h
    return y


def dpmpp_3m_sde(D, y, levels, noise, eta=1.0, s_noise=1.0):
    """k-diffusion's sample_dpmpp_3m_sde."""
    noise = list(noise)
    d1 = d2 = h1 = h2 = None
    for r, r_next in pairwise(levels):
        d = D(y, r)
        if r_next == 0:
            y = d
            continue
        h = log(r) - log(r_next)
        h_eta = h * (eta + 1)
        y = exp(-h_eta) * y - expm1(-h_eta) * d
        phi_2 = expm1(-h_eta) / h_eta + 1
        if h2 is not None:
            r0, r1 = h1 / h, h2 / h
            d1_0, d1_1 = (d - d1) / r0, (d1 - d2) / r1
            first = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            second = (d1_0 - d1_1) / (r0 + r1)
            y = y + phi_2 * first - (phi_2 / h_eta - 0.5) * second
        elif h1 is not None:
            y = y + phi_2 * (d - d1) / (h1 / h)
        if eta:
            y = y + r_next * sqrt(-expm1(-2 * h * eta)) * s_noise * noise.pop(0)
        d1, d2, h1, h2 = d, d1, h, h1
    return y


def unipc(D, y, levels, noise=(), order=2, variant="bh2", corrector=True):
    """Zhao et al. 2023, algorithms 5 and 6, with data prediction; the last steps lower the order."""

    def update(k, t, y_from, model_t):
        """One UniP (model_t None) or UniC update of order k to level index t."""
        s = t - 1
        h = log(levels[s]) - log(levels[t]) if levels[t] > 0 else inf
        r = [(log(levels[s]) - log(levels[s - j])) / h for j in range(1, k)] + [1.0]
        big_b = -h if variant == "bh1" else expm1(-h)
        g, fact, rows, rhs = expm1(-h) / -h - 1, 1, [], []
        for j in range(k):
            rows.append([v**j for v in r])
            rhs.append(g * fact / big_b)
            fact *= j + 2
            g = g / -h - 1 / fact
        out = levels[t] / levels[s] * y_from - expm1(-h) * history[s]
        differences = [(history[s - j] - history[s]) / r[j - 1] for j in range(1, k)]
        if model_t is None:
            rho = [0.5] if k == 2 else np.linalg.solve(np.array(rows)[:-1, :-1], rhs[:-1]) if k > 2 else []
        else:
            rho = [0.5] if k == 1 else np.linalg.solve(np.array(rows), rhs)
            differences.append(model_t - history[s])
        return out - big_b * sum(c * d for c, d in zip(rho, differences, strict=True)) if differences else out

    n, history, used, last = len(levels) - 1, {}, 0, None
    for i in range(n):
        d = D(y, levels[i])
        if corrector and i > 0:
            y = update(used, i, last, d)
        history[i], last = d, y
        used = min(order, i + 1, n - i)
        y = update(used, i + 1, y, None)
    return y


def flow_euler(v, x, times):
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * v(x, t)
    return x


def flow_heun(v, x, times):
    for t, t_next in pairwise(times):
        slope = v(x, t)
        x_next = x + (t_next - t) * slope
        if t_next > 0:
            x_next = x + (t_next - t) * 0.5 * (slope + v(x_next, t_next))
        x = x_next
    return x
