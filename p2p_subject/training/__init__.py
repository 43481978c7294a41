"""Pre-training of BLIP-Diffusion in two stages, and the miniature world that the shipped model is trained on."""
