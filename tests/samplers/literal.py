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


def consistency(D, y, levels, noise, epsilon=0.0):
    """Song et al. 2023, algorithm 1."""
    noise = list(noise)
    for r, r_next in pairwise(levels):
        y = D(y, r)
        if r_next > epsilon:
            y = y + sqrt(r_next**2 - epsilon**2) * noise.pop(0)
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


def _ancestral(r, r_next, eta):
    up = min(r_next, eta * sqrt(r_next**2 * (r**2 - r_next**2) / r**2))
    return sqrt(r_next**2 - up**2), up


def dpm2(D, y, levels, noise=(), s_churn=0.0, s_tmin=0.0, s_tmax=inf, s_noise=1.0):
    """k-diffusion's sample_dpm_2."""
    noise, n = list(noise), len(levels) - 1
    for i in range(n):
        gamma = min(s_churn / n, sqrt(2) - 1) if s_tmin <= levels[i] <= s_tmax else 0.0
        hat = levels[i] * (gamma + 1)
        if gamma > 0:
            y = y + noise.pop(0) * s_noise * sqrt(hat**2 - levels[i] ** 2)
        slope = (y - D(y, hat)) / hat
        if levels[i + 1] == 0:
            y = y + slope * (levels[i + 1] - hat)
        else:
            mid = exp((log(hat) + log(levels[i + 1])) / 2)
            y_2 = y + slope * (mid - hat)
            y = y + (y_2 - D(y_2, mid)) / mid * (levels[i + 1] - hat)
    return y


def dpm2_ancestral(D, y, levels, noise, eta=1.0, s_noise=1.0):
    """k-diffusion's sample_dpm_2_ancestral."""
    noise = list(noise)
    for r, r_next in pairwise(levels):
        down, up = _ancestral(r, r_next, eta)
        slope = (y - D(y, r)) / r
        if down == 0:
            y = y + slope * (down - r)
        else:
            mid = exp((log(r) + log(down)) / 2)
            y_2 = y + slope * (mid - r)
            y = y + (y_2 - D(y_2, mid)) / mid * (down - r)
            y = y + noise.pop(0) * s_noise * up if up else y
    return y


def dpmpp_2s_ancestral(D, y, levels, noise, eta=1.0, s_noise=1.0):
    """k-diffusion's sample_dpmpp_2s_ancestral."""
    noise = list(noise)
    for r, r_next in pairwise(levels):
        down, up = _ancestral(r, r_next, eta)
        d = D(y, r)
        if down == 0:
            y = y + (y - d) / r * (down - r)
        else:
            t, t_next = -log(r), -log(down)
            h = t_next - t
            s = t + 0.5 * h
            y_2 = exp(-s) / exp(-t) * y - expm1(-h * 0.5) * d
            y = exp(-t_next) / exp(-t) * y - expm1(-h) * D(y_2, exp(-s))
        if r_next > 0 and up:
            y = y + noise.pop(0) * s_noise * up
    return y


def dpmpp_sde(D, y, levels, noise, eta=1.0, s_noise=1.0):
    """k-diffusion's sample_dpmpp_sde with r = 1/2; the noises of a step are increments of one Brownian motion over sigma."""
    noise = list(noise)
    for r, r_next in pairwise(levels):
        d = D(y, r)
        if r_next == 0:
            y = y + (y - d) / r * (r_next - r)
            continue
        t, t_next = -log(r), -log(r_next)
        s = t + (t_next - t) / 2
        middle = exp(-s)
        walk = sqrt(r - middle) * noise.pop(0) if eta else 0.0  # from r to the middle
        down, up = _ancestral(r, middle, eta)
        y_2 = down / r * y - expm1(t + log(down)) * d + walk / sqrt(r - middle) * s_noise * up
        d_2 = D(y_2, middle)
        walk = walk + (sqrt(middle - r_next) * noise.pop(0) if eta else 0.0)
        down, up = _ancestral(r, r_next, eta)
        y = down / r * y - expm1(t + log(down)) * d_2 + walk / sqrt(r - r_next) * s_noise * up
    return y


def dpmpp_singlestep(D, y, levels, noise=(), order=2, variant="midpoint"):
    """diffusers' DPMSolverSinglestepScheduler, algorithm "dpmsolver++", lower_order_final."""
    n = len(levels) - 1
    if order == 3:
        tail = {0: [1, 2, 1], 1: [1, 2, 3, 1], 2: [1, 2, 3, 1, 2]}[n % 3]
        orders = ([1, 2, 3] * n)[: n - len(tail)] + tail
    else:
        orders = [1] * n if order == 1 else [1, 2] * (n // 2) + [1] if n % 2 else [1, 2] * (n // 2 - 1) + [1, 1]
    if levels[-1] == 0:
        orders[-1] = 1
    lam = [-log(r) if r > 0 else inf for r in levels]
    first, models = y, []
    for i, k in enumerate(orders):
        if k == 1:
            first, models = y, []
        models.append(D(y, levels[i]))
        s = i - k + 1
        h = lam[i + 1] - lam[s]
        base = levels[i + 1] / levels[s] * first - expm1(-h) * models[0]
        if k == 1:
            y = base
        elif k == 2:
            d1 = (models[1] - models[0]) / ((lam[i] - lam[s]) / h)
            y = base + (-0.5 * expm1(-h) if variant == "midpoint" else expm1(-h) / h + 1) * d1
        else:
            r0, r1 = (lam[i] - lam[s]) / h, (lam[i - 1] - lam[s]) / h
            d1_0, d1_1 = (models[1] - models[0]) / r1, (models[2] - models[0]) / r0
            if variant == "midpoint":
                y = base + (expm1(-h) / h + 1) * d1_1
            else:
                d1, d2 = (r0 * d1_0 - r1 * d1_1) / (r0 - r1), 2 * (d1_1 - d1_0) / (r0 - r1)
                y = base + (expm1(-h) / h + 1) * d1 - ((expm1(-h) + h) / h**2 - 0.5) * d2
    return y


def heunpp2(D, y, levels, noise=(), s_churn=0.0, s_tmin=0.0, s_tmax=inf, s_noise=1.0):
    """ComfyUI's sample_heunpp2."""
    noise, n = list(noise), len(levels) - 1
    for i in range(n):
        r = levels[i]
        gamma = min(s_churn / n, sqrt(2) - 1) if s_tmin <= r <= s_tmax else 0.0
        r_hat = r * (gamma + 1)
        if gamma > 0:
            y = y + sqrt(r_hat**2 - r**2) * s_noise * noise.pop(0)
        slope = (y - D(y, r_hat)) / r_hat
        dt = levels[i + 1] - r_hat
        if i + 1 == n:
            y = y + slope * dt
            continue
        y_2 = y + slope * dt
        slope_2 = (y_2 - D(y_2, levels[i + 1])) / levels[i + 1]
        if i + 2 == n:
            w2 = levels[i + 1] / (2 * levels[0])
            y = y + (slope * (1 - w2) + slope_2 * w2) * dt
        else:
            y_3 = y_2 + slope_2 * (levels[i + 2] - levels[i + 1])
            slope_3 = (y_3 - D(y_3, levels[i + 2])) / levels[i + 2]
            w2, w3 = levels[i + 1] / (3 * levels[0]), levels[i + 2] / (3 * levels[0])
            y = y + ((1 - w2 - w3) * slope + w2 * slope_2 + w3 * slope_3) * dt
    return y


def restart(D, y, levels, noise, intervals=((0.1, 2.0, 9, 1),), s_noise=1.0):
    """Xu et al. 2023, with Heun's method."""
    noise = list(noise)
    inner = [r for r in levels[1:-1] if r > 0]
    for r, r_next in pairwise(levels):
        y = heun(D, y, [r, r_next])
        for t_min, t_max, steps, times in intervals:
            if r_next > 0 and r_next in inner and abs(r_next - t_min) == min(abs(v - t_min) for v in inner):
                for _ in range(times):
                    y = y + sqrt(t_max**2 - r_next**2) * s_noise * noise.pop(0)
                    ramp = np.linspace(0, 1, steps)
                    y = heun(D, y, (t_max ** (1 / 7) + ramp * (r_next ** (1 / 7) - t_max ** (1 / 7))) ** 7)
    return y


def _seeds(D, y, levels, noise, eta, s_noise, nodes, stages):
    noise = list(noise)
    for r, r_next in pairwise(levels):
        if r_next == 0:
            y = D(y, r)
            continue
        h = log(r) - log(r_next)
        h_eta = h * (1 + eta)
        models, walk, state = [], 0.0, y
        for k, (c, c_next) in enumerate(pairwise([*nodes, 1.0])):
            models.append(D(state, r * exp(-c * h)))
            level = r * exp(-c_next * h)
            if eta:
                walk = exp(-(c_next - c) * h * eta) * walk + sqrt(-expm1(-2 * (c_next - c) * h * eta)) * noise.pop(0)
            state = exp(-c_next * h_eta) * y + stages[k](h_eta, *models) + s_noise * level * walk
        y = state
    return y


def seeds_2(D, y, levels, noise, eta=1.0, s_noise=1.0):
    """ComfyUI's sample_seeds_2 with r = 1/2, alpha = 1."""
    stages = [lambda h, a: -expm1(-0.5 * h) * a, lambda h, a, b: -expm1(-h) * (a + (b - a) * 1.0)]
    return _seeds(D, y, levels, noise, eta, s_noise, [0.0, 0.5], stages)


def seeds_3(D, y, levels, noise, eta=1.0, s_noise=1.0):
    """ComfyUI's sample_seeds_3, alpha = 1: the coefficients of Gonzalez et al. 2023."""
    r1, r2 = 1 / 3, 2 / 3
    stages = [
        lambda h, a: -expm1(-r1 * h) * a,
        lambda h, a, b: -expm1(-r2 * h) * a + r2 / r1 * (expm1(-r2 * h) / (r2 * h) + 1) * (b - a),
        lambda h, a, b, c: -expm1(-h) * a + 1 / r2 * (expm1(-h) / h + 1) * (c - a),
    ]
    return _seeds(D, y, levels, noise, eta, s_noise, [0.0, r1, r2], stages)


def deis(D, y, levels, noise=(), order=3):
    """diffusers' DEISMultistepScheduler (log-rho), lower_order_final, with a last step to 0 of first order."""
    n, eps = len(levels) - 1, []
    for i in range(n):
        r, r_next = levels[i], levels[i + 1]
        eps.append((y - D(y, r)) / r)
        k = 1 if r_next == 0 else min(order, i + 1, n - i)
        if k == 1:
            y = y + (r_next - r) * eps[-1]
        elif k == 2:

            def line(t, b, c):
                return t * (-log(c) + log(t) - 1) / (log(b) - log(c))

            q = levels[i - 1]
            y = y + (line(r_next, r, q) - line(r, r, q)) * eps[-1] + (line(r_next, q, r) - line(r, q, r)) * eps[-2]
        else:

            def parabola(t, b, c, d):
                top = t * (log(c) * (log(d) - log(t) + 1) - log(d) * log(t) + log(d) + log(t) ** 2 - 2 * log(t) + 2)
                return top / ((log(b) - log(c)) * (log(b) - log(d)))

            nodes = [r, levels[i - 1], levels[i - 2]]
            for j in range(3):
                b, c, d = nodes[j], nodes[j - 1], nodes[j - 2]
                y = y + (parabola(r_next, b, c, d) - parabola(r, b, c, d)) * eps[-1 - j]
    return y


def dpm_solver(D, y, levels, noise=(), order=2, variant="midpoint"):
    """diffusers' DPMSolverMultistepScheduler, algorithm "dpmsolver"."""
    eps, lam = [], [-log(r) if r > 0 else inf for r in levels]
    for i in range(len(levels) - 1):
        r, r_next = levels[i], levels[i + 1]
        eps.append((y - D(y, r)) / r)
        k = 1 if r_next == 0 else min(order, i + 1)
        if r_next == 0:
            y = y - r * eps[-1]
            continue
        h = lam[i + 1] - lam[i]
        y = y - r_next * expm1(h) * eps[-1]
        if k == 2:
            d1 = (eps[-1] - eps[-2]) / ((lam[i] - lam[i - 1]) / h)
            y = y - r_next * (0.5 * expm1(h) if variant == "midpoint" else expm1(h) / h - 1) * d1
        elif k == 3:
            r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
            d1_0, d1_1 = (eps[-1] - eps[-2]) / r0, (eps[-2] - eps[-3]) / r1
            d1, d2 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1), (d1_0 - d1_1) / (r0 + r1)
            y = y - r_next * (expm1(h) / h - 1) * d1 - r_next * ((expm1(h) - h) / h**2 - 0.5) * d2
    return y


def ipndm(D, y, levels, noise=(), order=4):
    """ComfyUI's sample_ipndm."""
    old = []
    for i, (r, r_next) in enumerate(pairwise(levels)):
        slope = (y - D(y, r)) / r
        k = min(order, i + 1)
        mix = [
            lambda a: a,
            lambda a, b: (3 * a - b) / 2,
            lambda a, b, c: (23 * a - 16 * b + 5 * c) / 12,
            lambda a, b, c, d: (55 * a - 59 * b + 37 * c - 9 * d) / 24,
        ][k - 1]
        y = y + (r_next - r) * mix(slope, *old[:-k:-1] if k > 1 else [])
        old.append(slope)
    return y


def pndm(D, y, levels, noise=()):
    """Pseudo linear multistep (Liu et al. 2022), started as in latent diffusion's PLMS sampler."""
    e = []
    for r, r_next in pairwise(levels):
        e.insert(0, (y - D(y, r)) / r)
        if len(e) == 1:
            y_2 = y + (r_next - r) * e[0]
            both = (e[0] + (y_2 - D(y_2, r_next)) / r_next) / 2
        elif len(e) == 2:
            both = (3 * e[0] - e[1]) / 2
        elif len(e) == 3:
            both = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            both = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        y = y + (r_next - r) * both
    return y


def gradient_estimation(D, y, levels, noise=(), gamma=2.0):
    """Permenter and Yuan 2024."""
    old = None
    for r, r_next in pairwise(levels):
        slope = (y - D(y, r)) / r
        bar = slope if old is None or r_next == 0 else gamma * slope + (1 - gamma) * old
        y, old = y + bar * (r_next - r), slope
    return y


def res_multistep(D, y, levels, noise=(), eta=0.0, s_noise=1.0):
    """ComfyUI's sample_res_multistep."""
    noise = list(noise)
    old = old_down = None
    for i, (r, r_next) in enumerate(pairwise(levels)):
        d = D(y, r)
        down, up = _ancestral(r, r_next, eta)
        if down == 0 or old is None:
            y = y + (y - d) / r * (down - r)
        else:
            h = log(r) - log(down)
            c2 = (log(old_down) - log(levels[i - 1])) / h
            phi1 = expm1(-h) / -h
            phi2 = (phi1 - 1) / -h
            y = exp(-h) * y + h * ((phi1 - phi2 / c2) * d + phi2 / c2 * old)
        if r_next > 0 and up:
            y = y + noise.pop(0) * s_noise * up
        old, old_down = d, down
    return y


def er_sde(D, y, levels, noise, order=3, s_noise=1.0):
    """ComfyUI's sample_er_sde, alpha = 1."""
    noise = list(noise)

    def scaler(x):
        return x * (np.exp(x**0.3) + 10.0)

    old = old_d = None
    for i, (r, r_next) in enumerate(pairwise(levels)):
        d = D(y, r)
        if r_next == 0:
            y = d
            continue
        ratio = scaler(r_next) / scaler(r)
        y = ratio * y + (1 - ratio) * d
        stage, dt = min(order, i + 1), r_next - r
        step = -dt / 200
        places = r_next + np.arange(200) * step
        if stage >= 2:
            d_d = (d - old) / (r - levels[i - 1])
            y = y + (dt + np.sum(1 / scaler(places)) * step * scaler(r_next)) * d_d
            if stage >= 3:
                d_u = (d_d - old_d) / ((r - levels[i - 2]) / 2)
                y = y + (dt**2 / 2 + np.sum((places - r) / scaler(places)) * step * scaler(r_next)) * d_u
            old_d = d_d
        y = y + noise.pop(0) * s_noise * sqrt(r_next**2 - r**2 * ratio**2)
        old = d
    return y


def sa_solver(D, y, levels, noise, predictor_order=2, corrector_order=2, tau=1.0, s_noise=1.0):
    """Xue et al. 2023, algorithm 1: y' = e^{-tau^2 h} r'/r y + the integral of the interpolated d + noise, predicted and corrected."""
    noise, lam = list(noise), [-log(r) if r > 0 else inf for r in levels]
    points, gauss = np.polynomial.legendre.leggauss(48)
    models, n, predicted, xi = [], len(levels) - 1, y, 0.0

    def step(i, y, used, xi):
        h = lam[i + 1] - lam[i]
        at = lam[i] + h * (points + 1) / 2
        weight = gauss * h / 2 * (1 + tau**2) * np.exp(-(1 + tau**2) * (lam[i + 1] - at))
        out = levels[i + 1] / levels[i] * exp(-(tau**2) * h) * y + levels[i + 1] * sqrt(-expm1(-2 * tau**2 * h)) * s_noise * xi
        for j in used:
            basis = np.prod([(at - lam[k]) / (lam[j] - lam[k]) for k in used if k != j], axis=0)
            out = out + np.sum(weight * basis) * models[j]
        return out

    for i in range(n):
        models.append(D(predicted, levels[i]))
        if i > 0:
            y = step(i - 1, y, [i, *range(max(i - corrector_order, 0), i)], xi) if corrector_order else predicted
        if levels[i + 1] == 0:
            return models[i]
        xi = noise.pop(0) if tau else 0.0
        predicted = step(i, y, range(max(i - predictor_order + 1, 0), i + 1), xi)
    return predicted
