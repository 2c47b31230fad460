"""What a trained workdir is used for: predicting images, adapting to a site, exporting.

It works on a `predictor.Predictor`, which build_detector.load_predictor makes, and never on a
config.
"""
