"""Synthetic anomalies on healthy images, in pure JAX.
An image, a partner and a random key give an altered image and its exact mask."""
