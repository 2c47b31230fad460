"""The test set becomes scores, maps, metrics and intervals: evaluate.py is read first.

Labels and masks are read after scoring; memory stays bounded for any number of images.
"""
