"""What is learned from calibration data, written into a bundle that exists.

``samples`` reads the data, ``record`` says what one sample shows, ``runner`` and ``ray_runner`` run them, ``journal``
keeps records until the end, ``statistics`` and ``buckets`` make of them what the manifest's ``calibration`` holds;
``calibration.calibrate`` is the whole way.
"""
