"""Progressive resolution: the first, noisy steps on a smaller latent, on the path of the full one."""
