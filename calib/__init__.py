"""What is learned from a user's pictures and questions.

Calibration fills a bundle that exists: how many visual tokens each site retains (which gives optimization profiles
their shapes), scales for quantized weights and activations. One file per kind; each takes a bundle and data and fills
the manifest's ``calibration``. Fitting (:mod:`edgeprune.calib.fit`) trains: it takes a checkpoint and data and writes a
checkpoint with the learned weights of its pruning.
"""
