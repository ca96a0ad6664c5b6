"""The streams of random numbers: one number for each purpose, so that no two of them ever share a draw (docs/noise.md).

Every random number is a function of (seed of the sample, stream, draw, element). Whoever uses a stream numbers its draws; the table says
how. A published number never changes its meaning.
"""

SAMPLING = 0  # noise of samplers and latents of generators: draw 0 is the initial latent, later ones are numbered by the solver's plan
TIMES = 1  # diffusion times, and the share of real samples where a gradient penalty lies between real and generated ones
NOISE = 2  # what is added to training samples, and the direction of path lengths
MODEL_NOISE = 3  # latents of training, and what networks draw themselves (genfast/models/stylegan2.py numbers those draws)
LABELS = 4  # whether a label is dropped, and tokens
ORDER = 5  # the order of the data, draw = epoch, and its augmentation
BROWNIAN = 6  # Brownian paths: draw = node of the tree (genfast/samplers/brownian.py)

# The seed of sample number n of a run is the run's seed * RUN + n: training takes the numbers from 0 on, validation those from VALIDATION.
RUN = 2**40
VALIDATION = 2**39
MOST_SEED = 2**23 - 1  # the largest seed of a run, so that those of its samples stay below 2**63
