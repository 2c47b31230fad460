"""report.html and its figures, from the files of a workdir alone: no model, no data set, no JAX.

The page is self-contained; the same files give the same bytes.
"""
