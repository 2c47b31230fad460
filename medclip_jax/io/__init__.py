"""Readers and writers of image files: DICOM, NIfTI, PNG, JPEG, BMP and TIFF.
Every reader returns grey pixels in [0, 1]; every file is untrusted, and this package has no JAX."""
