"""What is learned from calibration data.

``samples`` reads the data, ``record`` says what one sample shows, ``runner`` and ``ray_runner`` run them, ``journal``
keeps records until the end, ``statistics`` and ``buckets`` make of them what the manifest's ``calibration`` holds;
``calibration.calibrate`` is the whole way.

``quantize.quantize`` makes a quantized bundle on the same data: ``recorded_inputs`` holds what graphs were given,
``weight_products`` finds what may be quantized, ``graph_quantizer`` and ``float8`` do it, ``agreement`` compares.
"""
