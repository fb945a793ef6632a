"""What is learned from a user's pictures and questions.

Calibration fills a bundle that exists: ``samples`` reads the data, ``record`` says what one sample shows, ``runner``
and ``ray_runner`` run them, ``journal`` keeps records until the end, ``statistics`` and ``buckets`` make of them what
the manifest's ``calibration`` holds; ``calibration.calibrate`` is the whole way.

``quantize.quantize`` makes a quantized bundle on the same data: ``recorded_inputs`` holds what graphs were given,
``weight_products`` finds what may be quantized, ``graph_quantizer`` and ``float8`` do it, ``agreement`` compares.

Fitting takes a checkpoint and writes one with learned pruning: ``training_data`` embeds samples, ``atp_trainer`` and
``dyrate_trainer`` bring the methods, ``training`` is the loop over ``processes``, ``training_state`` what it goes on
from, ``fitted_checkpoint`` what it leaves; ``fit.fit`` is the whole way.
"""
