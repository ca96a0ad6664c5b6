"""Solvers in the coordinates of a flow, x = (1 - t) x_0 + t n: with ``v(x, t)`` or the denoised ``d(x, t)``, and ``times``."""

from __future__ import annotations

from itertools import pairwise
from math import exp, log, sqrt


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


def _rf_levels(t, t_next, eta):
    """ComfyUI's downstep in t, and the noise that leads back."""
    t_down = t_next * (1 + (t_next / t - 1) * eta)
    keep = (1 - t_next) / (1 - t_down)
    return t_down, keep, sqrt(max(t_next**2 - t_down**2 * keep**2, 0.0))


def euler_ancestral_rf(d, x, times, noise, eta=1.0, s_noise=1.0):
    """x = (1 - t) x_0 + t n; d(x, t) the denoised prediction."""
    noise = list(noise)
    for t, t_next in pairwise(times):
        if t_next == 0:
            return d(x, t)
        t_down, keep, up = _rf_levels(t, t_next, eta)
        x = keep * (t_down / t * x + (1 - t_down / t) * d(x, t)) + (noise.pop(0) * s_noise * up if eta else 0)
    return x


def dpm2_ancestral_rf(d, x, times, noise, eta=1.0, s_noise=1.0):
    noise = list(noise)
    for t, t_next in pairwise(times):
        slope = (x - d(x, t)) / t
        if t_next == 0:
            return x - t * slope
        t_down, keep, up = _rf_levels(t, t_next, eta)
        t_mid = exp((log(t) + log(t_down)) / 2)
        x_mid = x + slope * (t_mid - t)
        x = keep * (x + (x_mid - d(x_mid, t_mid)) / t_mid * (t_down - t)) + (noise.pop(0) * s_noise * up if eta else 0)
    return x


def dpmpp_2s_ancestral_rf(d, x, times, noise, eta=1.0, s_noise=1.0):
    noise = list(noise)
    for t, t_next in pairwise(times):
        if t_next == 0:
            return d(x, t)
        t_down, keep, up = _rf_levels(t, t_next, eta)
        lam, lam_down = log((1 - t) / t), log((1 - t_down) / t_down)
        t_s = 1 / (exp((lam + lam_down) / 2) + 1)
        u = t_s / t * x + (1 - t_s / t) * d(x, t)
        x = keep * (t_down / t * x + (1 - t_down / t) * d(u, t_s)) + (noise.pop(0) * s_noise * up if eta else 0)
    return x


def flow_midpoint(v, x, times):
    for t, t_next in pairwise(times):
        mid = (t + t_next) / 2
        x = x + (t_next - t) * v(x + (mid - t) * v(x, t), mid)
    return x
