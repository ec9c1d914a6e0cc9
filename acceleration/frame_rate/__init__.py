"""Dynamic frame rate: fewer latent frames where a video is calm (DLFR-VAE, VGDFR)."""
