"""What is learned from calibration data, written into a bundle that exists.

Here belong the steps between export and an engine that need example pictures and questions but no training: how many
visual tokens each site retains (which gives optimization profiles their shapes), scales for quantized weights and
activations, and thresholds or rates that reach a wanted number of tokens. One file per kind of calibration; each takes
a bundle and data and fills the manifest's ``calibration``. There is no code yet.
"""
