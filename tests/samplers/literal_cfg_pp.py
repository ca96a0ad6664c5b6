"""ComfyUI's CFG++ loops, as `literal` has the others, with the guided denoiser ``D`` and the unconditional ``U``."""

from __future__ import annotations

from itertools import pairwise
from math import exp, expm1, log, sqrt

from literal import _ancestral


def euler_ancestral_cfg_pp(D, U, y, levels, noise, eta=1.0, s_noise=1.0):
    noise = list(noise)
    for r, r_next in pairwise(levels):
        down, up = _ancestral(r, r_next, eta)
        y = D(y, r) + down * (y - U(y, r)) / r
        if r_next > 0 and eta > 0:
            y = y + up * s_noise * noise.pop(0)
    return y


def euler_cfg_pp(D, U, y, levels, noise):
    return euler_ancestral_cfg_pp(D, U, y, levels, noise, eta=0.0)


def dpmpp_2m_cfg_pp(D, U, y, levels, noise):
    u_old = None
    for i, (r, r_next) in enumerate(pairwise(levels)):
        d, u = D(y, r), U(y, r)
        decay = r_next / r
        mix = -decay * u
        if u_old is not None and r_next > 0:
            ratio = log(levels[i - 1] / r) / log(r / r_next)
            mix = mix + (1 - decay) / (2 * ratio) * (d - u_old)
        y, u_old = d + mix + decay * y, u
    return y


def dpmpp_2s_ancestral_cfg_pp(D, U, y, levels, noise, eta=1.0, s_noise=1.0):
    noise = list(noise)
    for r, r_next in pairwise(levels):
        move, u = D(y, r) - U(y, r), U(y, r)
        down, up = _ancestral(r, r_next, eta)
        if down == 0:
            y = u
        else:
            mid = sqrt(r * down)
            y_mid = mid / r * y + (1 - mid / r) * u
            y = down / r * y + (1 - down / r) * U(y_mid, mid)
        if r_next > 0 and eta > 0:
            y = y + up * s_noise * noise.pop(0)
        y = y + move
    return y


def res_multistep_cfg_pp(D, U, y, levels, noise, eta=0.0, s_noise=1.0):
    noise, down_old, u_old = list(noise), None, None
    for i, (r, r_next) in enumerate(pairwise(levels)):
        d, u = D(y, r), U(y, r)
        down, up = _ancestral(r, r_next, eta)
        if down == 0 or u_old is None:
            y = d + down * (y - u) / r
        else:
            h = log(r / down)
            c2 = log(down_old / levels[i - 1]) / h
            phi1 = expm1(-h) / -h
            phi2 = (phi1 - 1) / -h
            y = exp(-h) * (y + d - u) + h * ((phi1 - phi2 / c2) * u + phi2 / c2 * u_old)
        if r_next > 0 and eta > 0:
            y = y + up * s_noise * noise.pop(0)
        u_old, down_old = u, down
    return y


def gradient_estimation_cfg_pp(D, U, y, levels, noise, gamma=2.0):
    old = None
    for r, r_next in pairwise(levels):
        d, slope = D(y, r), (y - U(y, r)) / r
        y = d if r_next == 0 else d + slope * r_next + (0 if old is None else (gamma - 1) * (slope - old) * (r_next - r))
        old = slope
    return y
